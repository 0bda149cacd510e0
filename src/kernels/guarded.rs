//! A matrix product in which 0 times anything is 0.

use super::{Gemm, Init};
use crate::simd::{Kernel, Scalar, Simd};

/// The product of [`Gemm`] without the terms whose factor from A is 0. Without NaN and infinities the result is the same, bit
/// for bit but for the sign of a 0: sums run in the same order.
///
/// A weight of 0 times a NaN is NaN, so a value that a mask hides would spread through a plain product. This one is several
/// times slower, and only runs where the inputs have a NaN or an infinity.
pub(crate) struct Guarded<'a, 'c, T>(pub(crate) Gemm<'a, 'c, T>);

impl<T: Scalar> Kernel<T> for Guarded<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        let Gemm { a, a_transposed, b, b_rows, mut c, init, ahead: _ } = self.0;
        let (m, k) = if a_transposed { (a.cols, a.rows) } else { (a.rows, a.cols) };
        assert_eq!((b_rows.map_or(b.rows, <[u32]>::len), c.cols), (k, b.cols), "shapes of a product {m} x {k} x {}", b.cols);
        init.check(m, c.rows);
        assert_eq!(b.cols % S::LANES, 0, "columns of a product are whole vectors");
        for row in 0..m {
            for column in (0..b.cols).step_by(S::LANES) {
                let mut sum = simd.splat(T::ZERO);
                for p in 0..k {
                    let factor = if a_transposed { a.data()[p * a.stride + row] } else { a.data()[row * a.stride + p] };
                    if factor != T::ZERO {
                        let row_of_b = b_rows.map_or(p, |rows| rows[p] as usize);
                        let vector = &b.data()[row_of_b * b.stride + column..][..S::LANES];
                        // SAFETY: the slice holds a whole vector.
                        sum = simd.mul_add(simd.splat(factor), unsafe { simd.load(vector.as_ptr()) }, sum);
                    }
                }
                let (stride, row_of_c) = (c.stride, init.row(row));
                let place = &mut c.data_mut()[row_of_c * stride + column..][..S::LANES];
                // SAFETY: the slice holds a whole vector.
                unsafe {
                    let before = simd.load(place.as_ptr());
                    let after = match init {
                        Init::Zero => sum,
                        Init::Keep | Init::KeepAt(_) => simd.add(before, sum),
                        Init::ScaleRows(factors) => simd.mul_add(before, simd.splat(factors[row]), sum),
                    };
                    simd.store(place.as_mut_ptr(), after);
                }
            }
        }
    }
}

/// A product, guarded or not.
pub(crate) fn product<T: Scalar>(level: crate::simd::Level, guard: bool, gemm: Gemm<'_, '_, T>) {
    if guard { T::run(level, Guarded(gemm)) } else { T::run(level, gemm) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::{Matrix, MatrixMut};
    use crate::simd::Level;

    /// A 2 x 3 times 3 x n product: as the plain one, and with a row of NaN that only row 0 of A multiplies by 0.
    #[test]
    #[allow(clippy::float_cmp, reason = "the same bits are claimed")]
    fn zero_hides_not_a_number() {
        for level in Level::available() {
            let n = 3 * f32::lanes(level);
            for (a, a_transposed) in [([0.5, 0.0, -2.0, 1.0, 3.0, 0.25], false), ([0.5, 1.0, 0.0, 3.0, -2.0, 0.25], true)] {
                let mut b: Vec<f32> = (0..3 * n).map(|x| 0.1 + x as f32).collect();
                let run = |b: &[f32], init, guard| {
                    let mut c: Vec<f32> = (0..2 * n).map(|x| x as f32 / 7.0).collect();
                    let (rows, cols) = if a_transposed { (3, 2) } else { (2, 3) };
                    let gemm = Gemm {
                        a: Matrix::new(&a, rows, cols, cols),
                        a_transposed,
                        b: Matrix::new(b, 3, n, n),
                        b_rows: None,
                        c: MatrixMut::new(&mut c, 2, n, n),
                        init,
                        ahead: None,
                    };
                    product(level, guard, gemm);
                    c
                };
                for init in [Init::Zero, Init::Keep, Init::ScaleRows(&[0.5, 2.0])] {
                    let plain = run(&b, init, false);
                    assert_eq!(run(&b, init, true), plain);
                    b[n..2 * n].fill(f32::NAN);
                    let guarded = run(&b, init, true);
                    assert_eq!(guarded[..n], plain[..n]);
                    assert!(guarded[n..].iter().all(|x| x.is_nan()));
                    b[n..2 * n].fill_with(|| 1.0);
                    b.iter_mut().enumerate().for_each(|(x, b)| *b = 0.1 + x as f32);
                }
            }
        }
    }
}
