//! Positions, and what a token at a position sees.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::mra::problem::{Mode, Options, Problem};
use crate::simd::Level;

/// What does not follow from the tensors.
#[derive(Debug, Clone, Copy)]
pub struct CausalOptions<'a> {
    /// Tokens per block, 1 to [`Problem::MAX_BLOCK`].
    pub block_size: usize,
    /// The factor of the logits; `None` is `1 / sqrt(D)`.
    pub scale: Option<f64>,
    /// Which terms the softmax has.
    pub mode: Mode,
    /// The position of the first query, for each batch item, or one number for all of them. Keys start at position 0. A query
    /// at a negative position sees nothing.
    pub offsets: &'a [i64],
    /// How many keys each batch item has; those behind are never read. `None`: all.
    pub key_lengths: Option<&'a [usize]>,
    /// The probability with which a weight is dropped, 0 to 1; 0 is no dropout.
    pub dropout: f64,
    /// Decides, with the place of a weight, whether it is dropped; the same for forward and backward.
    pub seed: u64,
    /// Threads to compute on, at least 1. The result does not depend on it.
    pub threads: usize,
    /// The instruction set. Results of different levels differ by rounding.
    pub level: Level,
}

/// How many blocks each token sees exactly, and which ones in any case.
#[derive(Debug, Clone, Copy)]
pub struct CausalBudget {
    /// Exact blocks of a token, those below included.
    pub blocks: usize,
    /// The token's own block and the ones before it are exact in any case, so many in all; at least 1.
    pub local_blocks: usize,
    /// The first so many blocks of the sequence are exact in any case.
    pub first_blocks: usize,
}

impl CausalBudget {
    /// Checks the numbers.
    ///
    /// # Errors
    /// If one cannot be meant; the message names it.
    pub fn validate(&self) -> Result<()> {
        if self.local_blocks == 0 {
            return Err(Error::new("local_blocks: 0, expected at least 1: a token's own block is never pooled"));
        }
        Ok(())
    }
}

/// One validated call of the causal form.
#[derive(Debug)]
pub struct CausalProblem {
    pub(crate) inner: Problem<'static>,
    offsets: Vec<i64>,
}

impl CausalProblem {
    /// Checks the shapes (batch, head, token, channel) of query and key.
    ///
    /// # Errors
    /// If they do not fit each other or the options; the message names what is wrong.
    pub fn new(query: [usize; 4], key: [usize; 4], options: &CausalOptions<'_>) -> Result<Self> {
        let batch = query[0];
        if options.offsets.len() != 1 && options.offsets.len() != batch {
            return Err(Error::new(format!("offsets: {} numbers, expected 1 or {batch}", options.offsets.len())));
        }
        let inner_options = Options {
            block_size: options.block_size,
            scale: options.scale,
            mode: options.mode,
            key_mask: None,
            query_mask: None,
            bias: None,
            dropout: options.dropout,
            seed: options.seed,
            threads: options.threads,
            level: options.level,
        };
        let mut inner = Problem::new(query, key, &inner_options)?;
        if let Some(lengths) = options.key_lengths {
            if lengths.len() != batch {
                return Err(Error::new(format!("key_lengths: {} numbers, expected {batch}", lengths.len())));
            }
            if let Some(length) = lengths.iter().find(|&&length| length > key[2]) {
                return Err(Error::new(format!("key_lengths: {length}, expected at most the {} keys of key", key[2])));
            }
            inner.set_key_lengths(lengths);
        }
        Ok(Self { inner, offsets: options.offsets.to_vec() })
    }

    /// The most exact blocks of a token with this budget: the width of a plan that holds them all.
    pub fn plan_width(&self, budget: &CausalBudget) -> usize {
        self.inner.key_blocks().min(budget.blocks.max(budget.local_blocks.saturating_add(budget.first_blocks)))
    }

    /// The position of a query; negative before the first key.
    fn position(&self, batch: usize, token: usize) -> i64 {
        let offset = self.offsets[batch.min(self.offsets.len() - 1)];
        offset.saturating_add(i64::try_from(token).unwrap_or(i64::MAX))
    }

    /// What a query sees.
    pub(crate) fn sight(&self, batch: usize, token: usize) -> Sight {
        let Ok(position) = usize::try_from(self.position(batch, token)) else {
            return Sight::default();
        };
        let keys = self.inner.keys(batch);
        let (own, length) = (position / self.inner.block_size, keys.start(keys.len()));
        Sight {
            keys: length.min(position.saturating_add(1)),
            past: own.min(keys.len()),
            blocks: keys.len().min(own.saturating_add(1)),
            own,
        }
    }

    /// How many blocks are wholly visible to the last query of a batch item: no pooled block behind them is read.
    pub(crate) fn pooled_blocks(&self, batch: usize) -> usize {
        self.inner.query_len.checked_sub(1).map_or(0, |last| self.sight(batch, last).past)
    }

    /// Cuts queries at positions that are multiples of `size`. So a piece of as many queries as a block has, or fewer, lies in
    /// one block if the sizes divide each other.
    pub(crate) fn cut(&self, batch: usize, tokens: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
        let modulus = i64::try_from(size).expect("a size of a tile");
        let mut start = tokens.start;
        std::iter::from_fn(move || {
            (start < tokens.end).then(|| {
                let into = usize::try_from(self.position(batch, start).rem_euclid(modulus)).expect("less than the size");
                let piece = start..(start + size - into).min(tokens.end);
                start = piece.end;
                piece
            })
        })
    }
}

/// What one query sees.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sight {
    /// Visible keys: `0..keys`.
    pub(crate) keys: usize,
    /// Blocks before its own: `0..past`, wholly visible.
    pub(crate) past: usize,
    /// Blocks of which something is visible: `0..blocks`.
    pub(crate) blocks: usize,
    own: usize,
}

impl Sight {
    /// Blocks that are exact in any case: `0..first` and `local..self.blocks`. Between them lie past ones.
    pub(crate) fn forced(&self, budget: &CausalBudget) -> (usize, usize) {
        let local = self.blocks.min((self.own + 1).saturating_sub(budget.local_blocks));
        (budget.first_blocks.min(local), local)
    }

    /// The blocks among which the token chooses, and how many of them it may take.
    pub(crate) fn candidates(&self, budget: &CausalBudget) -> (Range<usize>, usize) {
        let (first, local) = self.forced(budget);
        let forced = first + self.blocks - local;
        (first..local, budget.blocks.saturating_sub(forced).min(local - first))
    }
}
