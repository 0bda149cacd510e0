//! How many blocks are computed exactly, and which ones in any case.

use crate::error::{Error, Result};

/// The budget of exact blocks (docs/definitions.md, sections 3 and 4).
#[derive(Debug, Clone, PartialEq)]
pub struct Budget {
    /// Exact blocks per query block (block form, on average) or per token (token form): one number for all heads, or one for each.
    /// Positive; infinite is every block.
    pub blocks_per_row: Vec<f64>,
    /// Exact blocks per head, in place of `blocks_per_row`. At least 1.
    pub num_blocks: Option<usize>,
    /// The first so many rows and columns of blocks are exact in any case; in the token form the first so many blocks that a token
    /// sees. `None` is 0 in the block form and 1 in the token form.
    pub first_blocks: Option<usize>,
    /// Blocks at most half of this off the diagonal are exact in any case; 0 forces none.
    pub diagonal_blocks: usize,
    /// In the token form, blocks less than this away from the token's own are exact in any case; at least 1. In the block form a number
    /// above 1 does the same for blocks off the diagonal.
    pub local_blocks: usize,
}

impl Default for Budget {
    fn default() -> Self {
        Self { blocks_per_row: vec![4.0], num_blocks: None, first_blocks: None, diagonal_blocks: 0, local_blocks: 1 }
    }
}

/// The budget of each token of a head.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TokenBudget {
    /// Exact blocks of a token, cut and forced ones among them.
    pub(crate) blocks: usize,
    pub(crate) first_blocks: usize,
    pub(crate) local_blocks: usize,
}

/// More blocks than any sequence has.
const EVERY_BLOCK: usize = 1 << 31;

impl Budget {
    /// Checks the numbers.
    ///
    /// # Errors
    /// If one cannot be meant; the message names it.
    pub(crate) fn validate(&self, heads: usize) -> Result<()> {
        if let Some(number) = self.blocks_per_row.iter().find(|&&number| number.is_nan() || number <= 0.0) {
            return Err(Error::new(format!("blocks_per_row: {number}, expected a positive number")));
        }
        if self.blocks_per_row.len() != 1 && self.blocks_per_row.len() != heads {
            let count = self.blocks_per_row.len();
            return Err(Error::new(format!("blocks_per_row: {count} numbers, expected 1 or one for each of {heads} heads")));
        }
        if self.num_blocks == Some(0) {
            return Err(Error::new("num_blocks: 0, expected at least 1"));
        }
        if self.local_blocks == 0 {
            return Err(Error::new("local_blocks: 0, expected at least 1: a token's own block is always exact"));
        }
        Ok(())
    }

    fn of_head(&self, head: usize) -> f64 {
        self.blocks_per_row[head.min(self.blocks_per_row.len() - 1)]
    }

    /// Block form: the exact blocks of a head with so many live query blocks, before the bounds by forced and live blocks.
    pub(crate) fn blocks_of_head(&self, head: usize, live_rows: usize) -> usize {
        self.num_blocks.unwrap_or_else(|| floor(self.of_head(head) * live_rows as f64 + 0.5))
    }

    /// Block form: whether the budget of a head has room for every one of so many blocks of keys in every row.
    pub(crate) fn covers(&self, head: usize, columns: usize) -> bool {
        floor(self.of_head(head).ceil()) >= columns
    }

    /// Block form: whether block `(i, j)` is exact, or refined, whatever its score: whether one of the `ratio x ratio` finest blocks in it
    /// is forced. `i` is negative for blocks of padded queries in front.
    pub(crate) fn forces(&self, i: i64, j: usize, ratio: usize) -> bool {
        let (first, j) =
            (i64::try_from(self.first_blocks.unwrap_or(0).div_ceil(ratio)).unwrap_or(i64::MAX), super::blocks::to_i64(j));
        // The nearest finest blocks of neighbours are one apart, and `ratio` more with each block between them.
        self.reach().is_some_and(|reach| i.abs_diff(j) <= reach.div_ceil(ratio) as u64) || i.min(j) < first
    }

    /// Block form: the most blocks of a head of so many blocks of queries and of keys that are forced, those that are the best of their row
    /// among them.
    pub(crate) fn most_forced(&self, rows: usize, columns: usize, ratio: usize) -> usize {
        let diagonal = self.reach().map_or(0, |reach| reach.div_ceil(ratio).saturating_mul(2).saturating_add(1));
        let first = self.first_blocks.unwrap_or(0).div_ceil(ratio);
        rows.saturating_mul(diagonal.saturating_add(1)).saturating_add(first.saturating_mul(rows + columns))
    }

    /// Block form: the most blocks of a head that are refined, and so the room for what is chosen among their children. What several
    /// sequences need is at most what one as long as all of them does.
    pub(crate) fn capacity(&self, rows: usize, columns: usize, ratio: usize) -> usize {
        let rate = self.blocks_per_row.iter().copied().fold(0.0, f64::max);
        let chosen = floor(rate.ceil()).saturating_mul(rows);
        // Rows of padded queries take one block each beyond the budget.
        let most = chosen.saturating_add(self.most_forced(rows, columns, ratio)).saturating_add(rows);
        most.min(rows.saturating_mul(columns))
    }

    /// Block form: how far off the diagonal blocks are forced, if any are.
    fn reach(&self) -> Option<usize> {
        let diagonal = (self.diagonal_blocks > 0).then_some(self.diagonal_blocks / 2);
        diagonal.max((self.local_blocks > 1).then_some(self.local_blocks - 1))
    }

    /// Block form: whether any block is forced whatever its score.
    pub(crate) fn forces_any(&self) -> bool {
        self.reach().is_some() || self.first_blocks.unwrap_or(0) > 0
    }

    /// Token form: the budget of the tokens of a head with so many query blocks.
    pub(crate) fn of_token(&self, head: usize, query_blocks: usize) -> TokenBudget {
        let number = self.num_blocks.map_or_else(|| self.of_head(head), |number| number as f64 / query_blocks.max(1) as f64);
        TokenBudget {
            blocks: floor(number + 0.5).clamp(1, EVERY_BLOCK),
            first_blocks: self.first_blocks.unwrap_or(1),
            local_blocks: self.local(),
        }
    }

    fn local(&self) -> usize {
        self.local_blocks.max(if self.diagonal_blocks > 0 { self.diagonal_blocks / 2 + 1 } else { 1 })
    }

    /// Whether every block of every head is exact.
    pub(crate) fn is_everything(&self) -> bool {
        self.num_blocks.is_none() && self.blocks_per_row.iter().all(|number| number.is_infinite())
    }

    /// Token form: room for the blocks of a token that no mask cuts, of which each has `ratio` finest ones, however many there are.
    pub(crate) fn token_width(&self, ratio: usize) -> usize {
        let per_token = self.num_blocks.unwrap_or_else(|| {
            self.blocks_per_row.iter().map(|&number| floor(number + 0.5).clamp(1, EVERY_BLOCK)).max().unwrap_or(1)
        });
        let local = (self.local() - 1).saturating_mul(2).div_ceil(ratio).saturating_add(1);
        per_token.max(local.saturating_add(self.first_blocks.unwrap_or(1)))
    }
}

fn floor(number: f64) -> usize {
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "positive; a cast of a float saturates, and a bound by what there is follows"
    )]
    {
        number.floor() as usize
    }
}
