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
    /// For each number of a key and the one behind the last, the sum of the positions of the keys before, unless the position of a key is
    /// its number: a look at every key would take longer than a step of decoding.
    position_sums: Option<Vec<i64>>,
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
            position_sums: (!keys.are_all()).then(|| sums((0..keys.total()).map(key_position))),
            near: Vec::new(),
        };
        let near = |i: usize| {
            let row = alibi.rows[i];
            let first = alibi.keys.partition_point(|keys| keys.last <= row.first);
            let overlapping = (first..keys.len()).take_while(|&j| alibi.keys[j].first < row.last);
            let excess = |j: usize| {
                let (numbers, of_keys) = (queries.numbers(i), keys.numbers(j));
                let sum = if queries.consecutive(numbers.clone()) && keys.consecutive(of_keys.clone()) {
                    distances_of_ranges(row.first - alibi.keys[j].first, numbers.len(), of_keys.len())
                } else {
                    numbers.map(|number| alibi.sum_of_distances(of_query(number), keys, j)).sum()
                };
                let pairs = queries.count(i) * keys.count(j);
                sum as f64 / pairs.max(1) as f64 - row.mean.distance(alibi.keys[j].mean)
            };
            overlapping.filter(|&j| keys.count(j) > 0).map(|j| (j, excess(j))).collect()
        };
        let near = (0..queries.len()).map(near).collect();
        alibi.near = near;
        alibi
    }

    /// The position of the key with this number.
    pub(crate) fn key_position(&self, number: usize) -> i64 {
        self.position_sums.as_ref().map_or_else(|| to_i64(number), |sums| sums[number + 1] - sums[number])
    }

    /// The distances of a position to the keys of a block, summed.
    fn sum_of_distances(&self, position: i64, keys: &Blocks, block: usize) -> i128 {
        let numbers = keys.numbers(block);
        let behind = keys.number_at(position).clamp(numbers.start, numbers.end);
        self.sum_of_differences(position, numbers.start..behind) - self.sum_of_differences(position, behind..numbers.end)
    }

    /// How far a position is behind the keys with these numbers, summed.
    fn sum_of_differences(&self, position: i64, numbers: Range<usize>) -> i128 {
        let (start, end, count) = (to_i64(numbers.start), to_i64(numbers.end), to_i64(numbers.len()));
        let positions = match &self.position_sums {
            Some(sums) => sums[numbers.end] - sums[numbers.start],
            None => (start + end - 1) * count / 2,
        };
        i128::from(position) * i128::from(count) - i128::from(positions)
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
                let mean = self.mean_of_overlapping(position, keys, block);
                let excess = mean - Place::at(position).distance(self.keys[block].mean);
                logits[(block - blocks.start) * columns + lane] += T::from_f64(-slope * excess);
            }
        }
    }

    /// How far the keys of a block are from a position, on average.
    pub(crate) fn mean_distance(&self, position: i64, keys: &Blocks, block: usize) -> f64 {
        let extent = self.keys[block];
        if extent.first < position && position < extent.last {
            self.mean_of_overlapping(position, keys, block)
        } else {
            Place::at(position).distance(extent.mean)
        }
    }

    fn mean_of_overlapping(&self, position: i64, keys: &Blocks, block: usize) -> f64 {
        self.sum_of_distances(position, keys, block) as f64 / keys.count(block).max(1) as f64
    }

    fn means(&self, blocks: Range<usize>) -> impl Iterator<Item = Place> {
        self.keys[blocks].iter().map(|keys| keys.mean)
    }
}

/// The distances of two ranges of consecutive positions, summed over all pairs; the first range begins `ahead` behind the second one.
///
/// The distance `|x|` is the second difference `G(x + 1) - 2 G(x) + G(x - 1)` of `G(x) = (|x|^3 - |x|) / 6`, so that of sums only their ends
/// remain.
fn distances_of_ranges(ahead: i64, count: usize, other: usize) -> i128 {
    let (ahead, count, other) = (i128::from(ahead), i128::from(to_i64(count)), i128::from(to_i64(other)));
    let ends = |x: i128| (x.abs().pow(3) - x.abs()) / 6;
    ends(ahead + count) - ends(ahead) - ends(ahead + count - other) + ends(ahead - other)
}

/// The sum of the numbers before each, and that of all.
fn sums(numbers: impl Iterator<Item = i64>) -> Vec<i64> {
    let running = numbers.scan(0, |sum, number| {
        *sum += number;
        Some(*sum)
    });
    std::iter::once(0).chain(running).collect()
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn counting(len: usize) -> impl Strategy<Value = Vec<bool>> {
        prop_oneof![Just(vec![true; len]), proptest::collection::vec(any::<bool>(), len)]
    }

    fn blocks(counts: &[bool], size: usize) -> Blocks {
        Blocks::from_first(0..counts.len(), size, |token| counts[token])
    }

    /// The mean over all pairs of two lists of positions, one pair at a time.
    fn mean(positions: &[i64], others: &[i64]) -> f64 {
        let pairs = positions.iter().flat_map(|a| others.iter().map(move |b| (a - b).abs() as f64));
        pairs.sum::<f64>() / (positions.len() * others.len()) as f64
    }

    proptest! {
        #[test]
        fn mean_distances_are_those_of_all_pairs(
            (queries, keys) in (1..90_usize, 1..90_usize).prop_flat_map(|(q, k)| (counting(q), counting(k))),
            (size, offset) in (1..40_usize, -100..100_i64),
        ) {
            let (queries, keys) = (blocks(&queries, size), blocks(&keys, size));
            let of_query = |token: usize| to_i64(token) + offset;
            let alibi = Alibi::new(&queries, &keys, of_query);
            let positions_of = |j: usize| keys.numbers(j).map(|n| to_i64(keys.token(n)) - keys.origin()).collect::<Vec<_>>();
            for j in (0..keys.len()).filter(|&j| keys.count(j) > 0) {
                let of_block = positions_of(j);
                // Whole numbers of less than 2^20 are summed exactly; means and differences of means round a few times.
                let tolerance = 8.0 * f64::EPSILON * 400.0;
                for position in -120..220 {
                    let expected = mean(&[position], &of_block);
                    let found = alibi.mean_distance(position, &keys, j);
                    prop_assert!((found - expected).abs() <= tolerance, "block {j}, {position}: {found}, not {expected}");
                }
                for i in (0..queries.len()).filter(|&i| queries.count(i) > 0) {
                    let of_row: Vec<i64> = queries.numbers(i).map(|n| of_query(queries.token(n))).collect();
                    let excess = alibi.near[i].iter().find(|near| near.0 == j).map_or(0.0, |near| near.1);
                    let (found, expected) = (alibi.rows[i].mean.distance(alibi.keys[j].mean) + excess, mean(&of_row, &of_block));
                    prop_assert!((found - expected).abs() <= tolerance, "blocks {i}, {j}: {found}, not {expected}");
                }
            }
        }
    }

    #[test]
    fn ranges_of_millions_of_positions_are_summed_exactly() {
        // n (n^2 - 1) / 3 where both are the same range; n^2 times the distance where they are apart.
        let n = 1 << 31;
        let exact = i128::from(to_i64(n));
        assert_eq!(distances_of_ranges(0, n, n), exact * (exact * exact - 1) / 3);
        assert_eq!(distances_of_ranges(to_i64(n) + 5, n, n), exact * exact * (exact + 5));
    }
}
