//! What the tests share: random cases, how they are computed, and how far results may be from the formulas.

mod bounds;
mod call;
mod case;
mod check;
mod levels;
mod number;
mod stored;

pub(crate) use bounds::{Bounds, flushed, largest};
pub(crate) use call::{
    Setup, attend, differentiate, differentiate_bias, exact_of, options, plan_of, select, with_options, with_problem,
};
pub(crate) use case::{CAUSAL, Case, Data, Padding, Pairs, budget};
pub(crate) use check::{Expected, Outcome, assert_close, assert_same_blocks, bits, check, check_all, compute, selected_by};
pub(crate) use levels::{levels, levels_for, levels_required, rounds_gradients, rounds_weights};
pub(crate) use number::{Number, Rounded};
pub(crate) use stored::{Layout, Stored};
