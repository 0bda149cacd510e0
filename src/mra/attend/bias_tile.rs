//! The bias of a tile of queries on a batch of keys, brought to the layout of the logits and added.

use std::ops::Range;

use super::key_batch::KeyBatch;
use crate::exec::Buffer;
use crate::kernels::{AddBias, Matrix, MatrixMut, pack_transposed};
use crate::mra::problem::{Batch, Problem};
use crate::simd::Scalar;

/// The buffers for one block of keys.
pub(crate) struct BiasTile<T> {
    rows: Buffer<T>,
    packed: Buffer<T>,
}

impl<T: Scalar> BiasTile<T> {
    /// Buffers for tiles of at most `columns` queries; none where there is no additive bias.
    pub(crate) fn new(problem: &Problem<'_>, columns: usize) -> Self {
        let size = if problem.additive_bias().is_some() { problem.block_size } else { 0 };
        Self { rows: Buffer::scratch(size * columns), packed: Buffer::scratch(size * columns) }
    }

    /// Adds the bias to the logits of queries of a flat head, which have these numbers among those computed, on a batch of keys.
    #[allow(clippy::too_many_arguments, reason = "queries, keys, and their logits")]
    pub(crate) fn apply(
        &mut self,
        problem: &Problem<'_>,
        batch: &Batch<'_>,
        head: usize,
        queries: &Range<usize>,
        keys: &KeyBatch<T>,
        logits: &mut [T],
        columns: usize,
    ) {
        let (segment, (item, of_item)) = (batch.segment(head), batch.item_and_head(head));
        if let (Some(alibi), Some(slope)) = (&segment.alibi, problem.alibi_slope(item, of_item)) {
            let positions = queries.clone().map(|number| segment.position(segment.rows.token(number)));
            for (rows, first) in keys.spans() {
                let logits = &mut logits[rows.start * columns..rows.end * columns];
                alibi.add_to_pairs(problem.level, slope, positions.clone(), first..first + rows.len(), logits, columns);
            }
        }
        let (Some(bias), true) = (problem.additive_bias(), segment.is_biased()) else { return };
        for (rows, first) in keys.spans() {
            // A block at a time, which is as much as the buffers hold.
            for start in rows.clone().step_by(problem.block_size) {
                let count = problem.block_size.min(rows.end - start);
                let numbers = first + start - rows.start..first + start - rows.start + count;
                for (row, number) in self.rows.chunks_exact_mut(count).zip(queries.clone()) {
                    bias.read([item, of_item, segment.rows.token(number)], &segment.keys, numbers.clone(), row);
                }
                let rows = self.rows.chunks_exact(count).take(queries.len());
                let mut packed = MatrixMut::new(&mut self.packed, count, columns, columns);
                pack_transposed(problem.level, rows, T::from_f64(1.0), &mut packed);
                let logits = &mut logits[start * columns..(start + count) * columns];
                let bias = Matrix::new(&self.packed, count, columns, columns);
                T::run(problem.level, AddBias { logits: MatrixMut::new(logits, count, columns, columns), bias });
            }
        }
    }
}
