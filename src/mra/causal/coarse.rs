//! The coarse level of a tile of queries: their logits of pooled keys, what they choose, and the softmax over the rest.

use std::ops::Range;

use super::lists::visible;
use super::pooled::Means;
use super::problem::{CausalBudget, CausalProblem, Sight};
use super::select::Chooser;
use crate::kernels::{AllFinite, Gemm, Init, Matrix, MatrixMut, OnlineSoftmax, Stream, pack_transposed};
use crate::mra::coarse::{for_strips, weigh};
use crate::mra::dropped::Dropped;
use crate::mra::problem::Mode;
use crate::mra::scratch::Buffer;
use crate::mra::tile::TILE_QUERIES;
use crate::simd::{Element, SQUARE, Scalar};
use crate::tensor::Rows;

/// Blocks of one step of the softmax: its logits fit into a first-level cache. Steps start at multiples of this, so that
/// the order of a query's sums does not depend on its tile.
pub(crate) const STRIP_BLOCKS: usize = 128;

/// The running softmax of consecutive queries.
pub(crate) struct State<T> {
    /// The largest logit so far.
    pub(crate) maximum: Buffer<T>,
    /// The sum of weights so far, relative to the maximum.
    pub(crate) sum: Buffer<T>,
    /// The sum of weighted values so far: a row of `width` for each query.
    pub(crate) values: Buffer<T>,
    /// Channels of a value, rounded up to whole vectors.
    pub(crate) width: usize,
}

impl<T: Scalar> State<T> {
    pub(crate) fn new(queries: usize, width: usize) -> Self {
        Self {
            maximum: Buffer::scratch(queries),
            sum: Buffer::scratch(queries),
            values: Buffer::scratch(queries * width),
            width,
        }
    }
}

/// What all tiles of a head share.
pub(crate) struct CoarseSource<'a, T> {
    pub(crate) problem: &'a CausalProblem,
    pub(crate) batch: usize,
    /// Heads of all batch items are numbered through.
    pub(crate) head: usize,
    /// Means of keys and of values; the latter in full mode.
    pub(crate) keys: Option<Rows<'a, T>>,
    pub(crate) values: Option<Rows<'a, T>>,
    /// `None`: the plan is given.
    pub(crate) budget: Option<&'a CausalBudget>,
}

impl<'a, T: Scalar> CoarseSource<'a, T> {
    pub(crate) fn new(
        problem: &'a CausalProblem,
        means: Option<&'a Means<'_, T>>,
        head: usize,
        budget: Option<&'a CausalBudget>,
    ) -> Self {
        let (kv, batch) = (problem.inner.kv_row(head), head / problem.inner.heads);
        let keys = means.map(|means| means.keys(&problem.inner, kv));
        let values = means.and_then(|means| means.values(&problem.inner, kv));
        Self { problem, batch, head, keys, values, budget }
    }
}

/// The buffers of a tile.
pub(crate) struct CoarseTile<T> {
    packed: Buffer<T>,
    lines: Buffer<T>,
    logits: Buffer<T>,
    rescale: Buffer<T>,
    maximum: Buffer<T>,
    sum: Buffer<T>,
    dropped: Option<Dropped>,
    chooser: Chooser,
}

impl<T: Scalar> CoarseTile<T> {
    /// Buffers for tiles of at most `queries` queries.
    pub(crate) fn new(problem: &CausalProblem, queries: usize) -> Self {
        let columns = problem.inner.padded::<T>(queries.min(TILE_QUERIES));
        let blocks = (0..problem.inner.batch).map(|batch| problem.pooled_blocks(batch)).max().unwrap_or(0);
        Self {
            packed: Buffer::scratch(problem.inner.head_dim * columns),
            lines: Buffer::scratch(SQUARE * problem.inner.head_dim),
            logits: Buffer::scratch(blocks * columns),
            rescale: Buffer::scratch(columns),
            maximum: Buffer::scratch(columns),
            sum: Buffer::scratch(columns),
            dropped: problem.inner.dropout.map(Dropped::new),
            chooser: Chooser::default(),
        }
    }

    /// Chooses the blocks of a tile of queries, unless the plan is given, and starts their softmax with all other past blocks.
    ///
    /// `queries` are rows of `rows`; `sights`, `plan` (`width` numbers for each query) and the rows of `state` from `first` on
    /// are those of the same queries.
    #[allow(clippy::too_many_arguments, reason = "a tile of queries, and what is computed for it")]
    pub(crate) fn compute<E: Element<Compute = T>>(
        &mut self,
        source: &CoarseSource<'_, T>,
        rows: &Rows<'_, E>,
        queries: Range<usize>,
        sights: &[Sight],
        plan: &mut [i32],
        width: usize,
        state: &mut State<T>,
        first: usize,
    ) {
        let inner = &source.problem.inner;
        let past = sights.iter().map(|sight| sight.past).max().unwrap_or(0);
        if let (Some(values), Some(split)) = (&source.values, split(sights))
            && !T::run(inner.level, AllFinite(matrix(values, sights[0].past..past)))
        {
            // Weight 0 times a value that is no number is no number: queries only go together with blocks that all of them see.
            let (left, right) = plan.split_at_mut(split * width);
            let middle = queries.start + split;
            self.compute(source, rows, queries.start..middle, &sights[..split], left, width, state, first);
            self.compute(source, rows, middle..queries.end, &sights[split..], right, width, state, first + split);
            return;
        }
        let columns = inner.padded::<T>(sights.len());
        if let Some(keys) = &source.keys {
            self.multiply(source.problem, rows, queries.clone(), &keys_of(keys, inner.head_dim, past), columns);
            blank(&mut self.logits, columns, sights, 0..past);
        }
        if let Some(budget) = source.budget {
            self.chooser.choose(inner.level, &mut self.logits, columns, budget, sights, plan, width);
        }
        match &source.values {
            Some(values) if inner.mode == Mode::Full => {
                exclude(&mut self.logits, columns, sights, plan, width, 0..past);
                if let Some(dropped) = &mut self.dropped {
                    dropped.start(Stream::Coarse, source.head, queries, columns);
                }
                self.attend(source, values, past, sights.len(), columns, state, first);
            }
            _ => {
                state.maximum[first..first + sights.len()].fill(T::NEG_INFINITY);
                state.sum[first..first + sights.len()].fill(T::ZERO);
                state.values[first * state.width..(first + sights.len()) * state.width].fill(T::ZERO);
            }
        }
    }

    /// The logits of the past blocks, one row for each.
    fn multiply<E: Element<Compute = T>>(
        &mut self,
        problem: &CausalProblem,
        rows: &Rows<'_, E>,
        queries: Range<usize>,
        keys: &Matrix<'_, T>,
        columns: usize,
    ) {
        let inner = &problem.inner;
        let ahead = rows_ahead(rows, queries.end, TILE_QUERIES);
        let mut packed = MatrixMut::new(&mut self.packed, inner.head_dim, columns, columns);
        pack_transposed(inner.level, queries.map(|t| rows.row(t)), T::from_f64(inner.scale), &mut self.lines, &mut packed);
        T::run(
            inner.level,
            Gemm {
                a: *keys,
                a_transposed: false,
                b: Matrix::new(&self.packed, inner.head_dim, columns, columns),
                b_rows: None,
                c: MatrixMut::new(&mut self.logits, keys.rows, columns, columns),
                init: Init::Zero,
                ahead,
            },
        );
    }

    /// The softmax over the blocks whose logits are not `-inf`, into the rows of the state from `first` on.
    #[allow(clippy::too_many_arguments, reason = "sizes of a tile, and its place")]
    fn attend(
        &mut self,
        source: &CoarseSource<'_, T>,
        values: &Rows<'_, T>,
        past: usize,
        queries: usize,
        columns: usize,
        state: &mut State<T>,
        first: usize,
    ) {
        let inner = &source.problem.inner;
        let width = state.width;
        let sums = &mut state.values[first * width..(first + queries) * width];
        self.maximum[..columns].fill(T::NEG_INFINITY);
        self.sum[..columns].fill(T::ZERO);
        if past == 0 {
            sums.fill(T::ZERO);
        }
        for_strips(past, STRIP_BLOCKS, |blocks| {
            let logits = &mut self.logits[blocks.start * columns..blocks.end * columns];
            weigh(logits, columns, inner.keys(source.batch), blocks.clone());
            T::run(
                inner.level,
                OnlineSoftmax {
                    logits: MatrixMut::new(logits, blocks.len(), columns, columns),
                    maximum: &mut self.maximum,
                    sum: &mut self.sum,
                    rescale: &mut self.rescale,
                },
            );
            if let Some(dropped) = &mut self.dropped {
                dropped.set_keys(blocks.start, blocks.len());
                dropped.drop_weights(inner.level, logits, columns);
            }
            T::run(
                inner.level,
                Gemm {
                    a: Matrix::new(logits, blocks.len(), queries, columns),
                    a_transposed: true,
                    b: matrix(values, blocks.clone()),
                    b_rows: None,
                    c: MatrixMut::new(sums, queries, width, width),
                    init: if blocks.start == 0 { Init::Zero } else { Init::ScaleRows(&self.rescale) },
                    ahead: None,
                },
            );
        });
        for (query, &sum) in self.sum[..queries].iter().enumerate() {
            if sum == T::ZERO {
                // Nothing but exact blocks. The sums may be NaN: weight 0 times a mean that is not finite.
                sums[query * width..(query + 1) * width].fill(T::ZERO);
            }
        }
        state.maximum[first..first + queries].copy_from_slice(&self.maximum[..queries]);
        state.sum[first..first + queries].copy_from_slice(&self.sum[..queries]);
    }
}

/// Where the queries of a tile that see fewest past blocks end, if not all see equally many.
pub(crate) fn split(sights: &[Sight]) -> Option<usize> {
    let split = sights.partition_point(|sight| sight.past == sights[0].past);
    (split < sights.len()).then_some(split)
}

/// Rows of a matrix whose rows are whole vectors.
pub(crate) fn matrix<'a, T: Scalar>(rows: &Rows<'a, T>, range: Range<usize>) -> Matrix<'a, T> {
    if range.is_empty() {
        return Matrix::new(&[], 0, rows.cols(), rows.cols());
    }
    let (data, stride) = rows.tail(range.start);
    Matrix::new(data, range.len(), rows.cols(), stride)
}

/// At most `most` rows from `first` on, to be brought nearer; `None` where copies of them are read.
fn rows_ahead<'a, E: Element>(rows: &Rows<'a, E>, first: usize, most: usize) -> Option<Matrix<'a, E::Compute>> {
    let count = most.min(rows.len() - first);
    let (data, stride) = if count == 0 { (&[][..], 0) } else { rows.tail(first) };
    Some(Matrix::new(E::as_compute(data)?, count, rows.cols(), stride))
}

fn keys_of<'a, T: Scalar>(rows: &Rows<'a, T>, channels: usize, past: usize) -> Matrix<'a, T> {
    matrix(rows, 0..past).columns(channels)
}

/// Sets the logits of those among some blocks that are not past ones of their query to `-inf`; the first row of `logits` is
/// that of the first one.
pub(crate) fn blank<T: Scalar>(logits: &mut [T], columns: usize, sights: &[Sight], blocks: Range<usize>) {
    for (lane, sight) in sights.iter().enumerate() {
        for block in sight.past.max(blocks.start)..blocks.end {
            logits[(block - blocks.start) * columns + lane] = T::NEG_INFINITY;
        }
    }
}

/// Sets the logits of the exact ones among some blocks to `-inf`; the first row of `logits` is that of the first one.
pub(crate) fn exclude<T: Scalar>(
    logits: &mut [T],
    columns: usize,
    sights: &[Sight],
    plan: &[i32],
    width: usize,
    blocks: Range<usize>,
) {
    for (lane, sight) in sights.iter().enumerate() {
        for &number in &plan[lane * width..][..width] {
            if let Some(block) = visible(number, sight).filter(|&block| block < sight.past && blocks.contains(&block)) {
                logits[(block - blocks.start) * columns + lane] = T::NEG_INFINITY;
            }
        }
    }
}
