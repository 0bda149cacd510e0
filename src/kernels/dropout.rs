//! Dropout of attention weights, decided by a hash.
//!
//! ```text
//! row  = hash(seed, stream, head, query)                           64 bits, once per query
//! keep = hash32(row, key) >= p * 2^32                              for each weight
//! weights[s, t] = keep ? weights[s, t] / (1 - p) : 0
//! ```
//!
//! The decision depends on nothing but the seed and the place in the matrix of weights. So backward makes it again rather
//! than read it, and no tile, thread or order of computation has a say.
//!
//! The hash of a key is two rounds of multiplication and shift in 32 bits ("lowbias32" by C. Wellons), with half of the row's
//! 64 bits put in before each round: every instruction set has these operations on whole vectors, and the compiler uses
//! them for the plain loop below.

use super::MatrixMut;
use crate::simd::{Kernel, Scalar, Simd};

/// Which weights a query's row of decisions is for: they must not share decisions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    /// Those of keys.
    Exact,
    /// Those of blocks of keys that are taken as a unit.
    Coarse,
}

/// A rate of dropout and the seed of its decisions.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dropout {
    seed: u64,
    threshold: u32,
    factor: f64,
    /// Sets the blocks of a level apart from those of the others.
    level: u64,
}

impl Dropout {
    /// Drops weights with probability `p`, in [0, 1]; `None` if that is 0.
    pub(crate) fn new(p: f64, seed: u64) -> Option<Self> {
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "in [0, 2^32], and a cast of a float saturates; what p = 1 then keeps is multiplied by 0"
        )]
        let threshold = (p * 4_294_967_296.0).round() as u32;
        let factor = if p < 1.0 { 1.0 / (1.0 - p) } else { 0.0 };
        (p > 0.0).then_some(Self { seed, threshold, factor, level: 0 })
    }

    /// The same for the blocks of a level, counted from the coarsest one.
    pub(crate) fn at_level(self, level: usize) -> Self {
        Self { level: level as u64, ..self }
    }

    /// What the decisions of one query have in common. `head` is a flat index over all sequences; `query` is the number of
    /// a token, or of a block of tokens where the whole block shares its weights.
    pub(crate) fn row(&self, stream: Stream, head: usize, query: usize) -> u64 {
        let salt = match stream {
            Stream::Exact => 0,
            Stream::Coarse => 0x5851_f42d_4c95_7f2d_u64.wrapping_mul(2 * self.level + 1),
        };
        let start = mix(self.seed ^ salt);
        [head, query].into_iter().fold(start, |hash, number| mix(hash.wrapping_add(0x9e37_79b9_7f4a_7c15) ^ number as u64))
    }
}

/// The finaliser of splitmix64: a bijection in which every bit depends on every bit.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The hash of one weight, from both halves of [`Dropout::row`].
#[inline(always)]
fn hash(low: u32, high: u32, key: u32) -> u32 {
    let mut x = key.wrapping_mul(0x9e37_79b9) ^ low;
    x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d) ^ high;
    x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// [`Dropout::row`] of each query of a tile, in the layout of the kernel.
#[derive(Debug, Default)]
pub(crate) struct DropoutRows {
    low: Vec<u32>,
    high: Vec<u32>,
}

impl DropoutRows {
    /// Starts a tile of `columns` lanes with the rows of its queries; the lanes of no query are free.
    pub(crate) fn start(&mut self, columns: usize, rows: impl Iterator<Item = u64>) {
        self.low.clear();
        self.high.clear();
        for row in rows {
            #[allow(clippy::cast_possible_truncation, reason = "the halves of 64 bits")]
            let (low, high) = (row as u32, (row >> 32) as u32);
            self.low.push(low);
            self.high.push(high);
        }
        self.low.resize(columns, 0);
        self.high.resize(columns, 0);
    }
}

/// Drops weights of a tile, and divides the others by the probability to be kept.
pub(crate) struct DropWeights<'a, T> {
    /// One row per key, one column per query: weights, or what is multiplied with them in backward.
    pub(crate) weights: MatrixMut<'a, T>,
    /// The number of each row's key, or block of keys; the low 32 bits count.
    pub(crate) keys: &'a [u32],
    /// The row of each column's query.
    pub(crate) rows: &'a DropoutRows,
    /// The rate. The seed is in the rows.
    pub(crate) dropout: Dropout,
}

impl<T: Scalar> Kernel<T> for DropWeights<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(mut self, _: S) {
        let (keys, queries, stride) = (self.weights.rows, self.weights.cols, self.weights.stride);
        assert_eq!(self.keys.len(), keys, "a number for each key");
        let (low, high) = (&self.rows.low[..queries], &self.rows.high[..queries]);
        let (threshold, factor) = (self.dropout.threshold, T::from_f64(self.dropout.factor));
        let data = self.weights.data_mut();
        for (index, &key) in self.keys.iter().enumerate() {
            let weights = &mut data[index * stride..][..queries];
            for ((weight, &low), &high) in weights.iter_mut().zip(low).zip(high) {
                *weight = if hash(low, high, key) >= threshold { *weight * factor } else { T::ZERO };
            }
        }
    }
}

/// The decisions of some queries about the same keys.
#[derive(Clone, Copy)]
pub(crate) struct Decisions<'a> {
    /// The numbers of the keys; the low 32 bits count.
    pub(crate) keys: &'a [u32],
    /// The row of each query.
    pub(crate) rows: &'a DropoutRows,
    /// The rate. The seed is in the rows.
    pub(crate) dropout: Dropout,
}

impl Decisions<'_> {
    /// Drops weights of one of the queries for the first ones of the keys, and divides the others by the probability to be kept.
    #[inline(always)]
    pub(super) fn drop_row<T: Scalar>(&self, query: usize, weights: &mut [T]) {
        assert!(weights.len() <= self.keys.len(), "a number for each key");
        let (low, high) = (self.rows.low[query], self.rows.high[query]);
        let (threshold, factor) = (self.dropout.threshold, T::from_f64(self.dropout.factor));
        for (weight, &key) in weights.iter_mut().zip(self.keys) {
            *weight = if hash(low, high, key) >= threshold { *weight * factor } else { T::ZERO };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Level;

    const SEED: u64 = 0x1234_5678_9abc_def0;

    /// Which of `queries x keys` weights are kept, one row per query.
    fn kept(dropout: &Dropout, level: Level, stream: Stream, head: usize, queries: usize, keys: u32) -> Vec<Vec<bool>> {
        let mut rows = DropoutRows::default();
        rows.start(queries, (0..queries).map(|query| dropout.row(stream, head, query)));
        let numbers: Vec<u32> = (0..keys).collect();
        let mut weights = vec![1f32; queries * numbers.len()];
        let kernel = DropWeights {
            weights: MatrixMut::new(&mut weights, numbers.len(), queries, queries),
            keys: &numbers,
            rows: &rows,
            dropout: *dropout,
        };
        f32::run(level, kernel);
        (0..queries).map(|t| weights.iter().skip(t).step_by(queries).map(|&w| w != 0.0).collect()).collect()
    }

    /// Asserts that `count` of `total` decisions is within 5 standard deviations of probability `p`.
    fn assert_rate(what: &str, count: usize, total: usize, p: f64) {
        let (expected, deviation) = (total as f64 * p, (total as f64 * p * (1.0 - p)).sqrt());
        assert!(
            (count as f64 - expected).abs() <= 5.0 * deviation,
            "{what}: {count} of {total}, expected {expected} +- {deviation}"
        );
    }

    fn equal<'a>(a: impl IntoIterator<Item = &'a bool>, b: impl IntoIterator<Item = &'a bool>) -> usize {
        a.into_iter().zip(b).filter(|(a, b)| a == b).count()
    }

    #[test]
    fn decisions_are_those_of_independent_draws() {
        let (level, n) = (Level::available()[0], 512);
        for p in [0.1, 0.5, 0.9] {
            let dropout = Dropout::new(p, SEED).unwrap();
            let agree = p * p + (1.0 - p) * (1.0 - p);
            let mask = kept(&dropout, level, Stream::Exact, 3, n, 512);
            assert_rate("kept", mask.iter().flatten().filter(|&&keep| keep).count(), n * n, 1.0 - p);
            for distance in [1, 2, 3, 4, 8, 16, 32, 64, 128, 256] {
                let pairs = n * (n - distance);
                let along: usize = mask.iter().map(|row| equal(row, &row[distance..])).sum();
                assert_rate("neighbouring keys", along, pairs, agree);
                let across: usize = mask.iter().zip(&mask[distance..]).map(|(a, b)| equal(a, b)).sum();
                assert_rate("neighbouring queries", across, pairs, agree);
            }
            let other_seed = Dropout::new(p, SEED + 1).unwrap();
            let others = [
                kept(&dropout, level, Stream::Coarse, 3, n, 512),
                kept(&dropout, level, Stream::Exact, 4, n, 512),
                kept(&other_seed, level, Stream::Exact, 3, n, 512),
            ];
            for other in others {
                let same: usize = mask.iter().zip(&other).map(|(a, b)| equal(a, b)).sum();
                assert_rate("stream, head, seed", same, n * n, agree);
            }
        }
    }

    #[test]
    fn every_level_decides_alike() {
        let dropout = Dropout::new(0.3, SEED).unwrap();
        let masks: Vec<_> =
            Level::available().into_iter().map(|level| kept(&dropout, level, Stream::Exact, 0, 48, 33)).collect();
        assert!(masks.iter().all(|mask| *mask == masks[0]));
    }

    #[test]
    #[allow(clippy::float_cmp, reason = "0 and the factor are exact")]
    fn weights_are_dropped_or_divided() {
        for level in Level::available() {
            let dropout = Dropout::new(0.75, SEED).unwrap();
            let mut rows = DropoutRows::default();
            rows.start(16, (0..5).map(|query| dropout.row(Stream::Exact, 0, query)));
            let mut weights = vec![f64::NAN; 16];
            weights.extend((0..16).map(f64::from));
            let matrix = MatrixMut::new(&mut weights[16..], 1, 16, 16);
            f64::run(level, DropWeights { weights: matrix, keys: &[7], rows: &rows, dropout });
            for (t, weight) in weights[16..].iter().enumerate() {
                assert!([0.0, 4.0 * t as f64].contains(weight), "{weight} of {t}");
            }
        }
    }

    #[test]
    fn the_ends_of_the_range() {
        assert!(Dropout::new(0.0, SEED).is_none());
        let all = Dropout::new(1.0, SEED).unwrap();
        let mask = kept(&all, Level::available()[0], Stream::Exact, 0, 64, 64);
        assert!(mask.iter().flatten().all(|keep| !keep));
    }
}
