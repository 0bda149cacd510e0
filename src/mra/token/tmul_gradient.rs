//! The products of exact pairs of the backward pass on tiles.
//!
//! With a guard, a gradient of 0 hides even the NaN of a row: rows that are not finite are left out of the products of tiles, and added by
//! themselves in float32. So those of all other rows have the same bits with and without it.

use half::bf16;

use super::gradient::{GradientTile, KeyRows, RangeRows};
use crate::exec::Buffer;
use crate::kernels::{AddRowsAt, Gemm, Init, Matrix, MatrixMut, all_finite, product};
use crate::mra::attend::{KeySums, float32};
use crate::simd::Scalar;

impl<T: Scalar> GradientTile<T> {
    /// Packs these queries of a range.
    pub(super) fn start_on_tiles(&mut self, rows: &RangeRows<T>, queries: &[u32], guard: bool) {
        let (columns, head_dim, value_dim) = (self.columns, self.head_dim, self.value_dim);
        let (Some((logits, tmul, _)), zeros) = (&mut self.tmul, vec![bf16::ZERO; head_dim.max(value_dim)]) else { return };
        let row = |which: usize, channels: usize, query: u32| &rows.bf16[which][query as usize * channels..][..channels];
        logits.start(queries.iter().map(|&query| row(0, head_dim, query)), columns);
        let finite = |which: usize, channels: usize| {
            let zeros = &zeros[..channels];
            queries.iter().map(
                move |&query| {
                    if guard && !rows.finite[query as usize] { zeros } else { row(which, channels, query) }
                },
            )
        };
        tmul.start(logits, finite(0, head_dim), finite(1, value_dim), columns);
    }

    /// [`Self::add`] on tiles.
    pub(super) fn add_on_tiles(
        &mut self,
        rows: &RangeRows<T>,
        queries: &[u32],
        of_keys: KeyRows<'_, T>,
        mut sums: Option<&mut KeySums<'_, T>>,
        mut dq: Option<&mut Buffer<T>>,
    ) {
        let KeyRows { keys, first, bf16: Some((stored, _, tokens)), guard, .. } = of_keys else { return };
        let Some((logits, tmul, products)) = &mut self.tmul else { return };
        let (weights, gradients) = (float32(&mut self.weights), float32(&mut self.gradients));
        if let Some(sums) = &mut sums {
            let place = || std::iter::once((0..keys.rows, first - sums.first));
            tmul.add_to_keys(logits, 0, gradients, place(), float32(&mut *sums.dk));
            tmul.add_to_keys(logits, 1, weights, place(), float32(&mut *sums.dv));
        }
        if let Some(dq) = &mut dq {
            let (count, width) = (queries.len(), rows.key_width);
            products[..count * width].fill(T::ZERO);
            let to = MatrixMut::new(float32(products), count, width, width);
            if guard {
                let finite = finite_rows(stored, tokens);
                let finite = Matrix::new(&finite, tokens.len(), stored.cols, stored.cols);
                let all: Vec<u32> = (0u32..).take(tokens.len()).collect();
                tmul.add_to_queries(logits, (finite, &all), gradients, to);
            } else {
                tmul.add_to_queries(logits, (stored, tokens), gradients, to);
            }
            let from = Matrix::new(products, count, width, width);
            let to = MatrixMut::new(dq, rows.terms.len(), width, width);
            T::run(self.level, AddRowsAt { from, numbers: queries, factors: None, to });
        }
        if guard {
            self.add_what_is_not_finite(rows, queries, of_keys, sums, dq);
        }
    }

    /// Adds what rows of queries and of keys that are not finite add to what they have a weight for.
    fn add_what_is_not_finite(
        &self,
        rows: &RangeRows<T>,
        queries: &[u32],
        KeyRows { keys, first, bf16, .. }: KeyRows<'_, T>,
        sums: Option<&mut KeySums<'_, T>>,
        dq: Option<&mut Buffer<T>>,
    ) {
        let (count, columns) = (keys.rows, self.columns);
        let only = |factors: &[T], which: &dyn Fn(usize, usize) -> bool| -> Vec<T> {
            let factor = |(place, &x): (usize, &T)| if which(place / columns, place % columns) { x } else { T::ZERO };
            factors[..count * columns].iter().enumerate().map(factor).collect()
        };
        let of_query = |_, lane: usize| queries.get(lane).is_some_and(|&query| !rows.finite[query as usize]);
        if let Some(sums) = sums {
            let row = first - sums.first;
            let products = [
                (&self.weights, rows.matrix(&rows.grads, rows.value_width), &mut *sums.dv),
                (&self.gradients, rows.matrix(&rows.queries, rows.key_width), &mut *sums.dk),
            ];
            for (factors, b, c) in products {
                let factors = only(factors, &of_query);
                let a = Matrix::new(&factors, count, queries.len(), columns);
                let c = MatrixMut::new(&mut c[row * b.cols..], count, b.cols, b.cols);
                let gemm = Gemm { a, a_transposed: false, b, b_rows: Some(queries), c, init: Init::Keep, ahead: None };
                product(self.level, true, gemm);
            }
        }
        if let (Some(dq), Some((stored, _, tokens))) = (dq, bf16) {
            let of_key = |key: usize, _| !all_finite(stored.row(tokens[key] as usize));
            let factors = only(&self.gradients, &of_key);
            let a = Matrix::new(&factors, count, queries.len(), columns);
            let c = MatrixMut::new(dq, rows.terms.len(), rows.key_width, rows.key_width);
            let gemm = Gemm { a, a_transposed: true, b: keys, b_rows: None, c, init: Init::KeepAt(queries), ahead: None };
            product(self.level, true, gemm);
        }
    }
}

/// Copies of some rows, with zeros in place of those that are not finite.
fn finite_rows(from: Matrix<'_, bf16>, rows: &[u32]) -> Vec<bf16> {
    let mut to = vec![bf16::ZERO; rows.len() * from.cols];
    for (to, &row) in to.chunks_exact_mut(from.cols.max(1)).zip(rows) {
        let row = from.row(row as usize);
        if all_finite(row) {
            to.copy_from_slice(row);
        }
    }
    to
}

#[cfg(test)]
mod tests;
