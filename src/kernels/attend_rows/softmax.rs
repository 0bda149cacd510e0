//! The softmax of the queries of a chunk, one row each.

use super::{AttendRows, Chunk, MOST_QUERIES};
use crate::simd::{Scalar, Simd};

impl<T: Scalar> AttendRows<'_, T> {
    /// Logits become weights; maxima and sums of their queries follow. `N` is the number of vectors of a row, or 1.
    ///
    /// # Safety
    /// - As [`Self::multiply_keys`], and rows are multiples of `N` vectors.
    #[inline(always)]
    pub(super) unsafe fn softmax<S: Simd<T>, const N: usize>(
        &mut self,
        simd: S,
        chunk: &Chunk<'_, T>,
        rescale: &mut [T; MOST_QUERIES],
    ) {
        let &Chunk { numbers, columns, .. } = chunk;
        let logits = self.logits.as_ptr();
        let (mut maxima, mut largest) = ([T::ZERO; MOST_QUERIES], [simd.splat(T::ZERO); MOST_QUERIES]);
        let mut reached = 0;
        for (r, &number) in numbers.iter().enumerate() {
            // SAFETY: the caller's.
            unsafe {
                maxima[r] = *self.maximum.get_unchecked(number as usize);
                largest[r] = row_maxima::<T, S, N>(simd, logits.add(r * columns), columns);
            }
            // Reached, not exceeded: a query that has seen nothing yet must not keep its -inf for the exponentials.
            reached |= simd.at_least(largest[r], simd.splat(maxima[r]));
        }
        if reached != 0 {
            // SAFETY: the caller's.
            unsafe { self.raise_maxima(simd, numbers, &largest, &mut maxima, rescale) };
        }
        // SAFETY: the caller's.
        let totals = unsafe { self.exponentials::<S, N>(simd, chunk, &maxima) };
        // Only now the sums across lanes, which each exponential would have to wait for.
        for (r, &number) in numbers.iter().enumerate() {
            let total = simd.sum_across(totals[r]);
            // SAFETY: the caller's.
            let sum = unsafe { self.sum.get_unchecked_mut(number as usize) };
            *sum = *sum * rescale[r] + total;
        }
    }

    /// Raises the maxima of some queries to the largest numbers of their rows, of which `largest` has that of each lane. `rescale`
    /// becomes what that makes of weights so far, and `-inf` among the `maxima`, but not in the state, the lowest finite number.
    ///
    /// # Safety
    /// - These are listed queries, at most [`MOST_QUERIES`].
    #[inline(always)]
    unsafe fn raise_maxima<S: Simd<T>>(
        &mut self,
        simd: S,
        numbers: &[u32],
        largest: &[S::V; MOST_QUERIES],
        maxima: &mut [T; MOST_QUERIES],
        rescale: &mut [T; MOST_QUERIES],
    ) {
        let before = *maxima;
        for (r, &number) in numbers.iter().enumerate() {
            let largest = simd.max_across(largest[r]);
            if largest > maxima[r] {
                maxima[r] = largest;
            }
            // SAFETY: the caller's.
            unsafe { *self.maximum.get_unchecked_mut(number as usize) = maxima[r] };
        }
        for r in (0..numbers.len()).step_by(S::LANES) {
            // SAFETY: vectors divide the arrays, asserted in `run`.
            unsafe {
                // -inf - -inf is NaN; the lowest finite number in its place leaves the weights 0.
                let finite = simd.max(simd.splat(T::LOWEST), simd.load(maxima.as_ptr().add(r)));
                simd.store(maxima.as_mut_ptr().add(r), finite);
                simd.store(rescale.as_mut_ptr().add(r), simd.exp(simd.sub(simd.load(before.as_ptr().add(r)), finite)));
            }
        }
    }

    /// Replaces each `x` of a row by `exp(x - maximum)` and returns the sum of each row in each lane, in the order of the row.
    ///
    /// # Safety
    /// - As [`Self::softmax`].
    #[inline(always)]
    unsafe fn exponentials<S: Simd<T>, const N: usize>(
        &mut self,
        simd: S,
        chunk: &Chunk<'_, T>,
        maxima: &[T; MOST_QUERIES],
    ) -> [S::V; MOST_QUERIES] {
        let (rows, columns) = (chunk.numbers.len(), chunk.columns);
        let (logits, others) = self.logits.split_at_mut(MOST_QUERIES * columns);
        let mut totals = [simd.splat(T::ZERO); MOST_QUERIES];
        for first in (0..columns).step_by(N * S::LANES) {
            for r in 0..rows {
                let maximum = simd.splat(maxima[r]);
                for v in 0..N {
                    // SAFETY: the caller's.
                    unsafe {
                        let place = r * columns + first + v * S::LANES;
                        let x = simd.sub(simd.load(logits.as_ptr().add(place)), maximum);
                        let [half, other] = simd.start_exp(x);
                        simd.store(logits.as_mut_ptr().add(place), half);
                        simd.store(others.as_mut_ptr().add(place), other);
                    }
                }
            }
            for r in 0..rows {
                for v in 0..N {
                    // SAFETY: the caller's.
                    unsafe {
                        let place = r * columns + first + v * S::LANES;
                        let logit = logits.as_mut_ptr().add(place);
                        let weight = simd.finish_exp([simd.load(logit), simd.load(others.as_ptr().add(place))]);
                        simd.store(logit, weight);
                        totals[r] = simd.add(totals[r], weight);
                    }
                }
            }
        }
        totals
    }
}

/// The largest number in each lane of a row.
///
/// # Safety
/// - `len` numbers, whole runs of `N` vectors, are readable from `row` on.
#[inline(always)]
unsafe fn row_maxima<T: Scalar, S: Simd<T>, const N: usize>(simd: S, row: *const T, len: usize) -> S::V {
    let mut maxima = [simd.splat(T::NEG_INFINITY); N];
    for column in (0..len).step_by(N * S::LANES) {
        for v in 0..N {
            // SAFETY: the caller's.
            maxima[v] = simd.max(unsafe { simd.load(row.add(column + v * S::LANES)) }, maxima[v]);
        }
    }
    for v in 1..N {
        maxima[0] = simd.max(maxima[v], maxima[0]);
    }
    maxima[0]
}
