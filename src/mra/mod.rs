//! The algorithm: what is pooled, what is selected, and how the two levels are summed. Plain Rust over the kernels.

mod attend;
mod backward;
mod bf16;
mod bias;
mod bias_tile;
mod blocks;
mod budget;
mod causal;
mod coarse;
mod coarse_backward;
mod dropped;
mod finite;
mod forward;
mod gradient_tile;
mod plan;
mod problem;
mod pyramid;
mod scores;
mod scratch;
mod select;
mod strip;
mod tile;

pub use backward::{Gradients, Saved, backward};
pub use bias::{Bias, BiasData};
pub use budget::Budget;
pub use causal::{
    CausalBudget, CausalOptions, CausalProblem, PooledInputs, append, causal_backward, causal_forward, causal_forward_selecting,
};
pub use forward::{Inputs, forward, forward_selecting};
pub use plan::Plan;
pub use problem::{Mask, Mode, Options, Problem};
pub(crate) use scratch::Buffer;
pub use select::select_blocks;
