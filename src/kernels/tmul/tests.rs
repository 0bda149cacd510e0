//! The product and what rounds its operands, against float64.

use half::bf16;
use proptest::prelude::RngExt;
use proptest::test_runner::{RngAlgorithm, TestRng};

use super::*;
use crate::kernels::{PackPairs, RoundColumns, RoundLines};
use crate::simd::{Level, TmulUnit, tmul_levels};
use crate::test_support::{GAP, Padded, ROUNDOFF};

fn unit(level: Level) -> TmulUnit {
    TmulUnit::of(level).expect("a level with tiles")
}

/// Rows of numbers with NaN behind each of them.
fn rows<T: Copy>(rows: usize, cols: usize, nan: T, element: impl FnMut(usize, usize) -> T) -> Vec<T> {
    Padded::new(rows, cols, nan, element).data
}

/// Which rows of a matrix of `count` rows, and of more that hold NaN, are the operand.
fn chosen(order: &str, count: usize) -> Option<Vec<u32>> {
    let count = u32::try_from(count).expect("a small size");
    match order {
        "all" => None,
        "consecutive" => Some((2..2 + count).collect()),
        "blocks" => Some((0..count).map(|row| row + row / 8 * 8).collect()),
        _ => Some((0..count).rev().map(|row| 2 * row + 1).collect()),
    }
}

fn check_product(level: Level, [m, k, n]: [usize; 3], order: &str, init: TmulInit<'_>) {
    let mut rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let picks = chosen(order, m);
    let all = picks.as_ref().map_or(m, |picks| picks.iter().max().map_or(0, |&last| last as usize + 2));
    let row_of = |row: usize| picks.as_ref().map_or(row, |picks| picks[row] as usize);
    let mut used = vec![false; all];
    (0..m).for_each(|row| used[row_of(row)] = true);
    let a = rows(all, k, bf16::NAN, |row, _| {
        let x = bf16::from_f32(rng.random_range(-2.0..2.0));
        if used[row] { x } else { bf16::NAN }
    });
    let b: Vec<Vec<bf16>> = (0..k).map(|_| (0..n).map(|_| bf16::from_f32(rng.random_range(-2.0..2.0))).collect()).collect();
    let pairs = k.next_multiple_of(TILE_DEPTH) / 2;
    let packed =
        rows(pairs, 2 * n, bf16::NAN, |pair, column| b.get(2 * pair + column % 2).map_or(bf16::ZERO, |row| row[column / 2]));
    let mut c = rows(m + 1, n, f32::NAN, |row, _| if row < m { rng.random_range(-1.0..1.0) } else { f32::NAN });
    let before = c.clone();
    let mut room = vec![bf16::NAN; room_for_rows(k)];
    let length = (m * (n + GAP)).saturating_sub(GAP);
    unit(level).run(TmulGemm {
        a: Matrix::new(&a, all, k, k + GAP),
        a_rows: picks.as_deref(),
        b: Matrix::new(&packed, pairs, 2 * n, 2 * n + GAP),
        c: MatrixMut::new(&mut c[..length], m, n, n + GAP),
        init,
        room: &mut room,
    });
    for (place, (&result, &before)) in c.iter().zip(&before).enumerate() {
        let (row, column) = (place / (n + GAP), place % (n + GAP));
        if row >= m || column >= n {
            assert!(result.is_nan(), "{}: {m} x {k} x {n}: written behind {row}", level.name());
            continue;
        }
        let product = |p: usize| f64::from(a[row_of(row) * (k + GAP) + p]) * f64::from(b[p][column]);
        let (factor, start) = match init {
            TmulInit::Scaled(factor) => (f64::from(factor), 0.0),
            TmulInit::Keep => (1.0, f64::from(before)),
            TmulInit::ScaleRows(factors) => (1.0, f64::from(factors[row]) * f64::from(before)),
        };
        let exact = start + factor * (0..k).map(product).sum::<f64>();
        let magnitude = start.abs() + factor.abs() * (0..k).map(|p| product(p).abs()).sum::<f64>();
        let error = (f64::from(result) - exact).abs();
        let bound = (k + 4) as f64 * ROUNDOFF * magnitude;
        assert!(error <= bound, "{}: {m} x {k} x {n}, {order}, at {row}, {column}: {result:e}, not {exact:e}", level.name());
    }
}

const ORDERS: [&str; 4] = ["all", "consecutive", "blocks", "backwards"];

#[test]
fn products() {
    let factors: Vec<f32> = (0..64).map(|row| if row % 3 == 0 { 1.0 } else { 0.05 * row as f32 }).collect();
    for level in tmul_levels() {
        for (index, m) in [0, 1, 15, 16, 17, 31, 32, 33, 49].into_iter().enumerate() {
            for k in [1, 3, 31, 32, 33, 64, 80, 128] {
                for n in [0, 16, 32, 48] {
                    let order = ORDERS[(index + k) % ORDERS.len()];
                    for init in [TmulInit::Scaled(-0.37), TmulInit::Keep, TmulInit::ScaleRows(&factors)] {
                        check_product(level, [m, k, n], order, init);
                    }
                }
            }
        }
        // Keys of whole tiles are read where they lie, whichever way they are listed.
        for order in ORDERS {
            check_product(level, [48, 64, 32], order, TmulInit::Scaled(1.0));
        }
    }
}

#[test]
fn rows_and_columns_are_rounded_with_zeros_behind_them() {
    for level in tmul_levels() {
        for m in [1, 2, 15, 16, 31, 32, 33, 70] {
            for n in [16, 32, 48] {
                let from = rows(m, n, f32::NAN, |row, column| (row as f32 - 3.3) * (column as f32 + 0.1));
                let from = Matrix::new(&from, m, n, n + GAP);
                let (deep, wide) = (m.next_multiple_of(TILE_DEPTH), n.next_multiple_of(TILE_DEPTH));
                let mut columns = rows(n, deep, bf16::NAN, |_, _| bf16::NAN);
                unit(level).run(RoundColumns { from, to: MatrixMut::new(&mut columns, n, deep, deep + GAP) });
                let mut lines = rows(m, wide, bf16::NAN, |_, _| bf16::NAN);
                unit(level).run(RoundLines { from, to: MatrixMut::new(&mut lines, m, wide, wide + GAP) });
                let rounded = |row: usize, column: usize| {
                    if row < m && column < n { bf16::from_f32(from.row(row)[column]) } else { bf16::ZERO }
                };
                let expected = rows(n, deep, bf16::NAN, |column, row| rounded(row, column));
                assert!(same(&columns, &expected), "{}: columns of {m} x {n}", level.name());
                let expected = rows(m, wide, bf16::NAN, rounded);
                assert!(same(&lines, &expected), "{}: rows of {m} x {n}", level.name());
            }
        }
    }
}

#[test]
fn pairs_of_channels_are_packed() {
    for level in tmul_levels() {
        for count in [0, 1, 15, 16, 17, 32, 40] {
            for channels in [1, 3, 31, 32, 33, 64, 80] {
                for order in ["consecutive", "backwards"] {
                    let picks = chosen(order, count).expect("a list");
                    let all = picks.iter().max().map_or(0, |&last| last as usize + 2);
                    let number = |row: usize, column: usize| {
                        let is_chosen = picks.iter().any(|&pick| pick as usize == row);
                        if is_chosen { bf16::from_f32((row * 100 + column) as f32) } else { bf16::NAN }
                    };
                    let from = rows(all, channels, bf16::NAN, number);
                    let (pairs, columns) = (channels.next_multiple_of(TILE_DEPTH) / 2, count.next_multiple_of(TILE));
                    let mut to = rows(pairs, 2 * columns, bf16::NAN, |_, _| bf16::NAN);
                    unit(level).run(PackPairs {
                        from: Matrix::new(&from, all, channels, channels + GAP),
                        rows: &picks,
                        to: MatrixMut::new(&mut to, pairs, 2 * columns, 2 * columns + GAP),
                    });
                    let expected = rows(pairs, 2 * columns, bf16::NAN, |pair, column| {
                        let (row, channel) = (column / 2, 2 * pair + column % 2);
                        if row < count && channel < channels { number(picks[row] as usize, channel) } else { bf16::ZERO }
                    });
                    assert!(same(&to, &expected), "{}: {count} rows of {channels}, {order}", level.name());
                }
            }
        }
    }
}

fn same(a: &[bf16], b: &[bf16]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    for level in tmul_levels() {
        let refused = |a_rows: &[u32], depth: usize, pairs: usize, room: usize| {
            let body = std::panic::AssertUnwindSafe(|| {
                let (a, b) = (vec![bf16::ONE; 4 * depth], vec![bf16::ONE; pairs * 2 * TILE]);
                let mut c = vec![0.0; a_rows.len() * TILE];
                unit(level).run(TmulGemm {
                    a: Matrix::new(&a, 4, depth, depth),
                    a_rows: Some(a_rows),
                    b: Matrix::new(&b, pairs, 2 * TILE, 2 * TILE),
                    c: MatrixMut::new(&mut c, a_rows.len(), TILE, TILE),
                    init: TmulInit::Keep,
                    room: &mut vec![bf16::ZERO; room],
                });
            });
            std::panic::catch_unwind(body).is_err()
        };
        assert!(!refused(&[3, 0], 6, 16, 1024), "{}", level.name());
        assert!(refused(&[4], 6, 16, 1024), "{}: a row beyond the last one", level.name());
        assert!(refused(&[0], 6, 3, 1024) && refused(&[0], 33, 16, 1024), "{}: rows of B", level.name());
        assert!(refused(&[0], 6, 16, 1023), "{}: room", level.name());
    }
}
