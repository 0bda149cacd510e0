//! A few keys, or pooled ones, and the queries of a range that compute them together.

use std::ops::Range;

use super::coarse::State;
use super::scaled::Scaled;
use crate::exec::Buffer;
use crate::kernels::{AttendRows, DotRows, MOST_QUERIES, Matrix, MatrixMut, Stream, Visible, WeightRows, pack_transposed};
use crate::mra::attend::DropoutTile;
use crate::mra::problem::{Batch, Problem};
use crate::simd::{Level, Scalar};

/// Queries of a range, as all blocks of keys find them.
pub(crate) struct RangeOfHead<'a, T> {
    pub(crate) queries: &'a Scaled<'a, T>,
    pub(crate) dropout_head: usize,
    /// The first token of the sequence.
    pub(crate) first_token: usize,
    /// The queries.
    pub(crate) tokens: Range<usize>,
}

impl<'a, T> RangeOfHead<'a, T> {
    pub(crate) fn new(queries: &'a Scaled<'a, T>, batch: &Batch<'_>, head: usize, tokens: &Range<usize>) -> Self {
        let first_token = batch.segment(head).rows.tokens().start;
        Self { queries, dropout_head: batch.dropout_head(head), first_token, tokens: tokens.clone() }
    }
}

/// Keys while their queries are computed.
pub(crate) struct Keys<'a, T> {
    pub(crate) keys: Matrix<'a, T>,
    pub(crate) values: Matrix<'a, T>,
    pub(crate) stream: Stream,
    /// What dropout calls them.
    pub(crate) names: &'a [u32],
    /// What is read next, to be prefetched.
    pub(crate) ahead: Option<[Matrix<'a, T>; 2]>,
}

/// Logits that are known, of any queries, and where those of each listed one start.
pub(crate) type Given<'a, T> = (&'a [T], &'a [usize]);

/// Queries whose biases are read at a time.
const BIASED_QUERIES: usize = 64;

/// The buffers of a step of the softmax.
pub(crate) struct KeyBlock<T> {
    level: Level,
    softcap: Option<T>,
    channels: usize,
    /// Keys, one column for each.
    packed: Buffer<T>,
    logits: Buffer<T>,
    /// A row for each of some queries: what is added to its logits.
    bias: Buffer<T>,
    dropout: Option<DropoutTile>,
    /// Weights, a row for each query of a step, and the factors of its sums, if values are multiplied elsewhere.
    weights: Option<[Buffer<T>; 2]>,
}

impl<T: Scalar> KeyBlock<T> {
    /// Buffers for at most `keys` keys; `biased` says whether there may be rows of biases.
    pub(crate) fn new(problem: &Problem<'_>, keys: usize, biased: bool) -> Self {
        let columns = problem.padded::<T>(keys);
        Self {
            level: problem.level,
            softcap: problem.softcap.map(T::from_f64),
            channels: problem.head_dim,
            packed: Buffer::scratch(problem.head_dim * columns),
            logits: Buffer::scratch(2 * MOST_QUERIES * columns),
            bias: Buffer::scratch(if biased { BIASED_QUERIES * keys } else { 0 }),
            dropout: problem.dropout.map(DropoutTile::new),
            weights: None,
        }
    }

    /// As this, for steps of at most `queries` queries, of which the weights are kept and multiply no values.
    pub(super) fn keeping_weights(self, queries: usize) -> Self {
        let columns = self.logits.len() / (2 * MOST_QUERIES);
        Self { weights: Some([queries * columns, queries].map(Buffer::scratch)), ..self }
    }

    /// The weights that were kept, a row for each query of the latest step, and the factors of their sums.
    pub(super) fn weights(&mut self) -> Option<(&mut [T], &[T])> {
        self.weights.as_mut().map(|[rows, factors]| (&mut rows[..], &factors[..]))
    }

    /// Columns of so many packed keys.
    fn columns(&self, keys: usize) -> usize {
        keys.next_multiple_of(T::lanes(self.level))
    }

    /// Packs keys for the queries of a range.
    pub(crate) fn pack(&mut self, keys: &Matrix<'_, T>, queries: &Scaled<'_, T>) {
        let columns = self.columns(keys.rows);
        let keys = (0..keys.rows).map(|key| &keys.row(key)[..self.channels]);
        let mut packed = MatrixMut::new(&mut self.packed, self.channels, columns, columns);
        pack_transposed(self.level, keys, queries.key_factor, &mut packed);
    }

    /// Writes the products of the packed keys, of which there are `count`, and of each listed query from a place on.
    pub(crate) fn multiply(&self, queries: &Scaled<'_, T>, count: usize, listed: &[(u32, usize)], to: &mut [T]) {
        let columns = self.columns(count);
        let keys = Matrix::new(&self.packed, self.channels, columns, columns);
        T::run(self.level, DotRows { queries: queries.rows, keys, count, listed, to });
    }

    /// A step for queries with a row of biases each, which `read` writes. Values of keys that a query does not see must be finite.
    pub(crate) fn attend_biased(
        &mut self,
        range: &RangeOfHead<'_, T>,
        at: &Keys<'_, T>,
        listed: &[u32],
        given: Option<Given<'_, T>>,
        read: impl Fn(usize, &mut [T]),
        state: &mut State<T>,
    ) {
        let count = at.keys.rows;
        let mut bias = std::mem::replace(&mut self.bias, Buffer::scratch(0));
        for (index, listed) in listed.chunks(BIASED_QUERIES).enumerate() {
            let given = given.map(|(logits, places)| (logits, &places[index * BIASED_QUERIES..][..listed.len()]));
            for (row, &query) in bias.chunks_exact_mut(count).zip(listed) {
                read(query as usize, row);
            }
            let biases = Matrix::new(&bias, listed.len(), count, count);
            self.attend(range, at, listed, Visible::Biased(biases), given, state);
        }
        self.bias = bias;
    }

    /// As [`Self::attend_biased`] where a value is not finite: weight 0 times a NaN is NaN, so values that a query does not see become 0.
    pub(crate) fn attend_one_by_one(
        &mut self,
        range: &RangeOfHead<'_, T>,
        at: &Keys<'_, T>,
        listed: &[u32],
        read: impl Fn(usize, &mut [T]),
        state: &mut State<T>,
    ) {
        let (values, count) = (at.values, at.keys.rows);
        let mut bias = vec![T::ZERO; count];
        let mut seen_values = Buffer::scratch(count * values.cols);
        for query in listed.chunks(1) {
            read(query[0] as usize, &mut bias);
            for (key, row) in seen_values.chunks_exact_mut(values.cols.max(1)).enumerate() {
                if bias[key] == T::NEG_INFINITY {
                    row.fill(T::ZERO);
                } else {
                    row.copy_from_slice(values.row(key));
                }
            }
            let values = Matrix::new(&seen_values, count, values.cols, values.cols);
            let visible = Visible::Biased(Matrix::new(&bias, 1, count, count));
            self.attend(range, &Keys { values, ..*at }, query, visible, None, state);
        }
    }

    /// A step of the softmax for some queries over the packed keys, which need not be packed if all logits are `given`.
    pub(crate) fn attend(
        &mut self,
        range: &RangeOfHead<'_, T>,
        at: &Keys<'_, T>,
        listed: &[u32],
        visible: Visible<'_, T>,
        given: Option<Given<'_, T>>,
        state: &mut State<T>,
    ) {
        if let Some(dropout) = &mut self.dropout {
            let places = listed.iter().map(|&query| range.tokens.start + query as usize - range.first_token);
            dropout.start(at.stream, range.dropout_head, places, listed.len());
            dropout.take_keys(at.names);
        }
        let columns = self.columns(at.keys.rows);
        let (count, width) = (range.tokens.len(), state.width);
        T::run(
            self.level,
            AttendRows {
                queries: range.queries.rows,
                keys: Matrix::new(&self.packed, self.channels, columns, columns),
                values: at.values,
                numbers: listed,
                softcap: self.softcap,
                visible,
                given,
                decisions: self.dropout.as_ref().map(DropoutTile::decisions),
                maximum: &mut state.maximum,
                sum: &mut state.sum,
                sums: MatrixMut::new(&mut state.values, count, width, width),
                weights: self
                    .weights
                    .as_mut()
                    .map(|[rows, rescale]| WeightRows { rows: MatrixMut::new(rows, listed.len(), columns, columns), rescale }),
                logits: &mut self.logits,
                ahead: at.ahead,
            },
        );
    }
}
