//! The gradient through the coarse level to first order (docs/definitions.md, section 3.8, Backward).
//!
//! The summaries of a row are keys and values like others, and get gradients like others. From these come those of the tokens:
//!
//! ```text
//! dkt_ij, dvt_ij, dq_t    as of exact pairs          E_ij = sum_t of the gradients of the logits, times the scale
//! u_ijs   = <dvt_ij, v_s> + <dkt_ij - E_ij qh_i, k_s>
//! dx_ijs  = scale a_ijs (u_ijs - sum_s' a_ijs' u_ijs')
//! dk_s   += sum_i a_ijs dkt_ij + dx_ijs qh_i         dv_s += sum_i a_ijs dvt_ij         dqh_i += sum_j sum_s dx_ijs k_s
//! ```
//!
//! Where there are enough heads, a task of the exact pass is a group of heads that share keys, and begins with this, so that the summaries
//! are computed once and no gradient is stored beside the outputs; otherwise rows drive dq and columns dk and dv. Both give the same bits:
//! a sum runs over the same few rows, or blocks, at a time.

use std::ops::Range;

use super::backward::Pass;
use super::summaries::{Place, ROWS, Summaries};
use crate::exec::Buffer;
use crate::kernels::{BlockSoftmaxGradient, Gemm, Init, Matrix, MatrixMut, Stream, pack_transposed};
use crate::mra::attend::{GradientTile, KeyBatch, KeySource, KeySums, PartView, tile_columns, tiles};
use crate::mra::inputs::Inputs;
use crate::mra::problem::{Batch, Blocks, Problem};
use crate::mra::pyramid::{Pooled, Side};
use crate::mra::select::BlockPlan;
use crate::simd::{Element, Level, Scalar};

/// Sums for a few rows.
pub(super) struct RowSums<'a, T> {
    /// Of their queries, from the number of the first one on.
    pub(super) dq: &'a mut [T],
    /// Of their means.
    pub(super) means: &'a mut [T],
}

/// The coarse blocks of all heads.
pub(super) struct FirstOrderPass<'a, 'g, E: Element> {
    pub(super) problem: &'a Problem<'a>,
    pub(super) batch: &'a Batch<'a>,
    plan: &'a BlockPlan,
    /// It knows the tensors, and starts tiles of queries.
    exact: Pass<'a, 'g, E>,
    queries: Pooled<E::Compute>,
    /// For each sequence, how many of its blocks have a key.
    filled: Vec<usize>,
    pub(super) value_dim: usize,
}

/// What a thread reuses.
pub(super) struct Buffers<T> {
    summaries: Summaries<T>,
    tile: GradientTile<T>,
    /// The summaries of a row as keys.
    of_row: KeyBatch<T>,
    /// Which of the rows have a coarse block and a gradient.
    active: Vec<bool>,
    /// The mean queries, 0 where a row is not active.
    means: Buffer<T>,
    /// For each row, `dkt`, `dvt`, `E`, and `dkt - E qh` of every block.
    dkt: Buffer<T>,
    dvt: Buffer<T>,
    totals: Buffer<T>,
    turns: Buffer<T>,
    packed_turns: Buffer<T>,
    packed_dvt: Buffer<T>,
    /// `u`, then `dx`, of a block: a row of lanes for each key.
    logits: Buffer<T>,
}

/// With the keys of a block.
pub(super) type Scratch<T> = (Buffers<T>, KeyBatch<T>);

/// With the gradients of queries and of means.
pub(super) type OfGroup<'s, T> = (&'s mut Scratch<T>, &'s mut [T], &'s mut [T]);

impl<'a, 'g, E: Element> FirstOrderPass<'a, 'g, E> {
    pub(super) fn new(
        problem: &'a Problem<'a>,
        batch: &'a Batch<'a>,
        inputs: &'a Inputs<'a, E>,
        plan: &'a BlockPlan,
        exact: Pass<'a, 'g, E>,
    ) -> Self {
        let [queries] = Pooled::each(problem, batch, [(&inputs.query, Side::Queries)]);
        let filled = |keys: &Blocks| (0..keys.len()).filter(|&j| keys.count(j) > 0).count();
        let filled = batch.segments.iter().map(|segment| filled(&segment.keys)).collect();
        Self { problem, batch, plan, exact, queries, filled, value_dim: inputs.value.shape()[3] }
    }

    /// Multiplications of all coarse blocks.
    pub(super) fn products(&self) -> usize {
        let pairs = self.problem.heads * self.batch.pairs_of_blocks() * self.problem.block_size;
        pairs * 7 * (self.problem.head_dim + self.value_dim)
    }

    pub(super) fn scratch(&self) -> Scratch<E::Compute> {
        (self.buffers(), KeyBatch::new(self.problem, self.problem.head_dim, self.value_dim))
    }

    fn buffers(&self) -> Buffers<E::Compute> {
        let (problem, value_dim) = (self.problem, self.value_dim);
        let summaries = Summaries::new(problem, self.batch, value_dim);
        let (places, columns) = (ROWS * summaries.capacity, summaries.columns);
        let (key_width, value_width) = (summaries.key_width, summaries.value_width);
        Buffers {
            summaries,
            tile: GradientTile::new(problem, tile_columns::<E::Compute>(problem), value_dim),
            of_row: KeyBatch::new(problem, problem.head_dim, value_dim),
            active: Vec::new(),
            means: Buffer::scratch(ROWS * key_width),
            dkt: Buffer::scratch(places * key_width),
            dvt: Buffer::scratch(places * value_width),
            totals: Buffer::scratch(places),
            turns: Buffer::scratch(places * key_width),
            packed_turns: Buffer::scratch(problem.head_dim * columns),
            packed_dvt: Buffer::scratch(value_dim * columns),
            logits: Buffer::scratch(problem.block_size * columns),
        }
    }

    /// Adds the gradients of the keys of a group, and writes those of the queries of its heads, one head after the other: of each, so
    /// many numbers, and so many means.
    pub(super) fn group(
        &self,
        group: usize,
        (scratch, dq, means): OfGroup<'_, E::Compute>,
        (numbers, rows_of_head): (usize, usize),
        sums: &mut KeySums<'_, E::Compute>,
    ) {
        let (width, keys) = (scratch.0.summaries.key_width, &self.batch.segment_of_group(group).keys);
        dq.fill(E::Compute::ZERO);
        means.fill(E::Compute::ZERO);
        for (index, head) in self.batch.heads_of(group).enumerate() {
            let of_rows = &self.batch.segment(head).rows;
            for rows in self.batch.segment(head).row_tiles(ROWS) {
                let of = |count: usize, range: Range<usize>| {
                    (index * count + range.start) * width..(index * count + range.end) * width
                };
                let mut to = RowSums {
                    dq: &mut dq[of(numbers, of_rows.start(rows.start)..of_rows.start(rows.end))],
                    means: &mut means[of(rows_of_head, rows.clone())],
                };
                self.rows(head, rows, 0..keys.len(), scratch, Some(&mut to), Some(sums));
            }
        }
    }

    /// Adds what some rows of a flat head and some blocks of keys have in common.
    pub(super) fn rows(
        &self,
        head: usize,
        rows: Range<usize>,
        blocks: Range<usize>,
        scratch: &mut Scratch<E::Compute>,
        mut of_rows: Option<&mut RowSums<'_, E::Compute>>,
        mut of_keys: Option<&mut KeySums<'_, E::Compute>>,
    ) {
        let (problem, batch, (buffers, _)) = (self.problem, self.batch, &mut *scratch);
        buffers.active.clear();
        buffers.active.extend(rows.clone().map(|i| self.is_active(head, i)));
        if !buffers.active.contains(&true) {
            return;
        }
        let (means, width) = (self.queries.of_head(batch, head), buffers.summaries.key_width);
        for (row, i) in rows.clone().enumerate() {
            let to = &mut buffers.means[row * width..][..width];
            if buffers.active[row] { to.copy_from_slice(means.row(i)) } else { to.fill(E::Compute::ZERO) }
        }
        buffers.summaries.start(problem, &means, rows.clone(), |i| buffers.active[i - rows.start]);
        let source = self.exact.source(batch.group(head));
        let size = buffers.summaries.capacity;
        for first in blocks.clone().step_by(size) {
            let place = Place { head, rows: rows.clone(), blocks: first..(first + size).min(blocks.end) };
            let (buffers, _) = &mut *scratch;
            buffers.summaries.compute(problem, batch, self.plan, &place, &source);
            self.through_summaries(&place, buffers, of_rows.as_deref_mut());
            self.through_keys(&place, &source, scratch, of_rows.as_deref_mut(), of_keys.as_deref_mut());
        }
    }

    /// Whether a row has a coarse block, and some of its queries a gradient. One without must not bring in a NaN of its queries.
    fn is_active(&self, head: usize, i: usize) -> bool {
        let rows = &self.batch.segment(head).rows;
        let coarse = self.plan.row(self.batch, head, i).len() < self.filled[head / self.problem.heads];
        coarse && rows.numbers(i).any(|number| !self.exact.terms_of(head, rows.token(number)).idle)
    }

    /// Computes the gradients of the summaries, and adds to those of the queries.
    fn through_summaries(
        &self,
        place: &Place,
        buffers: &mut Buffers<E::Compute>,
        mut of_rows: Option<&mut RowSums<'_, E::Compute>>,
    ) {
        let (problem, batch) = (self.problem, self.batch);
        let Buffers { summaries, tile, of_row, active, means, dkt, dvt, totals, turns, .. } = buffers;
        let (capacity, key_width, value_width) = (summaries.capacity, summaries.key_width, summaries.value_width);
        let (blocks, rows) = (Blocks::all(0..place.blocks.len(), 1), &batch.segment(place.head).rows);
        for (row, i) in place.rows.clone().enumerate() {
            let dkt = &mut dkt[row * capacity * key_width..][..blocks.total() * key_width];
            let dvt = &mut dvt[row * capacity * value_width..][..blocks.total() * value_width];
            let totals = &mut totals[row * capacity..][..blocks.total()];
            let turns = &mut turns[row * capacity * key_width..][..blocks.total() * key_width];
            dkt.fill(E::Compute::ZERO);
            dvt.fill(E::Compute::ZERO);
            totals.fill(E::Compute::ZERO);
            if !active[row] || !summaries.any(row, blocks.total()) {
                turns.fill(E::Compute::ZERO);
                continue;
            }
            let source = summaries.source(problem, row, &blocks, place.blocks.start);
            of_row.clear();
            of_row.push(&source, 0..blocks.total());
            for queries in tiles(rows.numbers(i)) {
                self.exact.start(place.head, queries.clone(), tile);
                tile.number_queries(Stream::Coarse, batch.dropout_head(place.head), queries.clone().map(|_| i));
                let sums = KeySums { dk: &mut *dkt, dv: &mut *dvt, first: 0 };
                tile.add(of_row, &source, of_rows.is_some(), Some(sums), |logits, lanes| {
                    summaries.add_offsets(row, logits, lanes);
                });
                tile.add_totals(totals);
                if let Some(of_rows) = &mut of_rows {
                    let first = queries.start - rows.start(place.rows.start);
                    let sums = &mut of_rows.dq[first * key_width..][..queries.len() * key_width];
                    sums.iter_mut().zip(&tile.dq[..]).for_each(|(sum, &x)| *sum += x);
                }
            }
            let mean = &means[row * key_width..][..key_width];
            for ((turn, dkt), &total) in
                turns.chunks_exact_mut(key_width.max(1)).zip(dkt.chunks_exact(key_width.max(1))).zip(&*totals)
            {
                for ((turn, &dkt), &mean) in turn.iter_mut().zip(dkt).zip(mean) {
                    *turn = dkt - total * mean;
                }
            }
        }
    }

    /// Adds to the gradients of keys, of values and of the mean queries.
    fn through_keys(
        &self,
        place: &Place,
        source: &KeySource<'_, E>,
        (buffers, of_block): &mut Scratch<E::Compute>,
        mut of_rows: Option<&mut RowSums<'_, E::Compute>>,
        mut of_keys: Option<&mut KeySums<'_, E::Compute>>,
    ) {
        let first = source.numbers(place.blocks.start).start;
        for (index, j) in place.blocks.clone().enumerate() {
            if !buffers.summaries.entering[index] {
                continue;
            }
            let numbers = source.numbers(j);
            of_block.clear();
            of_block.push(source, numbers.clone());
            if let Some(part) = of_block.parts(source).next() {
                let (at, rows) = ((index, numbers.start - first), place.rows.len());
                self.differentiate(at, rows, &part, buffers);
                self.add(at, rows, &part, buffers, of_rows.as_deref_mut(), of_keys.as_deref_mut());
            }
        }
    }

    /// Computes `dx` of a block.
    fn differentiate(
        &self,
        (index, first): (usize, usize),
        rows: usize,
        part: &PartView<'_, E::Compute>,
        buffers: &mut Buffers<E::Compute>,
    ) {
        let (problem, keys) = (self.problem, part.rows.len());
        let Buffers { summaries, dvt, turns, packed_turns, packed_dvt, logits, .. } = buffers;
        let (columns, capacity) = (summaries.columns, summaries.capacity);
        let one = E::Compute::from_f64(1.0);
        for (tokens, of_rows, packed, channels, width, init) in [
            (part.keys, turns, packed_turns, problem.head_dim, summaries.key_width, Init::Zero),
            (part.values, dvt, packed_dvt, self.value_dim, summaries.value_width, Init::Keep),
        ] {
            let row = |row: usize| &of_rows[(row * capacity + index) * width..][..channels];
            let mut to = MatrixMut::new(packed, channels, columns, columns);
            pack_transposed(problem.level, (0..rows).map(row), one, &mut to);
            E::Compute::run(
                problem.level,
                Gemm {
                    a: tokens.columns(channels),
                    a_transposed: false,
                    b: Matrix::new(packed, channels, columns, columns),
                    b_rows: None,
                    c: MatrixMut::new(logits, keys, columns, columns),
                    init,
                    ahead: None,
                },
            );
        }
        E::Compute::run(
            problem.level,
            BlockSoftmaxGradient {
                weights: Matrix::new(&summaries.weights[first * columns..], keys, columns, columns),
                gradients: MatrixMut::new(logits, keys, columns, columns),
                factor: E::Compute::from_f64(problem.scale),
            },
        );
    }

    /// Adds the gradients of a block and of the mean queries.
    fn add(
        &self,
        (index, first): (usize, usize),
        rows: usize,
        part: &PartView<'_, E::Compute>,
        buffers: &Buffers<E::Compute>,
        of_rows: Option<&mut RowSums<'_, E::Compute>>,
        mut of_keys: Option<&mut KeySums<'_, E::Compute>>,
    ) {
        let Buffers { summaries, means, dkt, dvt, logits, .. } = buffers;
        let (columns, capacity, keys) = (summaries.columns, summaries.capacity, part.rows.len());
        let (key_width, value_width) = (summaries.key_width, summaries.value_width);
        let level = self.problem.level;
        let weights = Matrix::new(&summaries.weights[first * columns..], keys, rows, columns);
        let gradients = Matrix::new(logits, keys, rows, columns);
        if let Some(KeySums { dk, dv, first }) = &mut of_keys {
            let place = part.first - *first;
            let of_block = |data, width| Matrix::new(data, rows, width, capacity * width);
            let means = Matrix::new(means, rows, key_width, key_width);
            for (factors, of_rows) in [(weights, of_block(&dkt[index * key_width..], key_width)), (gradients, means)] {
                let dk = MatrixMut::new(&mut dk[place * key_width..], keys, key_width, key_width);
                add_product(level, factors, false, of_rows, dk);
            }
            let dv = MatrixMut::new(&mut dv[place * value_width..], keys, value_width, value_width);
            add_product(level, weights, false, of_block(&dvt[index * value_width..], value_width), dv);
        }
        if let Some(of_rows) = of_rows {
            add_product(level, gradients, true, part.keys, MatrixMut::new(of_rows.means, rows, key_width, key_width));
        }
    }
}

/// `c += a b`, or with the transpose of `a`.
fn add_product<T: Scalar>(level: Level, a: Matrix<'_, T>, a_transposed: bool, b: Matrix<'_, T>, c: MatrixMut<'_, T>) {
    T::run(level, Gemm { a, a_transposed, b, b_rows: None, c, init: Init::Keep, ahead: None });
}
