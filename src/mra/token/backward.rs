//! Backward of the token form: the gradients of queries, keys and values in closed form.
//!
//! ```text
//! delta_t = <g_t, out_t> - dlse_t                                                    once per query
//! for each tile of queries:  p_tj = count_j exp(c_tj - lse_t)  of open blocks that are not exact for t
//!     dC = p (<g_t, vh_j> - delta_t)      dq_t += scale dC kh_j   dkh_j += scale dC q_t   dvh_j += p g_t
//! for each exact block, for the queries that compute it:              the same with its keys and values
//! dk_s += dkh_j / count_j             dv_s likewise
//! ```
//!
//! Where there are enough groups of heads for the threads, a task is a group and computes all of it in one pass: 5 products.
//! Otherwise ranges of queries give dq, then blocks of keys dk and dv: 7 products. Both give the same bits, because every sum
//! is in the same order and in the same pieces. Several levels have a way of their own, in one pass for any number of groups (pieces).

use std::ops::Range;

use super::backward_range::{BlockBuffers, GroupSums, Scratch};
use super::coarse::matrix;
use super::forward::{RANGE_QUERIES, range_for_threads};
use super::gradient::GradientTile;
use super::levels::{LevelOfRange, TokenLevel, Wanted, candidates, levels};
use super::queries_of_block::QueriesOfBlocks;
use crate::exec::{Buffer, Chunks, threads};
use crate::kernels::AllFinite;
use crate::mra::attend::{KeySource, KeySums, QueryTerms, TILE_QUERIES, nth_tile};
use crate::mra::block::one_pass;
use crate::mra::inputs::{Gradients, Inputs};
use crate::mra::problem::{Batch, Mode, Problem};
use crate::mra::query_terms::{KeyAndValue, finish_keys};
use crate::simd::{Element, Scalar};
use crate::tensor::{Rows, Tensor};

/// Computes the gradients of the segments of this form. Shapes are those of the problem.
pub(crate) fn backward<E: Element>(
    problem: &Problem<'_>,
    batch: &Batch<'_>,
    inputs: &Inputs<'_, E>,
    grad_out: &Tensor<'_, E>,
    terms: &[QueryTerms<E::Compute>],
    plan: &[u8],
    gradients: &Gradients<'_, E>,
) {
    let pass = Pass::new(problem, batch, inputs, grad_out, terms, plan, gradients);
    let everything = problem.is_everything();
    let exact = batch.segments.iter().map(|segment| {
        let blocks = if everything { segment.keys.len() } else { problem.plan_width(segment) };
        segment.rows.tokens().len().saturating_mul(blocks * problem.block_size)
    });
    let products = exact.fold(candidates(&pass.levels), usize::saturating_add).saturating_mul(3 * problem.heads);
    let threads = problem.threads_for(products.saturating_mul(problem.head_dim + pass.value_dim));
    if pass.levels.len() > 1 {
        pass.by_pieces(threads);
    } else if one_pass(batch.groups(), threads) {
        pass.by_groups(threads);
    } else {
        pass.by_ranges(threads);
        pass.by_blocks(threads);
    }
}

/// Whether the means of each block of keys of a level, and of its values, are finite.
fn finite_means<T: Scalar>(TokenLevel { problem, batch, means }: &TokenLevel<'_, T>) -> Vec<bool> {
    let Some(means) = means else { return Vec::new() };
    let is_finite = |rows: Rows<'_, T>, block: usize| T::run(problem.level, AllFinite(matrix(&rows, block..block + 1)));
    let columns = (0..batch.columns()).map(|index| {
        let (group, block) = batch.column_at(index);
        is_finite(means.keys(batch, group), block) && means.values(batch, group).is_none_or(|values| is_finite(values, block))
    });
    columns.collect()
}

/// One call.
pub(crate) struct Pass<'a, 'g, E: Element> {
    pub(crate) problem: &'a Problem<'a>,
    pub(crate) batch: &'a Batch<'a>,
    pub(crate) inputs: &'a Inputs<'a, E>,
    pub(crate) grad_out: &'a Tensor<'a, E>,
    pub(crate) terms: &'a [QueryTerms<E::Compute>],
    pub(crate) plan: &'a [u8],
    pub(crate) levels: Vec<TokenLevel<'a, E::Compute>>,
    /// For each level whether the means of a block of keys and of its values are finite, by flat index.
    pub(crate) finite_means: Vec<Vec<bool>>,
    pub(crate) gradients: &'a Gradients<'g, E>,
    pub(crate) value_dim: usize,
}

impl<'a, 'g, E: Element> Pass<'a, 'g, E> {
    pub(crate) fn new(
        problem: &'a Problem<'a>,
        batch: &'a Batch<'a>,
        inputs: &'a Inputs<'a, E>,
        grad_out: &'a Tensor<'a, E>,
        terms: &'a [QueryTerms<E::Compute>],
        plan: &'a [u8],
        gradients: &'a Gradients<'g, E>,
    ) -> Self {
        let wanted = if problem.mode == Mode::Full { Wanted::KeysAndValues } else { Wanted::Nothing };
        let levels = levels(problem, inputs, None, wanted);
        let finite_means = levels.iter().map(finite_means).collect();
        let value_dim = inputs.value.shape()[3];
        Self { problem, batch, inputs, grad_out, terms, plan, levels, finite_means, gradients, value_dim }
    }

    /// One task for each group of heads that share keys: all gradients in one pass.
    fn by_groups(&self, threads: usize) {
        let batch = self.batch;
        let (key_width, value_width) = self.widths();
        let of = |rows| (Buffer::scratch(rows * key_width), Buffer::scratch(rows * value_width));
        let pooled = |level: &TokenLevel<'_, E::Compute>| of(level.means.as_ref().map_or(0, |_| level.batch.most_columns()));
        let scratch = || (self.scratch(), of(batch.most_keys()), self.levels.iter().map(pooled).collect::<Vec<_>>());
        threads::for_each(threads, batch.groups(), scratch, |(scratch, sums, pooled), group| {
            for buffer in [&mut *sums].into_iter().chain(&mut *pooled).flat_map(|(dk, dv)| [dk, dv]) {
                buffer.fill(E::Compute::ZERO);
            }
            let mut sums = GroupSums {
                exact: KeySums { dk: &mut sums.0, dv: &mut sums.1, first: 0 },
                pooled: pooled.iter_mut().map(|(dk, dv)| KeySums { dk, dv, first: 0 }).collect(),
            };
            for head in batch.heads_of(group) {
                for range in batch.segment(head).ranges(RANGE_QUERIES) {
                    // SAFETY: each task has its own heads.
                    unsafe { self.range(head, range, scratch, Some(&mut sums)) };
                }
            }
            let of_means = sums.pooled.first().filter(|_| self.levels[0].means.is_some());
            for block in 0..batch.segment_of_group(group).keys.len() {
                let pooled = of_means.map(|sums| pooled_row(sums, block, key_width, value_width));
                // SAFETY: each task has its own group of heads.
                unsafe { finish_keys(self.problem, batch, self.gradients, (group, block), &sums.exact, pooled) };
            }
        });
    }

    /// One task for each range of queries: dq.
    fn by_ranges(&self, threads: usize) {
        let size = range_for_threads(self.problem, threads);
        let mut tasks: Vec<(usize, Range<usize>)> = Vec::new();
        for head in 0..self.batch.flat_heads() {
            let first = tasks.len();
            tasks.extend(self.batch.segment(head).ranges(size).map(|range| (head, range)));
            tasks[first..].reverse();
        }
        threads::for_each(
            threads,
            tasks.len(),
            || self.scratch(),
            |scratch, task| {
                let (head, range) = tasks[task].clone();
                // SAFETY: each task has its own queries.
                unsafe { self.range(head, range, scratch, None) };
            },
        );
    }

    /// One task for each block of keys: dk and dv.
    fn by_blocks(&self, threads: usize) {
        let (problem, batch, (key_width, value_width)) = (self.problem, self.batch, self.widths());
        let pooled = self.pooled_by_blocks(threads);
        let ranges: Vec<(usize, Range<usize>)> = (0..batch.flat_heads())
            .flat_map(|head| batch.segment(head).ranges(RANGE_QUERIES).map(move |range| (head, range)))
            .collect();
        let lists = self.all_lists(threads, &ranges);
        let scratch = || {
            let of = |width| Buffer::scratch(problem.block_size * width);
            (self.scratch(), of(key_width), of(value_width))
        };
        threads::for_each(threads, batch.columns(), scratch, |(scratch, dk, dv), task| {
            let (group, block) = batch.column_at(task);
            let source = self.source(group);
            let first = source.numbers(block).start;
            dk.fill(E::Compute::ZERO);
            dv.fill(E::Compute::ZERO);
            let heads = batch.heads_of(group);
            let start = ranges.partition_point(|&(head, _)| head < heads.start);
            let end = ranges.partition_point(|&(head, _)| head < heads.end);
            for ((head, range), lists) in ranges[start..end].iter().zip(&lists[start..end]) {
                let Some(place) = lists.find(block) else { continue };
                let Scratch { tiles, rows, keys, bias, levels, .. } = &mut *scratch;
                self.see(*head, range, levels);
                let range = self.query_range(0, *head, range.clone(), &levels[0]);
                self.fill(&range, lists.all_of(place), rows);
                let mut sums = KeySums { dk: &mut *dk, dv: &mut *dv, first };
                let buffers = BlockBuffers { tile: &mut tiles[0], keys, bias };
                self.exact(&range, rows, lists, place, &source, buffers, |tile, queries, keys| {
                    GradientTile::prefetch(rows, None, queries.next);
                    tile.add(rows, queries.queries, keys, Some(&mut sums), None);
                });
            }
            let pooled = pooled.as_ref().map(|(pooled_dk, pooled_dv)| {
                (&pooled_dk[task * key_width..][..key_width], &pooled_dv[task * value_width..][..value_width])
            });
            // SAFETY: each task has its own block of keys.
            unsafe { finish_keys(problem, batch, self.gradients, (group, block), &KeySums { dk, dv, first }, pooled) };
        });
    }

    /// The gradients of pooled keys and values, one task for each few of them.
    fn pooled_by_blocks(&self, threads: usize) -> Option<KeyAndValue<Buffer<E::Compute>>> {
        self.levels[0].means.as_ref()?;
        let (batch, (key_width, value_width)) = (self.batch, self.widths());
        let (mut all_dk, mut all_dv) = (
            Buffer::<E::Compute>::scratch(batch.columns() * key_width),
            Buffer::<E::Compute>::scratch(batch.columns() * value_width),
        );
        let (to_dk, to_dv) = (Chunks::new(&mut all_dk, key_width), Chunks::new(&mut all_dv, value_width));
        let tasks: Vec<(usize, usize)> = (0..batch.groups())
            .flat_map(|group| {
                (0..batch.segment_of_group(group).keys.len().div_ceil(TILE_QUERIES)).map(move |part| (group, part))
            })
            .collect();
        let scratch = || {
            let of = |width| Buffer::scratch(TILE_QUERIES * width);
            (self.scratch(), of(key_width), of(value_width))
        };
        threads::for_each(threads, tasks.len(), scratch, |(scratch, dk, dv), task| {
            let (group, part) = tasks[task];
            let blocks = nth_tile(part, batch.segment_of_group(group).keys.len());
            dk.fill(E::Compute::ZERO);
            dv.fill(E::Compute::ZERO);
            for head in batch.heads_of(group) {
                for tokens in batch.segment(head).ranges(RANGE_QUERIES) {
                    let Scratch { tiles, rows, levels, numbers, .. } = &mut *scratch;
                    self.see(head, &tokens, levels);
                    let range = self.query_range(0, head, tokens, &levels[0]);
                    self.fill(&range, &numbers[..range.tokens.len()], rows);
                    let mut sums = KeySums { dk: &mut *dk, dv: &mut *dv, first: blocks.start };
                    self.coarse(&range, rows, numbers, &blocks, &mut tiles[0], |tile, queries, keys| {
                        tile.add(rows, queries, keys, Some(&mut sums), None);
                    });
                }
            }
            for (row, block) in blocks.enumerate() {
                // SAFETY: each task has its own blocks.
                unsafe {
                    to_dk.get_mut(batch.column(group, block)).copy_from_slice(&dk[row * key_width..][..key_width]);
                    to_dv.get_mut(batch.column(group, block)).copy_from_slice(&dv[row * value_width..][..value_width]);
                }
            }
        });
        Some((all_dk, all_dv))
    }

    /// The lists of these ranges.
    fn all_lists(&self, threads: usize, ranges: &[(usize, Range<usize>)]) -> Vec<QueriesOfBlocks> {
        let mut lists: Vec<QueriesOfBlocks> = ranges.iter().map(|_| QueriesOfBlocks::default()).collect();
        let chunks = Chunks::new(&mut lists, 1);
        let scratch = || [LevelOfRange::default()];
        threads::for_each(threads, ranges.len(), scratch, |levels, task| {
            let (head, range) = ranges[task].clone();
            self.see(head, &range, levels);
            let range = self.query_range(0, head, range, &levels[0]);
            // SAFETY: each task has its own lists.
            let lists = unsafe { &mut chunks.get_mut(task)[0] };
            lists.build(range.segment.keys.len(), range.sights, range.plan, range.width);
        });
        lists
    }

    /// Channels of keys and values, rounded up to whole vectors.
    pub(crate) fn widths(&self) -> (usize, usize) {
        (self.problem.padded::<E::Compute>(self.problem.head_dim), self.problem.padded::<E::Compute>(self.value_dim))
    }

    /// The terms of the queries of a flat head, by token.
    pub(crate) fn terms_of(&self, head: usize) -> &'a [QueryTerms<E::Compute>] {
        let (item, head_of_item) = self.batch.item_and_head(head);
        let length = self.problem.query_len;
        &self.terms[(item * self.problem.heads + head_of_item) * length..][..length]
    }

    /// The keys and values of a group of heads.
    pub(crate) fn source(&self, group: usize) -> KeySource<'_, E> {
        let (item, kv_head) = self.batch.item_and_kv_head(group);
        let (keys, values) = (self.inputs.key.head(item, kv_head), self.inputs.value.head(item, kv_head));
        KeySource::new(self.problem, keys, values, &self.batch.segment_of_group(group).keys)
    }
}

/// The gradients of the means of a block.
fn pooled_row<'s, T>(sums: &'s KeySums<'_, T>, block: usize, key_width: usize, value_width: usize) -> KeyAndValue<&'s [T]> {
    (&sums.dk[block * key_width..][..key_width], &sums.dv[block * value_width..][..value_width])
}
