//! Operations on tiles: the same bits at every level, and the twin's by hand.
#![allow(clippy::float_cmp, reason = "these results are exact")]

use super::*;

/// Numbers of both signs and different sizes, whose sums are rounded.
fn number(seed: usize) -> f32 {
    ((seed * 37 % 101) as f32 - 50.0) * ((seed % 7) as f32 - 3.0).exp2() / 3.0
}

fn numbers(count: usize, shift: usize) -> Vec<bf16> {
    (0..count).map(|i| bf16::from_f32(number(i + shift))).collect()
}

/// The product of `ROWS` by `COLUMNS` tiles, with gaps between all rows.
struct Product<'a, const ROWS: usize, const COLUMNS: usize> {
    steps: usize,
    add: bool,
    sums: &'a mut Vec<f32>,
}

const GAP: usize = 6;

impl<const ROWS: usize, const COLUMNS: usize> KernelTmul for Product<'_, ROWS, COLUMNS> {
    #[inline(always)]
    unsafe fn run<S: Tmul>(self, simd: S) {
        let (depth, width) = (self.steps * TILE_DEPTH, COLUMNS * TILE);
        let a: [_; ROWS] = std::array::from_fn(|r| numbers(TILE * (depth + GAP), 11 * r));
        let b = numbers(self.steps * TILE * (2 * width + GAP), 5);
        *self.sums = (0..ROWS * TILE * (width + GAP)).map(|i| number(3 * i)).collect();
        let product = TileProduct {
            a: a.each_ref().map(Vec::as_ptr),
            a_strides: [depth + GAP; ROWS],
            b: b.as_ptr(),
            b_stride: 2 * width + GAP,
            steps: self.steps,
            c: self.sums.as_mut_ptr(),
            c_stride: width + GAP,
            add: self.add,
        };
        // SAFETY: the vectors hold all tiles, and the caller's.
        unsafe { simd.multiply::<ROWS, COLUMNS>(&product) }
    }
}

fn check_product<const ROWS: usize, const COLUMNS: usize>(level: Level) {
    let twin = TmulUnit::of(Level::PortableAmx(Portable)).expect("the twin");
    let unit = TmulUnit::of(level).expect("a level with tiles");
    for (steps, add) in [(0, false), (1, false), (1, true), (2, true), (4, false)] {
        let (mut sums, mut expected) = (Vec::new(), Vec::new());
        unit.run(Product::<ROWS, COLUMNS> { steps, add, sums: &mut sums });
        twin.run(Product::<ROWS, COLUMNS> { steps, add, sums: &mut expected });
        let bits = |sums: &[f32]| sums.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&sums), bits(&expected), "{}: {ROWS} x {COLUMNS} tiles, {steps} steps, {add}", level.name());
        let gap = |i: usize| i % (COLUMNS * TILE + GAP) >= COLUMNS * TILE;
        assert!(sums.iter().enumerate().all(|(i, &x)| !gap(i) || x == number(3 * i)), "between rows");
        let sum = |i: usize, x: f32| gap(i) || steps > 0 || x == if add { number(3 * i) } else { 0.0 };
        assert!(sums.iter().enumerate().all(|(i, &x)| sum(i, x)), "without steps");
    }
}

#[test]
fn products_have_the_same_bits() {
    for level in tmul_levels() {
        check_product::<1, 1>(level);
        check_product::<1, 2>(level);
        check_product::<2, 1>(level);
        check_product::<2, 2>(level);
    }
}

/// One sum of the first row and column.
struct Sum1<'a> {
    a: &'a [f32],
    b: &'a [f32],
    sum: &'a mut f32,
}

impl KernelTmul for Sum1<'_> {
    #[inline(always)]
    unsafe fn run<S: Tmul>(self, simd: S) {
        let (mut a, mut b, mut c) = ([bf16::ZERO; TILE * TILE_DEPTH], [bf16::ZERO; TILE * TILE_DEPTH], [0f32; TILE * TILE]);
        for (k, (&x, &y)) in self.a.iter().zip(self.b).enumerate() {
            a[k] = bf16::from_f32(x);
            b[k / 2 * TILE_DEPTH + k % 2] = bf16::from_f32(y);
        }
        c[0] = *self.sum;
        let (a, a_strides) = ([a.as_ptr()], [TILE_DEPTH]);
        let (b, b_stride) = (b.as_ptr(), TILE_DEPTH);
        let product = TileProduct { a, a_strides, b, b_stride, steps: 1, c: c.as_mut_ptr(), c_stride: TILE, add: true };
        // SAFETY: the arrays hold a tile each, and the caller's.
        unsafe { simd.multiply::<1, 1>(&product) };
        *self.sum = c[0];
    }
}

/// By hand: which of the sums is rounded first shows in what is left of 1 beside 2^26, of which the unit in the last place is 4 or 8.
#[test]
fn even_and_odd_products_are_summed_apart_and_the_sum_added_last() {
    let large = 2f32.powi(26);
    for level in tmul_levels() {
        let unit = TmulUnit::of(level).expect("a level with tiles");
        let dot = |a: &[f32], b: &[f32], mut sum: f32| {
            unit.run(Sum1 { a, b, sum: &mut sum });
            sum
        };
        let name = level.name();
        assert_eq!(dot(&[1.5, 2.0], &[-4.0, 5.0], 0.25), 4.25, "{name}");
        assert_eq!(dot(&[large, 1.0, -large, 1.0], &[1.0; 4], 0.0), 2.0, "{name}: the ones are by themselves");
        assert_eq!(dot(&[large, 0.0, 1.0, 0.0, -large, 0.0], &[1.0; 6], 0.0), 0.0, "{name}: in order");
        assert_eq!(dot(&[1.0, 1.0, 1.0, 1.0], &[1.0; 4], large), large, "{name}: 4 is half a unit, ties to even");
        assert_eq!(dot(&[2.0, 1.0, 2.0, 1.0], &[1.0; 4], large), large + 8.0, "{name}: 6 is not");
        assert_eq!(dot(&[1e-39], &[1.0], 1e-39), 0.0, "{name}: denormal numbers");
        assert_eq!(dot(&[1e-20], &[1e-20], 0.0), 0.0, "{name}: a denormal product");
    }
}

/// What [`Tmul::transpose_pairs`] and [`Tmul::store_rounded`] write.
struct Moves<'a>(&'a str);

impl KernelTmul for Moves<'_> {
    #[inline(always)]
    unsafe fn run<S: Tmul>(self, simd: S) {
        let (name, from_stride, stride) = (self.0, TILE_DEPTH + 1, TILE_DEPTH + 3);
        let from: Vec<bf16> = (0..TILE * from_stride).map(|i| bf16::from_bits(u16::try_from(i).expect("few"))).collect();
        let mut to = vec![bf16::MAX; TILE * stride];
        // SAFETY: the vectors hold as many numbers.
        unsafe { simd.transpose_pairs(from.as_ptr(), from_stride, to.as_mut_ptr(), stride) };
        for (place, x) in to.iter().enumerate() {
            let (row, column) = (place / stride, place % stride);
            let expected = if column < TILE_DEPTH { from[column / 2 * from_stride + 2 * row + column % 2] } else { bf16::MAX };
            assert_eq!(x.to_bits(), expected.to_bits(), "{name}: pairs at {row}, {column}");
        }
        let lanes = <<S::Pairs as DotBf16>::Float as crate::simd::Simd<f32>>::LANES;
        let numbers: [f32; TILE_DEPTH] = std::array::from_fn(number);
        let mut to = [bf16::MAX; TILE_DEPTH + 1];
        // SAFETY: the arrays hold two vectors of any level.
        unsafe {
            use crate::simd::Simd;
            let float = simd.pairs().float();
            let vectors = [float.load(numbers.as_ptr()), float.load(numbers.as_ptr().add(lanes))];
            simd.store_rounded(to.as_mut_ptr(), vectors);
        }
        for (i, x) in to.into_iter().enumerate() {
            let expected = if i < 2 * lanes { bf16::from_f32(numbers[i]) } else { bf16::MAX };
            assert_eq!(x.to_bits(), expected.to_bits(), "{name}: rounded {i}");
        }
    }
}

#[test]
fn pairs_are_transposed_and_vectors_rounded() {
    for level in tmul_levels() {
        TmulUnit::of(level).expect("a level with tiles").run(Moves(level.name()));
    }
}

/// Tiles stay configured until the last value of a thread is gone, and can be configured again.
#[test]
fn units_nest_and_belong_to_their_threads() {
    for level in tmul_levels() {
        let unit = || TmulUnit::of(level).expect("a level with tiles");
        let works = move |unit: &TmulUnit| {
            let mut sum = 1.0;
            unit.run(Sum1 { a: &[2.0, 3.0], b: &[5.0, 7.0], sum: &mut sum });
            assert_eq!(sum, 32.0, "{}", level.name());
        };
        for _ in 0..2 {
            let first = unit();
            let second = unit();
            drop(first);
            works(&second);
            std::thread::spawn(move || works(&TmulUnit::of(level).expect("a level with tiles"))).join().expect("a thread");
            works(&second);
        }
    }
}
