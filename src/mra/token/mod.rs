//! The token form: every token chooses for itself among the blocks that it sees, and nothing that it does not see has a say
//! (docs/definitions.md, section 4).
//!
//! ```text
//! pool     kh_j, vh_j = means of the blocks of every level                               mra::pyramid
//! for each range of queries of a head:                                                  forward
//!     for each tile of queries:                                                          coarse, mra::select
//!         c_tj = scale <q_t, kh_j>              one row for each open block, one lane for each query
//!         plan_t = forced blocks, and those with the largest c_tj, or the largest         rank, key_codes, members
//!                  estimate of the logit of a member; cut ones are exact without it
//!         state_t = softmax over the c_tj of all other open blocks, + ln count_j         full mode
//!     for each level of smaller blocks, if there are several:                             refine
//!         sort the blocks that queries have refined above by block                       queries_of_block
//!         for each of them, ascending, for the queries that refine it:                   key_block
//!             the same with its children: plan_t, and state_t continues
//!     sort the exact blocks of all queries by block
//!     for each block j, ascending, for the queries that compute it:                       exact, key_block
//!         state_t continues over the keys of j that t sees                               visible_keys
//!     out_t, lse_t = state_t
//! backward                                                backward, pieces, backward_range, gradient
//! ```
//!
//! - No query is pooled, so the work is that of each token's own choice; sorting by blocks makes it dense products again. The
//!   rows of queries and sums are gathered and scattered by the kernels themselves.
//! - A token's sums are in one order: pooled blocks of the coarsest level in steps from block 0 on, those of each level below ascending,
//!   then exact blocks ascending. What other queries do in the same tile adds terms of weight 0, which change no bit. Only a weight 0 times
//!   a NaN or an infinity would: where rows that some query of a tile must not see hold one, products leave out factors of 0.
//!   So neither hidden tokens nor the other queries of a call have a say in the bits of a row.
//! - Tried without gain: ranges that fit into the second-level cache (fewer queries share each block, and its keys and values are
//!   read more often).

mod backward;
mod backward_range;
mod bias_gradient;
mod coarse;
mod exact;
mod forward;
mod gradient;
mod key_block;
mod key_codes;
mod levels;
mod members;
mod pieces;
mod queries_of_block;
mod query_tile;
mod rank;
mod refine;
mod scaled;
mod tmul_exact;
mod tmul_gradient;
mod tmul_keys;
mod visible_keys;

pub(crate) use backward::{Pass, backward};
pub(crate) use backward_range::Scratch;
pub(crate) use forward::{Outputs, PlanBytes, forward, select};
