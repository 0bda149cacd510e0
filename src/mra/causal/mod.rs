//! The causal form: every token sees the keys up to its own position, and nothing else (docs/definitions.md, section 3).
//!
//! ```text
//! pool     kh_j, vh_j = means of the blocks that some query sees as past ones             pooled
//! for each range of queries of a head:                                                  forward
//!     for each tile of queries:                                                          coarse, select
//!         c_tj = scale <q_t, kh_j>              one row for each past block, one lane for each query
//!         plan_t = local and first blocks, and those with the largest c_tj
//!         state_t = softmax over the c_tj that are not in plan_t, + ln count_j            full mode
//!     sort the plans by block                                                            lists
//!     for each block j, ascending, for the queries that have it in their plan:            exact
//!         state_t continues over the keys of j, for queries of block j up to their own
//!     out_t, lse_t = state_t
//! backward                                                backward, backward_range, gradient
//! ```
//!
//! - No query is pooled, so the work is that of each token's own choice; sorting by blocks makes it dense products again. The
//!   rows of queries and sums are gathered and scattered by the kernels themselves.
//! - A token's sums are in one order: pooled blocks in strips from block 0 on, then exact blocks ascending. What other queries
//!   do in the same tile adds terms of weight 0, which change no bit. Only a weight 0 times a NaN or an infinity would: where
//!   rows that some query of a tile must not see hold one, the tile is split until all of its queries see the same rows.
//!   So neither later tokens nor the queries of a call have a say in the bits of a row.
//! - Tried without gain: ranges that fit into the second-level cache (fewer queries meet each block, and its keys and values are
//!   read more often).

mod append;
mod backward;
mod backward_range;
mod coarse;
mod exact;
mod forward;
mod gradient;
mod lists;
mod meeting;
mod pooled;
mod problem;
mod select;

pub use append::append;
pub use backward::causal_backward;
pub use forward::{causal_forward, causal_forward_selecting};
pub use pooled::PooledInputs;
pub use problem::{CausalBudget, CausalOptions, CausalProblem};
