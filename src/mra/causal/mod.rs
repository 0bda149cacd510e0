//! The causal form.

mod backward;
mod coarse;
mod exact;
mod forward;
mod gradient;
mod lists;
mod pooled;
mod problem;
mod select;

pub use backward::causal_backward;
pub use forward::{causal_forward, causal_forward_selecting};
pub use pooled::{PooledInputs, pool};
pub use problem::{CausalBudget, CausalOptions, CausalProblem};
