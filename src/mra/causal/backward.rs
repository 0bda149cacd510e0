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

use super::coarse::{STRIP_BLOCKS, TILE_QUERIES, blank, exclude, matrix, split};
use super::exact::{Meeting, for_meetings};
use super::forward::{RANGE_QUERIES, plan_width, range_for_threads};
use super::gradient::{GradientTile, RangeRows};
use super::lists::BlockLists;
use super::pooled::Means;
use super::problem::{CausalProblem, Sight};
use crate::error::Result;
use crate::kernels::{AllFinite, Matrix, Stream};
use crate::mra::backward::{Gradients, QueryTerms, Saved, finish, one_pass, query_terms};
use crate::mra::coarse::{for_strips, weigh};
use crate::mra::forward::Inputs;
use crate::mra::gradient_tile::KeySums;
use crate::mra::problem::Mode;
use crate::mra::scratch::Buffer;
use crate::mra::strip::{KeySource, Strip};
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

struct Pass<'a, 'g, E: Element> {
    problem: &'a CausalProblem,
    inputs: &'a Inputs<'a, E>,
    grad_out: &'a Tensor<'a, E>,
    terms: &'a [QueryTerms<E::Compute>],
    plan: &'a [i32],
    width: usize,
    means: Option<Means<'a, E::Compute>>,
    gradients: &'a Gradients<'g, E>,
    value_dim: usize,
}

/// A range of queries of a head, with what they see and what they have chosen.
struct QueryRange<'a> {
    /// Heads of all batch items are numbered through.
    head: usize,
    tokens: Range<usize>,
    sights: &'a [Sight],
    plan: &'a [i32],
}

/// What a thread reuses.
struct Scratch<T> {
    tile: GradientTile<T>,
    rows: RangeRows<T>,
    strip: Strip<T>,
    lists: BlockLists,
    sights: Vec<Sight>,
    /// The numbers of the queries of a range.
    numbers: Vec<u32>,
    /// The gradient of the queries of a range: a row of whole vectors for each.
    dq: Buffer<T>,
}

/// Sums of the gradients of all tokens of a group, and of all its pooled ones.
struct GroupSums<'a, T> {
    exact: KeySums<'a, T>,
    pooled: KeySums<'a, T>,
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
                let (index, head) = (ranges.len() - 1 - task / heads, task % heads);
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
    fn pooled_by_blocks(&self, threads: usize) -> Option<(Buffer<E::Compute>, Buffer<E::Compute>)> {
        self.means.as_ref()?;
        let inner = &self.problem.inner;
        let (nk, groups, (key_width, value_width)) = (inner.key_blocks(), inner.batch * inner.kv_heads, self.widths());
        let (mut all_dk, mut all_dv) =
            (Buffer::<E::Compute>::zeros(groups * nk * key_width), Buffer::<E::Compute>::zeros(groups * nk * value_width));
        let (to_dk, to_dv) = (Chunks::new(&mut all_dk, key_width), Chunks::new(&mut all_dv, value_width));
        let strips = nk.div_ceil(TILE_QUERIES);
        let scratch = || {
            let of = |width| Buffer::scratch(TILE_QUERIES * width);
            (self.scratch(), of(key_width), of(value_width))
        };
        threads::for_each(threads, groups * strips, scratch, |(scratch, dk, dv), task| {
            let (group, index) = (task % groups, task / groups);
            let blocks = index * TILE_QUERIES..((index + 1) * TILE_QUERIES).min(nk);
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
    fn widths(&self) -> (usize, usize) {
        let inner = &self.problem.inner;
        (inner.padded::<E::Compute>(inner.head_dim), inner.padded::<E::Compute>(self.value_dim))
    }

    /// Ranges of queries. The sums of dk and dv depend on their size.
    fn ranges(&self, size: usize) -> impl Iterator<Item = Range<usize>> + use<E> {
        let length = self.problem.inner.query_len;
        (0..length).step_by(size).map(move |start| start..(start + size).min(length))
    }

    fn scratch(&self) -> Scratch<E::Compute> {
        let (inner, (key_width, value_width)) = (&self.problem.inner, self.widths());
        let queries = inner.query_len.min(RANGE_QUERIES);
        Scratch {
            tile: GradientTile::new(self.problem, queries, STRIP_BLOCKS.max(inner.block_size), self.value_dim),
            rows: RangeRows::new(queries, key_width, value_width),
            strip: Strip::new(inner, inner.head_dim, self.value_dim),
            lists: BlockLists::default(),
            sights: Vec::with_capacity(queries),
            numbers: (0..u32::try_from(queries).expect("a size of a range")).collect(),
            dq: Buffer::scratch(queries * key_width),
        }
    }

    /// The keys and values of a group of heads.
    fn source(&self, group: usize) -> KeySource<'_, E> {
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

    fn query_range<'s>(&'s self, head: usize, tokens: Range<usize>, sights: &'s mut Vec<Sight>) -> QueryRange<'s> {
        let inner = &self.problem.inner;
        sights.clear();
        sights.extend(tokens.clone().map(|token| self.problem.sight(head / inner.heads, token)));
        let plan = &self.plan[(head * inner.query_len + tokens.start) * self.width..][..tokens.len() * self.width];
        QueryRange { head, tokens, sights, plan }
    }

    /// A range of queries: dq, and the sums for keys and values if wanted.
    ///
    /// # Safety
    /// - Nothing else holds the rows of these queries in the gradient of the queries.
    unsafe fn range(
        &self,
        head: usize,
        tokens: Range<usize>,
        scratch: &mut Scratch<E::Compute>,
        mut sums: Option<&mut GroupSums<'_, E::Compute>>,
    ) {
        let inner = &self.problem.inner;
        let Scratch { tile, rows, strip, lists, sights, numbers, dq } = scratch;
        let range = self.query_range(head, tokens, sights);
        self.fill(&range, &numbers[..range.tokens.len()], rows);
        let key_width = self.widths().0;
        dq[..range.tokens.len() * key_width].fill(E::Compute::ZERO);
        let blocks = range.blocks();
        let pooled = sums.as_mut().map(|sums| &mut sums.pooled);
        self.coarse(&range, rows, numbers, &(0..inner.key_blocks()), tile, pooled, Some(dq));
        lists.build(blocks, range.sights, range.plan, self.width);
        let source = self.source(inner.kv_row(head));
        for block in (0..blocks).filter(|&block| !lists.of(block).is_empty()) {
            let sums = sums.as_mut().map(|sums| &mut sums.exact);
            self.exact(&range, rows, lists, block, &source, tile, strip, sums, Some(dq));
        }
        for (query, token) in range.tokens.clone().enumerate() {
            // SAFETY: the caller's.
            let to = unsafe { self.gradients.query.row_mut(head / inner.heads, head % inner.heads, token) };
            E::narrow(&dq[query * key_width..][..to.len()], to);
        }
    }

    /// Copies the rows of some queries of a range.
    fn fill(&self, range: &QueryRange<'_>, numbers: &[u32], rows: &mut RangeRows<E::Compute>) {
        let (heads, head) = (self.problem.inner.heads, range.head);
        let (query, grad) =
            (self.inputs.query.head(head / heads, head % heads), self.grad_out.head(head / heads, head % heads));
        let terms = &self.terms[head * self.problem.inner.query_len..][range.tokens.clone()];
        rows.fill(range.tokens.len(), numbers, |number| {
            let token = range.tokens.start + number;
            (query.row(token), grad.row(token), terms[number])
        });
    }

    /// What some pooled keys and values contribute. `numbers` are those of the queries of the range.
    #[allow(clippy::too_many_arguments, reason = "queries, keys, the buffers, and what is wanted")]
    fn coarse(
        &self,
        range: &QueryRange<'_>,
        rows: &RangeRows<E::Compute>,
        numbers: &[u32],
        blocks: &Range<usize>,
        tile: &mut GradientTile<E::Compute>,
        mut sums: Option<&mut KeySums<'_, E::Compute>>,
        mut dq: Option<&mut Buffer<E::Compute>>,
    ) {
        let (inner, Some(means)) = (&self.problem.inner, &self.means) else { return };
        let (kv, batch) = (inner.kv_row(range.head), range.head / inner.heads);
        let (keys, Some(values)) = (means.keys(inner, kv), means.values(inner, kv)) else { return };
        let finite = |blocks: Range<usize>| {
            let finite = |means| E::Compute::run(inner.level, AllFinite(means));
            finite(matrix(&keys, blocks.clone())) && finite(matrix(&values, blocks))
        };
        for tokens in self.problem.cut(batch, range.tokens.clone(), TILE_QUERIES) {
            let mut rest = tokens.start - range.tokens.start..tokens.end - range.tokens.start;
            while !rest.is_empty() {
                let sights = &range.sights[rest.clone()];
                let past = sights[sights.len() - 1].past;
                // Gradient 0 times a mean that is no number is no number: queries only go together with blocks that all see.
                let count = match split(sights) {
                    Some(split) if !finite(sights[0].past..past) => split,
                    _ => sights.len(),
                };
                let queries = rest.start..rest.start + count;
                rest.start = queries.end;
                let sights = &range.sights[queries.clone()];
                let plan = &range.plan[queries.start * self.width..queries.end * self.width];
                let visible = blocks.start..blocks.end.min(sights[count - 1].past);
                if visible.is_empty() {
                    continue;
                }
                let numbers = &numbers[queries];
                tile.start(rows, numbers, Stream::Coarse, (range.head, range.tokens.start));
                for_strips(visible.len(), STRIP_BLOCKS, |part| {
                    let part = visible.start + part.start..visible.start + part.end;
                    let (keys, values) = (matrix(&keys, part.clone()), matrix(&values, part.clone()));
                    tile.add(
                        rows,
                        numbers,
                        keys,
                        values,
                        part.start,
                        sums.as_deref_mut(),
                        dq.as_deref_mut(),
                        |logits, columns| {
                            weigh(logits, columns, inner.keys(batch), part.clone());
                            blank(logits, columns, sights, part.clone());
                            exclude(logits, columns, sights, plan, self.width, part);
                        },
                    );
                });
            }
        }
    }

    /// What a block of keys and values contributes to the queries that have it in their plan, and they to it.
    #[allow(clippy::too_many_arguments, reason = "queries, keys, the buffers, and what is wanted")]
    fn exact(
        &self,
        range: &QueryRange<'_>,
        rows: &RangeRows<E::Compute>,
        lists: &BlockLists,
        block: usize,
        source: &KeySource<'_, E>,
        tile: &mut GradientTile<E::Compute>,
        strip: &mut Strip<E::Compute>,
        mut sums: Option<&mut KeySums<'_, E::Compute>>,
        mut dq: Option<&mut Buffer<E::Compute>>,
    ) {
        let (level, sights) = (self.problem.inner.level, range.sights);
        let numbers = source.numbers(block);
        // No key behind the last query that meets the block is read.
        let last = lists.of(block).last().map_or(0, |&query| sights[query as usize].keys);
        strip.clear();
        assert!(strip.push(source, numbers.start..numbers.end.min(last)), "an empty strip has room for a block");
        let Some(part) = strip.parts(source).next() else { return };
        for_meetings(lists, block, sights, numbers.start, numbers.len(), |meeting| {
            let mut meet = |meeting: &Meeting<'_>| {
                let (keys, values) = (part.keys.row_range(0..meeting.keys), part.values.row_range(0..meeting.keys));
                tile.start(rows, meeting.queries, Stream::Exact, (range.head, range.tokens.start));
                let (sums, dq) = (sums.as_deref_mut(), dq.as_deref_mut());
                tile.add(rows, meeting.queries, keys, values, numbers.start, sums, dq, |logits, columns| {
                    meeting.hide(logits, columns, sights, numbers.start);
                });
            };
            let finite = |matrix: Matrix<'_, E::Compute>| {
                E::Compute::run(level, AllFinite(matrix.row_range(meeting.hidden_from_some(sights, numbers.start))))
            };
            if !meeting.partly || (finite(part.keys) && finite(part.values)) {
                meet(&meeting);
            } else {
                // Gradient 0 times a key that is no number is no number.
                meeting.one_by_one(sights, numbers.start, |alone| meet(&alone));
            }
        });
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
        pooled: Option<(&[E::Compute], &[E::Compute])>,
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

impl QueryRange<'_> {
    /// Blocks of which some query of the range sees anything: `0..blocks`.
    fn blocks(&self) -> usize {
        self.sights.last().map_or(0, |sight| sight.blocks)
    }
}

/// The gradients of the means of a block.
fn pooled_row<'s, T>(sums: &'s KeySums<'_, T>, block: usize, key_width: usize, value_width: usize) -> (&'s [T], &'s [T]) {
    (&sums.dk[block * key_width..][..key_width], &sums.dv[block * value_width..][..value_width])
}
