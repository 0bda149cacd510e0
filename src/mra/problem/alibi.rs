//! A bias by distance (`alibi_slopes`), `-slope |p - s|`: the mean distances of blocks (docs/definitions.md, section 6).
//!
//! Where all tokens of one side lie before those of the other, the mean distance is that of the mean positions. So a table of the
//! means suffices, and a correction for the few pairs of blocks that overlap.

use std::ops::Range;

use super::blocks::{Blocks, to_i64};
use crate::kernels::{AddDistances, Positions};
use crate::simd::{Level, Scalar};

/// Where the tokens of a block lie. Those of an empty one lie where the block before it ends.
#[derive(Debug, Clone, Copy)]
struct Extent {
    first: i64,
    last: i64,
    mean: Place,
}

/// A position, or a mean of some: a whole number and a fraction. Apart, differences of whole numbers are exact and round the same
/// wherever positions are counted from.
#[derive(Debug, Clone, Copy)]
struct Place {
    whole: i64,
    fraction: f64,
}

impl Place {
    fn at(position: i64) -> Self {
        Self { whole: position, fraction: 0.0 }
    }

    /// The mean of `count` positions that are `offsets` in sum behind a first one.
    fn mean(first: i64, offsets: i64, count: usize) -> Self {
        let count = to_i64(count);
        Self { whole: first + offsets / count, fraction: (offsets % count) as f64 / count as f64 }
    }

    fn distance(self, other: Self) -> f64 {
        ((self.whole - other.whole) as f64 + (self.fraction - other.fraction)).abs()
    }
}

/// The mean distances of a sequence.
#[derive(Debug)]
pub(crate) struct Alibi {
    keys: Vec<Extent>,
    /// Of the blocks of queries; block form.
    rows: Vec<Extent>,
    /// Of the keys by number, unless it is the number: a look at every key would take longer than a step of decoding.
    key_positions: Option<Vec<i64>>,
    /// For each block of queries, the blocks of keys that overlap it, and how much farther apart they are than their means.
    near: Vec<Vec<(usize, f64)>>,
}

impl Alibi {
    /// `queries` are the blocks that are averaged; none in the token form. Positions of keys count from the first valid one.
    pub(crate) fn new(queries: &Blocks, keys: &Blocks, query_position: impl Fn(usize) -> i64) -> Self {
        let key_position = |number: usize| to_i64(keys.token(number)) - keys.origin();
        let of_query = |number: usize| query_position(queries.token(number));
        let mut alibi = Self {
            keys: extents(keys, key_position),
            rows: extents(queries, of_query),
            key_positions: (!keys.are_all()).then(|| (0..keys.total()).map(key_position).collect()),
            near: Vec::new(),
        };
        let near = |i: usize| {
            let row = alibi.rows[i];
            let first = alibi.keys.partition_point(|keys| keys.last <= row.first);
            let overlapping = (first..keys.len()).take_while(|&j| alibi.keys[j].first < row.last);
            let excess = |j: usize| {
                let sum: f64 = queries.numbers(i).map(|number| alibi.sum_of_distances(of_query(number), keys, j)).sum();
                let pairs = queries.count(i) * keys.count(j);
                sum / pairs.max(1) as f64 - row.mean.distance(alibi.keys[j].mean)
            };
            overlapping.filter(|&j| keys.count(j) > 0).map(|j| (j, excess(j))).collect()
        };
        let near = (0..queries.len()).map(near).collect();
        alibi.near = near;
        alibi
    }

    /// The position of the key with this number.
    pub(crate) fn key_position(&self, number: usize) -> i64 {
        self.key_positions.as_ref().map_or_else(|| to_i64(number), |positions| positions[number])
    }

    fn sum_of_distances(&self, position: i64, keys: &Blocks, block: usize) -> f64 {
        keys.numbers(block).map(|number| self.key_position(number).abs_diff(position) as f64).sum()
    }

    /// Adds to logits, one row of `columns` for each of the keys with these numbers and a lane for each query at these positions, the
    /// biases of that slope.
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
        let keys = keys.map(|number| Place::at(self.key_position(number)));
        add(level, slope, base, positions.map(Place::at), keys, logits, columns);
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
        let Some(base) = self.rows.get(rows.start).map(|row| row.mean.whole) else { return };
        let lanes = rows.clone().map(|i| self.rows[i].mean);
        add(level, slope, base, lanes, self.means(blocks.clone()), logits, columns);
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
        add(level, slope, base, positions.clone().map(Place::at), self.means(blocks.clone()), logits, columns);
        for (lane, position) in positions.enumerate() {
            let block = self.keys.partition_point(|keys| keys.last <= position);
            if blocks.contains(&block) && self.keys[block].first < position {
                let mean = self.sum_of_distances(position, keys, block) / keys.count(block).max(1) as f64;
                let excess = mean - Place::at(position).distance(self.keys[block].mean);
                logits[(block - blocks.start) * columns + lane] += T::from_f64(-slope * excess);
            }
        }
    }

    /// How far the keys of a block are from a position, on average.
    pub(crate) fn mean_distance(&self, position: i64, keys: &Blocks, block: usize) -> f64 {
        let extent = self.keys[block];
        if extent.first < position && position < extent.last {
            self.sum_of_distances(position, keys, block) / keys.count(block).max(1) as f64
        } else {
            Place::at(position).distance(extent.mean)
        }
    }

    fn means(&self, blocks: Range<usize>) -> impl Iterator<Item = Place> {
        self.keys[blocks].iter().map(|keys| keys.mean)
    }
}

fn extents(blocks: &Blocks, position: impl Fn(usize) -> i64) -> Vec<Extent> {
    let mut end = Extent { first: 0, last: 0, mean: Place::at(0) };
    let of_block = |block: usize| {
        let numbers = blocks.numbers(block);
        end = if numbers.is_empty() {
            Extent { first: end.last, last: end.last, mean: Place::at(end.last) }
        } else {
            let (first, last, count) = (position(numbers.start), position(numbers.end - 1), numbers.len());
            let offsets = if blocks.consecutive(numbers.clone()) {
                (last - first) * to_i64(count) / 2
            } else {
                numbers.map(|number| position(number) - first).sum()
            };
            Extent { first, last, mean: Place::mean(first, offsets, count) }
        };
        end
    };
    (0..blocks.len()).map(of_block).collect()
}

/// Adds to logits, one row of `columns` for each key and a lane for each query, the biases of that slope. Positions are counted from
/// `base`, near the queries, so that small distances are exact wherever they lie.
fn add<T: Scalar>(
    level: Level,
    slope: f64,
    base: i64,
    queries: impl Iterator<Item = Place>,
    keys: impl Iterator<Item = Place>,
    logits: &mut [T],
    columns: usize,
) {
    let (mut queries, keys) = (positions(queries, base), positions(keys, base));
    queries.wholes.resize(columns, T::ZERO);
    queries.fractions.resize(columns, T::ZERO);
    T::run(level, AddDistances { logits, slope: T::from_f64(slope), queries: &queries, keys: &keys });
}

fn positions<T: Scalar>(places: impl Iterator<Item = Place>, base: i64) -> Positions<T> {
    let number = |place: Place| (T::from_f64(place.whole.saturating_sub(base) as f64), T::from_f64(place.fraction));
    let (wholes, fractions) = places.map(number).unzip();
    Positions { wholes, fractions }
}
