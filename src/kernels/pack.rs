//! Copies of a tile in the layout and the number type that the products read.

use super::MatrixMut;
use crate::simd::{Element, Kernel, Level, SQUARE, Scalar, Simd};

/// Channels that are widened at a time, in registers or near them.
const WIDENED: usize = 32;

/// Writes `factor * row` as column `column` of `to`, for each of `rows`; the remaining columns become 0.
///
/// `to` has one row per channel.
pub(crate) fn pack_transposed<'a, E: Element>(
    level: Level,
    mut rows: impl ExactSizeIterator<Item = &'a [E]>,
    factor: E::Compute,
    to: &mut MatrixMut<'_, E::Compute>,
) {
    let (channels, columns, stride) = (to.rows, to.cols, to.stride);
    assert!(rows.len() <= columns, "{} rows into {columns} columns", rows.len());
    if channels == 0 {
        return;
    }
    let data = to.data_mut();
    for column in (0..columns).step_by(SQUARE) {
        let width = SQUARE.min(columns - column);
        let to = MatrixMut::new(&mut data[column..], channels, width, stride);
        E::Compute::run(level, Transpose { rows: [(); SQUARE].map(|()| rows.next()), factor, to });
    }
}

/// Writes rows as columns, and zeros where there is no row.
struct Transpose<'a, E: Element> {
    rows: [Option<&'a [E]>; SQUARE],
    factor: E::Compute,
    to: MatrixMut<'a, E::Compute>,
}

impl<E: Element> Kernel<E::Compute> for Transpose<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<E::Compute>>(mut self, simd: S) {
        let (channels, width, stride) = (self.to.rows, self.to.cols, self.to.stride);
        let mut lines = [[E::Compute::ZERO; WIDENED]; SQUARE];
        for first in (0..channels).step_by(WIDENED) {
            let count = WIDENED.min(channels - first);
            let mut starts = [std::ptr::null(); SQUARE];
            for r in 0..SQUARE {
                // No closure: it would borrow all lines anew, and be compiled without the instructions of `simd`.
                starts[r] = lines[r].as_ptr();
                if let Some(row) = self.rows[r] {
                    let row = &row[first..first + count];
                    if let Some(row) = E::as_compute(row) {
                        starts[r] = row.as_ptr();
                    } else {
                        let line = &mut lines[r];
                        E::widen(row, &mut line[..count]);
                        starts[r] = line.as_ptr();
                    }
                }
            }
            let whole = if width == SQUARE { count - count % SQUARE } else { 0 };
            let to = &mut self.to.data_mut()[first * stride..];
            for channel in (0..whole).step_by(SQUARE) {
                let rows = starts.map(|start| start.wrapping_add(channel));
                // SAFETY: a square of each lies before `count`, of rows that long and of as many rows of the matrix.
                unsafe { simd.transpose(rows, self.factor, to.as_mut_ptr().add(channel * stride), stride) };
            }
            for channel in whole..count {
                for r in 0..width {
                    // SAFETY: as above, one number.
                    to[channel * stride + r] = unsafe { *starts[r].add(channel) } * self.factor;
                }
            }
        }
    }
}

/// Writes `factor` times each of some numbers as tensors store them. The numbers are scratch afterwards.
pub(crate) struct NarrowScaled<'a, E: Element> {
    pub(crate) values: &'a mut [E::Compute],
    pub(crate) factor: E::Compute,
    /// As many.
    pub(crate) to: &'a mut [E],
}

impl<E: Element> Kernel<E::Compute> for NarrowScaled<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<E::Compute>>(self, _: S) {
        // The compiler makes vectors of the instruction set.
        E::narrow_scaled(self.values, self.factor, self.to);
    }
}

/// Writes the sums of some numbers and a multiple of others as tensors store them.
pub(crate) struct NarrowSum<'a, E: Element> {
    pub(crate) sums: &'a [E::Compute],
    /// A factor and at least as many numbers.
    pub(crate) share: Option<(E::Compute, &'a [E::Compute])>,
    /// Scratch for as many, if they are to be narrowed.
    pub(crate) line: &'a mut [E::Compute],
    /// As many.
    pub(crate) to: &'a mut [E],
}

impl<E: Element> Kernel<E::Compute> for NarrowSum<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<E::Compute>>(self, _: S) {
        let Some((factor, others)) = self.share else { return E::narrow(self.sums, self.to) };
        let line = &mut self.line[..self.sums.len()];
        for ((x, &sum), &other) in line.iter_mut().zip(self.sums).zip(others) {
            *x = sum + factor * other;
        }
        E::narrow(line, self.to);
    }
}

/// Writes each of `rows` as a row of `to`; channels beyond the row's own become 0.
pub(crate) fn pack_rows<'a, E: Element>(
    level: Level,
    rows: impl ExactSizeIterator<Item = &'a [E]>,
    to: &mut MatrixMut<'_, E::Compute>,
) {
    assert!(rows.len() <= to.rows, "{} rows into {}", rows.len(), to.rows);
    E::Compute::run(level, PackRows { rows, to });
}

struct PackRows<'a, 'b, R, T> {
    rows: R,
    to: &'a mut MatrixMut<'b, T>,
}

impl<'a, E: Element, R: Iterator<Item = &'a [E]>> Kernel<E::Compute> for PackRows<'_, '_, R, E::Compute> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<E::Compute>>(self, _: S) {
        let (columns, stride) = (self.to.cols, self.to.stride);
        for (row, line) in self.rows.zip(self.to.data_mut().chunks_mut(stride.max(1))) {
            let (used, padding) = line[..columns].split_at_mut(row.len());
            E::widen(row, used);
            padding.fill(E::Compute::ZERO);
        }
    }
}
