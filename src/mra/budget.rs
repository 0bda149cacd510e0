//! How many blocks are computed exactly, and which ones in any case.

use crate::error::{Error, Result};

/// The budget of exact blocks of each head (docs/definitions.md, section 2.3 and 2.4).
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    /// Exact blocks per live query block, on average. Positive and finite.
    pub blocks_per_row: f64,
    /// Exact blocks per head, in place of `blocks_per_row`. At least 1.
    pub num_blocks: Option<usize>,
    /// The first so many rows and columns of blocks are exact in any case.
    pub first_blocks: usize,
    /// Blocks at most half of this off the diagonal are exact in any case; 0 forces none.
    pub diagonal_blocks: usize,
}

impl Budget {
    /// Checks the numbers.
    ///
    /// # Errors
    /// If one cannot be meant; the message names it.
    pub fn validate(&self) -> Result<()> {
        if !(self.blocks_per_row > 0.0 && self.blocks_per_row.is_finite()) {
            return Err(Error::new(format!("blocks_per_row: {}, expected a positive finite number", self.blocks_per_row)));
        }
        if self.num_blocks == Some(0) {
            return Err(Error::new("num_blocks: 0, expected at least 1"));
        }
        Ok(())
    }

    /// The number of blocks for a head with so many live query blocks, before the bounds by forced and live blocks.
    pub(crate) fn blocks(&self, live_rows: usize) -> usize {
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "positive; a cast of a float saturates, and the bound by live blocks follows"
        )]
        self.num_blocks.unwrap_or_else(|| (self.blocks_per_row * live_rows as f64 + 0.5).floor() as usize)
    }

    /// Whether block `(i, j)` is forced whatever its score.
    pub(crate) fn forces(&self, i: usize, j: usize) -> bool {
        (self.diagonal_blocks > 0 && i.abs_diff(j) <= self.diagonal_blocks / 2) || i.min(j) < self.first_blocks
    }

    /// Whether any block is forced whatever its score.
    pub(crate) fn forces_any(&self) -> bool {
        self.diagonal_blocks > 0 || self.first_blocks > 0
    }
}
