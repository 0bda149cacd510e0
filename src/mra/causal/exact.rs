//! The exact blocks of a range of queries: block by block, the queries that have it in their plan together.

use super::coarse::State;
use super::lists::BlockLists;
use super::problem::{CausalProblem, Sight};
use crate::kernels::{AllFinite, Gemm, Init, Matrix, MatrixMut, OnlineSoftmax, Stream, pack_transposed};
use crate::mra::dropped::Dropped;
use crate::mra::scratch::Buffer;
use crate::mra::strip::{KeySource, PartView, Strip};
use crate::mra::tile::TILE_QUERIES;
use crate::simd::{Element, Level, SQUARE, Scalar, prefetch_far};

/// Queries that meet a block together.
pub(crate) struct Meeting<'a> {
    /// The queries, numbered from the start of the range.
    pub(crate) queries: &'a [u32],
    /// How many keys of the block the last of them sees; none of them sees more.
    pub(crate) keys: usize,
    /// Whether some of them see fewer.
    pub(crate) partly: bool,
    /// The queries of the tile after this one: time to bring their rows nearer, since nothing else says which come next.
    pub(crate) next: &'a [u32],
}

impl Meeting<'_> {
    /// Sets the logits of keys behind each query to `-inf`. The keys of the block start at `start`.
    pub(crate) fn hide<T: Scalar>(&self, logits: &mut [T], columns: usize, sights: &[Sight], start: usize) {
        if !self.partly {
            return;
        }
        for (lane, &query) in self.queries.iter().enumerate() {
            for key in sights[query as usize].keys - start..self.keys {
                logits[key * columns + lane] = T::NEG_INFINITY;
            }
        }
    }

    /// Calls `body` with each query alone and the keys that it sees.
    pub(crate) fn one_by_one(&self, sights: &[Sight], start: usize, mut body: impl FnMut(Meeting<'_>)) {
        for queries in self.queries.chunks(1) {
            body(Meeting { queries, keys: sights[queries[0] as usize].keys - start, partly: false, next: &[] });
        }
    }

    /// The rows of the block that some of the queries do not see.
    pub(crate) fn hidden_from_some(&self, sights: &[Sight], start: usize) -> std::ops::Range<usize> {
        sights[self.queries[0] as usize].keys - start..self.keys
    }
}

/// Calls `body` with the tiles of the queries that have a block in their plan: first those of the block itself, which see
/// its keys up to their own, then later ones, which see them all. `start` and `count` are those of the block's keys.
pub(crate) fn for_meetings(
    lists: &BlockLists,
    block: usize,
    sights: &[Sight],
    start: usize,
    count: usize,
    mut body: impl FnMut(Meeting<'_>),
) {
    let queries = lists.of(block);
    let (own, later) = queries.split_at(queries.partition_point(|&query| sights[query as usize].past <= block));
    let next = |done: usize| {
        let behind = lists.behind(block, done);
        &behind[..behind.len().min(TILE_QUERIES)]
    };
    let mut done = 0;
    for queries in own.chunks(TILE_QUERIES) {
        let seen = |query: u32| (sights[query as usize].keys - start).min(count);
        let keys = seen(queries[queries.len() - 1]);
        done += queries.len();
        body(Meeting { queries, keys, partly: seen(queries[0]) < keys, next: next(done) });
    }
    for queries in later.chunks(TILE_QUERIES) {
        done += queries.len();
        body(Meeting { queries, keys: count, partly: false, next: next(done) });
    }
}

/// The buffers of a tile of queries that meets a block.
pub(crate) struct ExactTile<T> {
    level: Level,
    scale: T,
    channels: usize,
    packed: Buffer<T>,
    lines: Buffer<T>,
    logits: Buffer<T>,
    maximum: Buffer<T>,
    sum: Buffer<T>,
    rescale: Buffer<T>,
    dropped: Option<Dropped>,
}

impl<T: Scalar> ExactTile<T> {
    pub(crate) fn new(problem: &CausalProblem, queries: usize) -> Self {
        let inner = &problem.inner;
        let columns = inner.padded::<T>(queries.min(TILE_QUERIES));
        Self {
            level: inner.level,
            scale: T::from_f64(inner.scale),
            channels: inner.head_dim,
            packed: Buffer::scratch(inner.head_dim * columns),
            lines: Buffer::scratch(SQUARE * inner.head_dim),
            logits: Buffer::scratch(inner.block_size * columns),
            maximum: Buffer::scratch(columns),
            sum: Buffer::scratch(columns),
            rescale: Buffer::scratch(columns),
            dropped: inner.dropout.map(Dropped::new),
        }
    }

    /// Continues the softmax of the queries of a range over all blocks of their plans, in ascending order. `place` is the head,
    /// numbered through all batch items, and the first token of the range; `row` gives a query by its number within the range.
    #[allow(clippy::too_many_arguments, reason = "queries, keys, the buffers, and where the result goes")]
    pub(crate) fn blocks<'q, E: Element<Compute = T>>(
        &mut self,
        place: (usize, usize),
        lists: &BlockLists,
        sights: &[Sight],
        row: impl Fn(usize) -> &'q [E] + Copy,
        source: &KeySource<'_, E>,
        strip: &mut Strip<T>,
        state: &mut State<T>,
    ) {
        for &block in lists.present() {
            let numbers = source.numbers(block);
            // No key behind the last query that meets the block is read.
            let last = lists.of(block).last().map_or(0, |&query| sights[query as usize].keys);
            strip.clear();
            assert!(strip.push(source, numbers.start..numbers.end.min(last)), "an empty strip has room for a block");
            let Some(part) = strip.parts(source).next() else { continue };
            for_meetings(lists, block, sights, numbers.start, numbers.len(), |meeting| {
                let hidden = meeting.hidden_from_some(sights, numbers.start);
                if meeting.partly && !T::run(self.level, AllFinite(part.values.row_range(hidden))) {
                    // Weight 0 times a value that is no number is no number.
                    meeting.one_by_one(sights, numbers.start, |alone| {
                        self.meet(place, &alone, sights, row, &part, numbers.start, state);
                    });
                } else {
                    self.meet(place, &meeting, sights, row, &part, numbers.start, state);
                }
            });
        }
    }

    /// One step of the softmax.
    #[allow(clippy::too_many_arguments, reason = "queries, keys, the buffers, and where the result goes")]
    fn meet<'q, E: Element<Compute = T>>(
        &mut self,
        place: (usize, usize),
        meeting: &Meeting<'_>,
        sights: &[Sight],
        row: impl Fn(usize) -> &'q [E],
        part: &PartView<'_, T>,
        start: usize,
        state: &mut State<T>,
    ) {
        let (count, width) = (meeting.queries.len(), state.width);
        for &query in meeting.next {
            prefetch_far(row(query as usize));
            prefetch_far(&state.values[query as usize * width..][..width]);
        }
        let columns = count.next_multiple_of(T::lanes(self.level));
        let rows = meeting.queries.iter().map(|&query| row(query as usize));
        let mut packed = MatrixMut::new(&mut self.packed, self.channels, columns, columns);
        pack_transposed(self.level, rows, self.scale, &mut self.lines, &mut packed);
        T::run(
            self.level,
            Gemm {
                a: part.keys.columns(self.channels).row_range(0..meeting.keys),
                a_transposed: false,
                b: Matrix::new(&self.packed, self.channels, columns, columns),
                b_rows: None,
                c: MatrixMut::new(&mut self.logits, meeting.keys, columns, columns),
                init: Init::Zero,
                ahead: None,
            },
        );
        meeting.hide(&mut self.logits, columns, sights, start);
        self.maximum[..columns].fill(T::NEG_INFINITY);
        self.sum[..columns].fill(T::ZERO);
        for (lane, &query) in meeting.queries.iter().enumerate() {
            self.maximum[lane] = state.maximum[query as usize];
            self.sum[lane] = state.sum[query as usize];
        }
        T::run(
            self.level,
            OnlineSoftmax {
                logits: MatrixMut::new(&mut self.logits, meeting.keys, columns, columns),
                maximum: &mut self.maximum,
                sum: &mut self.sum,
                rescale: &mut self.rescale,
            },
        );
        if let Some(dropped) = &mut self.dropped {
            let tokens = meeting.queries.iter().map(|&query| place.1 + query as usize);
            dropped.start(Stream::Exact, place.0, tokens, columns);
            dropped.set_keys(start, meeting.keys);
            dropped.drop_weights(self.level, &mut self.logits, columns);
        }
        T::run(
            self.level,
            Gemm {
                a: Matrix::new(&self.logits, meeting.keys, count, columns),
                a_transposed: true,
                b: part.values.row_range(0..meeting.keys),
                b_rows: None,
                c: MatrixMut::new(&mut state.values, sights.len(), width, width),
                init: Init::ScaleRowsAt(&self.rescale, meeting.queries),
                ahead: None,
            },
        );
        for (lane, &query) in meeting.queries.iter().enumerate() {
            state.maximum[query as usize] = self.maximum[lane];
            state.sum[query as usize] = self.sum[lane];
        }
    }
}
