//! Tests of the crate through its public interface, against the formulas of `mra_attention::reference`.
//!
//! Every test runs at every instruction set that the CPU has ([`support::levels`]). `MRA_ATTENTION_REQUIRE_ISA=avx2,avx512` in
//! the environment makes it a failure that one of these is missing. `PROPTEST_CASES` sets the number of random cases.

#![allow(clippy::needless_pass_by_value, reason = "views are passed by value")]
#![allow(clippy::float_cmp, reason = "what must be equal to the bit is compared so")]

mod append;
mod bias_gradient;
mod dropout;
mod errors;
mod extremes;
mod forms;
mod grid;
#[cfg(target_arch = "x86_64")]
mod instructions;
mod ladder_block;
mod ladder_token;
mod layouts;
mod packed;
mod padding;
mod random;
mod reference;
mod selection;
mod sinks;
mod some_queries;
mod support;
mod threads;
mod tiny;
mod visibility;
