//! What a call depends on besides its tensors.

use super::budget::Budget;
use super::mask::{Bias, Mask};
use super::sight::Window;
use crate::simd::Level;

/// Which terms the softmax has (docs/definitions.md, section 3.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Selected blocks exactly, all others by their pooled logit and value: MRA-2.
    Full,
    /// Selected blocks only: MRA-2-s.
    Sparse,
}

/// What stands for the blocks that are not exact in the block form (docs/definitions.md, sections 3.6 and 3.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coarse {
    /// The means of the keys and of the values: the term of the paper.
    Mean,
    /// The first-order expansion of the block's softmax around the mean query. The token form has the means in any case.
    FirstOrder,
}

/// What the blocks are ranked by that a token chooses from (docs/definitions.md, section 4). The block form has the mean alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Score {
    /// The logit of the mean of the keys.
    #[default]
    Mean,
    /// Among the best by that logit, an estimate of the largest logit of a member: a key or, above the finest blocks, the mean of a block
    /// of the next level (sections 4.1 and 5).
    Max,
}

/// How the tokens of the tensors are cut into sequences.
#[derive(Debug, Clone, Copy)]
pub enum Layout<'a> {
    /// A batch item is a sequence.
    Dense {
        /// The position of the first query of each batch item, or one number for all of them; keys count from 0. A query at a
        /// negative position is before the first key.
        offsets: &'a [i64],
        /// How many keys each batch item has; those behind are never read. `None`: all.
        key_lengths: Option<&'a [usize]>,
    },
    /// Several sequences lie one behind the other in tensors whose batch size is 1.
    Packed {
        /// Boundaries of the queries, from 0 to their number.
        queries: &'a [usize],
        /// Boundaries of the keys, as many.
        keys: &'a [usize],
        /// Whether the last query of a sequence has the position of its last key, rather than the first that of the first.
        lower_right: bool,
    },
}

/// A level above the finest blocks (docs/definitions.md, section 5): which of its blocks are refined is chosen first.
#[derive(Debug, Clone, PartialEq)]
pub struct CoarserLevel {
    /// Tokens per block: at least 2 and at most [`Problem::MAX_BLOCK`](super::Problem::MAX_BLOCK) blocks of the next level.
    pub block_size: usize,
    /// Refined blocks per query block of this size (block form, on average) or per token (token form): one number for all heads, or one
    /// for each. Positive; infinite is every block.
    pub blocks_per_row: Vec<f64>,
}

/// What does not follow from the tensors.
#[derive(Debug, Clone)]
pub struct Options<'a> {
    /// Tokens per block, 1 to [`Problem::MAX_BLOCK`](super::Problem::MAX_BLOCK); of the finest blocks where there are several levels.
    pub block_size: usize,
    /// The levels above, the coarsest one first; none for two resolutions.
    pub coarser: Vec<CoarserLevel>,
    /// The factor of the logits; `None` is `1 / sqrt(D)`.
    pub scale: Option<f64>,
    /// Which terms the softmax has.
    pub mode: Mode,
    /// What stands for blocks that are not exact in the block form.
    pub coarse: Coarse,
    /// What is added to the logit of a block that is not exact.
    pub coarse_shift: f64,
    /// What a token ranks blocks by.
    pub score: Score,
    /// Whether queries are averaged where nothing is hidden (block form), rather than each token choosing for itself (token form).
    pub pool_queries: bool,
    /// Which keys a token sees by their position.
    pub window: Window,
    /// How the tensors are cut into sequences.
    pub layout: Layout<'a>,
    /// Valid keys.
    pub key_mask: Option<Mask<'a>>,
    /// Valid queries; outputs and gradients of the others are 0.
    pub query_mask: Option<Mask<'a>>,
    /// Which pairs of a query and a key count, or what is added to their logits.
    pub bias: Option<Bias<'a>>,
    /// The bound of the logits: `x` becomes `softcap tanh(x / softcap)` before biases are added; `None` is no bound.
    pub softcap: Option<f64>,
    /// For each head of each batch item, `(B, H)`, the slope of a bias of minus the slope times the distance of query and key.
    pub alibi_slopes: Option<&'a [f64]>,
    /// For each head of each batch item, `(B, H)`, a logit that counts in the denominators alone.
    pub sinks: Option<&'a [f64]>,
    /// How many blocks are exact.
    pub budget: Budget,
    /// The probability with which a weight is dropped, 0 to 1; 0 is no dropout.
    pub dropout: f64,
    /// Decides, with the place of a weight, whether it is dropped; the same for forward and backward.
    pub seed: u64,
    /// Threads to compute on, at least 1. The result does not depend on it.
    pub threads: usize,
    /// The instruction set. Results of different levels differ by rounding.
    pub level: Level,
}

impl Options<'_> {
    /// Blocks of 32 tokens, 4 exact ones per row, nothing hidden, one thread.
    pub fn new(level: Level) -> Self {
        Self {
            block_size: 32,
            coarser: Vec::new(),
            scale: None,
            mode: Mode::Full,
            coarse: Coarse::Mean,
            coarse_shift: 0.0,
            score: Score::Mean,
            pool_queries: true,
            window: Window::default(),
            layout: Layout::Dense { offsets: &[0], key_lengths: None },
            key_mask: None,
            query_mask: None,
            bias: None,
            softcap: None,
            alibi_slopes: None,
            sinks: None,
            budget: Budget::default(),
            dropout: 0.0,
            seed: 0,
            threads: 1,
            level,
        }
    }
}
