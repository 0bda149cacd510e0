//! Sums of rows.

use super::Matrix;
use crate::simd::{Kernel, Scalar, Simd};

/// Adds rows to a row.
///
/// ```text
/// for each channel c:  sums[c] = sums[c] + rows[0, c] + rows[1, c] + ...
/// ```
///
/// The sums of a few vectors of channels stay in registers while all rows are added, so each element is read once and
/// nothing is written between. Every sum is in the order of the rows, however many are added at once.
pub(crate) struct AddRows<'a, T> {
    pub(crate) rows: Matrix<'a, T>,
    pub(crate) sums: &'a mut [T],
}

/// Vectors that are summed at once: 64 channels in one go with AVX2.
const VECTORS: usize = 8;

impl<T: Scalar> Kernel<T> for AddRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        let (count, channels, stride) = (self.rows.rows, self.rows.cols, self.rows.stride);
        assert!(channels <= self.sums.len(), "a sum for each of {channels} channels");
        let (rows, sums) = (self.rows.as_ptr(), self.sums.as_mut_ptr());
        let mut channel = 0;
        // SAFETY: `count` rows of `channels` elements are readable by the checks of the matrix, and as many sums by the
        // assertion; each step stays below `channels`.
        unsafe {
            while channel + VECTORS * S::LANES <= channels {
                add::<T, S, VECTORS>(simd, rows.add(channel), count, stride, sums.add(channel));
                channel += VECTORS * S::LANES;
            }
            while channel + S::LANES <= channels {
                add::<T, S, 1>(simd, rows.add(channel), count, stride, sums.add(channel));
                channel += S::LANES;
            }
            for channel in channel..channels {
                for row in 0..count {
                    *sums.add(channel) += *rows.add(row * stride + channel);
                }
            }
        }
    }
}

/// # Safety
/// - `N` vectors are writable at `sums` and readable at each of `count` rows, `stride` scalars apart, from `rows` on.
#[inline(always)]
unsafe fn add<T: Scalar, S: Simd<T>, const N: usize>(simd: S, rows: *const T, count: usize, stride: usize, sums: *mut T) {
    // SAFETY: the caller's.
    unsafe {
        let mut vectors = [simd.splat(T::ZERO); N];
        for v in 0..N {
            vectors[v] = simd.load(sums.add(v * S::LANES));
        }
        for row in 0..count {
            for v in 0..N {
                vectors[v] = simd.add(vectors[v], simd.load(rows.add(row * stride + v * S::LANES)));
            }
        }
        for v in 0..N {
            simd.store(sums.add(v * S::LANES), vectors[v]);
        }
    }
}
