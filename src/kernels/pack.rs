//! Copies of a tile in the layout and the number type that the products read.

use super::MatrixMut;
use crate::simd::{Element, Kernel, Level, SQUARE, Scalar, Simd};

/// Writes `factor * row` as column `column` of `to`, for each of `rows`; the remaining columns become 0.
///
/// `to` has one row per channel. `lines` is scratch for [`SQUARE`] rows, `to.rows` each.
pub(crate) fn pack_transposed<'a, E: Element>(
    level: Level,
    mut rows: impl ExactSizeIterator<Item = &'a [E]>,
    factor: E::Compute,
    lines: &mut [E::Compute],
    to: &mut MatrixMut<'_, E::Compute>,
) {
    let (channels, columns, stride) = (to.rows, to.cols, to.stride);
    assert!(lines.len() >= SQUARE * channels, "scratch for {SQUARE} rows of {channels}");
    if channels == 0 {
        return;
    }
    let data = to.data_mut();
    for column in (0..columns).step_by(SQUARE) {
        let mut group: [&[E::Compute]; SQUARE] = [&[]; SQUARE];
        let mut free = &mut *lines;
        for member in &mut group {
            let (line, rest) = free.split_at_mut(channels);
            free = rest;
            *member = if let Some(row) = rows.next() {
                E::as_compute(row).unwrap_or_else(|| {
                    let to = &mut MatrixMut::new(line, 1, channels, channels);
                    pack_rows(level, std::iter::once(row), to);
                    line
                })
            } else {
                line.fill(E::Compute::ZERO);
                line
            };
        }
        let width = SQUARE.min(columns - column);
        let to = MatrixMut::new(&mut data[column..], channels, width, stride);
        E::Compute::run(level, Transpose { rows: group, factor, to });
    }
}

/// Writes rows as columns.
struct Transpose<'a, T> {
    rows: [&'a [T]; SQUARE],
    factor: T,
    to: MatrixMut<'a, T>,
}

impl<T: Scalar> Kernel<T> for Transpose<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(mut self, simd: S) {
        let (channels, width, stride) = (self.to.rows, self.to.cols, self.to.stride);
        assert!(self.rows.iter().all(|row| row.len() >= channels), "rows of {channels} channels");
        let whole = if width == SQUARE { channels - channels % SQUARE } else { 0 };
        for channel in (0..whole).step_by(SQUARE) {
            let mut rows = [std::ptr::null(); SQUARE];
            for r in 0..SQUARE {
                rows[r] = self.rows[r].as_ptr().wrapping_add(channel);
            }
            // SAFETY: a square of each lies before `whole`, in rows that long and in a matrix of that many rows.
            unsafe { simd.transpose(rows, self.factor, self.to.as_mut_ptr().add(channel * stride), stride) };
        }
        let to = self.to.data_mut();
        for channel in whole..channels {
            for r in 0..width {
                to[channel * stride + r] = self.rows[r][channel] * self.factor;
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
