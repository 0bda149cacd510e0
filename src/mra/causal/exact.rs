//! The exact blocks of a range of queries: block by block, the queries that have it in their plan together.

use std::ops::Range;

use super::coarse::State;
use super::lists::BlockLists;
use super::problem::{CausalProblem, Sight};
use crate::kernels::{AllFinite, AttendRows, MOST_QUERIES, Matrix, MatrixMut, Stream, pack_rows, pack_transposed};
use crate::mra::dropped::Dropped;
use crate::mra::scratch::Buffer;
use crate::mra::strip::{KeySource, PartView, Strip};
use crate::simd::{Element, Level, SQUARE, Scalar};
use crate::tensor::Rows;

/// What a range of queries shares.
pub(crate) struct RangeOfHead<'a, E> {
    /// The rows of the head.
    pub(crate) rows: &'a Rows<'a, E>,
    /// Heads of all batch items are numbered through.
    pub(crate) head: usize,
    /// The queries.
    pub(crate) tokens: Range<usize>,
    /// What each of them sees.
    pub(crate) sights: &'a [Sight],
    /// Which of them have which blocks in their plan.
    pub(crate) lists: &'a BlockLists,
}

/// The queries of a range, and what keys are to be multiplied by so that the products are logits.
struct Scaled<'a, T> {
    rows: Matrix<'a, T>,
    key_factor: T,
}

/// The buffers of a block and the queries that meet it.
pub(crate) struct ExactBlock<T> {
    level: Level,
    scale: f64,
    channels: usize,
    /// Keys, one column for each.
    packed: Buffer<T>,
    lines: Buffer<T>,
    logits: Buffer<T>,
    /// Queries of the range, if they cannot be read where they lie.
    queries: Buffer<T>,
    dropped: Option<Dropped>,
}

impl<T: Scalar> ExactBlock<T> {
    /// Buffers for blocks of this problem.
    pub(crate) fn new(problem: &CausalProblem) -> Self {
        let inner = &problem.inner;
        let columns = inner.padded::<T>(inner.block_size);
        Self {
            level: inner.level,
            scale: inner.scale,
            channels: inner.head_dim,
            packed: Buffer::scratch(inner.head_dim * columns),
            lines: Buffer::scratch(SQUARE * inner.head_dim),
            logits: Buffer::scratch(2 * MOST_QUERIES * columns),
            queries: Buffer::scratch(0),
            dropped: inner.dropout.map(Dropped::new),
        }
    }

    /// Continues the softmax of the queries of a range over all blocks of their plans, in ascending order.
    pub(crate) fn attend<E: Element<Compute = T>>(
        &mut self,
        range: &RangeOfHead<'_, E>,
        source: &KeySource<'_, E>,
        strip: &mut Strip<T>,
        state: &mut State<T>,
    ) {
        let mut copied = std::mem::replace(&mut self.queries, Buffer::scratch(0));
        let queries = self.scaled(range, &mut copied);
        let present = range.lists.present();
        for (index, &block) in present.iter().enumerate() {
            let (numbers, listed) = (source.numbers(block), range.lists.of(block));
            // No key behind the last query that meets the block is read.
            let last = listed.last().map_or(0, |&query| range.sights[query as usize].keys);
            strip.clear();
            assert!(strip.push(source, numbers.start..numbers.end.min(last)), "an empty strip has room for a block");
            let Some(part) = strip.parts(source).next() else { continue };
            self.pack(&part, queries.key_factor);
            let ahead = present.get(index + 1).and_then(|&next| source.block_ahead(next));
            // First the queries of the block itself, which see its keys up to their own, then later ones, which see them all.
            let own = range.lists.own(block, range.sights);
            self.own_queries(range, &queries, &part, block, own, state);
            self.step(range, &queries, &part, part.values, (block, own..listed.len()), &[], ahead, state);
        }
        self.queries = copied;
    }

    /// The queries of the range in the compute type: where they lie, or else copied.
    ///
    /// Backward multiplies queries by the scale, and its logits must be rounded as these are: an lse that fits other logits makes
    /// wrong weights of large ones. So keys take the scale only if that makes no difference, as with 64 channels: it is a power
    /// of two, and not one that could make them infinite.
    fn scaled<'q, E: Element<Compute = T>>(&self, range: &RangeOfHead<'q, E>, copy: &'q mut Buffer<T>) -> Scaled<'q, T> {
        let (count, channels) = (range.tokens.len(), self.channels);
        let (data, stride) = range.rows.tail(range.tokens.start);
        let scale = T::from_f64(self.scale);
        if let Some(data) = E::as_compute(data).filter(|_| is_shrinking_power_of_two(self.scale)) {
            return Scaled { rows: Matrix::new(data, count, channels, stride), key_factor: scale };
        }
        if copy.len() < count * channels {
            *copy = Buffer::scratch(count * channels);
        }
        let rows = range.tokens.clone().map(|token| range.rows.row(token));
        pack_rows(rows, &mut MatrixMut::new(copy, count, channels, channels));
        copy[..count * channels].iter_mut().for_each(|x| *x = *x * scale);
        Scaled { rows: Matrix::new(copy, count, channels, channels), key_factor: T::from_f64(1.0) }
    }

    /// Columns of so many packed keys.
    fn columns(&self, keys: usize) -> usize {
        keys.next_multiple_of(T::lanes(self.level))
    }

    /// Packs the keys, times a factor.
    fn pack(&mut self, part: &PartView<'_, T>, factor: T) {
        let columns = self.columns(part.keys.rows);
        let keys = (0..part.keys.rows).map(|key| &part.keys.row(key)[..self.channels]);
        let mut packed = MatrixMut::new(&mut self.packed, self.channels, columns, columns);
        pack_transposed(self.level, keys, factor, &mut self.lines, &mut packed);
    }

    /// A step for the first `own` queries of a block, those that it holds.
    fn own_queries<E: Element<Compute = T>>(
        &mut self,
        range: &RangeOfHead<'_, E>,
        queries: &Scaled<'_, T>,
        part: &PartView<'_, T>,
        block: usize,
        own: usize,
        state: &mut State<T>,
    ) {
        let seen = |query: u32| (range.sights[query as usize].keys - part.first).min(part.keys.rows);
        let listed = &range.lists.of(block)[..own];
        let Some(&first) = listed.first() else { return };
        let all_seen: Vec<u32> = listed.iter().map(|&query| u32::try_from(seen(query)).expect("keys of a block")).collect();
        let hidden = part.values.row_range(seen(first)..part.values.rows);
        if T::run(self.level, AllFinite(hidden)) {
            self.step(range, queries, part, part.values, (block, 0..own), &all_seen, None, state);
            return;
        }
        // Weight 0 times a value that is no number is no number.
        for (index, seen) in all_seen.into_iter().enumerate() {
            let values = part.values.row_range(0..seen as usize);
            self.step(range, queries, part, values, (block, index..index + 1), &[], None, state);
        }
    }

    /// A step of the softmax for some of the queries that have a block in their plan, over as many of its packed keys as there are
    /// `values`.
    #[allow(clippy::too_many_arguments, reason = "queries, keys, who sees which, and where the result goes")]
    fn step<E: Element<Compute = T>>(
        &mut self,
        range: &RangeOfHead<'_, E>,
        queries: &Scaled<'_, T>,
        part: &PartView<'_, T>,
        values: Matrix<'_, T>,
        (block, places): (usize, Range<usize>),
        seen: &[u32],
        ahead: Option<[Matrix<'_, T>; 2]>,
        state: &mut State<T>,
    ) {
        let numbers = &range.lists.of(block)[places];
        if let Some(dropped) = &mut self.dropped {
            let tokens = numbers.iter().map(|&query| range.tokens.start + query as usize);
            dropped.start(Stream::Exact, range.head, tokens, numbers.len());
            dropped.set_keys(part.first, values.rows);
        }
        let columns = self.columns(part.keys.rows);
        let (count, width) = (range.tokens.len(), state.width);
        T::run(
            self.level,
            AttendRows {
                queries: queries.rows,
                keys: Matrix::new(&self.packed, self.channels, columns, columns),
                values,
                numbers,
                seen,
                decisions: self.dropped.as_ref().map(Dropped::decisions),
                maximum: &mut state.maximum,
                sum: &mut state.sum,
                sums: MatrixMut::new(&mut state.values, count, width, width),
                logits: &mut self.logits,
                ahead,
            },
        );
    }
}

/// Whether a product with it is a shift of the exponent, downwards or not at all.
fn is_shrinking_power_of_two(scale: f64) -> bool {
    scale.is_normal() && scale > 0.0 && scale <= 1.0 && scale.to_bits().trailing_zeros() >= f64::MANTISSA_DIGITS - 1
}
