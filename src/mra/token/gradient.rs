//! The gradient of a few queries of a range against some keys, or some pooled ones.
//!
//! ```text
//! weights   = exp(scale * keys queries^T - lse)           recomputed, one row per key
//! gradients = scale * weights * (values grads^T - delta)       with dropout, what is dropped of values grads^T is 0
//! dv += weights grads (less what is dropped)          dk += gradients queries        dq += gradients^T keys
//! ```
//!
//! The rows of queries, of the gradients of their outputs and of dq are read and written where they lie in the range. Every sum
//! runs over keys or queries in the same order and in the same pieces, whether dq or dk and dv are wanted, or all of them.

use half::bf16;

use super::coarse::STEP_BLOCKS;
use crate::exec::Buffer;
use crate::kernels::{
    AllFinite, Gemm, Init, LogitGradient, Matrix, MatrixMut, Softcap, Stream, pack_rows, pack_transposed, product,
};
use crate::mra::attend::{Bf16Logits, DropoutTile, KeySums, QueryTerms, TILE_QUERIES, TmulGradient, float32};
use crate::mra::problem::Problem;
use crate::simd::{Element, Level, Scalar, prefetch_far};

/// The queries of a range, in the type that is computed with, in rows of whole vectors.
pub(crate) struct RangeRows<T> {
    pub(super) queries: Buffer<T>,
    pub(super) grads: Buffer<T>,
    pub(super) terms: Vec<QueryTerms<T>>,
    /// Whether all numbers of a row are finite.
    pub(super) finite: Vec<bool>,
    /// Queries and gradients as they are stored, if they are bfloat16.
    pub(super) bf16: [Buffer<bf16>; 2],
    pub(super) key_width: usize,
    pub(super) value_width: usize,
}

impl<T: Scalar> RangeRows<T> {
    pub(crate) fn new(queries: usize, key_width: usize, value_width: usize) -> Self {
        Self {
            queries: Buffer::scratch(queries * key_width),
            grads: Buffer::scratch(queries * value_width),
            terms: Vec::with_capacity(queries),
            finite: Vec::with_capacity(queries),
            bf16: [Buffer::scratch(0), Buffer::scratch(0)],
            key_width,
            value_width,
        }
    }

    /// Copies the rows of some queries of a range of `len` of them; those of idle ones become 0.
    pub(crate) fn fill<'a, E: Element<Compute = T>>(
        &mut self,
        level: Level,
        len: usize,
        numbers: &[u32],
        query: impl Fn(usize) -> (&'a [E], &'a [E], QueryTerms<T>),
    ) {
        self.terms.resize(len, QueryTerms { lse: T::NAN, delta: T::NAN, idle: false });
        self.finite.resize(len, true);
        for &number in numbers {
            let number = number as usize;
            let (row, grad, terms) = query(number);
            if let (Some(row), Some(grad)) = (E::as_bf16(row), E::as_bf16(grad)) {
                self.store([row, grad], number, len, terms.idle);
            }
            let (row, grad) = if terms.idle { (&[][..], &[][..]) } else { (row, grad) };
            let to = &mut self.queries[number * self.key_width..][..self.key_width];
            pack_rows(level, [row].into_iter(), &mut MatrixMut::new(to, 1, self.key_width, self.key_width));
            let to = &mut self.grads[number * self.value_width..][..self.value_width];
            pack_rows(level, [grad].into_iter(), &mut MatrixMut::new(to, 1, self.value_width, self.value_width));
            self.terms[number] = terms;
            let rows = [(&self.queries, self.key_width), (&self.grads, self.value_width)];
            let finite = |x: T| x * T::ZERO == T::ZERO;
            // An lse of infinity is that of a query without a weight.
            self.finite[number] = finite(terms.delta)
                && (finite(terms.lse) || terms.lse == T::INFINITY)
                && rows
                    .into_iter()
                    .all(|(rows, width)| T::run(level, AllFinite(Matrix::new(&rows[number * width..], 1, width, width))));
        }
    }

    /// Copies the rows of a query of `len` as they are stored, or zeros.
    fn store(&mut self, rows: [&[bf16]; 2], number: usize, len: usize, idle: bool) {
        for (to, row) in self.bf16.iter_mut().zip(rows) {
            if to.len() < len * row.len() {
                *to = Buffer::scratch(len * row.len());
            }
            let to = &mut to[number * row.len()..][..row.len()];
            if idle { to.fill(bf16::ZERO) } else { to.copy_from_slice(row) }
        }
    }

    /// Whether all numbers of these queries are finite.
    pub(crate) fn are_finite(&self, queries: &[u32]) -> bool {
        queries.iter().all(|&query| self.finite[query as usize])
    }

    pub(super) fn matrix<'a>(&self, buffer: &'a Buffer<T>, width: usize) -> Matrix<'a, T> {
        Matrix::new(buffer, self.terms.len(), width, width)
    }
}

/// The buffers of a tile of queries.
pub(crate) struct GradientTile<T> {
    pub(super) level: Level,
    scale: T,
    /// What the gradients of the logits are multiplied by: the scale, for the gradients of queries and keys.
    factor: T,
    pub(super) head_dim: usize,
    pub(super) value_dim: usize,
    pub(super) columns: usize,
    packed_queries: Buffer<T>,
    packed_grads: Buffer<T>,
    lse: Buffer<T>,
    delta: Buffer<T>,
    pub(super) weights: Buffer<T>,
    pub(super) gradients: Buffer<T>,
    softcap: Option<T>,
    /// The derivatives of capped logits, if the gradients are to be multiplied by them.
    slopes: Buffer<T>,
    dropped: Option<DropoutTile>,
    /// The products of exact pairs, where they are those of tiles, and what they add to dq.
    pub(super) tmul: Option<(Bf16Logits, TmulGradient, Buffer<T>)>,
}

/// Keys, or pooled ones, and what is to be done with them.
#[derive(Clone, Copy)]
pub(crate) struct KeyRows<'a, T> {
    pub(crate) keys: Matrix<'a, T>,
    pub(crate) values: Matrix<'a, T>,
    /// The number of the first one.
    pub(crate) first: usize,
    /// What dropout calls them.
    pub(crate) names: &'a [u32],
    /// Whether a weight of 0 hides even a NaN.
    pub(crate) guard: bool,
    /// Keys and values as they are stored, and their tokens, where products are those of tiles.
    pub(crate) bf16: Option<(Matrix<'a, bf16>, Matrix<'a, bf16>, &'a [u32])>,
}

impl<T: Scalar> GradientTile<T> {
    /// Buffers for tiles of at most `queries` queries.
    pub(crate) fn new(problem: &Problem<'_>, queries: usize, value_dim: usize) -> Self {
        let (head_dim, keys) = (problem.head_dim, STEP_BLOCKS.max(Problem::MAX_BLOCK));
        let columns = problem.padded::<T>(queries.min(TILE_QUERIES));
        Self {
            level: problem.level,
            scale: T::from_f64(problem.scale),
            factor: T::from_f64(problem.scale),
            head_dim,
            value_dim,
            columns: 0,
            packed_queries: Buffer::scratch(head_dim * columns),
            packed_grads: Buffer::scratch(value_dim * columns),
            lse: Buffer::scratch(columns),
            delta: Buffer::scratch(columns),
            weights: Buffer::scratch(keys * columns),
            gradients: Buffer::scratch(keys * columns),
            softcap: problem.softcap.map(T::from_f64),
            slopes: Buffer::scratch(if problem.softcap.is_some() { keys * columns } else { 0 }),
            dropped: problem.dropout.map(DropoutTile::new),
            tmul: None,
        }
    }

    /// As [`Self::new`], for tensors of `E` alone, of which exact pairs may be multiplied on tiles.
    pub(crate) fn for_tensors<E: Element<Compute = T>>(problem: &Problem<'_>, queries: usize, value_dim: usize) -> Self {
        let columns = problem.padded::<T>(queries.min(TILE_QUERIES));
        let logits = Bf16Logits::new::<E>(problem, columns).filter(Bf16Logits::on_tiles);
        let tmul = logits.map(|logits| {
            let dq = Buffer::scratch(columns * problem.padded::<T>(problem.head_dim));
            (logits, TmulGradient::new(problem, columns, value_dim), dq)
        });
        Self { tmul, ..Self::new(problem, queries, value_dim) }
    }

    /// Whether exact pairs are multiplied on tiles.
    pub(crate) fn on_tiles(&self) -> bool {
        self.tmul.is_some()
    }

    /// A tile whose [`Self::gradients`] are those of the logits themselves.
    pub(crate) fn of_logits(self) -> Self {
        Self { factor: T::from_f64(1.0), slopes: Buffer::scratch(0), ..self }
    }

    /// Prefetches the rows of some queries of a range.
    pub(crate) fn prefetch(rows: &RangeRows<T>, dq: Option<&Buffer<T>>, queries: &[u32]) {
        for &query in queries {
            let (key, value) = (query as usize * rows.key_width, query as usize * rows.value_width);
            prefetch_far(&rows.queries[key..][..rows.key_width]);
            prefetch_far(&rows.grads[value..][..rows.value_width]);
            if let Some(dq) = dq {
                prefetch_far(&dq[key..][..rows.key_width]);
            }
        }
    }

    /// Starts a tile of these queries of a range. `place` is what dropout calls the head and the first token of the range; `guard` as in
    /// [`KeyRows`].
    pub(crate) fn start(&mut self, rows: &RangeRows<T>, queries: &[u32], stream: Stream, place: (usize, usize), guard: bool) {
        self.columns = queries.len().next_multiple_of(T::lanes(self.level));
        if let Some(dropped) = &mut self.dropped {
            dropped.start(stream, place.0, queries.iter().map(|&query| place.1 + query as usize), self.columns);
        }
        let columns = self.columns;
        // A lane without a query has weights of 0.
        self.lse[..columns].fill(T::INFINITY);
        self.delta[..columns].fill(T::ZERO);
        for (lane, &query) in queries.iter().enumerate() {
            let terms = rows.terms[query as usize];
            self.lse[lane] = terms.lse;
            self.delta[lane] = terms.delta;
        }
        if stream == Stream::Exact && self.on_tiles() {
            return self.start_on_tiles(rows, queries, guard);
        }
        let one = T::from_f64(1.0);
        let inputs = [
            (&rows.queries, rows.key_width, self.head_dim, self.scale, &mut self.packed_queries),
            (&rows.grads, rows.value_width, self.value_dim, one, &mut self.packed_grads),
        ];
        for (from, width, channels, factor, to) in inputs {
            let from = queries.iter().map(|&query| &from[query as usize * width..][..channels]);
            let mut to = MatrixMut::new(to, channels, self.columns, self.columns);
            pack_transposed(self.level, from, factor, &mut to);
        }
    }

    /// Computes the weights of these keys and the gradients of their logits. `adjust` may change the logits beforehand: a row for
    /// each key, and lanes.
    pub(crate) fn differentiate(
        &mut self,
        KeyRows { keys, values, names, guard, bf16, .. }: KeyRows<'_, T>,
        adjust: impl FnOnce(&mut [T], usize),
    ) {
        let (count, columns) = (keys.rows, self.columns);
        let products = [
            (keys.columns(self.head_dim), &self.packed_queries, &mut self.weights),
            (values.columns(self.value_dim), &self.packed_grads, &mut self.gradients),
        ];
        if let (Some((logits, tmul, _)), Some((keys, values, tokens))) = (&mut self.tmul, bf16) {
            let [(_, _, of_keys), (_, _, of_values)] = products;
            logits.of_tokens(keys, tokens, float32(of_keys));
            tmul.values_times_grads(logits, values, float32(of_values));
        } else {
            for (a, b, c) in products {
                let (b, c) = (Matrix::new(b, a.cols, columns, columns), MatrixMut::new(c, count, columns, columns));
                T::run(self.level, Gemm { a, a_transposed: false, b, b_rows: None, c, init: Init::Zero, ahead: None });
            }
        }
        if let Some(cap) = self.softcap {
            let (logits, slopes) = (&mut self.weights[..count * columns], self.slopes.get_mut(..count * columns));
            T::run(self.level, Softcap { logits, cap, slopes });
        }
        adjust(&mut self.weights[..count * columns], columns);
        if let Some(dropped) = &mut self.dropped {
            dropped.take_keys(names);
            dropped.drop_weights(self.level, &mut self.gradients, columns);
        }
        let slopes = self.softcap.and(self.slopes.get(..count * columns));
        T::run(
            self.level,
            LogitGradient {
                weights: MatrixMut::new(&mut self.weights, count, columns, columns),
                gradients: MatrixMut::new(&mut self.gradients, count, columns, columns),
                lse: &self.lse,
                delta: &self.delta,
                slopes: slopes.map(|slopes| Matrix::new(slopes, count, columns, columns)),
                factor: self.factor,
                guard,
            },
        );
        if let Some(dropped) = &self.dropped {
            dropped.drop_weights(self.level, &mut self.weights, columns);
        }
    }

    /// The gradients of the logits of `keys` keys: one row for each, and lanes.
    pub(crate) fn gradients(&self, keys: usize) -> Matrix<'_, T> {
        Matrix::new(&self.gradients, keys, self.columns, self.columns)
    }

    /// Adds what these keys contribute once they are differentiated: to dq, a row of whole vectors for each query of the range, and to
    /// the gradients of keys and values from row `first` of the sums on.
    pub(crate) fn add(
        &mut self,
        rows: &RangeRows<T>,
        queries: &[u32],
        of_keys @ KeyRows { keys, first, guard, .. }: KeyRows<'_, T>,
        sums: Option<&mut KeySums<'_, T>>,
        dq: Option<&mut Buffer<T>>,
    ) {
        if of_keys.bf16.is_some() {
            return self.add_on_tiles(rows, queries, of_keys, sums, dq);
        }
        let (count, columns) = (keys.rows, self.columns);
        let of_queries = |buffer| Matrix::new(buffer, count, queries.len(), columns);
        if let Some(sums) = sums {
            let row = first - sums.first;
            let products = [
                (of_queries(&self.weights), rows.matrix(&rows.grads, rows.value_width), &mut *sums.dv),
                (of_queries(&self.gradients), rows.matrix(&rows.queries, rows.key_width), &mut *sums.dk),
            ];
            for (a, b, c) in products {
                let c = MatrixMut::new(&mut c[row * b.cols..], count, b.cols, b.cols);
                let gemm = Gemm { a, a_transposed: false, b, b_rows: Some(queries), c, init: Init::Keep, ahead: None };
                product(self.level, guard, gemm);
            }
        }
        if let Some(dq) = dq {
            let c = MatrixMut::new(dq, rows.terms.len(), rows.key_width, rows.key_width);
            let a = of_queries(&self.gradients);
            let gemm = Gemm { a, a_transposed: true, b: keys, b_rows: None, c, init: Init::KeepAt(queries), ahead: None };
            product(self.level, guard, gemm);
        }
    }
}
