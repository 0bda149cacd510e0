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
//! because each query's sum of exponentials contains each term. The definitions take the largest `c_ij` for
//! `r_i`; the products are the same, and the smallest lse needs no pass over the logits.

use std::ops::Range;

use super::backward::one_pass;
use super::blocks::Blocks;
use super::coarse::{adjust, for_strips};
use super::forward::Inputs;
use super::gradient_tile::{GradientTile, KeySums, QueryTerms};
use super::plan::Plan;
use super::problem::Problem;
use super::pyramid::{Pooled, Pyramid};
use super::scratch::Buffer;
use super::strip::{KeySource, Strip};
use super::tile::{TILE_QUERIES, coarse_tile_columns, nth_tile, tiles};
use crate::kernels::Stream;
use crate::simd::{Element, Scalar};
use crate::tensor::{Rows, Tensor};
use crate::threads;
use crate::tiles::Chunks;

/// Gradients of the pooled queries, keys and values: a row per block, padded to whole vectors.
pub(crate) struct CoarseGradients<T> {
    dq: Buffer<T>,
    dk: Buffer<T>,
    dv: Buffer<T>,
    query_blocks: usize,
    key_blocks: usize,
    key_width: usize,
    value_width: usize,
}

impl<T: Scalar> CoarseGradients<T> {
    /// Of a block of queries. Heads of all batch items are numbered through.
    pub(crate) fn dq(&self, head: usize, i: usize) -> &[T] {
        &self.dq[(head * self.query_blocks + i) * self.key_width..][..self.key_width]
    }

    /// Of a block of keys. Key heads of all batch items are numbered through.
    pub(crate) fn dk(&self, group: usize, j: usize) -> &[T] {
        &self.dk[(group * self.key_blocks + j) * self.key_width..][..self.key_width]
    }

    /// Of a block of values.
    pub(crate) fn dv(&self, group: usize, j: usize) -> &[T] {
        &self.dv[(group * self.key_blocks + j) * self.value_width..][..self.value_width]
    }
}

/// Computes the gradients of the pooled tokens. `terms` are those of all queries.
pub(crate) fn coarse_backward<E: Element>(
    problem: &Problem,
    inputs: &Inputs<'_, E>,
    grad_out: &Tensor<'_, E>,
    terms: &[QueryTerms<E::Compute>],
    plan: &Plan,
    guard: bool,
) -> CoarseGradients<E::Compute> {
    let (pyramid, values) = Pyramid::with_values(problem, inputs);
    let sums = BlockSums::new(problem, grad_out, terms, plan);
    let (nq, nk) = (problem.query_blocks(), problem.key_blocks());
    let groups = problem.batch * problem.kv_heads;
    let (key_width, value_width) = (pyramid.keys.width, values.width);
    let mut gradients = CoarseGradients {
        dq: Buffer::scratch(problem.all_heads() * nq * key_width),
        dk: Buffer::scratch(groups * nk * key_width),
        dv: Buffer::scratch(groups * nk * value_width),
        query_blocks: nq,
        key_blocks: nk,
        key_width,
        value_width,
    };
    let pass = Pass {
        problem,
        plan,
        pyramid: &pyramid,
        values: &values,
        sums: &sums,
        all: Blocks::new(nk, 1),
        value_dim: grad_out.shape()[3],
        guard,
    };
    let threads = problem.threads_for(problem.all_heads() * nq * nk * 3 * (key_width + value_width));
    if one_pass(groups, threads) {
        pass.by_groups(threads, &mut gradients);
    } else {
        pass.by_rows(threads, &mut gradients);
        pass.by_columns(threads, &mut gradients);
    }
    gradients
}

struct Pass<'a, T: Scalar> {
    problem: &'a Problem<'a>,
    plan: &'a Plan,
    pyramid: &'a Pyramid<T>,
    values: &'a Pooled<T>,
    sums: &'a BlockSums<T>,
    all: Blocks,
    value_dim: usize,
    guard: bool,
}

impl<T: Scalar> Pass<'_, T> {
    fn by_groups(&self, threads: usize, gradients: &mut CoarseGradients<T>) {
        let (nk, heads) = (self.problem.key_blocks(), self.problem.group_size());
        let dq = Chunks::new(&mut gradients.dq, heads * self.problem.query_blocks() * gradients.key_width);
        let dk = Chunks::new(&mut gradients.dk, nk * gradients.key_width);
        let dv = Chunks::new(&mut gradients.dv, nk * gradients.value_width);
        threads::for_each(
            threads,
            self.problem.batch * self.problem.kv_heads,
            || self.buffers(),
            |(tile, strip), group| {
                // SAFETY: each task has its own group of heads.
                let (dq, dk, dv) = unsafe { (dq.get_mut(group), dk.get_mut(group), dv.get_mut(group)) };
                dk.fill(T::ZERO);
                dv.fill(T::ZERO);
                let size = self.problem.query_blocks() * tile.key_width;
                for index in 0..heads {
                    for rows in tiles(0..self.problem.query_blocks()) {
                        let head = group * heads + index;
                        self.start(head, rows.clone(), tile);
                        for_strips(nk, Strip::<T>::capacity(self.problem), |blocks| {
                            let sums = KeySums { dk: &mut *dk, dv: &mut *dv, first: 0 };
                            self.strip(head, rows.clone(), blocks, tile, strip, true, Some(sums));
                        });
                        let to = &mut dq[index * size..][rows.start * tile.key_width..rows.end * tile.key_width];
                        to.copy_from_slice(&tile.dq[..to.len()]);
                    }
                }
            },
        );
    }

    fn by_rows(&self, threads: usize, gradients: &mut CoarseGradients<T>) {
        let (nq, width) = (self.problem.query_blocks(), gradients.key_width);
        let tiles_of_head = nq.div_ceil(TILE_QUERIES);
        let dq = Chunks::new(&mut gradients.dq, width);
        threads::for_each(
            threads,
            self.problem.all_heads() * tiles_of_head,
            || self.buffers(),
            |(tile, strip), task| {
                let (head, index) = (task / tiles_of_head, task % tiles_of_head);
                let rows = nth_tile(index, nq);
                self.start(head, rows.clone(), tile);
                for_strips(self.problem.key_blocks(), Strip::<T>::capacity(self.problem), |blocks| {
                    self.strip(head, rows.clone(), blocks, tile, strip, true, None);
                });
                for (query, i) in rows.enumerate() {
                    // SAFETY: each task has its own rows.
                    unsafe { dq.get_mut(head * nq + i) }.copy_from_slice(&tile.dq[query * width..][..width]);
                }
            },
        );
    }

    fn by_columns(&self, threads: usize, gradients: &mut CoarseGradients<T>) {
        let (problem, nk) = (self.problem, self.problem.key_blocks());
        let (heads, key_width, value_width) = (problem.group_size(), gradients.key_width, gradients.value_width);
        let strips = nk.div_ceil(TILE_QUERIES);
        let (to_dk, to_dv) = (Chunks::new(&mut gradients.dk, key_width), Chunks::new(&mut gradients.dv, value_width));
        let scratch =
            || (self.buffers(), Buffer::scratch(TILE_QUERIES * key_width), Buffer::scratch(TILE_QUERIES * value_width));
        threads::for_each(threads, problem.batch * problem.kv_heads * strips, scratch, |((tile, strip), dk, dv), task| {
            let (group, index) = (task / strips, task % strips);
            let blocks = nth_tile(index, nk);
            dk.fill(T::ZERO);
            dv.fill(T::ZERO);
            for head in group * heads..(group + 1) * heads {
                for rows in tiles(0..problem.query_blocks()) {
                    self.start(head, rows.clone(), tile);
                    let sums = KeySums { dk: &mut *dk, dv: &mut *dv, first: blocks.start };
                    self.strip(head, rows, blocks.clone(), tile, strip, false, Some(sums));
                }
            }
            for (key, j) in blocks.enumerate() {
                // SAFETY: each task has its own blocks of keys.
                unsafe {
                    to_dk.get_mut(group * nk + j).copy_from_slice(&dk[key * key_width..][..key_width]);
                    to_dv.get_mut(group * nk + j).copy_from_slice(&dv[key * value_width..][..value_width]);
                }
            }
        });
    }

    fn buffers(&self) -> (GradientTile<T>, Strip<T>) {
        let tile = GradientTile::new(self.problem, coarse_tile_columns::<T>(self.problem), self.value_dim, self.guard);
        (tile, Strip::new(self.problem, self.problem.head_dim, self.value_dim))
    }

    fn start(&self, head: usize, rows: Range<usize>, tile: &mut GradientTile<T>) {
        let queries = self.pyramid.queries.head(head);
        let sums = self.sums.head(head);
        tile.start(
            rows.clone().map(|i| &queries.row(i)[..self.problem.head_dim]),
            rows.clone().map(|i| &sums.row(i)[..self.value_dim]),
            rows.clone().map(|i| self.sums.terms[head * self.problem.query_blocks() + i]),
        );
        tile.number_queries(Stream::Coarse, head, rows);
    }

    #[allow(clippy::too_many_arguments, reason = "a place in the matrix of blocks, the buffers, and what is wanted")]
    fn strip(
        &self,
        head: usize,
        rows: Range<usize>,
        blocks: Range<usize>,
        tile: &mut GradientTile<T>,
        strip: &mut Strip<T>,
        want_dq: bool,
        sums: Option<KeySums<'_, T>>,
    ) {
        let kv = self.problem.kv_row(head);
        let source = KeySource::new(self.problem, self.pyramid.keys.head(kv), self.values.head(kv), &self.all);
        strip.clear();
        strip.push(&source, blocks.clone());
        tile.strip(strip, &source, want_dq, sums, |logits, columns| {
            adjust(self.problem, self.plan, head, rows, blocks, logits, columns);
        });
    }
}

/// `G`, `r` and `E` of every block of queries.
struct BlockSums<T> {
    grads: Buffer<T>,
    terms: Vec<QueryTerms<T>>,
    blocks: usize,
    width: usize,
}

impl<T: Scalar> BlockSums<T> {
    /// A row without an unselected block has sums of 0 and weights of 0, so that a NaN of one of its queries, which is in no
    /// coarse weight, does not become one of the others.
    fn new<E: Element<Compute = T>>(problem: &Problem, grad_out: &Tensor<'_, E>, terms: &[QueryTerms<T>], plan: &Plan) -> Self {
        let live_keys: Vec<usize> = (0..problem.batch).map(|batch| problem.keys(batch).live()).collect();
        let (value_dim, nq) = (grad_out.shape()[3], problem.query_blocks());
        let width = problem.padded::<T>(value_dim);
        let mut grads = Buffer::scratch(problem.all_heads() * nq * width);
        let mut sums = vec![QueryTerms { lse: T::INFINITY, delta: T::ZERO }; problem.all_heads() * nq];
        let (grad_rows, sum_rows) = (Chunks::new(&mut grads, width), Chunks::new(&mut sums, 1));
        let threads = problem.threads_to_read(problem.all_heads() * problem.query_len * value_dim);
        threads::for_each(
            threads,
            problem.all_heads() * nq,
            || Buffer::scratch(width),
            |line, task| {
                let (head, i) = (task / nq, task % nq);
                let batch = head / problem.heads;
                // SAFETY: each task has its own block.
                let (sum, total) = unsafe { (grad_rows.get_mut(task), &mut sum_rows.get_mut(task)[0]) };
                sum.fill(T::ZERO);
                if plan.row(head, i).len() == live_keys[batch] {
                    return;
                }
                let rows = grad_out.head(batch, head % problem.heads);
                let blocks = problem.queries(batch);
                let tokens = || (blocks.start(i)..blocks.start(i + 1)).map(|number| blocks.token(number));
                let terms = &terms[head * problem.query_len..][..problem.query_len];
                let lse = tokens()
                    .map(|token| terms[token].lse)
                    .fold(T::INFINITY, |least, lse| if lse < least { lse } else { least });
                total.lse = lse;
                for token in tokens().filter(|&token| terms[token].lse != T::INFINITY) {
                    let weight = (lse - terms[token].lse).exp();
                    E::widen(rows.row(token), &mut line[..value_dim]);
                    for (sum, &g) in sum.iter_mut().zip(&line[..value_dim]) {
                        *sum += weight * g;
                    }
                    total.delta += weight * terms[token].delta;
                }
            },
        );
        Self { grads, terms: sums, blocks: nq, width }
    }

    fn head(&self, head: usize) -> Rows<'_, T> {
        let size = self.blocks * self.width;
        Rows::new(&self.grads[head * size..][..size], self.blocks, self.width, self.width)
    }
}
