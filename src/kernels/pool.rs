//! Sums of rows.

use super::Matrix;
use crate::simd::{Element, Kernel, Scalar, Simd};

/// Adds rows to a row.
///
/// ```text
/// for each channel c:  sums[c] = sums[c] + rows[0, c] + rows[1, c] + ...
/// ```
///
/// The sums of some channels stay in registers while all rows are added, so each element is read once and nothing is
/// written between. Every sum is in the order of the rows.
pub(crate) struct AddRows<'a, E: Element> {
    /// As they are stored.
    pub(crate) rows: Matrix<'a, E>,
    pub(crate) sums: &'a mut [E::Compute],
}

impl<E: Element> Kernel<E::Compute> for AddRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<E::Compute>>(self, _: S) {
        let Self { rows, sums } = self;
        // 64 channels in one go: parts of rows, one after the other, took twice as long to come from far memory.
        let channel = add::<E, 64>(rows, 0, sums);
        let channel = add::<E, 32>(rows, channel, sums);
        let channel = add::<E, 8>(rows, channel, sums);
        add::<E, 1>(rows, channel, sums);
    }
}

/// Adds `N` channels at a time, from one on; returns the first for which there are too few. The compiler makes vectors of the
/// instruction set.
#[inline(always)]
fn add<E: Element, const N: usize>(rows: Matrix<'_, E>, mut channel: usize, sums: &mut [E::Compute]) -> usize {
    while channel + N <= rows.cols {
        let sums = sums[channel..].first_chunk_mut::<N>().expect("a sum for each channel");
        let mut totals = *sums;
        for row in 0..rows.rows {
            let mut line = [E::Compute::ZERO; N];
            E::widen(&rows.row(row)[channel..channel + N], &mut line);
            for i in 0..N {
                totals[i] += line[i];
            }
        }
        *sums = totals;
        channel += N;
    }
    channel
}
