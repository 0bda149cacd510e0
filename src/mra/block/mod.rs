//! The block form: queries of a block share their pooled logits and a head shares a budget (docs/definitions.md, section 3).

mod backward;
mod bias_gradient;
mod coarse;
mod coarse_backward;
mod first_order;
mod first_order_backward;
mod first_order_gradients;
mod forward;
mod levels;
mod levels_backward;
mod summaries;

pub(crate) use backward::backward;
pub(crate) use bias_gradient::{BiasBuffers, BiasPass};
pub(crate) use coarse_backward::one_pass;
pub(crate) use forward::{forward, forward_selecting};
pub(crate) use levels::{read_plans, select};
