//! The candidates of a range of queries below the coarsest level, where they are ranked by more than the logits of means
//! (docs/definitions.md, section 4.1).

use std::ops::Range;

use crate::exec::Buffer;
use crate::kernels::Reached;
use crate::simd::{Level, Scalar};

/// The slots whose logits reach the bound of their query, and the scores there.
pub(crate) struct ChildCandidates<T> {
    /// Where those of each query are.
    of: Vec<Range<usize>>,
    /// Ascending for each query.
    slots: Vec<u32>,
    scores: Vec<T>,
    /// Where the next one of each query is, while they are listed block by block.
    next: Vec<usize>,
    bounds: Buffer<T>,
    reached: Vec<u32>,
}

/// The queries that have a block as a candidate, and the places of their scores.
#[derive(Debug, Clone, Default)]
pub(crate) struct Listed {
    pub(crate) queries: Vec<u32>,
    pub(crate) places: Vec<usize>,
}

impl<T: Scalar> ChildCandidates<T> {
    pub(super) fn new() -> Self {
        let bounds = Buffer::scratch(0);
        Self { of: Vec::new(), slots: Vec::new(), scores: Vec::new(), next: Vec::new(), bounds, reached: Vec::new() }
    }

    /// Forgets those of another range; there are so many queries.
    pub(super) fn clear(&mut self, queries: usize) {
        self.of.clear();
        self.of.resize(queries, 0..0);
        self.next.clear();
        self.next.resize(queries, 0);
        self.slots.clear();
        self.scores.clear();
    }

    /// Finds those of a query, whose logits are whole vectors; their scores are the logits at first.
    pub(super) fn find(&mut self, level: Level, query: usize, logits: &[T], bound: T) {
        if self.bounds.len() < logits.len() {
            self.bounds = Buffer::scratch(logits.len());
        }
        // The kernel compares each column with a bound of its own.
        self.bounds[..logits.len()].fill(bound);
        T::run(level, Reached { row: logits, bounds: &self.bounds, columns: &mut self.reached });
        let first = self.slots.len();
        self.slots.extend(&self.reached);
        self.scores.extend(self.reached.iter().map(|&slot| logits[slot as usize]));
        self.of[query] = first..self.slots.len();
        self.next[query] = first;
    }

    /// Brings the scores of some queries into lanes, with `-inf` behind them; returns how many rows that takes.
    pub(super) fn pack(&self, queries: &[u32], lanes: usize, to: &mut Buffer<T>) -> usize {
        let rows = queries.iter().map(|&query| self.of[query as usize].len()).max().unwrap_or(0);
        if to.len() < rows * lanes {
            *to = Buffer::scratch(rows * lanes);
        }
        to[..rows * lanes].fill(T::NEG_INFINITY);
        for (lane, &query) in queries.iter().enumerate() {
            for (row, &score) in self.scores_of(query as usize).iter().enumerate() {
                to[row * lanes + lane] = score;
            }
        }
        rows
    }

    /// The scores of a query.
    pub(super) fn scores_of(&self, query: usize) -> &[T] {
        &self.scores[self.of[query].clone()]
    }

    /// The slots of a query.
    pub(super) fn slots_of(&self, query: usize) -> &[u32] {
        &self.slots[self.of[query].clone()]
    }

    /// Lists a query for each of its next candidates, as far as their slots are among these: the first one belongs to the first of `listed`.
    pub(super) fn list(&mut self, query: u32, slots: Range<usize>, listed: &mut [Listed]) {
        let end = self.of[query as usize].end;
        let next = &mut self.next[query as usize];
        while *next < end && (self.slots[*next] as usize) < slots.end {
            let listed = &mut listed[self.slots[*next] as usize - slots.start];
            listed.queries.push(query);
            listed.places.push(*next);
            *next += 1;
        }
    }

    /// The scores, at the places that were listed.
    pub(crate) fn scores(&mut self) -> &mut [T] {
        &mut self.scores
    }
}
