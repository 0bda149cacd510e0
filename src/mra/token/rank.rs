//! The scores of the blocks that queries choose from, where they estimate the largest logit of a member
//! (docs/definitions.md, sections 4.1 and 5).
//!
//! ```text
//! for each query:   its candidates are the blocks with the largest c_tj, about four for each that it chooses
//!                   its codes are those of scale q_t
//! for each block:   score_tj = c_tj + WEIGHT unit_t unit_j max_s <codes of q_t, codes of k_s - kh_j>     for the queries that
//!                                                                                                      have it as a candidate
//! ```

use std::ops::Range;

use super::key_codes::{BlockCodes, CANDIDATES, CHANNELS, Encoder, KeyCodes};
use super::members::Members;
use crate::exec::Buffer;
use crate::kernels::{Bounds, Encode, LargestProducts, Matrix, Reached};
use crate::mra::problem::Problem;
use crate::simd::{CODE_BIAS, CodeLevel, Element, Scalar};
use crate::tensor::Rows;

/// How much of the largest difference from the mean counts. The sum of exponentials, which the score stands for, is between the mean
/// and the largest one; anything from 0.7 to 1 does as well.
const WEIGHT: f64 = 0.85;

/// What the blocks of a flat head at a level are ranked by.
pub(crate) struct RankedBlocks<'a, E: Element> {
    pub(crate) members: Members<'a, E>,
    pub(crate) means: Rows<'a, E::Compute>,
    /// The codes of all blocks and the flat index of the first one of this head, unless few of them are candidates.
    pub(crate) codes: Option<(&'a KeyCodes<E::Compute>, usize)>,
}

/// The codes of the queries of a range.
pub(crate) struct QueryCodes<T> {
    stride: usize,
    /// A row for each query.
    codes: Vec<u8>,
    /// What a code of 1 stands for.
    units: Vec<T>,
    line: Buffer<T>,
}

impl<T: Scalar> QueryCodes<T> {
    pub(crate) fn new(problem: &Problem<'_>) -> Self {
        let stride = problem.head_dim.next_multiple_of(CHANNELS);
        Self { stride, codes: Vec::new(), units: Vec::new(), line: Buffer::zeros(problem.head_dim) }
    }

    /// Makes those of some queries.
    pub(crate) fn encode<E: Element<Compute = T>>(&mut self, problem: &Problem<'_>, rows: &Rows<'_, E>, tokens: &Range<usize>) {
        self.codes.clear();
        self.codes.resize(tokens.len() * self.stride, CODE_BIAS);
        self.units.clear();
        for (place, token) in tokens.clone().enumerate() {
            let codes = &mut self.codes[place * self.stride..][..self.stride];
            E::widen(rows.row(token), &mut self.line);
            let encode = Encode { row: &self.line, factor: T::from_f64(problem.scale), bias: CODE_BIAS, codes };
            self.units.push(T::run(problem.level, encode));
        }
    }
}

/// Scores one block at a time.
pub(crate) struct Scorer<T> {
    encoder: Encoder<T>,
    largest: Vec<i32>,
}

impl<T: Scalar> Scorer<T> {
    /// For blocks of at most so many members.
    pub(crate) fn new(problem: &Problem<'_>, members: usize) -> Self {
        Self { encoder: Encoder::new(problem, members), largest: Vec::new() }
    }

    /// Calls `add` with the index of each listed query and what the score of a block has beyond its logit. Queries are numbered from the
    /// one with the codes `first`.
    pub(crate) fn score<E: Element<Compute = T>>(
        &mut self,
        problem: &Problem<'_>,
        (ranked, block): (&RankedBlocks<'_, E>, usize),
        (queries, first): (&QueryCodes<T>, usize),
        numbers: &[u32],
        mut add: impl FnMut(usize, T),
    ) {
        let BlockCodes { lines, groups, corrections, unit } = match ranked.codes {
            Some((codes, first)) => codes.block(first + block),
            None => self.encoder.encode(&ranked.members, block, ranked.means.row(block)),
        };
        self.largest.resize(self.largest.len().max(numbers.len()), 0);
        let (codes, stride, largest) = (&queries.codes[first * queries.stride..], queries.stride, &mut self.largest[..]);
        let products = LargestProducts { queries: codes, stride, numbers, lines, groups, corrections, largest };
        CodeLevel::of(problem.level).run(products);
        let weight = T::from_f64(WEIGHT) * unit;
        for (index, (&number, &largest)) in numbers.iter().zip(&self.largest).enumerate() {
            add(index, weight * queries.units[first + number as usize] * T::from_f64(f64::from(largest)));
        }
    }
}

/// The scores of the coarsest blocks for a tile of queries.
pub(crate) struct Rank<T> {
    scores: Buffer<T>,
    bounds: Buffer<T>,
    candidates: Vec<usize>,
    /// The queries of a block.
    columns: Vec<u32>,
    scorer: Scorer<T>,
}

impl<T: Scalar> Rank<T> {
    /// Buffers for tiles of so many blocks, of so many members at most, and columns.
    pub(crate) fn new(problem: &Problem<'_>, blocks: usize, members: usize, columns: usize) -> Self {
        Self {
            scores: Buffer::scratch(blocks * columns),
            bounds: Buffer::scratch(columns),
            candidates: Vec::new(),
            columns: Vec::with_capacity(columns),
            scorer: Scorer::new(problem, members),
        }
    }

    /// Returns the scores, in the places of the logits: `-inf` for blocks that are no candidates. The codes of the first query of the
    /// tile are the ones that `queries` names.
    pub(crate) fn scores<E: Element<Compute = T>>(
        &mut self,
        problem: &Problem<'_>,
        ranked: &RankedBlocks<'_, E>,
        queries: (&QueryCodes<T>, usize),
        blocks: &Range<usize>,
        logits: Matrix<'_, T>,
        wanted: &[usize],
    ) -> &[T] {
        let columns = logits.cols;
        self.candidates.clear();
        self.candidates.extend(wanted.iter().map(|&wanted| wanted.saturating_mul(CANDIDATES)));
        T::run(problem.level, Bounds { numbers: logits, wanted: &self.candidates, bounds: &mut self.bounds });
        for (row, block) in blocks.clone().enumerate() {
            let logits = logits.row(row);
            let scores = &mut self.scores[row * columns..][..columns];
            scores.fill(T::NEG_INFINITY);
            T::run(problem.level, Reached { row: logits, bounds: &self.bounds, columns: &mut self.columns });
            if self.columns.is_empty() {
                continue;
            }
            let listed = &self.columns;
            self.scorer.score(problem, (ranked, block), queries, listed, |index, beyond| {
                let column = listed[index] as usize;
                scores[column] = logits[column] + beyond;
            });
        }
        &self.scores
    }
}
