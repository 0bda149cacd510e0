//! The gradient through the coarse level, among pooled tokens.
//!
//! The weight of an unselected block depends on the query only through its lse, so the queries of a block can be summed
//! before anything is multiplied. With `r_i` the smallest lse of the block's queries,
//!
//! ```text
//! G_i = sum_t exp(r_i - lse_t) g_t        E_i = sum_t exp(r_i - lse_t) delta_t
//! w_ij = count_j exp(c_ij - r_i)          dC_ij = w_ij (<G_i, vh_j> - E_i)
//! dqh_i += scale dC_ij kh_j               dkh_j += scale dC_ij qh_i        dvh_j += w_ij G_i
//! ```
//!
//! which is the gradient of an exact tile with `G` for `g`, `r` for lse and `E` for delta. Every factor is at most 1,
//! because each query's sum of exponentials contains each term. The definitions leave
//! `r_i`; the products are the same, and the smallest lse needs no pass over the logits.

use std::ops::Range;

use super::coarse::{adjust, pooled_keys};
use super::levels::adjust_batch;
use crate::exec::{Buffer, Chunks, threads};
use crate::kernels::{Matrix, Stream};
use crate::mra::attend::{GradientTile, KeyBatch, KeySource, KeySums, QueryTerms, TILE_QUERIES, coarse_tile_columns, nth_tile};
use crate::mra::for_parts;
use crate::mra::problem::{Batch, Blocks, Problem};
use crate::mra::pyramid::{Pooled, Pyramid};
use crate::mra::select::{BlockPlan, Children};
use crate::simd::{Element, Scalar};
use crate::tensor::{Rows, Tensor};

/// Whether so many groups of heads keep the threads busy: then one pass saves two products of seven.
pub(crate) fn one_pass(groups: usize, threads: usize) -> bool {
    groups.is_multiple_of(threads) || groups >= 4 * threads
}

/// Gradients of the pooled queries, keys and values: a row per block, padded to whole vectors.
pub(crate) struct CoarseGradients<T> {
    pub(super) dq: Buffer<T>,
    pub(super) dk: Buffer<T>,
    pub(super) dv: Buffer<T>,
    pub(super) key_width: usize,
    pub(super) value_width: usize,
}

impl<T: Scalar> CoarseGradients<T> {
    /// Of a block of queries of a flat head.
    pub(crate) fn dq(&self, batch: &Batch<'_>, head: usize, i: usize) -> &[T] {
        &self.dq[batch.row(head, i) * self.key_width..][..self.key_width]
    }

    /// Of a block of keys of a group.
    pub(crate) fn dk(&self, batch: &Batch<'_>, group: usize, j: usize) -> &[T] {
        &self.dk[batch.column(group, j) * self.key_width..][..self.key_width]
    }

    /// Of a block of values of a group.
    pub(crate) fn dv(&self, batch: &Batch<'_>, group: usize, j: usize) -> &[T] {
        &self.dv[batch.column(group, j) * self.value_width..][..self.value_width]
    }
}

/// The pooled tokens of a call, and what is known of the gradients of their outputs.
pub(crate) struct CoarsePass<'a, T: Scalar> {
    pub(super) problem: &'a Problem<'a>,
    pub(super) batch: &'a Batch<'a>,
    pub(super) plan: &'a BlockPlan,
    pyramid: Pyramid<T>,
    values: Pooled<T>,
    sums: BlockSums<T>,
    pooled_keys: Vec<Blocks>,
    value_dim: usize,
    zeros: Vec<T>,
}

impl<'a, T: Scalar> CoarsePass<'a, T> {
    /// With the means of queries and keys and of values.
    pub(super) fn new(
        problem: &'a Problem<'a>,
        batch: &'a Batch<'a>,
        (pyramid, values): (Pyramid<T>, Pooled<T>),
        sums: BlockSums<T>,
        plan: &'a BlockPlan,
        value_dim: usize,
    ) -> Self {
        let (pooled_keys, zeros) = (pooled_keys(batch), vec![T::ZERO; problem.head_dim]);
        Self { problem, batch, plan, pyramid, values, sums, pooled_keys, value_dim, zeros }
    }

    /// The gradients before they are written.
    pub(super) fn unset(&self) -> CoarseGradients<T> {
        let (key_width, value_width) = (self.pyramid.keys.width, self.values.width);
        CoarseGradients {
            dq: Buffer::scratch(self.batch.rows() * key_width),
            dk: Buffer::scratch(self.batch.columns() * key_width),
            dv: Buffer::scratch(self.batch.columns() * value_width),
            key_width,
            value_width,
        }
    }

    /// The gradients among all blocks.
    pub(super) fn gradients(&self) -> CoarseGradients<T> {
        let (problem, batch, mut gradients) = (self.problem, self.batch, self.unset());
        let width = gradients.key_width + gradients.value_width;
        let threads = problem.threads_for(problem.heads * batch.pairs_of_blocks() * 3 * width);
        if one_pass(batch.groups(), threads) {
            self.by_groups(threads, &mut gradients);
        } else {
            self.by_rows(threads, &mut gradients);
            self.by_columns(threads, &mut gradients);
        }
        gradients
    }

    fn by_groups(&self, threads: usize, gradients: &mut CoarseGradients<T>) {
        let (batch, key_width, value_width) = (self.batch, gradients.key_width, gradients.value_width);
        let (dq, dk, dv) =
            (Chunks::new(&mut gradients.dq, 1), Chunks::new(&mut gradients.dk, 1), Chunks::new(&mut gradients.dv, 1));
        threads::for_each(
            threads,
            batch.groups(),
            || self.buffers(),
            |(tile, keys), group| {
                let segment = batch.segment_of_group(group);
                let (first, count) = (batch.column(group, 0), segment.keys.len());
                let of = |width: usize| first * width..(first + count) * width;
                // SAFETY: each task has its own group of heads.
                let (dk, dv) = unsafe { (dk.range_mut(of(key_width)), dv.range_mut(of(value_width))) };
                dk.fill(T::ZERO);
                dv.fill(T::ZERO);
                for head in batch.heads_of(group) {
                    for rows in segment.row_tiles(TILE_QUERIES) {
                        self.start(head, rows.clone(), tile);
                        for_parts(count, KeyBatch::<T>::capacity(self.problem), |blocks| {
                            let sums = KeySums { dk: &mut *dk, dv: &mut *dv, first: 0 };
                            self.add(head, rows.clone(), blocks, tile, keys, true, Some(sums));
                        });
                        let place = batch.row(head, rows.start) * key_width;
                        // SAFETY: each task has its own heads.
                        let to = unsafe { dq.range_mut(place..place + rows.len() * key_width) };
                        to.copy_from_slice(&tile.dq[..to.len()]);
                    }
                }
            },
        );
    }

    fn by_rows(&self, threads: usize, gradients: &mut CoarseGradients<T>) {
        let (batch, width) = (self.batch, gradients.key_width);
        let tasks: Vec<(usize, Range<usize>)> = (0..batch.flat_heads())
            .flat_map(|head| batch.segment(head).row_tiles(TILE_QUERIES).map(move |rows| (head, rows)))
            .collect();
        let dq = Chunks::new(&mut gradients.dq, width);
        threads::for_each(
            threads,
            tasks.len(),
            || self.buffers(),
            |(tile, keys), task| {
                let (head, rows) = tasks[task].clone();
                self.start(head, rows.clone(), tile);
                for_parts(batch.segment(head).keys.len(), KeyBatch::<T>::capacity(self.problem), |blocks| {
                    self.add(head, rows.clone(), blocks, tile, keys, true, None);
                });
                for (query, i) in rows.enumerate() {
                    // SAFETY: each task has its own rows.
                    unsafe { dq.get_mut(batch.row(head, i)) }.copy_from_slice(&tile.dq[query * width..][..width]);
                }
            },
        );
    }

    fn by_columns(&self, threads: usize, gradients: &mut CoarseGradients<T>) {
        let (batch, key_width, value_width) = (self.batch, gradients.key_width, gradients.value_width);
        let tasks: Vec<(usize, usize)> = (0..batch.groups())
            .flat_map(|group| {
                (0..batch.segment_of_group(group).keys.len().div_ceil(TILE_QUERIES)).map(move |part| (group, part))
            })
            .collect();
        let (to_dk, to_dv) = (Chunks::new(&mut gradients.dk, key_width), Chunks::new(&mut gradients.dv, value_width));
        let scratch =
            || (self.buffers(), Buffer::scratch(TILE_QUERIES * key_width), Buffer::scratch(TILE_QUERIES * value_width));
        threads::for_each(threads, tasks.len(), scratch, |((tile, keys), dk, dv), task| {
            let (group, part) = tasks[task];
            let segment = batch.segment_of_group(group);
            let blocks = nth_tile(part, segment.keys.len());
            dk.fill(T::ZERO);
            dv.fill(T::ZERO);
            for head in batch.heads_of(group) {
                for rows in segment.row_tiles(TILE_QUERIES) {
                    self.start(head, rows.clone(), tile);
                    let sums = KeySums { dk: &mut *dk, dv: &mut *dv, first: blocks.start };
                    self.add(head, rows, blocks.clone(), tile, keys, false, Some(sums));
                }
            }
            for (key, j) in blocks.enumerate() {
                // SAFETY: each task has its own blocks of keys.
                unsafe {
                    to_dk.get_mut(batch.column(group, j)).copy_from_slice(&dk[key * key_width..][..key_width]);
                    to_dv.get_mut(batch.column(group, j)).copy_from_slice(&dv[key * value_width..][..value_width]);
                }
            }
        });
    }

    pub(crate) fn buffers(&self) -> (GradientTile<T>, KeyBatch<T>) {
        let tile = GradientTile::new(self.problem, coarse_tile_columns::<T>(self.problem), self.value_dim);
        (tile, KeyBatch::new(self.problem, self.problem.head_dim, self.value_dim))
    }

    pub(crate) fn start(&self, head: usize, rows: Range<usize>, tile: &mut GradientTile<T>) {
        let queries = self.pyramid.queries.of_head(self.batch, head);
        let sums = self.sums.of_head(self.batch, head);
        // A block without a weight in the coarse level must not bring in a NaN of its queries.
        let query = |i: usize| {
            let counts = self.sums.terms[self.batch.row(head, i)].lse != T::INFINITY;
            &(if counts { queries.row(i) } else { &self.zeros })[..self.problem.head_dim]
        };
        tile.start(
            rows.clone().map(query),
            rows.clone().map(|i| &sums.row(i)[..self.value_dim]),
            rows.clone().map(|i| self.sums.terms[self.batch.row(head, i)]),
        );
        tile.number_queries(Stream::Coarse, self.batch.dropout_head(head), rows);
    }

    #[allow(clippy::too_many_arguments, reason = "a place in the matrix of blocks, the buffers, and what is wanted")]
    fn add(
        &self,
        head: usize,
        rows: Range<usize>,
        blocks: Range<usize>,
        tile: &mut GradientTile<T>,
        keys: &mut KeyBatch<T>,
        want_dq: bool,
        sums: Option<KeySums<'_, T>>,
    ) {
        let source = self.source(head);
        keys.clear();
        keys.push(&source, blocks.clone());
        tile.add(keys, &source, want_dq, sums, |logits, columns| {
            adjust(self.problem, self.batch, self.plan, head, rows, blocks, logits, columns);
        });
    }

    /// The gradients of the logits of a tile of rows, which it has started, on a batch of pooled keys: one row for each of these.
    pub(super) fn logit_gradients<'t>(
        &self,
        head: usize,
        rows: &Range<usize>,
        tile: &'t mut GradientTile<T>,
        keys: &KeyBatch<T>,
    ) -> Matrix<'t, T> {
        tile.differentiate(keys, &self.source(head), None, |logits, columns| {
            adjust_batch(self.problem, self.batch, self.plan, head, rows, keys, logits, columns);
        })
    }

    /// The means of keys and values that a flat head reads.
    pub(super) fn source(&self, head: usize) -> KeySource<'_, T> {
        let (batch, group) = (self.batch, self.batch.group(head));
        let (key_means, value_means) = (self.pyramid.keys.of_group(batch, group), self.values.of_group(batch, group));
        KeySource::new(self.problem, key_means, value_means, &self.pooled_keys[head / self.problem.heads])
    }
}

/// The sums over the queries of each block that weigh the coarse level: those of `exp(r - lse_t) g_t`, and as terms `r` and those of
/// `exp(r - lse_t) delta_t`.
pub(super) struct BlockSums<T> {
    grads: Buffer<T>,
    terms: Vec<QueryTerms<T>>,
    width: usize,
}

impl<T: Scalar> BlockSums<T> {
    /// Where a row may select any block.
    pub(super) fn of_all<E: Element<Compute = T>>(
        problem: &Problem<'_>,
        batch: &Batch<'_>,
        grad_out: &Tensor<'_, E>,
        terms: &[QueryTerms<T>],
        plan: &BlockPlan,
    ) -> Self {
        let filled: Vec<usize> = batch
            .segments
            .iter()
            .map(|segment| (0..segment.keys.len()).filter(|&j| segment.keys.count(j) > 0).count())
            .collect();
        let takes_all = |head: usize, i: usize| plan.row(batch, head, i).len() == filled[head / problem.heads];
        Self::new(problem, batch, grad_out, terms, takes_all)
    }

    /// Where a row may select children of what the level above refines.
    pub(super) fn of_children<E: Element<Compute = T>>(
        children: &Children<'_>,
        grad_out: &Tensor<'_, E>,
        terms: &[QueryTerms<T>],
        plan: &BlockPlan,
    ) -> Self {
        let (batch, above) = (children.batch, children.batch_above);
        let filled: Vec<usize> = (0..above.flat_heads())
            .flat_map(|head| (0..above.segment(head).rows.len()).map(move |row_above| children.filled(head, row_above)))
            .collect();
        let takes_all =
            |head: usize, i: usize| plan.row(batch, head, i).len() == filled[above.row(head, children.row_above(head, i))];
        Self::new(children.problem, batch, grad_out, terms, takes_all)
    }

    /// A row that selects all there is has sums of 0 and weights of 0, so that a NaN of one of its queries, which is in no
    /// coarse weight, does not become one of the others.
    fn new<E: Element<Compute = T>>(
        problem: &Problem<'_>,
        batch: &Batch<'_>,
        grad_out: &Tensor<'_, E>,
        terms: &[QueryTerms<T>],
        takes_all: impl Fn(usize, usize) -> bool + Sync,
    ) -> Self {
        let value_dim = grad_out.shape()[3];
        let width = problem.padded::<T>(value_dim);
        let mut grads = Buffer::scratch(batch.rows() * width);
        let unset = QueryTerms { lse: T::INFINITY, delta: T::ZERO, idle: true };
        let mut sums = vec![unset; batch.rows()];
        let (grad_rows, sum_rows) = (Chunks::new(&mut grads, width), Chunks::new(&mut sums, 1));
        let threads = problem.threads_to_read(grad_out.shape().iter().product());
        threads::for_each(
            threads,
            batch.rows(),
            || Buffer::scratch(width),
            |line, task| {
                let (head, i) = batch.row_at(task);
                let (item, head_of_item) = batch.item_and_head(head);
                // SAFETY: each task has its own block.
                let (sum, total) = unsafe { (grad_rows.get_mut(task), &mut sum_rows.get_mut(task)[0]) };
                sum.fill(T::ZERO);
                if takes_all(head, i) {
                    return;
                }
                let grad_rows = grad_out.head(item, head_of_item);
                let rows = &batch.segment(head).rows;
                let tokens = || rows.numbers(i).map(|number| rows.token(number));
                let terms = &terms[(item * problem.heads + head_of_item) * problem.query_len..][..problem.query_len];
                let lse = tokens()
                    .map(|token| terms[token].lse)
                    .fold(T::INFINITY, |least, lse| if lse < least { lse } else { least });
                (total.lse, total.idle) = (lse, lse == T::INFINITY);
                for token in tokens().filter(|&token| terms[token].lse != T::INFINITY) {
                    let weight = (lse - terms[token].lse).exp();
                    E::widen(grad_rows.row(token), &mut line[..value_dim]);
                    for (sum, &g) in sum.iter_mut().zip(&line[..value_dim]) {
                        *sum += weight * g;
                    }
                    total.delta += weight * terms[token].delta;
                }
            },
        );
        Self { grads, terms: sums, width }
    }

    fn of_head(&self, batch: &Batch<'_>, head: usize) -> Rows<'_, T> {
        let (first, count) = (batch.row(head, 0), batch.segment(head).rows.len());
        Rows::new(&self.grads[first * self.width..][..count * self.width], count, self.width, self.width)
    }
}
