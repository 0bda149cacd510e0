//! The running softmax of a tile of queries over strips of keys.

use std::any::Any;

use super::bf16::Bf16Products;
use super::coarse::CoarseState;
use super::dropped::Dropped;
use super::problem::Problem;
use super::scratch::Buffer;
use super::strip::{KeySource, Strip};
use crate::kernels::{Gemm, Init, Matrix, MatrixMut, OnlineSoftmax, Stream, pack_transposed, product};
use crate::simd::{Element, Level, SQUARE, Scalar};

/// The state of a tile of queries between strips, and the buffers of a step.
pub(crate) struct Attend<T> {
    level: Level,
    guard: bool,
    dropped: Option<Dropped>,
    /// The products, where bfloat16 numbers are multiplied as they are.
    bf16: Option<Bf16Products>,
    /// Queries of the tile.
    pub(crate) queries: usize,
    /// Lanes: the queries rounded up to whole vectors.
    pub(crate) columns: usize,
    /// Channels of a value, rounded up to whole vectors.
    pub(crate) width: usize,
    channels: usize,
    scale: T,
    packed: Buffer<T>,
    lines: Buffer<T>,
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
    /// Buffers for tiles of at most `columns` queries. With `guard` a weight of 0 hides even a NaN.
    pub(crate) fn new(problem: &Problem<'_>, columns: usize, value_dim: usize, guard: bool) -> Self {
        let width = problem.padded::<T>(value_dim);
        Self {
            level: problem.level,
            guard,
            dropped: problem.dropout.map(Dropped::new),
            bf16: None,
            queries: 0,
            columns: 0,
            width,
            channels: problem.head_dim,
            scale: T::from_f64(problem.scale),
            packed: Buffer::scratch(problem.head_dim * columns),
            lines: Buffer::scratch(SQUARE * problem.head_dim),
            logits: Buffer::scratch(Strip::<T>::capacity(problem) * columns),
            rescale: Buffer::scratch(columns),
            maximum: Buffer::scratch(columns),
            sum: Buffer::scratch(columns),
            values: Buffer::scratch(columns * width),
        }
    }

    /// As [`Self::new`], for tensors of `E` alone, which may be bfloat16 that is multiplied as it is.
    pub(crate) fn for_tensors<E: Element<Compute = T>>(
        problem: &Problem<'_>,
        columns: usize,
        value_dim: usize,
        guard: bool,
    ) -> Self {
        // Only the float32 products can be guarded, and whether a mask hides a NaN must not decide which ones are used.
        let bf16 = if problem.pairs.is_some() { None } else { Bf16Products::new::<E>(problem, columns, value_dim) };
        Self { bf16, ..Self::new(problem, columns, value_dim, guard) }
    }

    /// Keys and values as [`Self::strip`] wants them.
    pub(crate) fn source<'a, E: Element<Compute = T>>(&self, source: KeySource<'a, E>) -> KeySource<'a, E> {
        if self.bf16.is_some() { source.unstaged() } else { source }
    }

    /// Starts a tile of these queries, from the softmax over the coarse level if there is one, which is the same for all of them.
    pub(crate) fn start<'a, E: Element<Compute = T>>(
        &mut self,
        queries: impl ExactSizeIterator<Item = &'a [E]>,
        coarse: Option<&CoarseState<'_, T>>,
    ) {
        self.queries = queries.len();
        self.columns = self.queries.next_multiple_of(T::lanes(self.level));
        let columns = self.columns;
        if let Some(bf16) = &mut self.bf16 {
            bf16.start(queries, columns);
        } else {
            let mut packed = MatrixMut::new(&mut self.packed, self.channels, columns, columns);
            pack_transposed(self.level, queries, self.scale, &mut self.lines, &mut packed);
        }
        self.maximum[..columns].fill(coarse.map_or(T::NEG_INFINITY, |coarse| coarse.maximum));
        self.sum[..columns].fill(coarse.map_or(T::ZERO, |coarse| coarse.sum));
        let values = &mut self.values[..self.queries * self.width];
        match coarse {
            Some(coarse) => values.chunks_exact_mut(self.width.max(1)).for_each(|row| row.copy_from_slice(coarse.values)),
            None => values.fill(T::ZERO),
        }
    }

    /// Says which queries the tile has, for dropout: tokens, or blocks of them.
    pub(crate) fn number_queries(&mut self, stream: Stream, head: usize, queries: impl Iterator<Item = usize>) {
        if let Some(dropped) = &mut self.dropped {
            dropped.start(stream, head, queries, self.columns);
        }
    }

    /// Attends to the keys of a strip. `adjust` may change the logits, one row of `columns` per key, beforehand. `next` are
    /// the blocks of the strip after this one, whose keys are brought nearer. Logits that are `given` are not computed again.
    pub(crate) fn strip<E: Element<Compute = T>>(
        &mut self,
        strip: &Strip<T>,
        source: &KeySource<'_, E>,
        next: &[u32],
        given: Option<Matrix<'_, T>>,
        adjust: impl FnOnce(&mut [T]),
    ) {
        let columns = self.columns;
        if let Some(given) = given {
            assert_eq!((given.rows, given.cols, given.stride), (strip.rows(), columns, columns), "logits of this strip");
            self.logits[..strip.rows() * columns].copy_from_slice(&given.data()[..strip.rows() * columns]);
        } else {
            self.logits(strip, source);
        }
        adjust(&mut self.logits[..strip.rows() * columns]);
        T::run(
            self.level,
            OnlineSoftmax {
                logits: MatrixMut::new(&mut self.logits, strip.rows(), columns, columns),
                maximum: &mut self.maximum,
                sum: &mut self.sum,
                rescale: &mut self.rescale,
            },
        );
        if let Some(dropped) = &mut self.dropped {
            dropped.read_keys(strip, source);
            dropped.drop_weights(self.level, &mut self.logits, self.columns);
        }
        self.add_values(strip, source, next);
    }

    /// The logits of a strip.
    fn logits<E: Element<Compute = T>>(&mut self, strip: &Strip<T>, source: &KeySource<'_, E>) {
        if let Some(bf16) = &mut self.bf16 {
            bf16.logits(strip, source, float32(&mut self.logits));
            return;
        }
        let columns = self.columns;
        for part in strip.parts(source) {
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

    /// Multiplies the sums of each query by its factor, then adds the values of a strip with the weights that the logits became.
    fn add_values<E: Element<Compute = T>>(&mut self, strip: &Strip<T>, source: &KeySource<'_, E>, next: &[u32]) {
        let (columns, width) = (self.columns, self.width);
        if let Some(bf16) = &mut self.bf16 {
            let sums = MatrixMut::new(float32(&mut self.values), self.queries, width, width);
            bf16.add_values(source, float32(&mut self.logits), float32(&mut self.rescale), sums);
            return;
        }
        let blocks_of_a_part = next.len().div_ceil(strip.parts(source).count().max(1)).max(1);
        let mut next = next.chunks(blocks_of_a_part).map(|blocks| source.keys_ahead(blocks));
        for part in strip.parts(source) {
            let weights = &self.logits[part.rows.start * columns..part.rows.end * columns];
            product(
                self.level,
                self.guard,
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
    pub(crate) fn finish<E: Element<Compute = T>>(&mut self, query: usize, out: &mut [E], lse: &mut T) {
        let (sum, row) = (self.sum[query], &mut self.values[query * self.width..][..out.len()]);
        if sum == T::ZERO {
            out.fill(E::default());
            *lse = T::NEG_INFINITY;
            return;
        }
        E::narrow_scaled(row, T::from_f64(1.0) / sum, out);
        *lse = self.maximum[query] + sum.ln();
    }
}

/// A buffer, where the compute type is known to be float32: bfloat16 has no other.
fn float32<T: Scalar>(buffer: &mut Buffer<T>) -> &mut [f32] {
    let buffer: &mut dyn Any = buffer;
    buffer.downcast_mut::<Buffer<f32>>().expect("the compute type of bfloat16")
}
