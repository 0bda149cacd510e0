//! The scores of the blocks that a tile of queries chooses from, where they estimate the largest logit of a key
//! (docs/definitions.md, section 4).
//!
//! ```text
//! for each query:   its candidates are the blocks with the largest c_tj, about four for each that it chooses
//!                   its codes are those of scale q_t
//! for each block:   score_tj = c_tj + WEIGHT unit_t unit_j max_s <codes of q_t, codes of k_s - kh_j>     for the queries that
//!                                                                                                      have it as a candidate
//! ```

use std::ops::Range;

use super::coarse::Tile;
use super::key_codes::{BlockCodes, CHANNELS, Encoder, KeyCodes};
use crate::exec::Buffer;
use crate::kernels::{Bounds, Encode, LargestProducts, Matrix, Reached};
use crate::mra::problem::{Blocks, Problem};
use crate::simd::{CODE_BIAS, CodeLevel, Element, Scalar};
use crate::tensor::Rows;

/// How much of the largest difference from the mean counts. The sum of exponentials, which the score stands for, is between the mean
/// and the largest one; anything from 0.7 to 1 does as well.
const WEIGHT: f64 = 0.85;

/// What the blocks of a flat head are ranked by.
pub(crate) struct RankedKeys<'a, E: Element> {
    pub(crate) rows: Rows<'a, E>,
    pub(crate) blocks: &'a Blocks,
    pub(crate) means: Rows<'a, E::Compute>,
    /// The codes of all blocks and the flat index of the first one of this head, unless few of them are candidates.
    pub(crate) codes: Option<(&'a KeyCodes<E::Compute>, usize)>,
}

/// The buffers of a tile.
pub(crate) struct Rank<T> {
    scores: Buffer<T>,
    bounds: Buffer<T>,
    candidates: Vec<usize>,
    /// The queries of a block.
    columns: Vec<u32>,
    largest: Vec<i32>,
    line: Buffer<T>,
    /// The codes of each query.
    codes: Vec<u8>,
    /// What a code of 1 stands for.
    units: Vec<T>,
    encoder: Encoder<T>,
}

impl<T: Scalar> Rank<T> {
    /// Buffers for tiles of so many blocks and columns.
    pub(crate) fn new(problem: &Problem<'_>, blocks: usize, columns: usize) -> Self {
        Self {
            scores: Buffer::scratch(blocks * columns),
            bounds: Buffer::scratch(columns),
            candidates: Vec::new(),
            columns: Vec::with_capacity(columns),
            largest: vec![0; columns],
            line: Buffer::zeros(problem.head_dim),
            codes: vec![CODE_BIAS; columns * problem.head_dim.next_multiple_of(CHANNELS)],
            units: vec![T::ZERO; columns],
            encoder: Encoder::new(problem),
        }
    }

    /// Returns the scores, in the places of the logits: `-inf` for blocks that are no candidates.
    #[allow(clippy::too_many_arguments, reason = "a tile of queries, and what it chooses from")]
    pub(crate) fn scores<E: Element<Compute = T>>(
        &mut self,
        problem: &Problem<'_>,
        keys: &RankedKeys<'_, E>,
        rows: &Rows<'_, E>,
        tile: &Tile<'_>,
        blocks: &Range<usize>,
        logits: Matrix<'_, T>,
        wanted: &[usize],
    ) -> &[T] {
        let (columns, stride) = (logits.cols, problem.head_dim.next_multiple_of(CHANNELS));
        self.candidates.clear();
        self.candidates.extend(wanted.iter().map(|&wanted| wanted.saturating_mul(super::key_codes::CANDIDATES)));
        T::run(problem.level, Bounds { numbers: logits, wanted: &self.candidates, bounds: &mut self.bounds });
        self.encode_queries(problem, rows, tile, stride);
        let level = CodeLevel::of(problem.level);
        for (row, block) in blocks.clone().enumerate() {
            let logits = logits.row(row);
            let scores = &mut self.scores[row * columns..][..columns];
            scores.fill(T::NEG_INFINITY);
            T::run(problem.level, Reached { row: logits, bounds: &self.bounds, columns: &mut self.columns });
            if self.columns.is_empty() {
                continue;
            }
            let BlockCodes { lines, groups, corrections, unit } = match keys.codes {
                Some((codes, first)) => codes.block(first + block),
                None => self.encoder.encode(&keys.rows, keys.blocks, block, keys.means.row(block)),
            };
            let (numbers, largest) = (&self.columns, &mut self.largest);
            level.run(LargestProducts { queries: &self.codes, stride, numbers, lines, groups, corrections, largest });
            let weight = T::from_f64(WEIGHT) * unit;
            for (&column, &largest) in self.columns.iter().zip(&self.largest) {
                let column = column as usize;
                scores[column] = logits[column] + weight * self.units[column] * T::from_f64(f64::from(largest));
            }
        }
        &self.scores
    }

    fn encode_queries<E: Element<Compute = T>>(
        &mut self,
        problem: &Problem<'_>,
        rows: &Rows<'_, E>,
        tile: &Tile<'_>,
        stride: usize,
    ) {
        for (place, token) in tile.tokens.clone().enumerate() {
            let codes = &mut self.codes[place * stride..][..stride];
            E::widen(rows.row(token), &mut self.line);
            let encode = Encode { row: &self.line, factor: T::from_f64(problem.scale), bias: CODE_BIAS, codes };
            self.units[place] = T::run(problem.level, encode);
        }
    }
}
