//! The coarse level of a tile of queries: their logits of pooled keys, what they choose, and the softmax over the rest.

use std::ops::Range;

use super::queries_of_block::open_block;
use super::rank::{QueryCodes, Rank, RankedBlocks};
use crate::exec::Buffer;
use crate::kernels::{AllFinite, Gemm, Init, Matrix, MatrixMut, OnlineSoftmax, Softcap, Stream, pack_transposed, product};
use crate::mra::attend::{DropoutTile, TILE_QUERIES};
use crate::mra::problem::{Batch, Mode, Problem, Score, Segment, Sight, TokenBudget};
use crate::mra::pyramid::Means;
use crate::mra::select::Chooser;
use crate::mra::weigh;
use crate::simd::{Element, Level, Scalar};
use crate::tensor::Rows;

/// Blocks of one step of the softmax: its logits fit into a first-level cache. Steps start at multiples of this, so that
/// the order of a query's sums does not depend on its tile.
pub(crate) const STEP_BLOCKS: usize = 128;

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

    /// The state of queries that have seen nothing.
    fn clear(&mut self, queries: Range<usize>) {
        self.maximum[queries.clone()].fill(T::NEG_INFINITY);
        self.sum[queries.clone()].fill(T::ZERO);
        self.values[queries.start * self.width..queries.end * self.width].fill(T::ZERO);
    }
}

/// What all tiles of a flat head share.
pub(crate) struct CoarseSource<'a, T> {
    pub(crate) problem: &'a Problem<'a>,
    pub(crate) segment: &'a Segment,
    /// The head in its batch item.
    pub(crate) head: usize,
    pub(crate) dropout_head: usize,
    /// Means of keys and of values; the latter in full mode.
    pub(crate) keys: Option<Rows<'a, T>>,
    pub(crate) values: Option<Rows<'a, T>>,
    /// `None`: the plan is given.
    pub(crate) budget: Option<TokenBudget>,
}

impl<'a, T: Scalar> CoarseSource<'a, T> {
    pub(crate) fn new(
        problem: &'a Problem<'a>,
        batch: &'a Batch<'a>,
        means: Option<&'a Means<'_, T>>,
        head: usize,
        selecting: bool,
    ) -> Self {
        let (segment, group, (_, head_of_item)) = (batch.segment(head), batch.group(head), batch.item_and_head(head));
        Self {
            problem,
            segment,
            head: head_of_item,
            dropout_head: batch.dropout_head(head),
            keys: means.map(|means| means.keys(batch, group)),
            values: means.and_then(|means| means.values(batch, group)),
            budget: selecting.then(|| problem.token_budget(segment, head_of_item)),
        }
    }
}

/// The buffers of a tile.
pub(crate) struct CoarseTile<T> {
    packed: Buffer<T>,
    logits: Buffer<T>,
    rescale: Buffer<T>,
    maximum: Buffer<T>,
    sum: Buffer<T>,
    dropout: Option<DropoutTile>,
    chooser: Chooser,
    /// Where blocks are ranked by more than these logits.
    rank: Option<Rank<T>>,
}

/// Queries of a tile: where they lie, and what they see.
#[derive(Clone)]
pub(crate) struct Tile<'a> {
    /// The tokens.
    pub(crate) tokens: Range<usize>,
    /// The first of them, counted from the start of the range.
    pub(crate) first: usize,
    pub(crate) sights: &'a [Sight<'a>],
    /// What they see of the finest blocks.
    pub(crate) finest: &'a [Sight<'a>],
}

impl<T: Scalar> CoarseTile<T> {
    /// Buffers for tiles of at most `queries` queries; blocks have so many `members` at most.
    pub(crate) fn new(problem: &Problem<'_>, batch: &Batch<'_>, members: usize, queries: usize) -> Self {
        let columns = problem.padded::<T>(queries.min(TILE_QUERIES));
        Self {
            packed: Buffer::scratch(problem.head_dim * columns),
            logits: Buffer::scratch(batch.most_columns() * columns),
            rescale: Buffer::scratch(columns),
            maximum: Buffer::scratch(columns),
            sum: Buffer::scratch(columns),
            dropout: problem.dropout.map(DropoutTile::new),
            chooser: Chooser::default(),
            rank: (problem.score == Score::Max).then(|| Rank::new(problem, batch.most_columns(), members, columns)),
        }
    }

    /// Chooses the blocks of a tile of queries, unless the plan is given, and starts their softmax with all other open blocks.
    /// `plan` has `width` numbers for each query of the tile; `ranked` is what blocks are ranked by, if not by their means.
    #[allow(clippy::too_many_arguments, reason = "a tile of queries, what it chooses from, and where the result goes")]
    pub(crate) fn compute<E: Element<Compute = T>>(
        &mut self,
        source: &CoarseSource<'_, T>,
        rows: &Rows<'_, E>,
        tile: &Tile<'_>,
        ranked: Option<(&RankedBlocks<'_, E>, &QueryCodes<T>)>,
        plan: &mut [i32],
        width: usize,
        state: &mut State<T>,
    ) {
        let (problem, sights) = (source.problem, tile.sights);
        state.clear(tile.first..tile.first + sights.len());
        let Some(keys) = source.keys.as_ref().filter(|_| width > 0) else {
            return;
        };
        let blocks = match &source.budget {
            Some(budget) => self.chooser.start(budget, sights, tile.finest, problem.ratio),
            None => span_of_open(sights),
        };
        let columns = problem.padded::<T>(sights.len());
        if !blocks.is_empty() {
            let means = matrix(keys, blocks.clone()).columns(problem.head_dim);
            self.multiply(problem, rows, tile.tokens.clone(), &means, columns);
            self.hide(source, tile, &blocks, columns);
        }
        if source.budget.is_some() {
            let scores = match (&mut self.rank, ranked) {
                (Some(rank), Some((ranked, queries))) => {
                    let logits = Matrix::new(&self.logits, blocks.len(), columns, columns);
                    rank.scores(problem, ranked, (queries, tile.first), &blocks, logits, self.chooser.wanted(columns))
                }
                _ => &self.logits,
            };
            self.chooser.choose(problem.level, scores, columns, &blocks, sights, plan, width);
        }
        if let Some(values) = source.values.as_ref().filter(|_| problem.mode == Mode::Full && !blocks.is_empty()) {
            exclude(&mut self.logits, columns, sights, plan, width, &blocks);
            let places = tile.tokens.clone().map(|token| token - source.segment.rows.tokens().start);
            if let Some(dropout) = &mut self.dropout {
                dropout.start(Stream::Coarse, source.dropout_head, places, columns);
            }
            self.attend(source, values, &blocks, sights.len(), columns, state, tile.first);
        }
    }

    /// The logits of some blocks, one row for each.
    fn multiply<E: Element<Compute = T>>(
        &mut self,
        problem: &Problem<'_>,
        rows: &Rows<'_, E>,
        queries: Range<usize>,
        keys: &Matrix<'_, T>,
        columns: usize,
    ) {
        let ahead = rows_ahead(rows, queries.end, TILE_QUERIES);
        let mut packed = MatrixMut::new(&mut self.packed, problem.head_dim, columns, columns);
        pack_transposed(problem.level, queries.map(|t| rows.row(t)), T::from_f64(problem.scale), &mut packed);
        T::run(
            problem.level,
            Gemm {
                a: *keys,
                a_transposed: false,
                b: Matrix::new(&self.packed, problem.head_dim, columns, columns),
                b_rows: None,
                c: MatrixMut::new(&mut self.logits, keys.rows, columns, columns),
                init: Init::Zero,
                ahead,
            },
        );
        if let Some(cap) = problem.softcap.map(T::from_f64) {
            let logits = &mut self.logits[..keys.rows * columns];
            T::run(problem.level, Softcap { logits, cap, slopes: None });
        }
    }

    /// Adds mean biases to the logits of some blocks, and sets those that do not count to `-inf`.
    fn hide(&mut self, source: &CoarseSource<'_, T>, tile: &Tile<'_>, blocks: &Range<usize>, columns: usize) {
        let logits = &mut self.logits[..blocks.len() * columns];
        add_mean_distances(source.problem, source.segment, source.head, &tile.tokens, blocks, logits, columns);
        for (lane, (sight, token)) in tile.sights.iter().zip(tile.tokens.clone()).enumerate() {
            let logit = |block: usize| (block - blocks.start) * columns + lane;
            if let Some(means) = source.segment.mean_biases(source.head, token) {
                blocks.clone().for_each(|block| self.logits[logit(block)] += T::from_f64(means[block]));
            }
            if sight.is_masked() {
                for block in blocks.clone() {
                    let counts = match &source.budget {
                        Some(_) => self.chooser.counts(lane, sight, block),
                        None => sight.is_open(block),
                    };
                    if !counts {
                        self.logits[logit(block)] = T::NEG_INFINITY;
                    }
                }
                continue;
            }
            let ranges = if source.budget.is_some() { self.chooser.ranges(lane) } else { [sight.open.clone(), 0..0] };
            for block in outside(blocks, &ranges) {
                self.logits[logit(block)] = T::NEG_INFINITY;
            }
        }
    }

    /// The softmax over the blocks whose logits are not `-inf`, into the rows of the state from `first` on.
    #[allow(clippy::too_many_arguments, reason = "sizes of a tile, and its place")]
    fn attend(
        &mut self,
        source: &CoarseSource<'_, T>,
        values: &Rows<'_, T>,
        blocks: &Range<usize>,
        queries: usize,
        columns: usize,
        state: &mut State<T>,
        first: usize,
    ) {
        let (problem, width) = (source.problem, state.width);
        let sums = &mut state.values[first * width..(first + queries) * width];
        self.maximum[..columns].fill(T::NEG_INFINITY);
        self.sum[..columns].fill(T::ZERO);
        for_steps(blocks, |part| {
            let logits = &mut self.logits[(part.start - blocks.start) * columns..(part.end - blocks.start) * columns];
            weigh(logits, columns, &source.segment.keys, part.clone(), problem.coarse_shift);
            T::run(
                problem.level,
                OnlineSoftmax {
                    logits: MatrixMut::new(logits, part.len(), columns, columns),
                    maximum: &mut self.maximum,
                    sum: &mut self.sum,
                    rescale: &mut self.rescale,
                },
            );
            if let Some(dropout) = &mut self.dropout {
                dropout.set_keys(part.start, part.len());
                dropout.drop_weights(problem.level, logits, columns);
            }
            let init = if part.start == blocks.start { Init::Zero } else { Init::ScaleRows(&self.rescale) };
            let weights = Matrix::new(logits, part.len(), queries, columns);
            add_values(problem.level, weights, matrix(values, part), init, MatrixMut::new(sums, queries, width, width));
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

/// Adds the mean biases by distance, if there is such a bias, to the logits of some blocks for consecutive queries.
pub(crate) fn add_mean_distances<T: Scalar>(
    problem: &Problem<'_>,
    segment: &Segment,
    head: usize,
    tokens: &Range<usize>,
    blocks: &Range<usize>,
    logits: &mut [T],
    columns: usize,
) {
    if let (Some(alibi), Some(slope)) = (&segment.alibi, problem.alibi_slope(segment.batch, head)) {
        let positions = tokens.clone().map(|token| segment.position(token));
        alibi.add_to_queries(problem.level, slope, positions, &segment.keys, blocks.clone(), logits, columns);
    }
}

/// The blocks that some query sees all of lie here.
pub(crate) fn span_of_open(sights: &[Sight<'_>]) -> Range<usize> {
    let open = |sight: &Sight<'_>| if sight.is_masked() { sight.live.clone() } else { sight.open.clone() };
    let spans = sights.iter().map(open).filter(|span| !span.is_empty());
    spans.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)).unwrap_or(0..0)
}

/// Adds weighted values to the sums of each query, as if factors of 0 were left out: a block that does not count for a query has the
/// weight 0, and 0 times a NaN is NaN.
///
/// The plain product comes first. It gives other numbers only where a value is not finite, and then some sum is not finite either. So
/// the result is always that of the slower one, whatever other queries of the tile see.
fn add_values<T: Scalar>(
    level: Level,
    weights: Matrix<'_, T>,
    values: Matrix<'_, T>,
    init: Init<'_, T>,
    mut sums: MatrixMut<'_, T>,
) {
    let (rows, cols) = (sums.rows, sums.cols);
    let before = if matches!(init, Init::Zero) { Vec::new() } else { sums.data_mut()[..rows * cols].to_vec() };
    for guard in [false, true] {
        let c = MatrixMut::new(sums.data_mut(), rows, cols, cols);
        let gemm = Gemm { a: weights, a_transposed: true, b: values, b_rows: None, c, init, ahead: None };
        product(level, guard, gemm);
        if guard || T::run(level, AllFinite(Matrix::new(sums.data_mut(), rows, cols, cols))) {
            return;
        }
        sums.data_mut()[..before.len()].copy_from_slice(&before);
    }
}

/// The blocks outside of two ranges, the first one before the second.
fn outside(blocks: &Range<usize>, [before, behind]: &[Range<usize>; 2]) -> impl Iterator<Item = usize> + use<> {
    let within = |block: usize| block.clamp(blocks.start, blocks.end);
    let (first, second) = (within(before.start)..within(before.end), within(behind.start)..within(behind.end));
    let second = if second.is_empty() { first.end..first.end } else { second };
    (blocks.start..first.start).chain(first.end..second.start).chain(second.end..blocks.end)
}

/// Calls `body` with the parts of a range of blocks that multiples of [`STEP_BLOCKS`] cut.
pub(crate) fn for_steps(blocks: &Range<usize>, mut body: impl FnMut(Range<usize>)) {
    let mut start = blocks.start;
    while start < blocks.end {
        let end = ((start / STEP_BLOCKS + 1) * STEP_BLOCKS).min(blocks.end);
        body(start..end);
        start = end;
    }
}

/// Rows of a matrix whose rows are whole vectors.
pub(crate) fn matrix<'a, T: Scalar>(rows: &Rows<'a, T>, range: Range<usize>) -> Matrix<'a, T> {
    if range.is_empty() {
        return Matrix::new(&[], 0, rows.cols(), rows.cols());
    }
    let (data, stride) = rows.tail(range.start);
    Matrix::new(data, range.len(), rows.cols(), stride)
}

/// At most `most` rows from `first` on, to be prefetched; `None` where copies of them are read.
fn rows_ahead<'a, E: Element>(rows: &Rows<'a, E>, first: usize, most: usize) -> Option<Matrix<'a, E::Compute>> {
    let count = most.min(rows.len() - first);
    let (data, stride) = if count == 0 { (&[][..], 0) } else { rows.tail(first) };
    Some(Matrix::new(E::as_compute(data)?, count, rows.cols(), stride))
}

/// Sets the logits of the exact ones among some blocks to `-inf`; the first row of `logits` is that of the first one.
pub(crate) fn exclude<T: Scalar>(
    logits: &mut [T],
    columns: usize,
    sights: &[Sight<'_>],
    plan: &[i32],
    width: usize,
    blocks: &Range<usize>,
) {
    for (lane, sight) in sights.iter().enumerate() {
        for &number in &plan[lane * width..][..width] {
            if let Some(block) = open_block(number, sight).filter(|block| blocks.contains(block)) {
                logits[(block - blocks.start) * columns + lane] = T::NEG_INFINITY;
            }
        }
    }
}
