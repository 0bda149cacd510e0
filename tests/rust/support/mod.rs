//! What the tests share: random cases, how they are computed, and how far results may be from the formulas.

mod bounds;
mod case;
mod causal;
mod compute;
mod levels;
mod number;
mod stored;

pub(crate) use bounds::Bounds;
pub(crate) use case::{Case, Data, Padding, Pairs};
pub(crate) use causal::{
    CausalCase, CausalData, CausalExpected, CausalOutcome, bits, check_causal, compute_causal, select_causal,
};
pub(crate) use compute::{Expected, Outcome, Setup, check, compute, options, plan_bits, select, select_and_forward};
pub(crate) use levels::{levels, levels_for, levels_required, rounds_weights};
pub(crate) use number::{Number, Rounded};
pub(crate) use stored::{Layout, Stored};
