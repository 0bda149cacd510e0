//! The products and what makes their operands, against float64.

use half::bf16;
use proptest::prelude::RngExt;
use proptest::test_runner::{RngAlgorithm, TestRng};

use super::*;
use crate::kernels::{RoundRows, ZipRows, pack_channel_pairs};
use crate::simd::{Bf16Level, Level, Scalar, bf16_levels};
use crate::test_support::{Padded, ROUNDOFF, ROUNDOFF_BF16};

fn unset(rows: usize, cols: usize) -> Padded<bf16> {
    Padded::new(rows, cols, bf16::NAN, |_, _| bf16::NAN)
}

fn numbers(rng: &mut TestRng, rows: usize, cols: usize) -> Padded<bf16> {
    Padded::new(rows, cols, bf16::NAN, |_, _| bf16::from_f32(rng.random_range(-2.0..2.0)))
}

/// Rows out of order, of a matrix that has a row of NaN beside each of them.
fn every_other_backwards(rows: usize, matrix: &mut Padded<bf16>) -> Vec<u32> {
    assert_eq!(matrix.rows, 2 * rows);
    for row in (1..2 * rows).step_by(2) {
        matrix.row_mut(row).fill(bf16::NAN);
    }
    (0..u32::try_from(rows).expect("a small size")).rev().map(|row| 2 * row).collect()
}

fn run(level: Level, kernel: impl KernelBf16) {
    Bf16Level::of(level).expect("a level that multiplies bfloat16").run(kernel);
}

#[allow(clippy::too_many_arguments, reason = "where it is, and what is there")]
fn assert_near(level: Level, what: &str, sizes: [usize; 3], at: (usize, usize), result: f32, exact: f64, bound: f64) {
    let error = (f64::from(result) - exact).abs();
    assert!(error <= bound, "{}: {what} {sizes:?} at {at:?}: {result:e} is off by {error:e} from {exact:e}", level.name());
}

/// Queries packed and multiplied by keys, which lie among rows of NaN.
fn check_logits(level: Level, keys: usize, queries: usize, channels: usize) {
    let mut rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[9; 32]);
    let columns = queries.next_multiple_of(f32::lanes(level));
    let (q, mut k) = (numbers(&mut rng, queries, channels), numbers(&mut rng, 2 * keys, channels));
    let rows = every_other_backwards(keys, &mut k);
    let mut packed = unset(channels.div_ceil(2), 2 * columns);
    pack_channel_pairs((0..queries).map(|t| q.matrix().row(t)), &mut packed.matrix_mut());
    assert!(packed.gaps().all(bf16::is_nan), "pairs of channels between rows");
    let mut logits = Padded::new(keys, columns, f32::NAN, |_, _| f32::NAN);
    let scale = -0.37;
    let kernel = KeyDots { keys: k.matrix(), rows: &rows, queries: packed.matrix(), scale, logits: logits.matrix_mut() };
    run(level, kernel);
    assert!(logits.gaps().all(f32::is_nan), "logits between rows");
    for (s, t) in (0..keys).flat_map(|s| (0..columns).map(move |t| (s, t))) {
        let product = |c| if t < queries { f64::from(q.at(t, c)) * f64::from(k.at(rows[s] as usize, c)) } else { 0.0 };
        let exact = f64::from(scale) * (0..channels).map(product).sum::<f64>();
        let magnitude = f64::from(scale).abs() * (0..channels).map(|c| product(c).abs()).sum::<f64>();
        let bound = (channels + 2) as f64 * ROUNDOFF * magnitude;
        assert_near(level, "logits", [keys, queries, channels], (s, t), logits.at(s, t), exact, bound);
    }
}

/// Weights rounded and multiplied by values, which lie among rows of NaN.
fn check_values(level: Level, keys: usize, queries: usize, channels: usize) {
    let mut rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[11; 32]);
    let lanes = f32::lanes(level);
    let (columns, width, pairs) = (queries.next_multiple_of(lanes), channels.next_multiple_of(lanes), keys.div_ceil(2));
    let mut v = numbers(&mut rng, 2 * keys, channels);
    let rows = every_other_backwards(keys, &mut v);
    let weights = Padded::new(keys, columns, f32::NAN, |_, _| rng.random_range(0.0..1.0));
    let rescale: Vec<f32> = (0..queries).map(|_| rng.random_range(0.0..1.0)).collect();
    let mut sums = Padded::new(queries, width, f32::NAN, |_, _| rng.random_range(-1.0..1.0));
    let before = sums.clone();
    let (mut of_values, mut of_weights) = (unset(pairs, 2 * width), unset(pairs, 2 * columns));
    run(level, ZipRows { from: v.matrix(), rows: &rows, to: of_values.matrix_mut() });
    run(level, RoundRows { from: weights.matrix(), to: of_weights.matrix_mut() });
    assert!(of_values.gaps().chain(of_weights.gaps()).all(bf16::is_nan), "pairs of keys between rows");
    let kernel =
        AddValues { weights: of_weights.matrix(), values: of_values.matrix(), rescale: &rescale, sums: sums.matrix_mut() };
    run(level, kernel);
    assert!(sums.gaps().all(f32::is_nan), "sums between rows");
    for (t, c) in (0..queries).flat_map(|t| (0..width).map(move |c| (t, c))) {
        let product = |s: usize| {
            let value = if c < channels { f64::from(v.at(rows[s] as usize, c)) } else { 0.0 };
            f64::from(weights.at(s, t)) * value
        };
        let start = f64::from(rescale[t]) * f64::from(before.at(t, c));
        let exact = start + (0..keys).map(product).sum::<f64>();
        let magnitude = (0..keys).map(|s| product(s).abs()).sum::<f64>();
        let bound = ROUNDOFF_BF16 * magnitude + (keys + 3) as f64 * ROUNDOFF * 2.0 * (start.abs() + magnitude);
        assert_near(level, "values", [keys, queries, channels], (t, c), sums.at(t, c), exact, bound);
    }
}

fn check_sizes(check: impl Fn(Level, usize, usize, usize)) {
    for level in bf16_levels() {
        for keys in [0, 1, 2, 7, 8, 9, 17, 33] {
            for queries in [1, 5, 16, 17, 32, 49] {
                for channels in [1, 2, 3, 15, 16, 17, 31, 64, 81] {
                    check(level, keys, queries, channels);
                }
            }
        }
    }
}

#[test]
fn logits() {
    check_sizes(check_logits);
}

#[test]
fn weighted_values() {
    check_sizes(check_values);
}

/// Nothing is read or written where there are no columns.
#[test]
fn values_without_channels() {
    for level in bf16_levels() {
        check_values(level, 3, 2, 0);
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    for level in bf16_levels() {
        let refused = |rows: &[u32], channels_of_queries: usize| {
            let k = Padded::new(4, 6, bf16::NAN, |_, _| bf16::ONE);
            let columns = f32::lanes(level);
            let packed = unset(channels_of_queries.div_ceil(2), 2 * columns);
            let mut logits = Padded::new(rows.len(), columns, f32::NAN, |_, _| 0.0);
            let body = std::panic::AssertUnwindSafe(|| {
                let (queries, logits) = (packed.matrix(), logits.matrix_mut());
                run(level, KeyDots { keys: k.matrix(), rows, queries, scale: 1.0, logits });
            });
            std::panic::catch_unwind(body).is_err()
        };
        assert!(!refused(&[3, 0], 6) && !refused(&[3, 0], 5));
        assert!(refused(&[4], 6), "{}: a row beyond the last one", level.name());
        assert!(refused(&[0], 8) && refused(&[0], 4), "{}: channels", level.name());
    }
}
