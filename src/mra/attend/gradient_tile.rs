//! The gradient of a tile of queries against batches of keys.
//!
//! ```text
//! weights   = exp(scale * keys queries^T - lse)           recomputed, one row per key
//! gradients = scale * weights * (values grads^T - delta)   with dropout, what is dropped of values grads^T is 0
//! dq += gradients^T keys        dk += gradients queries        dv += weights grads      (less what is dropped)
//! ```
//!
//! Every sum runs over keys or queries in the same order and in the same pieces, whether the rows of the plan or its columns
//! drive the loop; so one pass that computes all three and two passes that compute dq and then dk and dv give the same bits.

use super::dropout::DropoutTile;
use super::key_batch::{KeyBatch, KeySource, PartView};
use super::tmul_gradient::TmulGradient;
use super::{Bf16Logits, float32};
use crate::exec::Buffer;
use crate::kernels::{
    AllFinite, Gemm, Init, LogitGradient, Matrix, MatrixMut, Softcap, Stream, pack_rows, pack_transposed, product,
};
use crate::mra::problem::Problem;
use crate::simd::{Element, Level, Scalar};

/// A tile of queries with the gradients of their outputs, and the buffers of a step.
pub(crate) struct GradientTile<T> {
    level: Level,
    dropped: Option<DropoutTile>,
    /// The logits, where bfloat16 numbers are multiplied as they are.
    pub(super) bf16: Option<Bf16Logits>,
    /// All other products, where they are products of tiles, too.
    pub(super) tmul: Option<TmulGradient>,
    /// Whether biases are added to the logits: in float32, as everything then.
    biased: bool,
    /// Which queries of the tile are idle.
    pub(super) idle: Vec<bool>,
    /// Whether a weight of 0 hides even a NaN.
    pub(super) guard: bool,
    scale: T,
    /// What the gradients of the logits are multiplied by: the scale, for the gradients of queries and keys.
    factor: T,
    head_dim: usize,
    value_dim: usize,
    /// Channels of a key, rounded up to whole vectors.
    pub(crate) key_width: usize,
    /// Channels of a value, rounded up to whole vectors.
    pub(crate) value_width: usize,
    pub(super) count: usize,
    pub(super) columns: usize,
    packed_queries: Buffer<T>,
    packed_grads: Buffer<T>,
    queries: Buffer<T>,
    grads: Buffer<T>,
    lse: Buffer<T>,
    delta: Buffer<T>,
    pub(super) weights: Buffer<T>,
    pub(super) gradients: Buffer<T>,
    softcap: Option<T>,
    /// The derivatives of capped logits, if the gradients are to be multiplied by them.
    slopes: Buffer<T>,
    /// The gradient of the queries: a row of `key_width` for each.
    pub(crate) dq: Buffer<T>,
}

/// What a tile needs to know of one query: its lse, and what is subtracted from `<g, v>`.
#[derive(Clone, Copy)]
pub(crate) struct QueryTerms<T> {
    pub(crate) lse: T,
    pub(crate) delta: T,
    /// Whether the gradients of its output and lse are 0: then it adds nothing to any gradient, whatever its channels hold.
    pub(crate) idle: bool,
}

/// Sums of the gradients of consecutive keys and values, by number.
pub(crate) struct KeySums<'a, T> {
    /// A row of `key_width` for each key.
    pub(crate) dk: &'a mut [T],
    /// A row of `value_width` for each value.
    pub(crate) dv: &'a mut [T],
    /// The number of the first key.
    pub(crate) first: usize,
}

impl<T> KeySums<'_, T> {
    /// The first element of the rows of a part, of `width` elements each.
    fn start(&self, part: &PartView<'_, T>, width: usize) -> usize {
        (part.first - self.first) * width
    }

    /// The same sums, for a call.
    pub(crate) fn reborrow(&mut self) -> KeySums<'_, T> {
        KeySums { dk: self.dk, dv: self.dv, first: self.first }
    }
}

impl<T: Scalar> GradientTile<T> {
    /// Buffers for tiles of at most `columns` queries.
    pub(crate) fn new(problem: &Problem<'_>, columns: usize, value_dim: usize) -> Self {
        let (head_dim, keys) = (problem.head_dim, KeyBatch::<T>::capacity(problem));
        let (key_width, value_width) = (problem.padded::<T>(head_dim), problem.padded::<T>(value_dim));
        Self {
            level: problem.level,
            dropped: problem.dropout.map(DropoutTile::new),
            bf16: None,
            tmul: None,
            biased: false,
            idle: Vec::new(),
            guard: false,
            scale: T::from_f64(problem.scale),
            factor: T::from_f64(problem.scale),
            head_dim,
            value_dim,
            key_width,
            value_width,
            count: 0,
            columns: 0,
            packed_queries: Buffer::scratch(head_dim * columns),
            packed_grads: Buffer::scratch(value_dim * columns),
            queries: Buffer::scratch(columns * key_width),
            grads: Buffer::scratch(columns * value_width),
            lse: Buffer::scratch(columns),
            delta: Buffer::scratch(columns),
            weights: Buffer::scratch(keys * columns),
            gradients: Buffer::scratch(keys * columns),
            softcap: problem.softcap.map(T::from_f64),
            slopes: Buffer::scratch(if problem.softcap.is_some() { keys * columns } else { 0 }),
            dq: Buffer::scratch(columns * key_width),
        }
    }

    /// As [`Self::new`], for tensors of `E` alone, which may be bfloat16 that is multiplied as it is.
    pub(crate) fn for_tensors<E: Element<Compute = T>>(problem: &Problem<'_>, columns: usize, value_dim: usize) -> Self {
        let bf16 = Bf16Logits::new::<E>(problem, columns);
        let on_tiles = bf16.as_ref().is_some_and(|logits| logits.tmul.is_some());
        let tmul = on_tiles.then(|| TmulGradient::new(problem, columns, value_dim));
        Self { bf16, tmul, ..Self::new(problem, columns, value_dim) }
    }

    /// A tile for [`Self::differentiate`], of which the gradients are those of the logits themselves.
    pub(crate) fn of_logits(self) -> Self {
        Self { factor: T::from_f64(1.0), slopes: Buffer::scratch(0), tmul: None, ..self }
    }

    /// Says whether biases are added to the logits of the tiles that follow.
    pub(crate) fn set_biased(&mut self, biased: bool) {
        self.biased = biased;
    }

    /// Keys and values as [`Self::add`] wants them.
    pub(crate) fn source<'a, E: Element<Compute = T>>(&self, source: KeySource<'a, E>) -> KeySource<'a, E> {
        if self.tmul.is_some() && !self.biased { source.unstaged() } else { source }
    }

    /// Starts a tile of these queries with the gradients of their outputs.
    pub(crate) fn start<'a, E: Element<Compute = T>>(
        &mut self,
        queries: impl ExactSizeIterator<Item = &'a [E]> + Clone,
        grads: impl ExactSizeIterator<Item = &'a [E]> + Clone,
        terms: impl Iterator<Item = QueryTerms<T>>,
    ) {
        self.count = queries.len();
        self.columns = self.count.next_multiple_of(T::lanes(self.level));
        let columns = self.columns;
        self.pack(queries, grads);
        // A lane without a query is as an idle one.
        self.lse[..columns].fill(T::INFINITY);
        self.delta[..columns].fill(T::ZERO);
        self.idle.clear();
        for (query, terms) in terms.enumerate() {
            self.idle.push(terms.idle);
            self.lse[query] = terms.lse;
            self.delta[query] = terms.delta;
        }
        self.dq[..self.count * self.key_width].fill(T::ZERO);
    }

    /// Packs the queries of a tile and the gradients of their outputs.
    fn pack<'a, E: Element<Compute = T>>(
        &mut self,
        queries: impl ExactSizeIterator<Item = &'a [E]> + Clone,
        grads: impl ExactSizeIterator<Item = &'a [E]> + Clone,
    ) {
        let columns = self.columns;
        if let Some(bf16) = self.bf16.as_mut().filter(|_| !self.biased) {
            bf16.start(queries.clone(), columns);
            if let Some(tmul) = &mut self.tmul {
                return tmul.start(bf16, queries, grads, columns);
            }
        } else {
            let mut packed = MatrixMut::new(&mut self.packed_queries, self.head_dim, columns, columns);
            pack_transposed(self.level, queries.clone(), self.scale, &mut packed);
        }
        pack_rows(self.level, queries, &mut MatrixMut::new(&mut self.queries, self.count, self.key_width, self.key_width));
        pack_rows(
            self.level,
            grads.clone(),
            &mut MatrixMut::new(&mut self.grads, self.count, self.value_width, self.value_width),
        );
        let mut packed = MatrixMut::new(&mut self.packed_grads, self.value_dim, columns, columns);
        pack_transposed(self.level, grads, T::from_f64(1.0), &mut packed);
    }

    /// Says which queries the tile has, for dropout: tokens, or blocks of them.
    pub(crate) fn number_queries(&mut self, stream: Stream, head: usize, queries: impl Iterator<Item = usize>) {
        if let Some(dropped) = &mut self.dropped {
            dropped.start(stream, head, queries, self.columns);
        }
    }

    /// Adds what a batch of keys contributes to dq, or to the gradients of keys and values, or both. `adjust` may change
    /// the logits, one row per key and `columns` lanes, beforehand.
    pub(crate) fn add<E: Element<Compute = T>>(
        &mut self,
        batch: &KeyBatch<T>,
        source: &KeySource<'_, E>,
        want_dq: bool,
        mut sums: Option<KeySums<'_, T>>,
        adjust: impl FnOnce(&mut [T], usize),
    ) {
        if self.tmul.is_some() && !self.biased {
            return self.add_on_tiles(batch, source, want_dq, sums, adjust);
        }
        self.differentiate(batch, source, sums.as_ref(), adjust);
        for part in batch.parts(source) {
            if let Some(sums) = &mut sums {
                self.add_to_keys(&part, source, sums);
            }
            if want_dq {
                self.add_to_queries(&part);
            }
        }
    }

    /// Computes the weights of a batch of keys and the gradients of its logits, which it returns: one row per key, a lane for each
    /// query. `ahead` is prefetched on the way.
    pub(crate) fn differentiate<E: Element<Compute = T>>(
        &mut self,
        batch: &KeyBatch<T>,
        source: &KeySource<'_, E>,
        ahead: Option<&KeySums<'_, T>>,
        adjust: impl FnOnce(&mut [T], usize),
    ) -> Matrix<'_, T> {
        // An idle query adds nothing, not even 0 times the NaN of a key.
        let finite = |rows: Matrix<'_, T>| T::run(self.level, AllFinite(rows));
        self.guard = self.any_idle() && !batch.parts(source).all(|part| finite(part.keys) && finite(part.values));
        if let Some(bf16) = self.bf16.as_mut().filter(|_| !self.biased) {
            bf16.compute(batch, source, float32(&mut self.weights));
        }
        for part in batch.parts(source) {
            let dk = ahead.map(|sums| rows(&sums.dk[sums.start(&part, self.key_width)..], &part, self.key_width));
            self.logits_and_products(&part, source.ahead(part.values), dk.and_then(|dk| source.ahead(dk)));
        }
        self.finish_gradients(batch, source, adjust);
        Matrix::new(&self.gradients, batch.rows(), self.columns, self.columns)
    }

    /// Makes the weights of the logits of a batch of keys, and the gradients of the logits of the products of values and gradients.
    pub(super) fn finish_gradients<E: Element<Compute = T>>(
        &mut self,
        batch: &KeyBatch<T>,
        source: &KeySource<'_, E>,
        adjust: impl FnOnce(&mut [T], usize),
    ) {
        let columns = self.columns;
        if let Some(cap) = self.softcap {
            let (logits, slopes) = (&mut self.weights[..batch.rows() * columns], self.slopes.get_mut(..batch.rows() * columns));
            T::run(self.level, Softcap { logits, cap, slopes });
        }
        adjust(&mut self.weights[..batch.rows() * columns], columns);
        if let Some(dropped) = &mut self.dropped {
            dropped.read_keys(batch, source);
            dropped.drop_weights(self.level, &mut self.gradients, columns);
        }
        let slopes = self.softcap.and(self.slopes.get(..batch.rows() * columns));
        T::run(
            self.level,
            LogitGradient {
                weights: MatrixMut::new(&mut self.weights, batch.rows(), columns, columns),
                gradients: MatrixMut::new(&mut self.gradients, batch.rows(), columns, columns),
                lse: &self.lse,
                delta: &self.delta,
                slopes: slopes.map(|slopes| Matrix::new(slopes, batch.rows(), columns, columns)),
                factor: self.factor,
                guard: self.guard,
            },
        );
        if let Some(dropped) = &self.dropped {
            dropped.drop_weights(self.level, &mut self.weights, columns);
        }
    }

    /// Whether some query of the tile is idle.
    pub(super) fn any_idle(&self) -> bool {
        self.idle.contains(&true)
    }

    /// Adds, for each key of the latest batch, the gradients of its logits with all queries.
    pub(crate) fn add_totals(&self, to: &mut [T]) {
        const CHAINS: usize = 8;
        for (total, row) in to.iter_mut().zip(self.gradients.chunks_exact(self.columns)) {
            // Several chains, since each addition waits for the one before.
            let mut sums = [T::ZERO; CHAINS];
            for part in row[..self.count].chunks(CHAINS) {
                sums.iter_mut().zip(part).for_each(|(sum, &x)| *sum += x);
            }
            *total += sums.into_iter().fold(T::ZERO, |total, sum| total + sum);
        }
    }

    /// The logits, unless they are there, and the products of values and gradients. `values` and `dk` are prefetched on the way.
    fn logits_and_products(&mut self, part: &PartView<'_, T>, values: Option<Matrix<'_, T>>, dk: Option<Matrix<'_, T>>) {
        let columns = self.columns;
        let lanes = part.rows.start * columns..part.rows.end * columns;
        if self.bf16.is_none() || self.biased {
            T::run(
                self.level,
                Gemm {
                    a: part.keys.columns(self.head_dim),
                    a_transposed: false,
                    b: Matrix::new(&self.packed_queries, self.head_dim, columns, columns),
                    b_rows: None,
                    c: MatrixMut::new(&mut self.weights[lanes.clone()], part.rows.len(), columns, columns),
                    init: Init::Zero,
                    ahead: values,
                },
            );
        }
        T::run(
            self.level,
            Gemm {
                a: part.values.columns(self.value_dim),
                a_transposed: false,
                b: Matrix::new(&self.packed_grads, self.value_dim, columns, columns),
                b_rows: None,
                c: MatrixMut::new(&mut self.gradients[lanes], part.rows.len(), columns, columns),
                init: Init::Zero,
                ahead: dk,
            },
        );
    }

    fn add_to_queries(&mut self, part: &PartView<'_, T>) {
        let (width, columns) = (self.key_width, self.columns);
        product(
            self.level,
            self.guard,
            Gemm {
                a: Matrix::new(&self.gradients[part.rows.start * columns..], part.rows.len(), self.count, columns),
                a_transposed: true,
                b: part.keys,
                b_rows: None,
                c: MatrixMut::new(&mut self.dq, self.count, width, width),
                init: Init::Keep,
                ahead: None,
            },
        );
    }

    fn add_to_keys<E: Element<Compute = T>>(
        &self,
        part: &PartView<'_, T>,
        source: &KeySource<'_, E>,
        sums: &mut KeySums<'_, T>,
    ) {
        let (key_start, value_start) = (sums.start(part, self.key_width), sums.start(part, self.value_width));
        let (dk, dv) = (&mut sums.dk[key_start..], &mut sums.dv[value_start..]);
        let ahead = source.ahead(rows(dv, part, self.value_width));
        self.add_product(part, &self.gradients, &self.queries, self.key_width, dk, ahead);
        self.add_product(part, &self.weights, &self.grads, self.value_width, dv, None);
    }

    /// Adds `factors`, of which each key has a row, times rows of `width` numbers for each query.
    fn add_product(
        &self,
        part: &PartView<'_, T>,
        factors: &[T],
        queries: &[T],
        width: usize,
        sums: &mut [T],
        ahead: Option<Matrix<'_, T>>,
    ) {
        product(
            self.level,
            self.guard,
            Gemm {
                a: Matrix::new(&factors[part.rows.start * self.columns..], part.rows.len(), self.count, self.columns),
                a_transposed: false,
                b: Matrix::new(queries, self.count, width, width),
                b_rows: None,
                c: MatrixMut::new(sums, part.rows.len(), width, width),
                init: Init::Keep,
                ahead,
            },
        );
    }
}

/// As many of the first rows as a part has keys.
fn rows<'a, T>(data: &'a [T], part: &PartView<'_, T>, width: usize) -> Matrix<'a, T> {
    Matrix::new(data, part.rows.len(), width, width)
}
