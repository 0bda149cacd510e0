//! What queries see of a block that some of them see partly, and the biases of its keys.

use std::ops::Range;

use crate::exec::Buffer;
use crate::kernels::{AddBias, Matrix, MatrixMut, pack_transposed};
use crate::mra::problem::{Batch, Problem, Segment, Sight};
use crate::simd::{Level, Scalar};

/// A flat head whose queries see keys through a window, a mask or a bias.
#[derive(Clone, Copy)]
pub(crate) struct Viewer<'a> {
    problem: &'a Problem<'a>,
    segment: &'a Segment,
    item: usize,
    head: usize,
}

impl<'a> Viewer<'a> {
    pub(crate) fn new(problem: &'a Problem<'a>, batch: &Batch<'a>, head: usize) -> Self {
        let (item, head_of_item) = batch.item_and_head(head);
        Self { problem, segment: batch.segment(head), item, head: head_of_item }
    }

    /// Whether biases are added to the logits of all keys, whoever sees them.
    pub(crate) fn is_biased(&self) -> bool {
        self.segment.is_biased() || self.segment.alibi.is_some()
    }

    /// Whether a window alone says what a query sees.
    pub(crate) fn is_window(&self) -> bool {
        self.segment.kinds.is_none() && self.segment.alibi.is_none()
    }

    /// The keys of a block, counted from its first one, that the window leaves to a query.
    pub(crate) fn range(sight: &Sight<'_>, numbers: &Range<usize>) -> Range<usize> {
        let place = |number: usize| number.clamp(numbers.start, numbers.end) - numbers.start;
        place(sight.keys.start)..place(sight.keys.end)
    }

    /// Writes what is added to the logits of a query on the keys of a block: `-inf` where it does not see the key.
    pub(crate) fn read_row<T: Scalar>(&self, token: usize, sight: &Sight<'_>, numbers: &Range<usize>, row: &mut [T]) {
        match &self.problem.bias {
            Some(bias) => bias.read([self.item, self.head, token], &self.segment.keys, numbers.clone(), row),
            None => row.fill(T::ZERO),
        }
        if let (Some(alibi), Some(slope)) = (&self.segment.alibi, self.problem.alibi_slope(self.item, self.head)) {
            let position = self.segment.position(token);
            for (bias, number) in row.iter_mut().zip(numbers.clone()) {
                let distance = alibi.key_position(number).abs_diff(position);
                *bias = *bias - T::from_f64(slope) * T::from_f64(distance as f64);
            }
        }
        let seen = Self::range(sight, numbers);
        row[..seen.start].fill(T::NEG_INFINITY);
        row[seen.end..].fill(T::NEG_INFINITY);
    }
}

/// The biases of a tile of queries on the keys of a block, in the layout of transposed logits.
pub(crate) struct BiasColumns<T> {
    rows: Buffer<T>,
    packed: Buffer<T>,
}

impl<T: Scalar> BiasColumns<T> {
    /// Buffers for tiles of at most `columns` queries; none where there is no mask.
    pub(crate) fn new(problem: &Problem<'_>, columns: usize) -> Self {
        let masked = problem.has_alibi() || problem.segments.iter().any(|segment| segment.kinds.is_some());
        Self::of_keys(if masked { problem.block_size } else { 0 }, columns)
    }

    /// Buffers for at most `size` keys.
    pub(crate) fn of_keys(size: usize, columns: usize) -> Self {
        Self { rows: Buffer::scratch(size * columns), packed: Buffer::scratch(size * columns) }
    }

    /// Makes the logits of a block, one row for each key and a lane for each of `queries`, those of what each query sees.
    pub(crate) fn apply<'s>(
        &mut self,
        viewer: &Viewer<'_>,
        queries: impl ExactSizeIterator<Item = (usize, &'s Sight<'s>)>,
        numbers: &Range<usize>,
        logits: &mut [T],
        columns: usize,
    ) {
        if viewer.is_window() {
            for (lane, (_, sight)) in queries.enumerate() {
                let seen = Viewer::range(sight, numbers);
                for key in (0..seen.start).chain(seen.end..numbers.len()) {
                    logits[key * columns + lane] = T::NEG_INFINITY;
                }
            }
            return;
        }
        self.add(
            viewer.problem.level,
            queries,
            |(token, sight), row| viewer.read_row(token, sight, numbers, row),
            logits,
            columns,
        );
    }

    /// Adds to logits, one row for each key and a lane for each of `queries`, what `read` writes for a query.
    pub(crate) fn add<Q>(
        &mut self,
        level: Level,
        queries: impl ExactSizeIterator<Item = Q>,
        read: impl Fn(Q, &mut [T]),
        logits: &mut [T],
        columns: usize,
    ) {
        let (count, lanes) = (logits.len() / columns.max(1), queries.len());
        for (row, query) in self.rows.chunks_exact_mut(count.max(1)).zip(queries) {
            read(query, row);
        }
        let rows = self.rows.chunks_exact(count.max(1)).take(lanes);
        let mut packed = MatrixMut::new(&mut self.packed, count, columns, columns);
        pack_transposed(level, rows, T::from_f64(1.0), &mut packed);
        let bias = Matrix::new(&self.packed, count, columns, columns);
        T::run(level, AddBias { logits: MatrixMut::new(logits, count, columns, columns), bias });
    }
}
