//! The logits of the pooled queries and keys of a head: what the selection ranks, and what the coarse level weighs.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::exec::Buffer;
use crate::kernels::{ColumnMaxima, Gemm, Init, Matrix, MatrixMut, Softcap, pack_transposed};
use crate::mra::attend::{TILE_QUERIES, coarse_tile_columns, nth_tile};
use crate::mra::problem::{Batch, Problem, Segment};
use crate::mra::pyramid::Pyramid;
use crate::simd::Scalar;

/// The scores of one head, tile by tile: a row for each block of keys, a lane for each block of queries, as the softmax of
/// the coarse level has them, with the mean bias. Where a block has no valid keys the score is `-inf`.
pub(crate) struct Scores<T> {
    values: Buffer<T>,
    best: Buffer<T>,
    packed: Buffer<T>,
    rows: usize,
    keys: usize,
    lanes: usize,
}

impl<T: Scalar> Scores<T> {
    /// Checks that the scores of as many heads as there are threads fit in memory: they are what grows with the square of
    /// the length, and a failing allocation further down would end the process.
    pub(crate) fn check_memory(problem: &Problem<'_>, batch: &Batch<'_>, threads: usize) -> Result<()> {
        let numbers = Self::most_scores(problem, batch).checked_mul(threads.min(batch.flat_heads()));
        let fits = numbers.is_some_and(|numbers| Vec::<T>::new().try_reserve_exact(numbers).is_ok());
        if fits {
            return Ok(());
        }
        Err(Error::new(format!(
            "block_size: {}, the scores of {} x {} tokens on {threads} threads do not fit in memory; larger blocks would",
            problem.block_size, problem.query_len, problem.key_len
        )))
    }

    /// The scores of the largest head.
    fn most_scores(problem: &Problem<'_>, batch: &Batch<'_>) -> usize {
        let scores = |segment: &&Segment| problem.padded::<T>(segment.rows.len()).saturating_mul(segment.keys.len());
        batch.segments.iter().map(scores).max().unwrap_or(0)
    }

    pub(crate) fn new(problem: &Problem<'_>, batch: &Batch<'_>) -> Self {
        let columns = coarse_tile_columns::<T>(problem);
        let rows = batch.segments.iter().map(|segment| problem.padded::<T>(segment.rows.len())).max().unwrap_or(0);
        Self {
            values: Buffer::scratch(Self::most_scores(problem, batch)),
            best: Buffer::scratch(rows),
            packed: Buffer::scratch(problem.head_dim * columns),
            rows: 0,
            keys: 0,
            lanes: T::lanes(problem.level),
        }
    }

    /// Computes the scores of a flat head.
    pub(crate) fn compute(&mut self, problem: &Problem<'_>, batch: &Batch<'_>, head: usize, pyramid: &Pyramid<T>) {
        let segment = batch.segment(head);
        (self.rows, self.keys) = (segment.rows.len(), segment.keys.len());
        let (channels, keys) = (problem.head_dim, self.keys);
        let (queries, key_means) = (pyramid.queries.of_head(batch, head), pyramid.keys.of_group(batch, batch.group(head)));
        if keys == 0 {
            return;
        }
        for tile in 0..self.tiles() {
            let (rows, columns) = (self.rows_of(tile), self.columns_of(tile));
            let mut packed = MatrixMut::new(&mut self.packed, channels, columns, columns);
            let means = rows.clone().map(|i| &queries.row(i)[..channels]);
            pack_transposed(problem.level, means, T::from_f64(problem.scale), &mut packed);
            let values = &mut self.values[rows.start * keys..][..keys * columns];
            let (data, stride) = key_means.tail(0);
            T::run(
                problem.level,
                Gemm {
                    a: Matrix::new(data, keys, channels, stride),
                    a_transposed: false,
                    b: Matrix::new(&self.packed, channels, columns, columns),
                    b_rows: None,
                    c: MatrixMut::new(values, keys, columns, columns),
                    init: Init::Zero,
                    ahead: None,
                },
            );
            if let Some(cap) = problem.softcap.map(T::from_f64) {
                T::run(problem.level, Softcap { logits: values, cap, slopes: None });
            }
            add_mean_bias(problem, segment, head % problem.heads, rows.clone(), 0..keys, values, columns);
            for (_, row) in values.chunks_exact_mut(columns).enumerate().filter(|&(j, _)| segment.keys.count(j) == 0) {
                row.fill(T::NEG_INFINITY);
            }
            let numbers = Matrix::new(values, keys, columns, columns);
            T::run(problem.level, ColumnMaxima { numbers, maxima: &mut self.best[rows.start..][..columns] });
        }
    }

    pub(crate) fn tiles(&self) -> usize {
        self.rows.div_ceil(TILE_QUERIES)
    }

    /// The blocks of queries of a tile.
    pub(crate) fn rows_of(&self, tile: usize) -> Range<usize> {
        nth_tile(tile, self.rows)
    }

    fn columns_of(&self, tile: usize) -> usize {
        self.rows_of(tile).len().next_multiple_of(self.lanes)
    }

    /// The scores of a tile, `blocks` of the keys: a row of lanes for each of them.
    pub(crate) fn tile(&self, tile: usize, blocks: Range<usize>) -> Matrix<'_, T> {
        let columns = self.columns_of(tile);
        let first = self.rows_of(tile).start * self.keys + blocks.start * columns;
        Matrix::new(&self.values[first..][..blocks.len() * columns], blocks.len(), columns, columns)
    }

    /// The score of block `(i, j)`.
    pub(crate) fn get(&self, i: usize, j: usize) -> T {
        let tile = i / TILE_QUERIES;
        self.values[tile * TILE_QUERIES * self.keys + j * self.columns_of(tile) + i % TILE_QUERIES]
    }

    /// The best score of each block of queries, NaN left out, and of the lanes behind the last one, whatever they have.
    pub(crate) fn best(&self) -> &[T] {
        &self.best
    }
}

/// Adds the mean bias to the logits of some pooled keys, one row of `columns` for each of `blocks` and one lane for each of the blocks
/// of queries `rows`.
pub(crate) fn add_mean_bias<T: Scalar>(
    problem: &Problem<'_>,
    segment: &Segment,
    head: usize,
    rows: Range<usize>,
    blocks: Range<usize>,
    logits: &mut [T],
    columns: usize,
) {
    if let Some(bias) = &segment.bias {
        for (column, i) in rows.clone().enumerate() {
            for (row, &mean) in bias.row(head, i)[blocks.clone()].iter().enumerate() {
                logits[row * columns + column] += T::from_f64(mean);
            }
        }
    }
    if let (Some(alibi), Some(slope)) = (&segment.alibi, problem.alibi_slope(segment.batch, head)) {
        alibi.add_to_rows(problem.level, slope, rows, blocks.clone(), &mut logits[..blocks.len() * columns], columns);
    }
}
