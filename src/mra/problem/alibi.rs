//! A bias by distance (`alibi_slopes`), `-slope |p - s|`: the mean distances of blocks (docs/definitions.md, section 6).
//!
//! Where all tokens of one side lie before those of the other, the mean distance is that of the mean positions. So a table of the
//! means suffices, and a correction for the few pairs of blocks that overlap.

use std::ops::Range;

use super::blocks::Blocks;
use crate::kernels::AddDistances;
use crate::simd::{Level, Scalar};

/// Where the tokens of a block lie. Those of an empty one lie where the block before it ends.
#[derive(Debug, Clone, Copy)]
struct Extent {
    first: i64,
    last: i64,
    mean: f64,
}

fn extents(blocks: &Blocks, position: impl Fn(usize) -> i64) -> Vec<Extent> {
    let mut end = Extent { first: 0, last: 0, mean: 0.0 };
    let of_block = |block: usize| {
        let numbers = blocks.numbers(block);
        end = if numbers.is_empty() {
            Extent { first: end.last, last: end.last, mean: end.last as f64 }
        } else {
            let (first, count) = (position(numbers.start), numbers.len());
            let offsets: i64 = numbers.clone().map(|number| position(number) - first).sum();
            Extent { first, last: position(numbers.end - 1), mean: first as f64 + offsets as f64 / count as f64 }
        };
        end
    };
    (0..blocks.len()).map(of_block).collect()
}

/// The mean distances of a sequence.
#[derive(Debug)]
pub(crate) struct Alibi {
    keys: Vec<Extent>,
    /// Of the blocks of queries; block form.
    rows: Vec<Extent>,
    key_positions: Vec<i64>,
    /// For each block of queries, the blocks of keys that overlap it, and how much farther apart they are than their means.
    near: Vec<Vec<(usize, f64)>>,
}

impl Alibi {
    /// `queries` are the blocks that are averaged; none in the token form.
    pub(crate) fn new(
        queries: &Blocks,
        keys: &Blocks,
        query_position: impl Fn(usize) -> i64,
        key_position: impl Fn(usize) -> i64,
    ) -> Self {
        let mut alibi = Self {
            keys: extents(keys, &key_position),
            rows: extents(queries, |number| query_position(queries.token(number))),
            key_positions: (0..keys.total()).map(key_position).collect(),
            near: Vec::new(),
        };
        let near = |i: usize| {
            let positions: Vec<i64> = queries.numbers(i).map(|number| query_position(queries.token(number))).collect();
            let row = alibi.rows[i];
            let first = alibi.keys.partition_point(|keys| keys.last <= row.first);
            let overlapping = (first..keys.len()).take_while(|&j| alibi.keys[j].first < row.last);
            let excess = |j: usize| {
                let sum: f64 = positions.iter().map(|&p| alibi.sum_of_distances(p, keys, j)).sum();
                let pairs = positions.len() * keys.count(j);
                sum / pairs.max(1) as f64 - (row.mean - alibi.keys[j].mean).abs()
            };
            overlapping.filter(|&j| keys.count(j) > 0).map(|j| (j, excess(j))).collect::<Vec<_>>()
        };
        let near = (0..queries.len()).map(near).collect();
        alibi.near = near;
        alibi
    }

    fn sum_of_distances(&self, position: i64, keys: &Blocks, block: usize) -> f64 {
        keys.numbers(block).map(|number| self.key_positions[number].abs_diff(position) as f64).sum()
    }

    fn means(&self, blocks: Range<usize>, base: f64) -> impl Iterator<Item = f64> {
        self.keys[blocks].iter().map(move |keys| keys.mean - base)
    }

    /// Adds to logits, one row of `columns` for each of the keys with these numbers and a lane for each query at these positions, the biases
    /// of that slope.
    pub(crate) fn add_to_pairs<T: Scalar>(
        &self,
        level: Level,
        slope: f64,
        positions: impl ExactSizeIterator<Item = i64> + Clone,
        keys: Range<usize>,
        logits: &mut [T],
        columns: usize,
    ) {
        let Some(base) = positions.clone().next() else { return };
        let lanes = positions.map(|position| position.saturating_sub(base) as f64);
        let keys = self.key_positions[keys].iter().map(|&position| position.saturating_sub(base) as f64);
        add(level, slope, lanes, keys, logits, columns);
    }

    /// Adds to logits, one row of `columns` for each of `blocks` of keys and a lane for each of some blocks of queries, the mean biases of
    /// that slope.
    pub(crate) fn add_to_rows<T: Scalar>(
        &self,
        level: Level,
        slope: f64,
        rows: Range<usize>,
        blocks: Range<usize>,
        logits: &mut [T],
        columns: usize,
    ) {
        let Some(base) = self.rows.get(rows.start).map(|row| row.mean) else { return };
        let lanes = rows.clone().map(|i| self.rows[i].mean - base);
        add(level, slope, lanes, self.means(blocks.clone(), base), logits, columns);
        for (lane, i) in rows.enumerate() {
            for &(j, excess) in self.near[i].iter().filter(|(j, _)| blocks.contains(j)) {
                logits[(j - blocks.start) * columns + lane] += T::from_f64(-slope * excess);
            }
        }
    }

    /// The same with a lane for each of some queries at these positions.
    #[allow(clippy::too_many_arguments, reason = "queries, keys, and their logits")]
    pub(crate) fn add_to_queries<T: Scalar>(
        &self,
        level: Level,
        slope: f64,
        positions: impl ExactSizeIterator<Item = i64> + Clone,
        keys: &Blocks,
        blocks: Range<usize>,
        logits: &mut [T],
        columns: usize,
    ) {
        let Some(base) = positions.clone().next() else { return };
        let lanes = positions.clone().map(|position| position.saturating_sub(base) as f64);
        add(level, slope, lanes, self.means(blocks.clone(), base as f64), logits, columns);
        for (lane, position) in positions.enumerate() {
            let block = self.keys.partition_point(|keys| keys.last <= position);
            if blocks.contains(&block) && self.keys[block].first < position {
                let mean = self.sum_of_distances(position, keys, block) / keys.count(block).max(1) as f64;
                let excess = mean - (position as f64 - self.keys[block].mean).abs();
                logits[(block - blocks.start) * columns + lane] += T::from_f64(-slope * excess);
            }
        }
    }
}

/// Adds to logits, one row of `columns` for each key and a lane for each query, the biases of that slope. Positions count from some place
/// near the queries, so that small distances are exact wherever they lie.
fn add<T: Scalar>(
    level: Level,
    slope: f64,
    queries: impl ExactSizeIterator<Item = f64>,
    keys: impl Iterator<Item = f64>,
    logits: &mut [T],
    columns: usize,
) {
    let mut lanes = vec![T::ZERO; columns];
    lanes.iter_mut().zip(queries).for_each(|(to, position)| *to = T::from_f64(position));
    let keys: Vec<T> = keys.map(T::from_f64).collect();
    T::run(level, AddDistances { logits, slope: T::from_f64(slope), queries: &lanes, keys: &keys });
}
