//! The bias of a tile of queries on a strip of keys, brought to the layout of the logits and added.

use std::ops::Range;

use super::bias::{Kind, Pairs};
use super::blocks::Blocks;
use super::problem::Problem;
use super::scratch::Buffer;
use super::strip::Strip;
use crate::kernels::{AddBias, Matrix, MatrixMut, pack_transposed};
use crate::simd::{SQUARE, Scalar};

/// The buffers for one block.
pub(crate) struct BiasTile<T> {
    rows: Buffer<T>,
    packed: Buffer<T>,
    lines: Buffer<T>,
}

impl<T: Scalar> BiasTile<T> {
    /// Buffers for tiles of at most `columns` queries; none where there is no bias.
    pub(crate) fn new(problem: &Problem<'_>, columns: usize) -> Self {
        let size = if problem.pairs.is_some() { problem.block_size } else { 0 };
        Self {
            rows: Buffer::scratch(size * columns),
            packed: Buffer::scratch(size * columns),
            lines: Buffer::scratch(SQUARE * size),
        }
    }

    /// Adds the bias to the logits of the queries with these numbers, of block `i`, on the keys of a strip. Heads of all batch
    /// items are numbered through.
    pub(crate) fn apply(
        &mut self,
        problem: &Problem<'_>,
        (head, i): (usize, usize),
        queries: &Range<usize>,
        strip: &Strip<T>,
        logits: &mut [T],
        columns: usize,
    ) {
        let Some(pairs) = &problem.pairs else { return };
        let keys = problem.keys(head / problem.heads);
        let kinds = pairs.head(head);
        for (rows, first) in strip.spans() {
            let mut done = 0;
            while done < rows.len() {
                let number = first + done;
                let j = keys.token(number) / problem.block_size;
                let end = keys.start(j + 1).min(first + rows.len());
                if !(pairs.is_mask() && kinds.kind(i, j) == Kind::Open) {
                    let logits = &mut logits[(rows.start + done) * columns..][..(end - number) * columns];
                    self.add(problem, pairs, head, queries, keys, number..end, logits, columns);
                }
                done = end - first;
            }
        }
    }

    #[allow(clippy::too_many_arguments, reason = "a part of one block and where it lies")]
    fn add(
        &mut self,
        problem: &Problem<'_>,
        pairs: &Pairs<'_>,
        head: usize,
        queries: &Range<usize>,
        keys: &Blocks,
        numbers: Range<usize>,
        logits: &mut [T],
        columns: usize,
    ) {
        let (batch, of_item, count) = (head / problem.heads, head % problem.heads, numbers.len());
        let query_blocks = problem.queries(batch);
        for (row, number) in self.rows.chunks_exact_mut(count).zip(queries.clone()) {
            pairs.bias.read([batch, of_item, query_blocks.token(number)], keys, numbers.clone(), row);
        }
        let rows = self.rows.chunks_exact(count).take(queries.len());
        let mut packed = MatrixMut::new(&mut self.packed, count, columns, columns);
        pack_transposed(problem.level, rows, T::from_f64(1.0), &mut self.lines, &mut packed);
        let bias = Matrix::new(&self.packed, count, columns, columns);
        T::run(problem.level, AddBias { logits: MatrixMut::new(logits, count, columns, columns), bias });
    }
}
