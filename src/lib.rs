//! Multi-resolution (MRA) attention: the few important blocks of the attention matrix exactly, the rest from pooled
//! queries, keys and values ("Multi Resolution Analysis (MRA) for Approximate Self-Attention", arXiv 2207.10284).
//!
//! ```text
//! pool      qh_i, kh_j, vh_j = means over the valid tokens of each block            mra::pyramid
//! select    c_ij = scale <qh_i, kh_j>; the blocks nearest to their row's best        mra::select, mra::plan
//! forward   for each query block i:
//!               softmax over the pooled keys of unselected blocks, weighted by count  mra::coarse
//!               continued over the keys of selected blocks, query by query            mra::forward
//! backward  weights recomputed from the log-sum-exp, block by block                   mra::backward
//! causal    the same for each token by itself: its own choice among past blocks        mra::causal
//! ```
//!
//! Layers point one way: `simd <- kernels <- mra <- {python, tch}`. `simd` has the vector operations of each instruction set,
//! `kernels` the computations on one tile, `mra` the algorithm, `threads` and `tiles` how tasks and outputs are spread over
//! cores, `reference` the formulas in float64, written to be read. The definitions: docs/definitions.md.

#[doc(hidden)]
pub mod bench;
mod error;
mod kernels;
mod mra;
pub mod reference;
mod simd;
mod tensor;
mod threads;
mod tiles;

#[cfg(feature = "python")]
mod python;
#[cfg(feature = "tch")]
pub mod tch;

pub use error::{Error, Result};
pub use mra::{
    Bias, BiasData, Budget, CausalBudget, CausalOptions, CausalProblem, Gradients, Inputs, Mask, Mode, Options, Plan,
    PooledInputs, Problem, Saved, append, backward, causal_backward, causal_forward, causal_forward_selecting, forward,
    forward_selecting, select_blocks,
};
pub use simd::{Element, Level, Scalar};
pub use tensor::Tensor;
pub use tiles::TensorMut;
