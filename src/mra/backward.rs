//! Backward: the gradients of queries, keys and values in closed form (docs/definitions.md, section 2, Backward).
//!
//! ```text
//! delta_t = <g_t, out_t> - dlse_t                                               once per query
//! coarse level: the same gradient among pooled tokens, with summed g            mra::coarse_backward
//! exact blocks: for each tile of queries, for each strip of its selected keys    mra::gradient_tile
//! dq_t = exact + dqh_i / count_i        dk_s, dv_s likewise
//! ```
//!
//! Nothing is kept from forward but out, lse and the plan. Where there are enough heads for the threads, a task is a
//! group of heads that share keys, and computes all three gradients in one pass: 5 products per block. Otherwise rows of the
//! plan drive dq and columns dk and dv: 7 products, but a task for each block. Both give the same bits, because every
//! sum is in the same order.

use std::ops::Range;

use super::bias_tile::BiasTile;
use super::coarse_backward::{CoarseGradients, coarse_backward};
use super::finite::needs_guard;
use super::forward::Inputs;
pub(crate) use super::gradient_tile::QueryTerms;
use super::gradient_tile::{GradientTile, KeySums};
use super::plan::Plan;
use super::problem::{Mode, Problem};
use super::scratch::Buffer;
use super::strip::{KeySource, Strip};
use super::tile::{tile_columns, tiles};
use crate::error::Result;
use crate::kernels::Stream;
use crate::simd::{Element, Scalar};
use crate::tensor::Tensor;
use crate::threads;
use crate::tiles::{Chunks, TensorMut};

/// What backward gets from forward and from the caller, channels contiguous.
#[derive(Debug, Clone, Copy)]
pub struct Saved<'a, E: Element> {
    /// The gradient of `out`, `(B, H, Lq, Dv)`.
    pub grad_out: Tensor<'a, E>,
    /// The gradient of `lse`, `(B, H, Lq, 1)`, if the caller used it.
    pub grad_lse: Option<Tensor<'a, E::Compute>>,
    /// The output of forward, `(B, H, Lq, Dv)`.
    pub out: Tensor<'a, E>,
    /// The lse of forward, `(B, H, Lq, 1)`.
    pub lse: Tensor<'a, E::Compute>,
}

/// Where the gradients go; shapes as the inputs'.
#[derive(Debug)]
pub struct Gradients<'a, E> {
    /// `(B, H, Lq, D)`.
    pub query: TensorMut<'a, E>,
    /// `(B, Hk, Lk, D)`.
    pub key: TensorMut<'a, E>,
    /// `(B, Hk, Lk, Dv)`.
    pub value: TensorMut<'a, E>,
}

impl<E: Element> Saved<'_, E> {
    /// Checks the shapes.
    pub(crate) fn validate(&self, problem: &Problem, value_dim: usize) -> Result<()> {
        let of = |channels| [problem.batch, problem.heads, problem.query_len, channels];
        Problem::expect("grad_out", self.grad_out.shape(), of(value_dim))?;
        Problem::expect("out", self.out.shape(), of(value_dim))?;
        Problem::expect("lse", self.lse.shape(), of(1))?;
        self.grad_lse.as_ref().map_or(Ok(()), |grad_lse| Problem::expect("grad_lse", grad_lse.shape(), of(1)))
    }
}

impl<E: Element> Gradients<'_, E> {
    /// Checks the shapes.
    pub(crate) fn validate(&self, inputs: &Inputs<'_, E>) -> Result<()> {
        Problem::expect("grad_query", self.query.shape(), inputs.query.shape())?;
        Problem::expect("grad_key", self.key.shape(), inputs.key.shape())?;
        Problem::expect("grad_value", self.value.shape(), inputs.value.shape())
    }
}

/// Computes the gradients with respect to query, key and value, for the plan of forward.
///
/// Deterministic: the same bits for any number of threads. Gradients of padded tokens are 0.
///
/// # Errors
/// If a tensor does not have the shape of the problem; nothing is written then.
pub fn backward<E: Element>(
    problem: &Problem,
    inputs: &Inputs<'_, E>,
    saved: &Saved<'_, E>,
    plan: &Plan,
    gradients: &mut Gradients<'_, E>,
) -> Result<()> {
    let value_dim = inputs.validate(problem)?;
    plan.validate(problem)?;
    saved.validate(problem, value_dim)?;
    gradients.validate(inputs)?;
    let terms = query_terms(problem, saved);
    let (queries, keys) = (|batch| problem.queries(batch), |batch| problem.keys(batch));
    let guard = needs_guard(problem, &inputs.query, queries)
        || needs_guard(problem, &saved.grad_out, queries)
        || needs_guard(problem, &inputs.key, keys)
        || needs_guard(problem, &inputs.value, keys);
    let coarse = (problem.mode == Mode::Full).then(|| coarse_backward(problem, inputs, &saved.grad_out, &terms, plan, guard));
    let pass = Pass { problem, inputs, grad_out: &saved.grad_out, terms: &terms, plan, coarse, gradients, value_dim, guard };
    let (groups, products) = (problem.batch * problem.kv_heads, plan.num_blocks() * problem.block_size.pow(2) * 3);
    let threads = problem.threads_for(products * (problem.head_dim + value_dim));
    if one_pass(groups, threads) {
        pass.by_groups(threads);
    } else {
        pass.by_rows(threads);
        pass.by_columns(threads);
    }
    Ok(())
}

/// Whether so many groups of heads keep the threads busy: then one pass saves two products of seven.
pub(crate) fn one_pass(groups: usize, threads: usize) -> bool {
    groups.is_multiple_of(threads) || groups >= 4 * threads
}

/// Lse and delta of every query, heads and tokens numbered through.
pub(crate) fn query_terms<E: Element>(problem: &Problem, saved: &Saved<'_, E>) -> Vec<QueryTerms<E::Compute>> {
    let length = problem.query_len;
    let unset = QueryTerms { lse: E::Compute::NAN, delta: E::Compute::NAN };
    let mut terms = vec![unset; problem.all_heads() * length];
    let value_dim = saved.out.shape()[3];
    let chunks = Chunks::new(&mut terms, length);
    let threads = problem.threads_to_read(problem.all_heads() * length * value_dim);
    let heads = if length == 0 { 0 } else { problem.all_heads() };
    let scratch = || (Buffer::scratch(value_dim), Buffer::scratch(value_dim));
    threads::for_each(threads, heads, scratch, |(grad_line, out_line), task| {
        let (batch, head) = (task / problem.heads, task % problem.heads);
        let (grads, outs, lses) = (saved.grad_out.head(batch, head), saved.out.head(batch, head), saved.lse.head(batch, head));
        let grad_lses = saved.grad_lse.map(|tensor| tensor.head(batch, head));
        let blocks = problem.queries(batch);
        // SAFETY: each task has its own head.
        let terms = unsafe { chunks.get_mut(task) };
        for number in 0..blocks.start(blocks.len()) {
            let token = blocks.token(number);
            E::widen(grads.row(token), grad_line);
            E::widen(outs.row(token), out_line);
            let product = dot(grad_line, out_line);
            let lse = lses.row(token)[0];
            terms[token] = QueryTerms {
                // A query that saw no key has weights exp(x - inf) = 0.
                lse: if lse == E::Compute::NEG_INFINITY { E::Compute::INFINITY } else { lse },
                delta: grad_lses.map_or(product, |grad_lses| product - grad_lses.row(token)[0]),
            };
        }
    });
    terms
}

/// A sum of products. Several chains, since each addition waits for the one before.
fn dot<T: Scalar>(x: &[T], y: &[T]) -> T {
    const CHAINS: usize = 16;
    let mut sums = [T::ZERO; CHAINS];
    for (x, y) in x.chunks(CHAINS).zip(y.chunks(CHAINS)) {
        for ((sum, &x), &y) in sums.iter_mut().zip(x).zip(y) {
            *sum += x * y;
        }
    }
    sums.into_iter().fold(T::ZERO, |total, sum| total + sum)
}

/// What a thread computes a block in.
struct Buffers<T> {
    tile: GradientTile<T>,
    strip: Strip<T>,
    bias: BiasTile<T>,
}

/// The exact blocks of all heads, and the writing of the results.
struct Pass<'a, 'g, E: Element> {
    problem: &'a Problem<'a>,
    inputs: &'a Inputs<'a, E>,
    grad_out: &'a Tensor<'a, E>,
    terms: &'a [QueryTerms<E::Compute>],
    plan: &'a Plan,
    coarse: Option<CoarseGradients<E::Compute>>,
    gradients: &'a Gradients<'g, E>,
    value_dim: usize,
    guard: bool,
}

impl<E: Element> Pass<'_, '_, E> {
    /// One task for each group of heads that share keys: all gradients in one pass.
    fn by_groups(&self, threads: usize) {
        let problem = self.problem;
        let scratch = || {
            let buffers = self.buffers();
            let (key_width, value_width) = (buffers.tile.key_width, buffers.tile.value_width);
            (buffers, Buffer::scratch(problem.key_len * key_width), Buffer::scratch(problem.key_len * value_width))
        };
        threads::for_each(threads, problem.batch * problem.kv_heads, scratch, |(buffers, dk, dv), group| {
            let source = self.source(group);
            dk.fill(E::Compute::ZERO);
            dv.fill(E::Compute::ZERO);
            for head in self.heads_of(group) {
                for i in 0..problem.query_blocks() {
                    // SAFETY: each task has its own heads.
                    unsafe { self.row(head, i, buffers, &source, Some(&mut KeySums { dk, dv, first: 0 })) };
                }
            }
            for block in 0..problem.key_blocks() {
                // SAFETY: each task has its own group of heads.
                unsafe { self.finish_keys(group, block, &KeySums { dk, dv, first: 0 }) };
            }
        });
    }

    /// One task for each block of queries: dq.
    fn by_rows(&self, threads: usize) {
        let nq = self.problem.query_blocks();
        threads::for_each(
            threads,
            self.problem.all_heads() * nq,
            || self.buffers(),
            |buffers, task| {
                let (head, i) = (task / nq, task % nq);
                let source = self.source(self.problem.kv_row(head));
                // SAFETY: each task has its own block of queries.
                unsafe { self.row(head, i, buffers, &source, None) };
            },
        );
    }

    /// One task for each block of keys: dk and dv.
    fn by_columns(&self, threads: usize) {
        let (problem, nk) = (self.problem, self.problem.key_blocks());
        let scratch = || {
            let buffers = self.buffers();
            let (key_width, value_width) = (buffers.tile.key_width, buffers.tile.value_width);
            (buffers, Buffer::scratch(problem.block_size * key_width), Buffer::scratch(problem.block_size * value_width))
        };
        threads::for_each(
            threads,
            problem.batch * problem.kv_heads * nk,
            scratch,
            |(Buffers { tile, strip, bias }, dk, dv), task| {
                let (group, block) = (task / nk, task % nk);
                let source = self.source(group);
                let numbers = source.numbers(block);
                dk.fill(E::Compute::ZERO);
                dv.fill(E::Compute::ZERO);
                strip.clear();
                strip.push(&source, numbers.clone());
                for head in self.heads_of(group) {
                    for &i in self.plan.column(head, block) {
                        let blocks = problem.queries(head / problem.heads);
                        for queries in tiles(blocks.start(i as usize)..blocks.start(i as usize + 1)) {
                            self.start(head, queries.clone(), tile);
                            let sums = KeySums { dk: &mut *dk, dv: &mut *dv, first: numbers.start };
                            tile.strip(strip, &source, false, Some(sums), |logits, columns| {
                                bias.apply(problem, (head, i as usize), &queries, strip, logits, columns);
                            });
                        }
                    }
                }
                // SAFETY: each task has its own block of keys.
                unsafe { self.finish_keys(group, block, &KeySums { dk, dv, first: numbers.start }) };
            },
        );
    }

    fn buffers(&self) -> Buffers<E::Compute> {
        let columns = tile_columns::<E::Compute>(self.problem);
        Buffers {
            tile: GradientTile::new(self.problem, columns, self.value_dim, self.guard),
            strip: Strip::new(self.problem, self.problem.head_dim, self.value_dim),
            bias: BiasTile::new(self.problem, columns),
        }
    }

    /// The keys and values of a group of heads.
    fn source(&self, group: usize) -> KeySource<'_, E> {
        let (batch, kv_head) = (group / self.problem.kv_heads, group % self.problem.kv_heads);
        let (keys, values) = (self.inputs.key.head(batch, kv_head), self.inputs.value.head(batch, kv_head));
        KeySource::new(self.problem, keys, values, self.problem.keys(batch))
    }

    /// The query heads of a group, heads of all batch items numbered through.
    fn heads_of(&self, group: usize) -> Range<usize> {
        let size = self.problem.group_size();
        group * size..(group + 1) * size
    }

    fn start(&self, head: usize, queries: Range<usize>, tile: &mut GradientTile<E::Compute>) {
        let (batch, head_of_item) = (head / self.problem.heads, head % self.problem.heads);
        let blocks = self.problem.queries(batch);
        let (query, grad) = (self.inputs.query.head(batch, head_of_item), self.grad_out.head(batch, head_of_item));
        let terms = &self.terms[head * self.problem.query_len..];
        tile.start(
            queries.clone().map(|number| query.row(blocks.token(number))),
            queries.clone().map(|number| grad.row(blocks.token(number))),
            queries.clone().map(|number| terms[blocks.token(number)]),
        );
        tile.number_queries(Stream::Exact, head, queries.map(|number| blocks.token(number)));
    }

    /// One block of queries against its selected keys: dq, and dk and dv if wanted.
    ///
    /// # Safety
    /// - Nothing else holds the rows of this block in the gradient of the queries.
    unsafe fn row(
        &self,
        head: usize,
        i: usize,
        buffers: &mut Buffers<E::Compute>,
        source: &KeySource<'_, E>,
        mut sums: Option<&mut KeySums<'_, E::Compute>>,
    ) {
        let Buffers { tile, strip, bias } = buffers;
        let (batch, head_of_item) = (head / self.problem.heads, head % self.problem.heads);
        let blocks = self.problem.queries(batch);
        if blocks.count(i) < blocks.range(i).len() {
            for token in blocks.range(i) {
                // SAFETY: the caller's.
                unsafe { self.gradients.query.row_mut(batch, head_of_item, token) }.fill(E::default());
            }
        }
        for queries in tiles(blocks.start(i)..blocks.start(i + 1)) {
            self.start(head, queries.clone(), tile);
            let mut step = |tile: &mut GradientTile<E::Compute>, strip: &Strip<E::Compute>| {
                tile.strip(strip, source, true, sums.as_deref_mut().map(KeySums::reborrow), |logits, columns| {
                    bias.apply(self.problem, (head, i), &queries, strip, logits, columns);
                });
            };
            strip.clear();
            for &j in self.plan.row(head, i) {
                let numbers = source.numbers(j as usize);
                if !strip.push(source, numbers.clone()) {
                    step(tile, strip);
                    strip.clear();
                    assert!(strip.push(source, numbers), "an empty strip has room for a block");
                }
            }
            if strip.rows() > 0 {
                step(tile, strip);
            }
            let pooled = self.coarse.as_ref().map(|coarse| coarse.dq(head, i));
            for (query, number) in queries.enumerate() {
                let row = &mut tile.dq[query * tile.key_width..][..self.problem.head_dim];
                // SAFETY: the caller's.
                let to = unsafe { self.gradients.query.row_mut(batch, head_of_item, blocks.token(number)) };
                finish(row, pooled, blocks.count(i), to);
            }
        }
    }

    /// Writes dk and dv of a block of keys.
    ///
    /// # Safety
    /// - Nothing else holds the rows of this block in the gradients of keys and values.
    unsafe fn finish_keys(&self, group: usize, block: usize, sums: &KeySums<'_, E::Compute>) {
        let (batch, kv_head) = (group / self.problem.kv_heads, group % self.problem.kv_heads);
        let blocks = self.problem.keys(batch);
        let count = blocks.count(block);
        let pooled = self.coarse.as_ref().map(|coarse| (coarse.dk(group, block), coarse.dv(group, block)));
        let outputs = [
            (&self.gradients.key, &*sums.dk, self.problem.head_dim, pooled.map(|(dk, _)| dk)),
            (&self.gradients.value, &*sums.dv, self.value_dim, pooled.map(|(_, dv)| dv)),
        ];
        for (output, sums_of_all, channels, pooled) in outputs {
            let width = self.problem.padded::<E::Compute>(channels);
            if count < blocks.range(block).len() {
                for token in blocks.range(block) {
                    // SAFETY: the caller's.
                    unsafe { output.row_mut(batch, kv_head, token) }.fill(E::default());
                }
            }
            let mut line = [E::Compute::ZERO; 256];
            for number in blocks.start(block)..blocks.start(block + 1) {
                // SAFETY: the caller's.
                let to = unsafe { output.row_mut(batch, kv_head, blocks.token(number)) };
                let row = &sums_of_all[(number - sums.first) * width..][..channels];
                for start in (0..channels).step_by(line.len()) {
                    let part = start..(start + line.len()).min(channels);
                    let line = &mut line[..part.len()];
                    line.copy_from_slice(&row[part.clone()]);
                    finish(line, pooled.map(|pooled| &pooled[part.clone()]), count, &mut to[part]);
                }
            }
        }
    }
}

/// Adds a token's share of its block's pooled gradient and writes the sum.
pub(crate) fn finish<E: Element>(row: &mut [E::Compute], pooled: Option<&[E::Compute]>, count: usize, to: &mut [E]) {
    if let Some(pooled) = pooled {
        let share = E::Compute::from_f64(1.0 / count as f64);
        for (x, &p) in row.iter_mut().zip(pooled) {
            *x += share * p;
        }
    }
    E::narrow(row, to);
}
