//! The coarse level: attention among pooled tokens, without the selected blocks.
//!
//! It is the same softmax as the exact one, over pooled keys, with two differences: a pooled key stands for as many keys
//! as its block has valid ones, so the logarithm of that count is added to its logits; and where a block is selected its logit
//! is `-inf`. A bias adds its mean, and hides what it hides: see [`adjust`].

use std::ops::Range;

use super::attend::Attend;
use super::bias::Kind;
use super::blocks::Blocks;
use super::plan::Plan;
use super::problem::Problem;
use super::pyramid::Pooled;
use super::scratch::Buffer;
use super::strip::{KeySource, Strip};
use super::tile::{TILE_QUERIES, coarse_tile_columns};
use crate::kernels::Stream;
use crate::simd::Scalar;
use crate::threads;
use crate::tiles::Chunks;

/// What the unselected blocks add to the softmax of each block of queries. It is the same for every query of a block.
pub(crate) struct Coarse<T> {
    states: Buffer<T>,
    row: usize,
    blocks: usize,
}

/// The state of a running softmax: as in [`Attend`], for one block of queries.
pub(crate) struct CoarseState<'a, T> {
    pub(crate) maximum: T,
    pub(crate) sum: T,
    pub(crate) values: &'a [T],
}

impl<T: Scalar> Coarse<T> {
    /// Attends from every pooled query to the pooled keys of the blocks that its block has not selected.
    pub(crate) fn new(
        problem: &Problem<'_>,
        plan: &Plan,
        queries: &Pooled<T>,
        keys: &Pooled<T>,
        values: &Pooled<T>,
        guard: bool,
    ) -> Self {
        let (nq, nk) = (problem.query_blocks(), problem.key_blocks());
        let row = values.width + 2;
        let mut states = Buffer::scratch(problem.all_heads() * nq * row);
        let tiles = nq.div_ceil(TILE_QUERIES);
        let chunks = Chunks::new(&mut states, row);
        let threads = problem.threads_for(problem.all_heads() * nq * nk * 2 * problem.head_dim);
        let scratch = || {
            (
                Attend::<T>::new(problem, coarse_tile_columns::<T>(problem), values.width, guard),
                Strip::<T>::new(problem, keys.width, values.width),
            )
        };
        threads::for_each(threads, problem.all_heads() * tiles, scratch, |(attend, strip), task| {
            let (head, tile) = (task / tiles, task % tiles);
            let kv = problem.kv_row(head);
            let all = Blocks::new(nk, 1);
            let source = KeySource::new(problem, keys.head(kv), values.head(kv), &all);
            let rows = tile * TILE_QUERIES..((tile + 1) * TILE_QUERIES).min(nq);
            let pooled = queries.head(head);
            attend.start(rows.clone().map(|i| &pooled.row(i)[..problem.head_dim]));
            attend.number_queries(Stream::Coarse, head, rows.clone());
            for_strips(nk, Strip::<T>::capacity(problem), |blocks| {
                strip.clear();
                strip.push(&source, blocks.clone());
                let columns = attend.columns;
                attend.strip(strip, &source, &[], |logits| {
                    adjust(problem, plan, head, rows.clone(), blocks, logits, columns);
                });
            });
            for (query, i) in rows.enumerate() {
                // SAFETY: each task has its own rows.
                let state = unsafe { chunks.get_mut(head * nq + i) };
                state[0] = attend.maximum[query];
                state[1] = attend.sum[query];
                let values = &attend.values[query * attend.width..][..attend.width];
                if attend.sum[query] == T::ZERO {
                    // Everything is selected. The sums may be NaN: weight 0 times a pooled infinity.
                    state[2..].fill(T::ZERO);
                } else {
                    state[2..].copy_from_slice(values);
                }
            }
        });
        Self { states, row, blocks: nq }
    }

    /// The state of a block of queries. Heads of all batch items are numbered through.
    pub(crate) fn state(&self, head: usize, i: usize) -> CoarseState<'_, T> {
        let state = &self.states[(head * self.blocks + i) * self.row..][..self.row];
        CoarseState { maximum: state[0], sum: state[1], values: &state[2..] }
    }
}

/// Calls `body` with consecutive ranges of at most `most` out of `0..len`.
pub(crate) fn for_strips(len: usize, most: usize, mut body: impl FnMut(Range<usize>)) {
    (0..len).step_by(most).for_each(|start| body(start..(start + most).min(len)));
}

/// Makes the logits of pooled keys, one row of `columns` for each of `blocks`, those of the coarse level: one lane for each of
/// the query blocks `rows`.
pub(crate) fn adjust<T: Scalar>(
    problem: &Problem<'_>,
    plan: &Plan,
    head: usize,
    rows: Range<usize>,
    blocks: Range<usize>,
    logits: &mut [T],
    columns: usize,
) {
    weigh(logits, columns, problem.keys(head / problem.heads), blocks.clone());
    if let Some(pairs) = &problem.pairs {
        let (pairs, additive) = (pairs.head(head), !pairs.is_mask());
        for (column, i) in rows.clone().enumerate() {
            for (row, (j, kind)) in blocks.clone().zip(&pairs.kinds(i)[blocks.clone()]).enumerate() {
                let logit = &mut logits[row * columns + column];
                match kind {
                    Kind::Open if additive => *logit += T::from_f64(pairs.mean(i, j)),
                    Kind::Open => {}
                    Kind::Cut | Kind::Dead => *logit = T::NEG_INFINITY,
                }
            }
        }
    }
    exclude(logits, columns, plan, head, rows, blocks);
}

/// Adds the logarithm of the number of valid keys to the logits of each pooled key; a block without any gets `-inf`.
pub(crate) fn weigh<T: Scalar>(logits: &mut [T], columns: usize, keys: &Blocks, blocks: Range<usize>) {
    let weight = |count: usize| T::from_f64((count as f64).ln());
    if let Some(count) = keys.count_of_each(blocks.clone()) {
        // As nearly always. A logarithm for each block would take as long as its dot products.
        let weight = weight(count);
        logits[..blocks.len() * columns].iter_mut().for_each(|logit| *logit += weight);
        return;
    }
    for (row, block) in logits.chunks_exact_mut(columns).zip(blocks) {
        let weight = weight(keys.count(block));
        for logit in row {
            *logit += weight;
        }
    }
}

/// Sets the logits of selected blocks to `-inf`.
fn exclude<T: Scalar>(logits: &mut [T], columns: usize, plan: &Plan, head: usize, rows: Range<usize>, blocks: Range<usize>) {
    for (column, i) in rows.enumerate() {
        let selected = plan.row(head, i);
        let first = selected.partition_point(|&j| (j as usize) < blocks.start);
        for &j in selected[first..].iter().take_while(|&&j| (j as usize) < blocks.end) {
            logits[(j as usize - blocks.start) * columns + column] = T::NEG_INFINITY;
        }
    }
}
