//! Backward of the causal form: the gradients of queries, keys and values in closed form.
//!
//! ```text
//! delta_t = <g_t, out_t> - dlse_t                                                    once per query
//! for each tile of queries:  p_tj = count_j exp(c_tj - lse_t)  of past blocks that are not exact for t
//!     dC = p (<g_t, vh_j> - delta_t)      dq_t += scale dC kh_j   dkh_j += scale dC q_t   dvh_j += p g_t
//! for each exact block, for the queries that have it in their plan:   the same with its keys and values
//! dk_s += dkh_j / count_j             dv_s likewise
//! ```
//!
//! Where there are enough groups of heads for the threads, a task is a group and computes all of it in one pass: 5 products.
//! Otherwise ranges of queries give dq, then blocks of keys dk and dv: 7 products. Both give the same bits, because every sum
//! is in the same order and in the same pieces.

use std::ops::Range;

use super::backward_range::{GroupSums, Scratch};
use super::forward::{RANGE_QUERIES, plan_width, range_for_threads};
use super::lists::BlockLists;
use super::pooled::Means;
use super::problem::CausalProblem;
use crate::error::Result;
use crate::mra::backward::{Gradients, QueryTerms, Saved, finish, one_pass, query_terms};
use crate::mra::forward::Inputs;
use crate::mra::gradient_tile::KeySums;
use crate::mra::problem::Mode;
use crate::mra::scratch::Buffer;
use crate::mra::strip::KeySource;
use crate::mra::tile::{TILE_QUERIES, nth_tile};
use crate::simd::{Element, Scalar};
use crate::tensor::Tensor;
use crate::threads;
use crate::tiles::Chunks;

/// Computes the gradients with respect to query, key and value, for the plan of forward.
///
/// Deterministic: the same bits for any number of threads.
///
/// # Errors
/// If a tensor does not have the shape of the problem; nothing is written then.
pub fn causal_backward<E: Element>(
    problem: &CausalProblem,
    inputs: &Inputs<'_, E>,
    saved: &Saved<'_, E>,
    plan: &[i32],
    gradients: &mut Gradients<'_, E>,
) -> Result<()> {
    let inner = &problem.inner;
    let value_dim = inputs.validate(inner)?;
    saved.validate(inner, value_dim)?;
    gradients.validate(inputs)?;
    let width = plan_width(problem, plan.len())?;
    let terms = query_terms(inner, saved);
    let means = (inner.mode == Mode::Full).then(|| Means::new(problem, inputs, None, true)).transpose()?;
    let pass = Pass { problem, inputs, grad_out: &saved.grad_out, terms: &terms, plan, width, means, gradients, value_dim };
    let keys = width * inner.block_size + inner.key_blocks();
    let products = inner.all_heads().saturating_mul(inner.query_len).saturating_mul(keys).saturating_mul(3);
    let threads = inner.threads_for(products.saturating_mul(inner.head_dim + value_dim));
    if one_pass(inner.batch * inner.kv_heads, threads) {
        pass.by_groups(threads);
    } else {
        pass.by_ranges(threads);
        pass.by_blocks(threads);
    }
    Ok(())
}

/// What there is of keys and of values.
type KeyAndValue<R> = (R, R);

/// One call.
pub(crate) struct Pass<'a, 'g, E: Element> {
    pub(crate) problem: &'a CausalProblem,
    pub(crate) inputs: &'a Inputs<'a, E>,
    pub(crate) grad_out: &'a Tensor<'a, E>,
    pub(crate) terms: &'a [QueryTerms<E::Compute>],
    pub(crate) plan: &'a [i32],
    pub(crate) width: usize,
    pub(crate) means: Option<Means<'a, E::Compute>>,
    pub(crate) gradients: &'a Gradients<'g, E>,
    pub(crate) value_dim: usize,
}

impl<E: Element> Pass<'_, '_, E> {
    /// One task for each group of heads that share keys: all gradients in one pass.
    fn by_groups(&self, threads: usize) {
        let inner = &self.problem.inner;
        let (key_width, value_width) = self.widths();
        let pooled = if self.means.is_some() { inner.key_blocks() } else { 0 };
        let scratch = || {
            let of = |rows| (Buffer::scratch(rows * key_width), Buffer::scratch(rows * value_width));
            (self.scratch(), of(inner.key_len), of(pooled))
        };
        threads::for_each(threads, inner.batch * inner.kv_heads, scratch, |(scratch, sums, pooled), group| {
            for buffer in [&mut sums.0, &mut sums.1, &mut pooled.0, &mut pooled.1] {
                buffer.fill(E::Compute::ZERO);
            }
            let mut sums = GroupSums {
                exact: KeySums { dk: &mut sums.0, dv: &mut sums.1, first: 0 },
                pooled: KeySums { dk: &mut pooled.0, dv: &mut pooled.1, first: 0 },
            };
            for head in self.heads_of(group) {
                for range in self.ranges(RANGE_QUERIES) {
                    // SAFETY: each task has its own heads.
                    unsafe { self.range(head, range, scratch, Some(&mut sums)) };
                }
            }
            for block in 0..inner.key_blocks() {
                let pooled = self.means.is_some().then(|| pooled_row(&sums.pooled, block, key_width, value_width));
                // SAFETY: each task has its own group of heads.
                unsafe { self.finish_keys(group, block, &sums.exact, pooled) };
            }
        });
    }

    /// One task for each range of queries: dq.
    fn by_ranges(&self, threads: usize) {
        let heads = self.problem.inner.all_heads();
        let ranges: Vec<_> = self.ranges(range_for_threads(self.problem, threads)).collect();
        threads::for_each(
            threads,
            heads * ranges.len(),
            || self.scratch(),
            |scratch, task| {
                let (head, index) = (task / ranges.len(), ranges.len() - 1 - task % ranges.len());
                // SAFETY: each task has its own queries.
                unsafe { self.range(head, ranges[index].clone(), scratch, None) };
            },
        );
    }

    /// One task for each block of keys: dk and dv.
    fn by_blocks(&self, threads: usize) {
        let inner = &self.problem.inner;
        let (nk, groups, (key_width, value_width)) = (inner.key_blocks(), inner.batch * inner.kv_heads, self.widths());
        let pooled = self.pooled_by_blocks(threads);
        let ranges: Vec<_> = self.ranges(RANGE_QUERIES).collect();
        let lists = self.all_lists(threads, &ranges);
        let scratch = || {
            let of = |width| Buffer::scratch(inner.block_size * width);
            (self.scratch(), of(key_width), of(value_width))
        };
        threads::for_each(threads, groups * nk, scratch, |(scratch, dk, dv), task| {
            let (group, block) = (task % groups, task / groups);
            let source = self.source(group);
            let first = source.numbers(block).start;
            dk.fill(E::Compute::ZERO);
            dv.fill(E::Compute::ZERO);
            for head in self.heads_of(group) {
                for (index, range) in ranges.iter().enumerate() {
                    let lists = &lists[head * ranges.len() + index];
                    if block >= lists.blocks() || lists.of(block).is_empty() {
                        continue;
                    }
                    let Scratch { tile, rows, strip, sights, .. } = &mut *scratch;
                    let range = self.query_range(head, range.clone(), sights);
                    self.fill(&range, lists.of(block), rows);
                    let mut sums = KeySums { dk: &mut *dk, dv: &mut *dv, first };
                    self.exact(&range, rows, lists, block, &source, tile, strip, Some(&mut sums), None);
                }
            }
            let pooled = pooled.as_ref().map(|(pooled_dk, pooled_dv)| {
                let row = group * nk + block;
                (&pooled_dk[row * key_width..][..key_width], &pooled_dv[row * value_width..][..value_width])
            });
            // SAFETY: each task has its own block of keys.
            unsafe { self.finish_keys(group, block, &KeySums { dk, dv, first }, pooled) };
        });
    }

    /// The gradients of pooled keys and values, one task for each strip of them.
    fn pooled_by_blocks(&self, threads: usize) -> Option<KeyAndValue<Buffer<E::Compute>>> {
        self.means.as_ref()?;
        let inner = &self.problem.inner;
        let (nk, groups, (key_width, value_width)) = (inner.key_blocks(), inner.batch * inner.kv_heads, self.widths());
        let (mut all_dk, mut all_dv) =
            (Buffer::<E::Compute>::scratch(groups * nk * key_width), Buffer::<E::Compute>::scratch(groups * nk * value_width));
        let (to_dk, to_dv) = (Chunks::new(&mut all_dk, key_width), Chunks::new(&mut all_dv, value_width));
        let strips = nk.div_ceil(TILE_QUERIES);
        let scratch = || {
            let of = |width| Buffer::scratch(TILE_QUERIES * width);
            (self.scratch(), of(key_width), of(value_width))
        };
        threads::for_each(threads, groups * strips, scratch, |(scratch, dk, dv), task| {
            let (group, index) = (task % groups, task / groups);
            let blocks = nth_tile(index, nk);
            dk.fill(E::Compute::ZERO);
            dv.fill(E::Compute::ZERO);
            for head in self.heads_of(group) {
                for tokens in self.ranges(RANGE_QUERIES) {
                    let Scratch { tile, rows, sights, numbers, .. } = &mut *scratch;
                    let range = self.query_range(head, tokens, sights);
                    self.fill(&range, &numbers[..range.tokens.len()], rows);
                    let mut sums = KeySums { dk: &mut *dk, dv: &mut *dv, first: blocks.start };
                    self.coarse(&range, rows, numbers, &blocks, tile, Some(&mut sums), None);
                }
            }
            for (row, block) in blocks.enumerate() {
                // SAFETY: each task has its own blocks.
                unsafe {
                    to_dk.get_mut(group * nk + block).copy_from_slice(&dk[row * key_width..][..key_width]);
                    to_dv.get_mut(group * nk + block).copy_from_slice(&dv[row * value_width..][..value_width]);
                }
            }
        });
        Some((all_dk, all_dv))
    }

    /// The lists of every range of every head.
    fn all_lists(&self, threads: usize, ranges: &[Range<usize>]) -> Vec<BlockLists> {
        let heads = self.problem.inner.all_heads();
        let mut lists: Vec<BlockLists> = (0..heads * ranges.len()).map(|_| BlockLists::default()).collect();
        let chunks = Chunks::new(&mut lists, 1);
        threads::for_each(threads, heads * ranges.len(), Vec::new, |sights, task| {
            let range = self.query_range(task / ranges.len(), ranges[task % ranges.len()].clone(), sights);
            // SAFETY: each task has its own lists.
            let lists = unsafe { &mut chunks.get_mut(task)[0] };
            lists.build(range.blocks(), range.sights, range.plan, self.width);
        });
        lists
    }

    /// Channels of keys and values, rounded up to whole vectors.
    pub(crate) fn widths(&self) -> (usize, usize) {
        let inner = &self.problem.inner;
        (inner.padded::<E::Compute>(inner.head_dim), inner.padded::<E::Compute>(self.value_dim))
    }

    /// Ranges of queries. The sums of dk and dv depend on their size.
    fn ranges(&self, size: usize) -> impl Iterator<Item = Range<usize>> + use<E> {
        let length = self.problem.inner.query_len;
        (0..length).step_by(size).map(move |start| start..(start + size).min(length))
    }

    /// The keys and values of a group of heads.
    pub(crate) fn source(&self, group: usize) -> KeySource<'_, E> {
        let inner = &self.problem.inner;
        let (batch, kv_head) = (group / inner.kv_heads, group % inner.kv_heads);
        let (keys, values) = (self.inputs.key.head(batch, kv_head), self.inputs.value.head(batch, kv_head));
        KeySource::new(inner, keys, values, inner.keys(batch))
    }

    /// The query heads of a group, heads of all batch items numbered through.
    fn heads_of(&self, group: usize) -> Range<usize> {
        let size = self.problem.inner.group_size();
        group * size..(group + 1) * size
    }

    /// Writes dk and dv of a block of keys.
    ///
    /// # Safety
    /// - Nothing else holds the rows of this block in the gradients of keys and values.
    unsafe fn finish_keys(
        &self,
        group: usize,
        block: usize,
        sums: &KeySums<'_, E::Compute>,
        pooled: Option<KeyAndValue<&[E::Compute]>>,
    ) {
        let inner = &self.problem.inner;
        let (batch, kv_head) = (group / inner.kv_heads, group % inner.kv_heads);
        let (key_width, value_width) = self.widths();
        let (keys, count) = (inner.keys(batch), inner.keys(batch).count(block));
        let length = keys.start(keys.len());
        let outputs = [
            (&self.gradients.key, &*sums.dk, key_width, pooled.map(|(dk, _)| dk)),
            (&self.gradients.value, &*sums.dv, value_width, pooled.map(|(_, dv)| dv)),
        ];
        let tokens = block * inner.block_size..((block + 1) * inner.block_size).min(inner.key_len);
        let mut line = Buffer::scratch(key_width.max(value_width));
        for (output, rows, width, pooled) in outputs {
            for token in tokens.clone() {
                // SAFETY: the caller's.
                let to = unsafe { output.row_mut(batch, kv_head, token) };
                if token >= length {
                    to.fill(E::default());
                    continue;
                }
                let channels = to.len();
                line[..channels].copy_from_slice(&rows[(token - sums.first) * width..][..channels]);
                finish(&mut line[..channels], pooled.map(|pooled| &pooled[..channels]), count, to);
            }
        }
    }
}

/// The gradients of the means of a block.
fn pooled_row<'s, T>(sums: &'s KeySums<'_, T>, block: usize, key_width: usize, value_width: usize) -> KeyAndValue<&'s [T]> {
    (&sums.dk[block * key_width..][..key_width], &sums.dv[block * value_width..][..value_width])
}
