//! The blocks that each token of a tile chooses (docs/definitions.md, section 3).

use std::cmp::Ordering;
use std::ops::Range;

use super::problem::{CausalBudget, Sight};
use crate::kernels::{Largest, Matrix};
use crate::simd::{Level, Scalar};

/// The buffers of a choice.
#[derive(Debug, Default)]
pub(crate) struct Chooser {
    wanted: Vec<usize>,
    taken: Vec<usize>,
    rows: Vec<u32>,
    order: Vec<u32>,
}

impl Chooser {
    /// Writes the plan of a tile of queries: `width` numbers for each, the blocks ascending, then -1.
    ///
    /// `logits` has a row for each block from 0 on and `columns` lanes, one for each query; `-inf` where a block is no past one
    /// of it. It may be empty if every query can take all its candidates. Those of some forced blocks become `-inf`.
    #[allow(clippy::too_many_arguments, reason = "a tile of queries, and what it chooses from")]
    pub(crate) fn choose<T: Scalar>(
        &mut self,
        level: Level,
        logits: &mut [T],
        columns: usize,
        budget: &CausalBudget,
        sights: &[Sight],
        plan: &mut [i32],
        width: usize,
    ) {
        self.wanted.clear();
        self.wanted.resize(columns, 0);
        self.taken.clear();
        self.taken.resize(columns, 0);
        let mut candidates = Range { start: usize::MAX, end: 0 };
        for (wanted, sight) in self.wanted.iter_mut().zip(sights) {
            let (range, take) = sight.candidates(budget);
            if take > 0 && take < range.len() {
                *wanted = take;
                candidates = candidates.start.min(range.start)..candidates.end.max(range.end);
            }
        }
        let stride = self.wanted.iter().copied().max().unwrap_or(0);
        if stride > 0 {
            for (lane, sight) in sights.iter().enumerate() {
                for block in sight.candidates(budget).0.end..candidates.end {
                    logits[block * columns + lane] = T::NEG_INFINITY;
                }
            }
            self.rows.resize(self.rows.len().max(columns * stride), 0);
            let numbers = &logits[candidates.start * columns..candidates.end * columns];
            let numbers = Matrix::new(numbers, candidates.len(), columns, columns);
            T::run(level, Largest { numbers, wanted: &self.wanted, rows: &mut self.rows, stride, taken: &mut self.taken });
        }
        for (lane, sight) in sights.iter().enumerate() {
            let (range, take) = sight.candidates(budget);
            let (first, local) = sight.forced(budget);
            let row = &mut plan[lane * width..][..width];
            let mut write = Writer { row, len: 0 };
            write.extend(0..first);
            match self.wanted[lane] {
                0 if take > 0 => write.extend(range),
                0 => {}
                wanted if self.taken[lane] == wanted => {
                    write.extend(self.rows[lane * stride..][..wanted].iter().map(|&row| row as usize + candidates.start));
                }
                wanted => {
                    let chosen = self.by_sorting(logits, columns, range, lane, wanted);
                    write.extend(chosen.iter().map(|&block| block as usize));
                }
            }
            write.extend(local..sight.blocks);
            write.finish();
        }
    }

    /// The same choice by partial sorting: slower, but for any number of blocks, and with NaN in their place, which is the last.
    fn by_sorting<T: Scalar>(
        &mut self,
        logits: &[T],
        columns: usize,
        candidates: Range<usize>,
        lane: usize,
        wanted: usize,
    ) -> &[u32] {
        let logit = |block: u32| logits[block as usize * columns + lane];
        self.order.clear();
        self.order.extend(candidates.map(|block| u32::try_from(block).expect("fewer than 2^32 blocks")));
        self.order.select_nth_unstable_by(wanted - 1, |&a, &b| descending(logit(a), logit(b)).then(a.cmp(&b)));
        self.order.truncate(wanted);
        self.order.sort_unstable();
        &self.order
    }
}

/// Larger numbers first, NaN last, zeros of both signs equal.
fn descending<T: Scalar>(a: T, b: T) -> Ordering {
    let is_nan = |x: T| x.partial_cmp(&x).is_none();
    b.partial_cmp(&a).unwrap_or_else(|| is_nan(a).cmp(&is_nan(b)))
}

/// A row of a plan while it is written.
struct Writer<'a> {
    row: &'a mut [i32],
    len: usize,
}

impl Writer<'_> {
    fn extend(&mut self, blocks: impl IntoIterator<Item = usize>) {
        for block in blocks {
            self.row[self.len] = i32::try_from(block).expect("fewer than 2^31 blocks");
            self.len += 1;
        }
    }

    fn finish(self) {
        self.row[self.len..].fill(-1);
    }
}
