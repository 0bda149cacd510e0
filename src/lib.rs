//! Multi-resolution (MRA) attention: the few important blocks of the attention matrix exactly, the rest from pooled
//! queries, keys and values ("Multi Resolution Analysis (MRA) for Approximate Self-Attention", arXiv 2207.10284).
//!
//! ```text
//! problem   the sequences of a call; who sees whom: dead, cut and open blocks            mra::problem
//! pool      qh_i, kh_j, vh_j = means over the valid tokens of each block                 mra::pyramid
//!
//! block form, where nothing is hidden but padding:                                       mra::block
//! select    c_ij = scale <qh_i, kh_j>; the blocks nearest to their row's best            mra::select
//!           with blocks of several sizes: then among the smaller ones in these
//! forward   for each query block i:
//!               softmax over the pooled keys of unselected blocks, weighted by count
//!               continued over the keys of selected blocks, query by query
//! backward  weights recomputed from the log-sum-exp, block by block
//!
//! token form, for any mask: the same for each token by itself                            mra::token
//! ```
//!
//! Layers point one way: `simd <- kernels <- mra <- {python, tch}`. `simd` has the vector operations of each instruction set,
//! `kernels` the computations on one tile, `mra` the algorithm, `exec` how tasks and outputs are spread over cores, `reference`
//! the formulas in float64, written to be read. The definitions: docs/definitions.md.

#[doc(hidden)]
pub mod bench;
mod error;
mod exec;
mod kernels;
mod mra;
pub mod reference;
mod simd;
mod tensor;
#[cfg(test)]
mod test_support;

#[cfg(feature = "python")]
mod python;
#[cfg(feature = "tch")]
pub mod tch;

pub use error::{Error, Result};
pub use exec::TensorMut;
pub use mra::{
    Bias, BiasData, BiasGradient, Budget, Coarse, CoarserLevel, Gradients, Inputs, Layout, Mask, Mode, Options, PooledInputs,
    Problem, Saved, Score, Selection, Window, append, backward, forward, select,
};
pub use simd::{Element, Level, Scalar};
pub use tensor::Tensor;
