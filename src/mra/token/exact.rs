//! The exact blocks of a range of queries: block by block, the queries that compute it together.

use std::ops::Range;

use super::coarse::State;
use super::queries_of_block::QueriesOfBlocks;
use super::visible_keys::Viewer;
use crate::exec::Buffer;
use crate::kernels::{AllFinite, AttendRows, MOST_QUERIES, Matrix, MatrixMut, Stream, Visible, pack_rows, pack_transposed};
use crate::mra::attend::{DropoutTile, KeyBatch, KeySource, PartView};
use crate::mra::problem::{Problem, Sight};
use crate::simd::{Element, Level, SQUARE, Scalar};
use crate::tensor::Rows;

/// What a range of queries shares.
pub(crate) struct RangeOfHead<'a, E> {
    /// The rows of the head.
    pub(crate) rows: &'a Rows<'a, E>,
    pub(crate) dropout_head: usize,
    /// The first token of the sequence.
    pub(crate) first_token: usize,
    /// The queries.
    pub(crate) tokens: Range<usize>,
    /// What each of them sees.
    pub(crate) sights: &'a [Sight<'a>],
    pub(crate) viewer: Viewer<'a>,
    /// Which of them compute which blocks.
    pub(crate) lists: &'a QueriesOfBlocks,
}

/// The queries of a range, and what keys are to be multiplied by so that the products are logits.
struct Scaled<'a, T> {
    rows: Matrix<'a, T>,
    key_factor: T,
}

/// Queries whose biases are read at a time.
const BIASED_QUERIES: usize = 64;

/// The buffers of a block and the queries that compute it.
pub(crate) struct ExactBlock<T> {
    level: Level,
    scale: f64,
    softcap: Option<T>,
    channels: usize,
    /// Keys, one column for each.
    packed: Buffer<T>,
    lines: Buffer<T>,
    logits: Buffer<T>,
    /// Queries of the range, if they cannot be read where they lie.
    queries: Buffer<T>,
    /// A row for each of some queries: what is added to its logits.
    bias: Buffer<T>,
    dropout: Option<DropoutTile>,
}

/// A block while its queries are computed.
struct Block<'a, T> {
    part: &'a PartView<'a, T>,
    /// The numbers of its keys.
    numbers: Range<usize>,
    /// What dropout calls its keys.
    keys: &'a [u32],
    /// What is read next, to be prefetched.
    ahead: Option<[Matrix<'a, T>; 2]>,
}

impl<T: Scalar> ExactBlock<T> {
    /// Buffers for blocks of this problem.
    pub(crate) fn new(problem: &Problem<'_>) -> Self {
        let columns = problem.padded::<T>(problem.block_size);
        let masked = problem.has_alibi() || problem.segments.iter().any(|segment| segment.kinds.is_some());
        Self {
            level: problem.level,
            scale: problem.scale,
            softcap: problem.softcap.map(T::from_f64),
            channels: problem.head_dim,
            packed: Buffer::scratch(problem.head_dim * columns),
            lines: Buffer::scratch(SQUARE * problem.head_dim),
            logits: Buffer::scratch(2 * MOST_QUERIES * columns),
            queries: Buffer::scratch(0),
            bias: Buffer::scratch(if masked { BIASED_QUERIES * problem.block_size } else { 0 }),
            dropout: problem.dropout.map(DropoutTile::new),
        }
    }

    /// Continues the softmax of the queries of a range over all of their exact blocks, in ascending order.
    pub(crate) fn attend<E: Element<Compute = T>>(
        &mut self,
        range: &RangeOfHead<'_, E>,
        source: &KeySource<'_, E>,
        keys: &mut KeyBatch<T>,
        state: &mut State<T>,
    ) {
        let mut copied = std::mem::replace(&mut self.queries, Buffer::scratch(0));
        let queries = self.scaled(range, &mut copied);
        let present = range.lists.present();
        let mut names = Vec::new();
        for (index, &block) in present.iter().enumerate() {
            let numbers = source.numbers(block);
            keys.clear();
            assert!(keys.push(source, numbers.clone()), "an empty batch has room for a block");
            let Some(part) = keys.parts(source).next() else { continue };
            if self.dropout.is_some() {
                names.clear();
                names.extend(numbers.clone().map(|number| dropout_key(source, number)));
            }
            self.pack(&part, queries.key_factor);
            let ahead = present.get(index + 1).and_then(|&next| source.block_ahead(next));
            let [partly, wholly] = range.lists.of(index);
            let mut at = Block { part: &part, numbers, keys: &names, ahead: None };
            self.attend_partly(range, &queries, &at, partly, state);
            at.ahead = ahead;
            if range.viewer.is_biased() {
                self.attend_biased(range, &queries, &at, wholly, state);
            } else {
                self.step(range, &queries, &at, part.values, wholly, Visible::All, state);
            }
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

    /// A step for queries that do not see all keys.
    fn attend_partly<E: Element<Compute = T>>(
        &mut self,
        range: &RangeOfHead<'_, E>,
        queries: &Scaled<'_, T>,
        at: &Block<'_, T>,
        listed: &[u32],
        state: &mut State<T>,
    ) {
        if listed.is_empty() {
            return;
        }
        if !T::run(self.level, AllFinite(at.part.values)) {
            self.attend_one_by_one(range, queries, at, listed, state);
        } else if range.viewer.is_window() {
            let seen: Vec<[u32; 2]> = listed.iter().map(|&query| ends(&range.sights[query as usize], &at.numbers)).collect();
            self.step(range, queries, at, at.part.values, listed, Visible::Ranges(&seen), state);
        } else {
            self.attend_biased(range, queries, at, listed, state);
        }
    }

    /// A step for queries with a row of biases each.
    fn attend_biased<E: Element<Compute = T>>(
        &mut self,
        range: &RangeOfHead<'_, E>,
        queries: &Scaled<'_, T>,
        at: &Block<'_, T>,
        listed: &[u32],
        state: &mut State<T>,
    ) {
        let count = at.numbers.len();
        let mut bias = std::mem::replace(&mut self.bias, Buffer::scratch(0));
        for listed in listed.chunks(BIASED_QUERIES) {
            for (row, &query) in bias.chunks_exact_mut(count).zip(listed) {
                let sight = &range.sights[query as usize];
                range.viewer.read_row(range.tokens.start + query as usize, sight, &at.numbers, row);
            }
            let biases = Matrix::new(&bias, listed.len(), count, count);
            self.step(range, queries, at, at.part.values, listed, Visible::Biased(biases), state);
        }
        self.bias = bias;
    }

    /// As [`Self::attend_partly`] where a value is not finite: weight 0 times a NaN is NaN, so values that a query does not see become 0.
    fn attend_one_by_one<E: Element<Compute = T>>(
        &mut self,
        range: &RangeOfHead<'_, E>,
        queries: &Scaled<'_, T>,
        at: &Block<'_, T>,
        listed: &[u32],
        state: &mut State<T>,
    ) {
        let (values, count) = (at.part.values, at.numbers.len());
        let mut bias = vec![T::ZERO; count];
        let mut seen_values = Buffer::scratch(count * values.cols);
        for query in listed.chunks(1) {
            let sight = &range.sights[query[0] as usize];
            range.viewer.read_row(range.tokens.start + query[0] as usize, sight, &at.numbers, &mut bias);
            for (key, row) in seen_values.chunks_exact_mut(values.cols.max(1)).enumerate() {
                if bias[key] == T::NEG_INFINITY {
                    row.fill(T::ZERO);
                } else {
                    row.copy_from_slice(values.row(key));
                }
            }
            let seen_values = Matrix::new(&seen_values, count, values.cols, values.cols);
            self.step(range, queries, at, seen_values, query, Visible::Biased(Matrix::new(&bias, 1, count, count)), state);
        }
    }

    /// A step of the softmax for some queries over the packed keys of a block.
    #[allow(clippy::too_many_arguments, reason = "queries, keys, who sees which, and where the result goes")]
    fn step<E: Element<Compute = T>>(
        &mut self,
        range: &RangeOfHead<'_, E>,
        queries: &Scaled<'_, T>,
        at: &Block<'_, T>,
        values: Matrix<'_, T>,
        listed: &[u32],
        visible: Visible<'_, T>,
        state: &mut State<T>,
    ) {
        if let Some(dropout) = &mut self.dropout {
            let places = listed.iter().map(|&query| range.tokens.start + query as usize - range.first_token);
            dropout.start(Stream::Exact, range.dropout_head, places, listed.len());
            dropout.take_keys(at.keys);
        }
        let columns = self.columns(at.part.keys.rows);
        let (count, width) = (range.tokens.len(), state.width);
        T::run(
            self.level,
            AttendRows {
                queries: queries.rows,
                keys: Matrix::new(&self.packed, self.channels, columns, columns),
                values,
                numbers: listed,
                softcap: self.softcap,
                visible,
                decisions: self.dropout.as_ref().map(DropoutTile::decisions),
                maximum: &mut state.maximum,
                sum: &mut state.sum,
                sums: MatrixMut::new(&mut state.values, count, width, width),
                logits: &mut self.logits,
                ahead: at.ahead,
            },
        );
    }
}

/// What dropout calls a key: the low 32 bits of its place in the sequence.
pub(crate) fn dropout_key<E: Element>(source: &KeySource<'_, E>, number: usize) -> u32 {
    #[allow(clippy::cast_possible_truncation, reason = "the low 32 bits count")]
    {
        (source.token(number) - source.first_token()) as u32
    }
}

/// The keys of a block that the window leaves to a query, counted from its first one.
fn ends(sight: &Sight<'_>, numbers: &Range<usize>) -> [u32; 2] {
    let range = Viewer::range(sight, numbers);
    [range.start, range.end].map(|key| u32::try_from(key).expect("keys of a block"))
}

/// Whether a product with it is a shift of the exponent, downwards or not at all.
fn is_shrinking_power_of_two(scale: f64) -> bool {
    scale.is_normal() && scale > 0.0 && scale <= 1.0 && scale.to_bits().trailing_zeros() >= f64::MANTISSA_DIGITS - 1
}
