//! An additive bias in the block form: its mean over the pairs of each block of queries and keys (docs/definitions.md, section 6).
//!
//! The bias is read once for this, and again only where a block is exact. Where it is the same for all heads, so are the means, and
//! they are computed once.

use std::ops::Range;

use super::blocks::Blocks;
use super::mask::{Bias, BiasData, in_place};
use super::padding::SCAN_THREAD;
use super::sight::Kind;
use super::token_kinds::kind_of_bounds;
use crate::exec::{Chunks, threads};
use crate::kernels::Extend;
use crate::simd::{Level, Scalar};

/// The mean biases of the blocks of a batch item.
#[derive(Debug)]
pub(crate) struct BlockBias {
    means: Vec<f64>,
    rows: usize,
    columns: usize,
    same_heads: bool,
}

impl BlockBias {
    /// Reads the bias of a batch item with these blocks of queries and of keys. `None` where it hides a pair, or differs so much
    /// within a block that its mean stands for nothing.
    pub(crate) fn new(
        bias: &Bias<'_>,
        item: usize,
        queries: &Blocks,
        keys: &Blocks,
        threads: usize,
        level: Level,
    ) -> Option<Self> {
        let (rows, columns, heads) = (queries.len(), keys.len(), bias.distinct_heads());
        let mut means = vec![0.0; heads * rows * columns];
        let tasks = if columns == 0 { 0 } else { heads * rows };
        let mut cut = vec![false; tasks];
        {
            let (to_means, to_cut) = (Chunks::new(&mut means, columns), Chunks::new(&mut cut, 1));
            let worth = heads * queries.total() * keys.total() / SCAN_THREAD + 1;
            threads::for_each(threads.min(worth), tasks, Scan::default, |scan, task| {
                let (head, i) = (task / rows, task % rows);
                // Where all queries have the same bias, one of them tells.
                let most = if bias.is_same_for_queries() { 1 } else { usize::MAX };
                let row = BlockRow {
                    level,
                    bias,
                    item,
                    head,
                    queries: queries.numbers(i).take(most).map(|n| queries.token(n)),
                    keys,
                };
                // SAFETY: each task has its own row of blocks.
                let (means, cut) = unsafe { (to_means.get_mut(task), &mut to_cut.get_mut(task)[0]) };
                let Scan { singles, doubles, sums } = scan;
                *cut = match bias.data {
                    BiasData::F64(data) => row.scan(doubles, sums, Some(data), means),
                    BiasData::F32(data) => row.scan(singles, sums, Some(data), means),
                    _ => row.scan(singles, sums, None, means),
                };
            });
        }
        (!cut.contains(&true)).then_some(Self { means, rows, columns, same_heads: heads <= 1 })
    }

    /// The mean biases of a row of blocks of a head.
    pub(crate) fn row(&self, head: usize, i: usize) -> &[f64] {
        let row = if self.same_heads { i } else { head * self.rows + i };
        &self.means[row * self.columns..][..self.columns]
    }
}

/// Keys that are scanned together for all queries of a block: what is known of them stays in a first-level cache.
const SCAN_KEYS: usize = 1024;

/// What is known of the keys of a few blocks after some queries.
#[derive(Debug, Default)]
struct Scan {
    singles: [Vec<f32>; 3],
    doubles: [Vec<f64>; 3],
    sums: Vec<f64>,
}

/// One row of blocks of a bias.
struct BlockRow<'a, I> {
    level: Level,
    bias: &'a Bias<'a>,
    item: usize,
    head: usize,
    queries: I,
    keys: &'a Blocks,
}

impl<I: Iterator<Item = usize> + Clone> BlockRow<'_, I> {
    /// Calls `body` with consecutive blocks and the numbers of their keys, about [`SCAN_KEYS`] at a time.
    fn for_parts(&self, blocks: usize, mut body: impl FnMut(Range<usize>, Range<usize>)) {
        let mut start = 0;
        while start < blocks {
            let end = (start + 1..blocks).find(|&j| self.keys.start(j + 1) - self.keys.start(start) > SCAN_KEYS);
            let end = end.unwrap_or(blocks);
            body(start..end, self.keys.start(start)..self.keys.start(end));
            start = end;
        }
    }

    /// Writes the means of the row, and returns whether the bias hides or cuts any block.
    fn scan<S: Scalar>(&self, lines: &mut [Vec<S>; 3], sums: &mut Vec<f64>, data: Option<&[S]>, means: &mut [f64]) -> bool {
        let [line, minus_lowest, highest] = lines;
        let rows = self.queries.clone().count();
        let mut cut = false;
        self.for_parts(means.len(), |blocks, numbers| {
            line.resize(numbers.len(), S::ZERO);
            refill(minus_lowest, numbers.len(), S::NEG_INFINITY);
            refill(highest, numbers.len(), S::NEG_INFINITY);
            refill(sums, numbers.len(), 0.0);
            for query in self.queries.clone() {
                let place = [self.item, self.head, query];
                let start = self.bias.start(place);
                let row = data.and_then(|data| in_place(data, start, self.bias.strides[3], self.keys, numbers.clone()));
                let bias = row.unwrap_or_else(|| {
                    self.bias.read(place, self.keys, numbers.clone(), line);
                    line
                });
                S::run(self.level, Extend { bias, highest, minus_lowest, sums });
            }
            for j in blocks {
                let keys = self.keys.start(j) - numbers.start..self.keys.start(j + 1) - numbers.start;
                let largest = |bounds: &[S]| bounds.iter().map(|&x| x.into()).fold(f64::NEG_INFINITY, f64::max);
                let (highest, lowest) = (largest(&highest[keys.clone()]), -largest(&minus_lowest[keys.clone()]));
                let sum: f64 = sums[keys.clone()].iter().sum();
                let count = rows * keys.len();
                cut |= count > 0 && kind_of_bounds(lowest, highest, sum, count) != Kind::Open;
                // The sum of numbers near the lowest one overflows.
                means[j] = if count == 0 { 0.0 } else { (sum / count as f64).max(lowest) };
            }
        });
        cut
    }
}

/// Makes `count` elements `value`.
fn refill<T: Copy>(elements: &mut Vec<T>, count: usize, value: T) {
    elements.clear();
    elements.resize(count, value);
}
