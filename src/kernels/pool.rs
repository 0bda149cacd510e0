//! Sums of rows.

use super::Matrix;
use crate::simd::{Element, Kernel, Scalar, Simd};

/// Adds rows to a row.
///
/// ```text
/// for each channel c:  sums[c] = sums[c] + rows[0, c] + rows[1, c] + ...
/// ```
///
/// The sums of a few vectors of channels stay in registers while all rows are added, so each element is read once and
/// nothing is written between. Every sum is in the order of the rows, however many are added at once.
pub(crate) struct AddRows<'a, E: Element> {
    /// As they are stored.
    pub(crate) rows: Matrix<'a, E>,
    /// Scratch for a row, if it is to be widened; for several, if they are to be widened at a time.
    pub(crate) line: &'a mut [E::Compute],
    pub(crate) sums: &'a mut [E::Compute],
}

impl<E: Element> Kernel<E::Compute> for AddRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<E::Compute>>(self, simd: S) {
        let Self { rows, line, sums } = self;
        if let Some(data) = E::as_compute(rows.data()) {
            return add_rows(simd, Matrix::new(data, rows.rows, rows.cols, rows.stride), sums);
        }
        let (count, channels) = (rows.rows, rows.cols);
        let at_once = (line.len() / channels.max(1)).max(1);
        for first in (0..count).step_by(at_once) {
            let widened = at_once.min(count - first);
            for row in 0..widened {
                E::widen(rows.row(first + row), &mut line[row * channels..][..channels]);
            }
            add_rows(simd, Matrix::new(line, widened, channels, channels), sums);
        }
    }
}

#[inline(always)]
fn add_rows<T: Scalar, S: Simd<T>>(simd: S, matrix: Matrix<'_, T>, sums: &mut [T]) {
    let Matrix { rows: count, cols: channels, stride, .. } = matrix;
    assert!(channels <= sums.len(), "a sum for each of {channels} channels");
    let (rows, sums) = (matrix.as_ptr(), sums.as_mut_ptr());
    let mut channel = 0;
    // SAFETY: `count` rows of `channels` elements are readable by the checks of the matrix, and as many sums by the
    // assertion; each step stays below `channels`.
    unsafe {
        // 64 channels in one go, 8 vectors with AVX2 and 4 with AVX-512: parts of rows, one after the other, took twice as long
        // to come from far memory.
        while channel + 8 * S::LANES <= channels {
            add::<T, S, 8>(simd, rows.add(channel), count, stride, sums.add(channel));
            channel += 8 * S::LANES;
        }
        while channel + 4 * S::LANES <= channels {
            add::<T, S, 4>(simd, rows.add(channel), count, stride, sums.add(channel));
            channel += 4 * S::LANES;
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
