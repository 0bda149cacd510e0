//! All shapes of products against float64.

use proptest::prelude::RngExt;
use proptest::test_runner::{RngAlgorithm, TestRng};

use super::*;
use crate::simd::Level;
use crate::test_support::{GAP, Padded};

/// All products of these sizes against float64, element by element.
fn check<T: Scalar>(level: Level, m: usize, k: usize, n: usize, roundoff: f64) {
    let mut rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let factors: Vec<T> = (0..m).map(|_| T::from_f64(rng.random_range(-1.0..1.0))).collect();
    let backwards = |count: usize| (0..u32::try_from(count).expect("a small size")).rev().collect::<Vec<_>>();
    let (places, b_rows) = (backwards(m), backwards(k));
    let inits = [Init::Zero, Init::Keep, Init::ScaleRows(&factors), Init::KeepAt(&places)];
    for (a_transposed, init) in [false, true].into_iter().flat_map(|t| inits.map(|init| (t, init))) {
        // Rows of B and C in reverse order stand for any other order.
        let gather = !a_transposed && matches!(init, Init::Keep | Init::KeepAt(_));
        let row_of_b = |p: usize| if gather { k - 1 - p } else { p };
        let row_of_c = |r: usize| if matches!(init, Init::KeepAt(_)) { m - 1 - r } else { r };
        let mut number = |_, _| T::from_f64(rng.random_range(-1.0..1.0));
        let (rows, cols) = if a_transposed { (k, m) } else { (m, k) };
        let a = Padded::new(rows, cols, T::NAN, &mut number);
        let b = Padded::new(k, n, T::NAN, &mut number);
        let overwritten = matches!(init, Init::Zero);
        let mut c = Padded::new(m, n, T::NAN, |row, col| if overwritten { T::NAN } else { number(row, col) });
        let before = c.clone();
        let stride = n + GAP;
        let to = MatrixMut::new(&mut c.data, m, n, stride);
        let b_rows = gather.then_some(&b_rows[..]);
        T::run(level, Gemm { a: a.matrix(), a_transposed, b: b.matrix(), b_rows, c: to, init, ahead: None });
        for (row, col) in (0..m).flat_map(|row| (0..n).map(move |col| (row, col))) {
            let start = match init {
                Init::Zero => 0.0,
                Init::Keep | Init::KeepAt(_) => before.at(row_of_c(row), col).into(),
                Init::ScaleRows(factors) => factors[row].into() * before.at(row_of_c(row), col).into(),
            };
            let of_a = |p| if a_transposed { a.at(p, row) } else { a.at(row, p) }.into();
            let product = |p| of_a(p) * b.at(row_of_b(p), col).into();
            let sum = start + (0..k).map(product).sum::<f64>();
            // Each product and each sum may be rounded, in the order of k, and so may C: twice where it is scaled.
            let magnitude = start.abs() + (0..k).map(|p| product(p).abs()).sum::<f64>();
            let bound = (k + 2) as f64 * roundoff * magnitude;
            let error = (c.at(row_of_c(row), col).into() - sum).abs();
            assert!(
                error <= bound,
                "{}: {m} x {k} x {n}, transposed {a_transposed}, ({row}, {col}) is off by {error:e}, more than {bound:e}",
                level.name()
            );
        }
        let gaps = c.data.chunks_exact(stride).flat_map(|row| &row[n..]);
        assert!(gaps.into_iter().all(|&x| x.into().is_nan()), "{}: {m} x {k} x {n} wrote between rows of C", level.name());
    }
}

fn check_sizes<T: Scalar>(roundoff: f64) {
    for level in Level::available() {
        let lanes = T::lanes(level);
        for m in (0..=17).chain([32, 33]) {
            for k in [0, 1, 2, 7, 64] {
                for vectors in [0, 1, 2, 3, 6, 8] {
                    check::<T>(level, m, k, vectors * lanes, roundoff);
                }
            }
        }
    }
}

#[test]
fn float32() {
    check_sizes::<f32>(f64::from(f32::EPSILON) / 2.0);
}

#[test]
fn float64() {
    // The sums that it is compared with are rounded as often.
    check_sizes::<f64>(2.0 * f64::EPSILON / 2.0);
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    for (rows_of_b, cols_of_c) in [(4, 16), (3, 32)] {
        let (a, b) = (Padded::new(2, 3, f32::NAN, |_, _| 0.0), Padded::new(rows_of_b, 16, f32::NAN, |_, _| 0.0));
        let mut c = Padded::new(2, cols_of_c, f32::NAN, |_, _| 0.0);
        let refused = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let to = MatrixMut::new(&mut c.data, 2, cols_of_c, cols_of_c);
            let level = Level::available()[0];
            f32::run(
                level,
                Gemm { a: a.matrix(), a_transposed: false, b: b.matrix(), b_rows: None, c: to, init: Init::Zero, ahead: None },
            );
        }));
        assert!(refused.is_err(), "B with {rows_of_b} rows, C with {cols_of_c} columns");
    }
}
