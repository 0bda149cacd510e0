//! The running softmax of a tile of queries over batches of keys, and the gradient of a tile.

mod bf16;
mod bias_tile;
mod dropout;
mod gradient_tile;
mod key_batch;
mod tile;
mod tmul_gradient;

pub(crate) use bf16::Bf16Logits;
use bf16::Bf16Products;
pub(crate) use bias_tile::BiasTile;
pub(crate) use dropout::DropoutTile;
pub(crate) use gradient_tile::{GradientTile, KeySums, QueryTerms};
pub(crate) use key_batch::{KeyBatch, KeySource, PartView};
pub(crate) use tile::{TILE_QUERIES, coarse_tile_columns, nth_tile, tile_columns, tiles};
pub(crate) use tmul_gradient::TmulGradient;

use super::problem::Problem;
use crate::exec::Buffer;
use crate::kernels::{Gemm, Init, Matrix, MatrixMut, NarrowScaled, OnlineSoftmax, Softcap, Stream, pack_transposed};
use crate::simd::{Element, Level, Scalar};

/// The running softmax that all queries of a block start from: that of the coarse level.
pub(crate) struct StartState<'a, T> {
    pub(crate) maximum: T,
    pub(crate) sum: T,
    pub(crate) values: &'a [T],
}

/// The state of a tile of queries between batches of keys, and the buffers of a step.
pub(crate) struct Attend<T> {
    level: Level,
    dropped: Option<DropoutTile>,
    /// The products, where bfloat16 numbers are multiplied as they are.
    bf16: Option<Bf16Products>,
    /// Whether biases are added to the logits: in float32, as everything then.
    biased: bool,
    /// Queries of the tile.
    pub(crate) queries: usize,
    /// Lanes: the queries rounded up to whole vectors.
    pub(crate) columns: usize,
    /// Channels of a value, rounded up to whole vectors.
    pub(crate) width: usize,
    channels: usize,
    scale: T,
    softcap: Option<T>,
    packed: Buffer<T>,
    logits: Buffer<T>,
    rescale: Buffer<T>,
    /// The largest logit so far.
    pub(crate) maximum: Buffer<T>,
    /// The sum of weights so far, relative to the maximum.
    pub(crate) sum: Buffer<T>,
    /// The sum of weighted values so far: a row of `width` for each query.
    pub(crate) values: Buffer<T>,
}

impl<T: Scalar> Attend<T> {
    /// Buffers for tiles of at most `columns` queries.
    pub(crate) fn new(problem: &Problem<'_>, columns: usize, value_dim: usize) -> Self {
        let width = problem.padded::<T>(value_dim);
        Self {
            level: problem.level,
            dropped: problem.dropout.map(DropoutTile::new),
            bf16: None,
            biased: false,
            queries: 0,
            columns: 0,
            width,
            channels: problem.head_dim,
            scale: T::from_f64(problem.scale),
            softcap: problem.softcap.map(T::from_f64),
            packed: Buffer::scratch(problem.head_dim * columns),
            logits: Buffer::scratch(KeyBatch::<T>::capacity(problem) * columns),
            rescale: Buffer::scratch(columns),
            maximum: Buffer::scratch(columns),
            sum: Buffer::scratch(columns),
            values: Buffer::scratch(columns * width),
        }
    }

    /// As [`Self::new`], for tensors of `E` alone, which may be bfloat16 that is multiplied as it is.
    pub(crate) fn for_tensors<E: Element<Compute = T>>(problem: &Problem<'_>, columns: usize, value_dim: usize) -> Self {
        Self { bf16: Bf16Products::new::<E>(problem, columns, value_dim), ..Self::new(problem, columns, value_dim) }
    }

    /// Says whether biases are added to the logits of the tiles that follow.
    pub(crate) fn set_biased(&mut self, biased: bool) {
        self.biased = biased;
    }

    /// Keys and values as [`Self::attend`] wants them.
    pub(crate) fn source<'a, E: Element<Compute = T>>(&self, source: KeySource<'a, E>) -> KeySource<'a, E> {
        if self.bf16.is_some() && !self.biased { source.unstaged() } else { source }
    }

    /// Starts a tile of these queries, from the softmax over the coarse level if there is one, which is the same for all of them.
    pub(crate) fn start<'a, E: Element<Compute = T>>(
        &mut self,
        queries: impl ExactSizeIterator<Item = &'a [E]>,
        coarse: Option<&StartState<'_, T>>,
    ) {
        self.queries = queries.len();
        self.columns = self.queries.next_multiple_of(T::lanes(self.level));
        let columns = self.columns;
        if let Some(bf16) = self.bf16.as_mut().filter(|_| !self.biased) {
            bf16.logits.start(queries, columns);
        } else {
            let mut packed = MatrixMut::new(&mut self.packed, self.channels, columns, columns);
            pack_transposed(self.level, queries, self.scale, &mut packed);
        }
        self.maximum[..columns].fill(coarse.map_or(T::NEG_INFINITY, |coarse| coarse.maximum));
        self.sum[..columns].fill(coarse.map_or(T::ZERO, |coarse| coarse.sum));
        let values = &mut self.values[..self.queries * self.width];
        match coarse {
            Some(coarse) => values.chunks_exact_mut(self.width.max(1)).for_each(|row| row.copy_from_slice(coarse.values)),
            None => values.fill(T::ZERO),
        }
    }

    /// Whether [`Self::attend`] takes keys and values of the compute type, whatever the tensors have.
    pub(crate) fn takes_compute_type(&self) -> bool {
        self.bf16.is_none()
    }

    /// The length of what [`Self::save`] writes for tiles of at most `queries` queries.
    pub(crate) fn saved_len(problem: &Problem<'_>, queries: usize, value_dim: usize) -> usize {
        2 * problem.padded::<T>(queries) + queries * problem.padded::<T>(value_dim)
    }

    /// Writes the running softmax of every query, for [`Self::resume`].
    pub(crate) fn save(&self, to: &mut [T]) {
        let (maximum, rest) = to.split_at_mut(self.columns);
        let (sum, values) = rest.split_at_mut(self.columns);
        maximum.copy_from_slice(&self.maximum[..self.columns]);
        sum.copy_from_slice(&self.sum[..self.columns]);
        values[..self.queries * self.width].copy_from_slice(&self.values[..self.queries * self.width]);
    }

    /// Goes on with what was saved for the queries of this tile.
    pub(crate) fn resume(&mut self, from: &[T]) {
        let (maximum, rest) = from.split_at(self.columns);
        let (sum, values) = rest.split_at(self.columns);
        self.maximum[..self.columns].copy_from_slice(maximum);
        self.sum[..self.columns].copy_from_slice(sum);
        self.values[..self.queries * self.width].copy_from_slice(&values[..self.queries * self.width]);
    }

    /// Says which queries the tile has, for dropout: tokens, or blocks of them.
    pub(crate) fn number_queries(&mut self, stream: Stream, head: usize, queries: impl Iterator<Item = usize>) {
        if let Some(dropped) = &mut self.dropped {
            dropped.start(stream, head, queries, self.columns);
        }
    }

    /// Attends to a batch of keys. `adjust` may change the logits, one row of `columns` per key, beforehand. `next` are
    /// the blocks of the batch after this one, whose keys are prefetched. Logits that are `given` are not computed again.
    pub(crate) fn attend<E: Element<Compute = T>>(
        &mut self,
        batch: &KeyBatch<T>,
        source: &KeySource<'_, E>,
        next: &[u32],
        given: Option<Matrix<'_, T>>,
        adjust: impl FnOnce(&mut [T]),
    ) {
        let columns = self.columns;
        if let Some(given) = given {
            assert_eq!((given.rows, given.cols, given.stride), (batch.rows(), columns, columns), "logits of this batch");
            self.logits[..batch.rows() * columns].copy_from_slice(&given.data()[..batch.rows() * columns]);
        } else {
            self.logits(batch, source);
            if let Some(cap) = self.softcap {
                let logits = &mut self.logits[..batch.rows() * columns];
                T::run(self.level, Softcap { logits, cap, slopes: None });
            }
        }
        adjust(&mut self.logits[..batch.rows() * columns]);
        T::run(
            self.level,
            OnlineSoftmax {
                logits: MatrixMut::new(&mut self.logits, batch.rows(), columns, columns),
                maximum: &mut self.maximum,
                sum: &mut self.sum,
                rescale: &mut self.rescale,
            },
        );
        if let Some(dropped) = &mut self.dropped {
            dropped.read_keys(batch, source);
            dropped.drop_weights(self.level, &mut self.logits, self.columns);
        }
        self.add_values(batch, source, next);
    }

    /// The logits of a batch of keys.
    fn logits<E: Element<Compute = T>>(&mut self, batch: &KeyBatch<T>, source: &KeySource<'_, E>) {
        if let Some(bf16) = self.bf16.as_mut().filter(|_| !self.biased) {
            bf16.logits.compute(batch, source, float32(&mut self.logits));
            return;
        }
        let columns = self.columns;
        for part in batch.parts(source) {
            let logits = &mut self.logits[part.rows.start * columns..part.rows.end * columns];
            T::run(
                self.level,
                Gemm {
                    a: part.keys.columns(self.channels),
                    a_transposed: false,
                    b: Matrix::new(&self.packed, self.channels, columns, columns),
                    b_rows: None,
                    c: MatrixMut::new(logits, part.rows.len(), columns, columns),
                    init: Init::Zero,
                    ahead: source.ahead(part.values),
                },
            );
        }
    }

    /// Multiplies the sums of each query by its factor, then adds the values of a batch of keys with the weights that the logits became.
    fn add_values<E: Element<Compute = T>>(&mut self, batch: &KeyBatch<T>, source: &KeySource<'_, E>, next: &[u32]) {
        let (columns, width) = (self.columns, self.width);
        if let Some(bf16) = self.bf16.as_mut().filter(|_| !self.biased) {
            let sums = MatrixMut::new(float32(&mut self.values), self.queries, width, width);
            bf16.add_values(source, float32(&mut self.logits), float32(&mut self.rescale), sums);
            return;
        }
        let blocks_of_a_part = next.len().div_ceil(batch.parts(source).count().max(1)).max(1);
        let mut next = next.chunks(blocks_of_a_part).map(|blocks| source.keys_ahead(blocks));
        for part in batch.parts(source) {
            let weights = &self.logits[part.rows.start * columns..part.rows.end * columns];
            T::run(
                self.level,
                Gemm {
                    a: Matrix::new(weights, part.rows.len(), self.queries, columns),
                    a_transposed: true,
                    b: part.values,
                    b_rows: None,
                    c: MatrixMut::new(&mut self.values, self.queries, width, width),
                    init: if part.rows.start == 0 { Init::ScaleRows(&self.rescale) } else { Init::Keep },
                    ahead: next.next().flatten(),
                },
            );
        }
    }

    /// Writes the output and the lse of a query.
    pub(crate) fn finish<E: Element<Compute = T>>(&mut self, query: usize, sink: Option<T>, out: &mut [E], lse: &mut T) {
        let values = &mut self.values[query * self.width..][..out.len()];
        let (factor, of_query) = factor_and_lse(self.maximum[query], self.sum[query], sink);
        *lse = of_query;
        match factor {
            Some(factor) => T::run(self.level, NarrowScaled { values, factor, to: out }),
            None => out.fill(E::default()),
        }
    }
}

/// Ends the softmax of a query with the sums of its weights and of its weighted `values`, relative to the largest logit: writes the output
/// and returns the lse. A `sink` is one more logit, without a value.
pub(crate) fn finish<E: Element>(
    maximum: E::Compute,
    sum: E::Compute,
    sink: Option<E::Compute>,
    values: &mut [E::Compute],
    out: &mut [E],
) -> E::Compute {
    let (factor, lse) = factor_and_lse(maximum, sum, sink);
    match factor {
        Some(factor) => E::narrow_scaled(values, factor, out),
        None => out.fill(E::default()),
    }
    lse
}

/// What the sums of weighted values must be multiplied by, nothing where a query sees no key, and the lse.
fn factor_and_lse<T: Scalar>(maximum: T, sum: T, sink: Option<T>) -> (Option<T>, T) {
    let (zero, one) = (T::ZERO, T::from_f64(1.0));
    if sum == zero {
        return (None, T::NEG_INFINITY);
    }
    let Some(sink) = sink else { return (Some(one / sum), maximum + sum.ln()) };
    // The larger one of both is the reference, so that no exponential is infinite.
    let (reference, factor, of_sink) =
        if sink > maximum { (sink, (maximum - sink).exp(), one) } else { (maximum, one, (sink - maximum).exp()) };
    let sum = sum * factor + of_sink;
    (Some(factor / sum), reference + sum.ln())
}

/// Numbers, where the compute type is known to be float32: bfloat16 has no other.
pub(crate) fn float32<T: Scalar>(numbers: &mut [T]) -> &mut [f32] {
    T::as_float32(numbers).expect("the compute type of bfloat16")
}
