//! A tile of queries against a block of keys, by the formulas in float64. What is not to be read holds NaN.

use proptest::prelude::RngExt;
use proptest::test_runner::{RngAlgorithm, TestRng};

use super::*;
use crate::kernels::Stream;
use crate::mra::attend::QueryTerms;
use crate::mra::problem::{Options, Problem};
use crate::simd::{Level, MAX_ULPS, tmul_levels};
use crate::test_support::{Padded, ROUNDOFF, ROUNDOFF_BF16};

/// Rows of the sums before those of the block.
const ROWS_BEFORE: usize = 2;

/// Queries of a range, of which the tile has every other one.
const RANGE: usize = 41;

/// A number and how far the computed one may be from it.
#[derive(Clone, Copy)]
struct Bounded(f64, f64);

impl Bounded {
    /// As an operand of a product on tiles.
    fn rounded(self) -> Self {
        Self(self.0, self.1 + ROUNDOFF_BF16 * (self.0.abs() + self.1))
    }

    /// A sum that starts somewhere; a factor of 0 hides what it is multiplied by.
    fn sum(start: f32, terms: &[(Self, f64)]) -> Self {
        let counted = || terms.iter().filter(|(factor, _)| factor.0 != 0.0);
        let (start, count) = (f64::from(start), terms.len() + 4);
        let magnitude = start.abs() + counted().map(|(factor, x)| (factor.0.abs() + factor.1) * x.abs()).sum::<f64>();
        let exact = start + counted().map(|(factor, x)| factor.0 * x).sum::<f64>();
        Self(exact, counted().map(|(factor, x)| factor.1 * x.abs()).sum::<f64>() + count as f64 * ROUNDOFF * magnitude)
    }

    fn check(self, actual: f32, context: impl Fn() -> String) {
        let error = (f64::from(actual) - self.0).abs();
        let same = if self.0.is_nan() { actual.is_nan() } else { error <= self.1 };
        assert!(same, "{}: {actual}, not {} by {}", context(), self.0, self.1);
    }
}

struct Tile {
    sizes: [usize; 2],
    /// Queries, gradients, keys and values as they are stored.
    stored: [Padded<bf16>; 4],
    queries: Vec<u32>,
    tokens: Vec<u32>,
    terms: Vec<QueryTerms<f32>>,
    /// dq, dk and dv before.
    before: [Vec<f32>; 3],
}

impl Tile {
    fn new(level: Level, [head_dim, value_dim, keys]: [usize; 3]) -> Self {
        let mut rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[19; 32]);
        let (queries, tokens): (Vec<u32>, Vec<u32>) = (
            (0u32..).map(|query| 2 * query + 1).take(RANGE / 2).collect(),
            (0u32..).map(|key| 3 * key + 1).take(keys).collect(),
        );
        let mut rows = |count, cols, used: &[u32]| Padded::of_rows(count, cols, used, || rng.random_range(-1.0..1.0));
        let dims = [head_dim, value_dim];
        let [q, g] = dims.map(|dim| rows(RANGE, dim, &queries));
        let [k, v] = dims.map(|dim| rows(3 * keys + 2, dim, &tokens));
        let widths = dims.map(|dim| dim.next_multiple_of(f32::lanes(level)));
        let mut numbers = |count: usize| (0..count).map(|_| rng.random_range(-0.5f32..0.5)).collect::<Vec<_>>();
        let sums = ROWS_BEFORE + keys;
        let before = [numbers(RANGE * widths[0]), numbers(sums * widths[0]), numbers(sums * widths[1])];
        let lse = |x: f32| QueryTerms { lse: 2.0 + x, delta: x, idle: false };
        let terms = numbers(RANGE).into_iter().map(lse).collect();
        Self { sizes: dims, stored: [q, g, k, v], queries, tokens, terms, before }
    }

    fn row(&self, which: usize, row: u32) -> &[bf16] {
        self.stored[which].row(row as usize)
    }

    /// dq, dk and dv after it; `hidden` says which pairs of a key and a lane do not count.
    fn compute(&self, level: Level, guard: bool, hidden: impl Fn(usize, usize) -> bool) -> [Vec<f32>; 3] {
        let ([head_dim, value_dim], keys) = (self.sizes, self.tokens.len());
        let options = Options { block_size: keys, ..Options::new(level) };
        let key_len = 3 * keys + 2;
        let problem = Problem::new([1, 1, RANGE, head_dim], [1, 1, key_len, head_dim], &options).expect("a valid problem");
        let mut tile = GradientTile::<f32>::for_tensors::<bf16>(&problem, RANGE, value_dim);
        let widths = self.sizes.map(|dim| problem.padded::<f32>(dim));
        let mut rows = RangeRows::new(RANGE, widths[0], widths[1]);
        rows.fill::<bf16>(level, RANGE, &self.queries, |query| {
            let number = u32::try_from(query).expect("few");
            (self.row(0, number), self.row(1, number), self.terms[query])
        });
        let widened = [2, 3].map(|which| {
            let width = widths[which % 2];
            let mut data = vec![0f32; keys * width];
            for (to, &token) in data.chunks_exact_mut(width).zip(&self.tokens) {
                to.iter_mut().zip(self.row(which, token)).for_each(|(to, x)| *to = x.to_f32());
            }
            data
        });
        let of_keys = KeyRows {
            keys: Matrix::new(&widened[0], keys, widths[0], widths[0]),
            values: Matrix::new(&widened[1], keys, widths[1], widths[1]),
            first: 10 + ROWS_BEFORE,
            names: &[],
            guard,
            bf16: Some((self.stored[2].matrix(), self.stored[3].matrix(), &self.tokens)),
        };
        tile.start(&rows, &self.queries, Stream::Exact, (0, 0), guard);
        tile.differentiate(of_keys, |logits, columns| {
            for (place, logit) in logits.iter_mut().enumerate() {
                if hidden(place / columns, place % columns) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        });
        let [dq, mut dk, mut dv] = self.before.clone();
        let mut sum = Buffer::scratch(dq.len());
        sum.copy_from_slice(&dq);
        let mut sums = KeySums { dk: &mut dk, dv: &mut dv, first: 10 };
        tile.add(&rows, &self.queries, of_keys, Some(&mut sums), Some(&mut sum));
        [sum.to_vec(), dk, dv]
    }

    /// The weight of a pair, and the gradient of its logit.
    fn pair(&self, key: usize, lane: usize, hidden: bool) -> [Bounded; 2] {
        if hidden {
            return [Bounded(0.0, 0.0); 2];
        }
        let (query, token, scale) = (self.queries[lane], self.tokens[key], (self.sizes[0] as f64).sqrt().recip());
        let QueryTerms { lse, delta, .. } = self.terms[query as usize];
        let (lse, delta) = (f64::from(lse), f64::from(delta));
        let dot = |x: &[bf16], y: &[bf16], factor: f64| {
            let products: Vec<f64> = x.iter().zip(y).map(|(&x, &y)| factor * f64::from(x) * f64::from(y)).collect();
            let magnitude = products.iter().map(|x| x.abs()).sum::<f64>();
            Bounded(products.iter().sum(), (x.len() + 4) as f64 * ROUNDOFF * magnitude)
        };
        let logit = dot(self.row(0, query), self.row(2, token), scale);
        let product = dot(self.row(1, query), self.row(3, token), 1.0);
        let weight = (logit.0 - lse).exp();
        let relative = logit.1 + ROUNDOFF * ((logit.0 - lse).abs() + 2.0 * MAX_ULPS);
        // What second-order terms add is less than a hundredth.
        let weight = Bounded(weight, 1.01 * weight * relative);
        let difference = Bounded(product.0 - delta, product.1 + ROUNDOFF * (product.0.abs() + delta.abs()));
        let gradient = scale * weight.0 * difference.0;
        let error = scale * (weight.0 * difference.1 + weight.1 * difference.0.abs()) + 3.0 * ROUNDOFF * gradient.abs();
        [weight, Bounded(gradient, 1.01 * error)]
    }

    fn check(&self, level: Level, guard: bool, hidden: impl Fn(usize, usize) -> bool) {
        let [dq, dk, dv] = self.compute(level, guard, &hidden);
        let pair = |key, lane| self.pair(key, lane, hidden(key, lane)).map(Bounded::rounded);
        let number = |which, row, channel: usize| self.row(which, row).get(channel).map_or(0.0, |&x| f64::from(x));
        let context = |name: &str, row, channel| {
            format!("{}: {name} at {row}, {channel} of {:?}, {} keys, {guard}", level.name(), self.sizes, self.tokens.len())
        };
        let widths = self.sizes.map(|dim| dim.next_multiple_of(f32::lanes(level)));
        for (row, (dq, before)) in dq.chunks_exact(widths[0]).zip(self.before[0].chunks_exact(widths[0])).enumerate() {
            let Some(lane) = self.queries.iter().position(|&query| query as usize == row) else {
                assert!(dq == before, "{}", context("a query of another tile", row, 0));
                continue;
            };
            let factors: Vec<_> = (0..self.tokens.len()).map(|key| pair(key, lane)[1]).collect();
            for channel in 0..self.sizes[0] {
                let terms: Vec<_> =
                    factors.iter().zip(&self.tokens).map(|(&factor, &token)| (factor, number(2, token, channel))).collect();
                Bounded::sum(before[channel], &terms).check(dq[channel], || context("dq", row, channel));
            }
        }
        for (which, name, sums) in [(0, "dk", &dk), (1, "dv", &dv)] {
            let (before, width) = (&self.before[1 + which], widths[which]);
            assert!(sums[..ROWS_BEFORE * width] == before[..ROWS_BEFORE * width], "{}", context("before", 0, 0));
            for key in 0..self.tokens.len() {
                let place = (ROWS_BEFORE + key) * width;
                let factors: Vec<_> = (0..self.queries.len()).map(|lane| pair(key, lane)[1 - which]).collect();
                for channel in 0..self.sizes[which] {
                    let terms: Vec<_> = factors
                        .iter()
                        .zip(&self.queries)
                        .map(|(&factor, &query)| (factor, number(which, query, channel)))
                        .collect();
                    let expected = Bounded::sum(before[place + channel], &terms);
                    expected.check(sums[place + channel], || context(name, key, channel));
                }
            }
        }
    }
}

const SIZES: [[usize; 3]; 3] = [[20, 37, 19], [32, 16, 32], [64, 64, 47]];

/// A few pairs that do not count, at any level.
fn some(key: usize, lane: usize) -> bool {
    (3 * key + lane).is_multiple_of(7)
}

#[test]
fn gradients_are_those_of_the_formulas() {
    for level in tmul_levels() {
        for sizes in SIZES {
            let tile = Tile::new(level, sizes);
            tile.check(level, false, some);
            let bits =
                |guard| tile.compute(level, guard, some).map(|sums| sums.into_iter().map(f32::to_bits).collect::<Vec<_>>());
            assert!(bits(false) == bits(true), "{}: a guard changes what is finite", level.name());
        }
    }
}

/// A query of NaN and a key of NaN reach what counts for them, and nothing else.
#[test]
fn a_guard_hides_what_does_not_count() {
    for level in tmul_levels() {
        for sizes in SIZES {
            let mut tile = Tile::new(level, sizes);
            let (lane, key) = (3, 5);
            for (which, row) in [(0, tile.queries[lane]), (2, tile.tokens[key])] {
                tile.stored[which].row_mut(row as usize).fill(bf16::NAN);
            }
            // The query sees the first two keys, and the first two queries see the key.
            tile.check(level, true, |k, l| (l == lane && k >= 2) || (k == key && l >= 2) || some(k, l));
        }
    }
}
