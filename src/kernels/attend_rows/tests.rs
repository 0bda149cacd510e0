//! Steps of the softmax against sums in float64, and a query alone against the same one among others.

#![allow(clippy::float_cmp, reason = "what must be equal to the bit is compared so")]

use proptest::prelude::RngExt;
use proptest::test_runner::{RngAlgorithm, TestRng};

use super::*;
use crate::kernels::{DotRows, Dropout, DropoutRows, Stream};
use crate::simd::{Level, MAX_ULPS};
use crate::test_support::{GAP, ROUNDOFF};

/// Queries with a state, the packed keys and the values of a block.
struct Step {
    level: Level,
    channels: usize,
    keys: usize,
    width: usize,
    queries: Vec<f32>,
    packed: Vec<f32>,
    values: Vec<f32>,
    maximum: Vec<f32>,
    sum: Vec<f32>,
    sums: Vec<f32>,
}

impl Step {
    /// Random numbers, with NaN between rows and where there is no key. Every third query has seen nothing yet.
    fn new(level: Level, queries: usize, channels: usize, keys: usize, vectors: usize) -> Self {
        let mut rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[13; 32]);
        let (width, columns) = (vectors * f32::lanes(level), keys.next_multiple_of(f32::lanes(level)));
        let mut number = |scale: f32| scale * rng.random_range(-1.0f32..1.0);
        let mut rows = |rows: usize, used: usize, stride: usize| -> Vec<f32> {
            let index = 0..rows * stride;
            index.map(|index| if index % stride < used { number(1.0) } else { f32::NAN }).collect()
        };
        let (of_queries, packed) = (rows(queries, channels, channels + GAP), rows(channels, keys, columns));
        let (values, mut sums) = (rows(keys, width, width + GAP), rows(queries, width, width + GAP));
        let fresh = |query: usize| query.is_multiple_of(3);
        for row in sums.chunks_exact_mut(width + GAP).step_by(3) {
            row[..width].fill(0.0);
        }
        let maximum = (0..queries).map(|query| if fresh(query) { f32::NEG_INFINITY } else { number(2.0) }).collect();
        let sum = (0..queries).map(|query| if fresh(query) { 0.0 } else { 2.0 + number(1.0) }).collect();
        Self { level, channels, keys, width, queries: of_queries, packed, values, maximum, sum, sums }
    }

    /// The same, with maxima above every logit of the step.
    fn far_above(mut self) -> Self {
        self.maximum.fill(self.channels as f32 + 0.5);
        self
    }

    /// A step in which each query sees so many first keys, all if `seen` is empty.
    fn run(&mut self, numbers: &[u32], seen: &[u32], decisions: Option<Decisions<'_>>) {
        let ranges: Vec<[u32; 2]> = seen.iter().map(|&seen| [0, seen]).collect();
        self.run_on(numbers, if seen.is_empty() { Visible::All } else { Visible::Ranges(&ranges) }, decisions);
    }

    fn run_on(&mut self, numbers: &[u32], visible: Visible<'_, f32>, decisions: Option<Decisions<'_>>) {
        self.run_with(numbers, visible, decisions, None);
    }

    fn run_with(
        &mut self,
        numbers: &[u32],
        visible: Visible<'_, f32>,
        decisions: Option<Decisions<'_>>,
        given: Option<(&[f32], &[usize])>,
    ) {
        let (count, columns) = (self.maximum.len(), self.keys.next_multiple_of(f32::lanes(self.level)));
        let mut logits = vec![f32::NAN; 2 * MOST_QUERIES * columns];
        let values = Matrix::new(&self.values, self.keys, self.width, self.width + GAP);
        let step = AttendRows {
            queries: Matrix::new(&self.queries, count, self.channels, self.channels + GAP),
            keys: Matrix::new(&self.packed, self.channels, columns, columns),
            values,
            numbers,
            softcap: None,
            visible,
            given,
            decisions,
            maximum: &mut self.maximum,
            sum: &mut self.sum,
            sums: MatrixMut::new(&mut self.sums, count, self.width, self.width + GAP),
            weights: None,
            logits: &mut logits,
            ahead: Some([values; 2]),
        };
        f32::run(self.level, step);
    }

    fn row(&self, query: usize) -> (f32, f32, &[f32]) {
        (self.maximum[query], self.sum[query], &self.sums[query * (self.width + GAP)..][..self.width])
    }

    fn logit(&self, query: usize, key: usize) -> f64 {
        let (row, columns) = (&self.queries[query * (self.channels + GAP)..], self.packed.len() / self.channels);
        (0..self.channels).map(|c| f64::from(row[c]) * f64::from(self.packed[c * columns + key])).sum()
    }

    /// The state of one query after a step, in float64, from the state before it.
    fn assert_step(&self, before: &Self, query: usize, seen: usize, kept: impl Fn(usize) -> f64) {
        let logits: Vec<f64> = (0..seen).map(|key| before.logit(query, key)).collect();
        let (old_maximum, old_sum, old_sums) = before.row(query);
        let (maximum, sum, sums) = self.row(query);
        let highest = logits.iter().copied().fold(f64::from(old_maximum), f64::max);
        // Logits are at most `channels`, so is the rounding of one in parts of a roundoff for each of its channels.
        let of_logit = 2.0 * (self.channels as f64).powi(2) * ROUNDOFF;
        assert!((f64::from(maximum) - highest).abs() <= of_logit, "{maximum} for {highest}");
        let weight = |logit: f64| (logit - highest).exp();
        let relative = 3.0 * of_logit + (MAX_ULPS * 2.0 + (seen + 8) as f64) * ROUNDOFF;
        let rescaled = f64::from(old_sum) * weight(f64::from(old_maximum));
        let total = rescaled + logits.iter().map(|&logit| weight(logit)).sum::<f64>();
        assert!((f64::from(sum) - total).abs() <= relative * total, "{sum} for {total}");
        for channel in 0..self.width {
            let value = |key: usize| f64::from(before.values[key * (self.width + GAP) + channel]);
            let start = f64::from(old_sums[channel]) * weight(f64::from(old_maximum));
            let terms = || (0..seen).map(|key| kept(key) * weight(logits[key]) * value(key));
            let (exact, magnitude) = (start + terms().sum::<f64>(), start.abs() + terms().map(f64::abs).sum::<f64>());
            let error = (f64::from(sums[channel]) - exact).abs();
            assert!(error <= relative * magnitude, "{}: query {query}, channel {channel}: off by {error:e}", self.level.name());
        }
    }
}

fn numbers(count: usize) -> Vec<u32> {
    (0..u32::try_from(count).expect("a small number")).collect()
}

/// Every number of queries, so every height of tiles; every second query is left alone.
#[test]
fn a_step_is_the_softmax() {
    for level in Level::available() {
        for (channels, keys, vectors) in
            [(1, 1, 1), (5, 7, 2), (8, 8, 3), (7, 16, 1), (9, 31, 2), (6, 32, 4), (3, 64, 1), (4, 70, 2)]
        {
            for listed in (1..=19).chain([33]) {
                let before = Step::new(level, 2 * listed, channels, keys, vectors);
                let mut after = Step::new(level, 2 * listed, channels, keys, vectors);
                let odd: Vec<u32> = numbers(listed).iter().map(|number| 2 * number + 1).collect();
                let seen: Vec<u32> = numbers(listed).iter().map(|number| 1 + number % u32::try_from(keys).unwrap()).collect();
                for partly in [false, true] {
                    after.maximum.clone_from(&before.maximum);
                    after.sum.clone_from(&before.sum);
                    after.sums.clone_from(&before.sums);
                    after.run(&odd, if partly { &seen } else { &[] }, None);
                    for index in 0..listed {
                        let (alone, other) = (odd[index] as usize, odd[index] as usize - 1);
                        after.assert_step(&before, alone, if partly { seen[index] as usize } else { keys }, |_| 1.0);
                        assert_eq!(after.row(other), before.row(other), "a query that is not listed");
                    }
                    let gaps = after.sums.chunks_exact(after.width + GAP).flat_map(|row| &row[after.width..]);
                    assert!(gaps.into_iter().all(|x| x.is_nan()), "{} wrote between rows", level.name());
                }
            }
        }
    }
}

/// No maximum of a chunk changes then, and no sum is rescaled.
#[test]
fn a_step_below_all_maxima_is_the_softmax() {
    for level in Level::available() {
        for (channels, keys, vectors) in [(1, 1, 1), (5, 7, 2), (9, 31, 2), (6, 32, 4), (3, 64, 1), (4, 70, 2)] {
            let step = || Step::new(level, 19, channels, keys, vectors).far_above();
            let (before, mut after) = (step(), step());
            after.run(&numbers(19), &[], None);
            for query in 0..19 {
                after.assert_step(&before, query, keys, |_| 1.0);
                assert_eq!(after.maximum[query], before.maximum[query], "{}: query {query}", level.name());
            }
        }
    }
}

#[test]
fn a_query_has_the_same_bits_alone_and_behind_its_keys() {
    for level in Level::available() {
        for keys in [5, 32, 33, 64] {
            let mut together = Step::new(level, 20, 6, keys, 2);
            let seen: Vec<u32> = numbers(20).iter().map(|number| 1 + number % u32::try_from(keys).unwrap()).collect();
            together.run(&numbers(20), &seen, None);
            for query in 0..20 {
                let mut alone = Step::new(level, 20, 6, keys, 2);
                // As if there were no other keys.
                let (columns, count) = (alone.packed.len() / 6, seen[query] as usize);
                let shorter = count.next_multiple_of(f32::lanes(level));
                alone.packed = alone.packed.chunks_exact(columns).flat_map(|row| row[..shorter].to_vec()).collect();
                alone.keys = count;
                alone.run(&numbers(20)[query..=query], &[], None);
                assert_eq!(alone.row(query), together.row(query), "{}: query {query} of {keys} keys", level.name());
            }
        }
    }
}

/// Queries and keys are not looked at then: they hold NaN.
#[test]
fn logits_that_are_known_give_the_bits_of_the_products() {
    for level in Level::available() {
        for keys in [1, 5, 16, 32, 33] {
            let step = || Step::new(level, 40, 6, keys, 2);
            let (mut computed, mut given) = (step(), step());
            let odd: Vec<u32> = numbers(20).iter().map(|number| 2 * number + 1).collect();
            let places: Vec<usize> = (0..20).rev().map(|index| index * (keys + 2)).collect();
            let listed: Vec<(u32, usize)> = odd.iter().copied().zip(places.iter().copied()).collect();
            let columns = given.packed.len() / 6;
            let mut logits = vec![f32::NAN; 20 * (keys + 2)];
            let products = DotRows {
                queries: Matrix::new(&given.queries, 40, 6, 6 + GAP),
                keys: Matrix::new(&given.packed, 6, columns, columns),
                count: keys,
                listed: &listed,
                to: &mut logits,
            };
            f32::run(level, products);
            given.queries.fill(f32::NAN);
            given.packed.fill(f32::NAN);
            computed.run(&odd, &[], None);
            given.run_with(&odd, Visible::All, None, Some((&logits, &places)));
            for query in 0..40 {
                assert_eq!(given.row(query), computed.row(query), "{}: query {query} of {keys} keys", level.name());
            }
        }
    }
}

/// What some queries hold or see changes no bit of the others of their chunk.
#[test]
fn a_query_has_the_same_bits_among_extraordinary_ones() {
    for level in Level::available() {
        let step = || {
            let mut step = Step::new(level, 9, 6, 32, 2).far_above();
            step.maximum[1] = -0.5; // is raised
            step.queries[2 * (6 + GAP)] = f32::NAN;
            step.queries[3 * (6 + GAP)] = f32::INFINITY;
            step.maximum[4] = f32::NAN;
            step.maximum[6] = f32::NEG_INFINITY; // has seen nothing yet
            step
        };
        // Queries 5 and 6 see nothing.
        let seen = [32, 32, 32, 32, 32, 0, 0, 20, 32];
        let (before, mut together) = (step(), step());
        together.run(&numbers(9), &seen, None);
        for query in [0, 1, 7, 8] {
            let mut alone = step();
            alone.run(&[u32::try_from(query).unwrap()], &[seen[query]], None);
            assert_eq!(alone.row(query), together.row(query), "{}: query {query}", level.name());
            assert!(together.row(query).2.iter().all(|x| x.is_finite()));
        }
        for query in [2, 3, 4] {
            assert!(together.sum[query].is_nan() && together.row(query).2.iter().all(|x| x.is_nan()), "query {query}");
        }
        let mut nothing = step();
        nothing.run(&[5, 6], &[0, 0], None);
        for query in [5, 6] {
            assert_eq!(together.row(query), before.row(query), "{}: query {query}, which sees nothing", level.name());
            assert_eq!(nothing.row(query), before.row(query), "{}: query {query} without others", level.name());
        }
    }
}

#[test]
fn dropped_weights_add_nothing_and_count_in_the_sum() {
    let dropout = Dropout::new(0.4, 7).expect("a rate");
    for (level, partly) in Level::available().into_iter().flat_map(|level| [(level, false), (level, true)]) {
        let (before, mut after) = (Step::new(level, 9, 5, 12, 2), Step::new(level, 9, 5, 12, 2));
        let seen: Vec<u32> = if partly { (1..10).collect() } else { vec![] };
        let mut rows = DropoutRows::default();
        rows.start(9, (0..9).map(|query| dropout.row(Stream::Exact, 3, query)));
        let keys: Vec<u32> = (100..112).collect();
        let decisions = Decisions { keys: &keys, rows: &rows, dropout };
        after.run(&numbers(9), &seen, Some(decisions));
        for query in 0..9 {
            let mut kept = [1.0f32; 12];
            decisions.drop_row(query, &mut kept);
            assert!(kept.contains(&0.0) && kept.iter().any(|&factor| factor > 1.0), "some of both");
            after.assert_step(&before, query, seen.get(query).map_or(12, |&seen| seen as usize), |key| f64::from(kept[key]));
        }
    }
}

/// Keys hidden at the front, at the back and in the middle: ranges and biases of `-inf` give the bits of a step over the others alone.
#[test]
fn hidden_keys_change_no_bit() {
    for level in Level::available() {
        for (keys, from, to) in [(32, 5, 32), (32, 9, 17), (31, 30, 31), (16, 0, 3), (7, 7, 7)] {
            let whole = || Step::new(level, 3, 4, keys, 2);
            let mut by_range = whole();
            let ranges = [[u32::try_from(from).unwrap(), u32::try_from(to).unwrap()]; 3];
            by_range.run_on(&numbers(3), Visible::Ranges(&ranges), None);
            let bias: Vec<f32> =
                (0..3 * keys).map(|index| if (from..to).contains(&(index % keys)) { 0.0 } else { f32::NEG_INFINITY }).collect();
            let mut by_bias = whole();
            by_bias.run_on(&numbers(3), Visible::Biased(Matrix::new(&bias, 3, keys, keys)), None);
            // The other keys, moved to the front: sums of weights run lane by lane, so only those of values keep their order.
            let mut alone = whole();
            let columns = alone.packed.len() / 4;
            for row in alone.packed.chunks_exact_mut(columns) {
                row.copy_within(from..to, 0);
            }
            alone.values.copy_within(from * (alone.width + GAP)..to * (alone.width + GAP), 0);
            for query in 0..3 {
                assert_eq!(by_range.row(query), by_bias.row(query), "{}: {from}..{to} of {keys}", level.name());
                if from == to {
                    assert_eq!(by_range.row(query), whole().row(query), "{}: nothing seen", level.name());
                    continue;
                }
                let before = whole();
                let moved = Step { packed: alone.packed.clone(), values: alone.values.clone(), ..whole() };
                let (maximum, ..) = by_range.row(query);
                let highest =
                    (0..to - from).map(|key| moved.logit(query, key)).fold(f64::from(before.maximum[query]), f64::max);
                assert!((f64::from(maximum) - highest).abs() <= 1e-5, "{maximum} for {highest}");
                by_range.assert_step(&Step { maximum: before.maximum.clone(), ..moved }, query, to - from, |_| 1.0);
            }
        }
    }
}

/// A bias is added to logits that it does not hide.
#[test]
fn biases_are_added() {
    for level in Level::available() {
        let (mut shifted, mut plain) = (Step::new(level, 2, 4, 20, 1), Step::new(level, 2, 4, 20, 1));
        let bias = vec![0.5; 40];
        shifted.run_on(&numbers(2), Visible::Biased(Matrix::new(&bias, 2, 20, 20)), None);
        plain.maximum.iter_mut().for_each(|maximum| *maximum -= 0.5);
        plain.run(&numbers(2), &[], None);
        for query in 0..2 {
            let ((a, x, _), (b, y, _)) = (shifted.row(query), plain.row(query));
            assert!((a - b - 0.5).abs() <= 1e-5 && (x - y).abs() <= 1e-4 * y, "{}: {x} for {y}", level.name());
        }
    }
}
