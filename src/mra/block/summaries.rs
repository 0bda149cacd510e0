//! What a block of keys is to a block of queries that has not selected it, to first order (docs/definitions.md, section 3.8).
//!
//! ```text
//! for a few rows i, for each block j of keys:
//!     x_is  = scale <qh_i, k_s>                       for the keys s of j; one product for all of the rows
//!     a_ijs = softmax of x_is over s, H_ij its entropy
//!     kt_ij = sum_s a_ijs k_s        vt_ij = sum_s a_ijs v_s
//! ```
//!
//! Then `scale <q_t, kt_ij> + H_ij` is the logit of the block for a query t of i, and `vt_ij` its value: the mean query's softmax within
//! the block, and its first-order change with the query. A few rows at a time, so that the products have as many lanes as a vector; a
//! few blocks at a time, so that what is stored stays in a second-level cache at any length.

use std::ops::Range;

use super::coarse::exclude_selected;
use crate::exec::Buffer;
use crate::kernels::{BlockSoftmax, Gemm, Init, Matrix, MatrixMut, pack_transposed};
use crate::mra::attend::{KeyBatch, KeySource};
use crate::mra::problem::{Batch, Blocks, Problem};
use crate::mra::select::{BlockPlan, add_mean_bias};
use crate::simd::{Element, Scalar};
use crate::tensor::Rows;

/// Rows whose summaries are computed together: a vector of AVX-512. Sums of gradients over queries are sums over as many rows each.
pub(super) const ROWS: usize = 16;

/// Bytes of summaries that a second-level cache may hold beside everything else.
const NEAR: usize = 128 << 10;

/// The summaries of some blocks of keys for some rows, and the buffers that they are computed in.
pub(super) struct Summaries<T> {
    /// Blocks of keys, at most.
    pub(super) capacity: usize,
    pub(super) key_width: usize,
    pub(super) value_width: usize,
    /// Lanes of the rows.
    pub(super) columns: usize,
    /// The weights `a`: a row of lanes for each key, by its number from that of the first one on.
    pub(super) weights: Buffer<T>,
    /// For each row, `kt` of every block.
    keys: Buffer<T>,
    /// For each row, `vt` of every block.
    values: Buffer<T>,
    /// Which of the blocks some row has not selected. The others enter for none, so nothing is computed of them.
    pub(super) entering: Vec<bool>,
    /// What is added to the logit of each block, a row of lanes: the entropy and the mean bias, `-inf` where it does not enter.
    offsets: Buffer<T>,
    packed: Buffer<T>,
    zeros: Vec<T>,
    block: KeyBatch<T>,
}

/// A place in the matrix of blocks of a flat head.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) head: usize,
    pub(super) rows: Range<usize>,
    pub(super) blocks: Range<usize>,
}

impl<T: Scalar> Summaries<T> {
    /// Blocks of keys whose summaries are computed together.
    pub(super) fn capacity(problem: &Problem<'_>, value_dim: usize) -> usize {
        let width = problem.padded::<T>(problem.head_dim) + problem.padded::<T>(value_dim);
        (NEAR / (ROWS * width.max(1) * size_of::<T>())).clamp(8, KeyBatch::<T>::capacity(problem).max(8))
    }

    pub(super) fn new(problem: &Problem<'_>, batch: &Batch<'_>, value_dim: usize) -> Self {
        let capacity = Self::capacity(problem, value_dim).min(batch.most_columns()).max(1);
        let (key_width, value_width) = (problem.padded::<T>(problem.head_dim), problem.padded::<T>(value_dim));
        let columns = problem.padded::<T>(ROWS);
        Self {
            capacity,
            key_width,
            value_width,
            columns,
            weights: Buffer::scratch(capacity * problem.block_size * columns),
            keys: Buffer::scratch(ROWS * capacity * key_width),
            values: Buffer::scratch(ROWS * capacity * value_width),
            entering: Vec::with_capacity(capacity),
            offsets: Buffer::scratch(capacity * columns),
            packed: Buffer::scratch(problem.head_dim * columns),
            zeros: vec![T::ZERO; problem.head_dim],
            block: KeyBatch::new(problem, problem.head_dim, value_dim),
        }
    }

    /// Starts with these rows of a flat head: those that `counts` says, of the others the mean is taken for 0.
    pub(super) fn start(
        &mut self,
        problem: &Problem<'_>,
        means: &Rows<'_, T>,
        rows: Range<usize>,
        counts: impl Fn(usize) -> bool,
    ) {
        self.columns = problem.padded::<T>(rows.len());
        let zeros = &self.zeros;
        let row = |i: usize| &(if counts(i) { means.row(i) } else { zeros })[..problem.head_dim];
        let mut packed = MatrixMut::new(&mut self.packed, problem.head_dim, self.columns, self.columns);
        let means = rows.map(row);
        pack_transposed(problem.level, means, T::from_f64(problem.scale), &mut packed);
    }

    /// Computes the summaries of some blocks, at most as many as there is room for, for the rows that were started.
    pub(super) fn compute<E: Element<Compute = T>>(
        &mut self,
        problem: &Problem<'_>,
        batch: &Batch<'_>,
        plan: &BlockPlan,
        place: &Place,
        source: &KeySource<'_, E>,
    ) {
        let Place { head, rows, blocks } = place.clone();
        if blocks.is_empty() {
            return;
        }
        let columns = self.columns;
        self.find_entering(batch, plan, place);
        let first = source.numbers(blocks.start).start;
        for (index, j) in blocks.clone().enumerate() {
            let numbers = source.numbers(j);
            self.block.clear();
            if self.entering[index] {
                self.block.push(source, numbers.clone());
            }
            let Some(part) = self.block.parts(source).next() else {
                self.offsets[index * columns..][..columns].fill(T::NEG_INFINITY);
                for row in 0..rows.len() {
                    self.keys[(row * self.capacity + index) * self.key_width..][..self.key_width].fill(T::ZERO);
                    self.values[(row * self.capacity + index) * self.value_width..][..self.value_width].fill(T::ZERO);
                }
                continue;
            };
            let weights = &mut self.weights[(numbers.start - first) * columns..][..numbers.len() * columns];
            T::run(
                problem.level,
                Gemm {
                    a: part.keys.columns(problem.head_dim),
                    a_transposed: false,
                    b: Matrix::new(&self.packed, problem.head_dim, columns, columns),
                    b_rows: None,
                    c: MatrixMut::new(weights, numbers.len(), columns, columns),
                    init: Init::Zero,
                    ahead: None,
                },
            );
            let entropies = &mut self.offsets[index * columns..][..columns];
            let logits = MatrixMut::new(weights, numbers.len(), columns, columns);
            T::run(problem.level, BlockSoftmax { logits, entropies });
            for (from, to, width) in
                [(part.keys, &mut self.keys, self.key_width), (part.values, &mut self.values, self.value_width)]
            {
                T::run(
                    problem.level,
                    Gemm {
                        a: Matrix::new(weights, numbers.len(), rows.len(), columns),
                        a_transposed: true,
                        b: from,
                        b_rows: None,
                        c: MatrixMut::new(&mut to[index * width..], rows.len(), width, self.capacity * width),
                        init: Init::Zero,
                        ahead: None,
                    },
                );
            }
        }
        let segment = batch.segment(head);
        let offsets = &mut self.offsets[..blocks.len() * columns];
        add_mean_bias(problem, segment, head % problem.heads, rows.clone(), blocks.clone(), offsets, columns);
        if problem.coarse_shift != 0.0 {
            let shift = T::from_f64(problem.coarse_shift);
            for offset in offsets.iter_mut() {
                *offset += shift;
            }
        }
        exclude_selected(batch, plan, head, rows, blocks, offsets, columns);
    }

    fn find_entering(&mut self, batch: &Batch<'_>, plan: &BlockPlan, place: &Place) {
        let Place { head, rows, blocks } = place.clone();
        let (lanes, columns) = (rows.len(), self.columns);
        let marks = &mut self.offsets[..blocks.len() * columns];
        marks.fill(T::ZERO);
        exclude_selected(batch, plan, head, rows, blocks, marks, columns);
        self.entering.clear();
        self.entering.extend(marks.chunks_exact(columns).map(|marks| marks[..lanes].contains(&T::ZERO)));
    }

    /// The summaries for a row, of so many blocks, as keys and values: a key and a value for each block.
    pub(super) fn source<'a>(
        &'a self,
        problem: &Problem<'_>,
        row: usize,
        blocks: &'a Blocks,
        first: usize,
    ) -> KeySource<'a, T> {
        let of = |data: &'a [T], width: usize| Rows::new(&data[row * self.capacity * width..], blocks.total(), width, width);
        let (keys, values) = (of(&self.keys, self.key_width), of(&self.values, self.value_width));
        KeySource::new(problem, keys, values, blocks).placed_at(first)
    }

    /// Whether any of so many blocks enters for a row.
    pub(super) fn any(&self, row: usize, blocks: usize) -> bool {
        (0..blocks).any(|index| self.offsets[index * self.columns + row] != T::NEG_INFINITY)
    }

    /// Makes logits of the products of queries of a row, a row of `lanes` for each block.
    pub(super) fn add_offsets(&self, row: usize, logits: &mut [T], lanes: usize) {
        for (logits, offsets) in logits.chunks_exact_mut(lanes).zip(self.offsets.chunks_exact(self.columns)) {
            match offsets[row] {
                // Whatever is stored there.
                offset if offset == T::NEG_INFINITY => logits.fill(offset),
                offset => logits.iter_mut().for_each(|logit| *logit += offset),
            }
        }
    }
}
