//! The coarse level of the block form: attention among pooled tokens, without the selected blocks.
//!
//! It is the same softmax as the exact one, over pooled keys, with two differences: a pooled key stands for as many keys
//! as its block has valid ones, so the logarithm of that count is added to its logits; and where a block is selected its logit
//! is `-inf`. A bias adds its mean.

use std::ops::Range;

use crate::error::Result;
use crate::exec::{Buffer, Chunks, threads};
use crate::kernels::Stream;
use crate::mra::attend::{Attend, KeyBatch, KeySource, StartState, TILE_QUERIES, coarse_tile_columns, nth_tile};
use crate::mra::for_parts;
use crate::mra::problem::{Batch, Blocks, Problem};
use crate::mra::pyramid::{Pooled, Pyramid};
use crate::mra::select::{BlockPlan, Scores, add_mean_bias, select_rows, select_rows_then, selected};
use crate::mra::weigh;
use crate::simd::Scalar;

/// What the unselected blocks add to the softmax of each block of queries. It is the same for every query of a block.
pub(crate) struct Coarse<T> {
    /// For each block of queries its largest logit, its sum of weights, and its sums of values.
    pub(super) states: Buffer<T>,
    /// Numbers of a state.
    pub(super) row: usize,
}

impl<T: Scalar> Coarse<T> {
    /// Attends from every pooled query to the pooled keys of the blocks that its block has not selected.
    pub(crate) fn new(
        problem: &Problem<'_>,
        batch: &Batch<'_>,
        plan: &BlockPlan,
        pyramid: &Pyramid<T>,
        values: &Pooled<T>,
    ) -> Self {
        let mut coarse = Self::unset(batch, values);
        let level = CoarseLevel::new(problem, batch, pyramid, values, &mut coarse);
        let tiles: Vec<(usize, usize)> = (0..batch.flat_heads())
            .flat_map(|head| (0..batch.segment(head).rows.len().div_ceil(TILE_QUERIES)).map(move |tile| (head, tile)))
            .collect();
        let threads = problem.threads_for(problem.heads * batch.pairs_of_blocks() * 2 * problem.head_dim);
        threads::for_each(
            threads,
            tiles.len(),
            || level.buffers(),
            |buffers, task| {
                let (head, tile) = tiles[task];
                // SAFETY: each task has its own rows.
                unsafe {
                    level.attend(buffers, head, tile, None, |logits, columns, rows, blocks| {
                        adjust(problem, batch, plan, head, rows, blocks, logits, columns);
                    });
                }
            },
        );
        coarse
    }

    /// Selects blocks, which it writes to `bytes`, and attends to the others. Returns the plan as well.
    ///
    /// # Errors
    /// As [`select_rows`].
    pub(crate) fn selecting(
        problem: &Problem<'_>,
        batch: &Batch<'_>,
        pyramid: &Pyramid<T>,
        values: &Pooled<T>,
        bytes: &mut [u8],
    ) -> Result<(Self, BlockPlan)> {
        if batch.flat_heads() < problem.threads {
            // A head is selected by one thread, but its coarse level can be shared: worth more than to keep its scores.
            select_rows(problem, batch, pyramid, bytes)?;
            let plan = BlockPlan::read(problem, batch, bytes);
            return Ok((Self::new(problem, batch, &plan, pyramid, values), plan));
        }
        let mut coarse = Self::unset(batch, values);
        coarse.select(problem, batch, 0..batch.flat_heads(), pyramid, values, bytes)?;
        Ok((coarse, BlockPlan::read(problem, batch, bytes)))
    }

    /// As [`Self::selecting`], for some flat heads.
    ///
    /// # Errors
    /// As [`select_rows`].
    pub(super) fn select(
        &mut self,
        problem: &Problem<'_>,
        batch: &Batch<'_>,
        heads: Range<usize>,
        pyramid: &Pyramid<T>,
        values: &Pooled<T>,
        bytes: &mut [u8],
    ) -> Result<()> {
        let level = CoarseLevel::new(problem, batch, pyramid, values, self);
        let then = |buffers: &mut CoarseBuffers<T>, head: usize, scores: &Scores<T>, bits: &[u8]| {
            let keys = &batch.segment(head).keys;
            for tile in 0..scores.tiles() {
                // SAFETY: each head is given to this function once, and its tiles have their own rows.
                unsafe {
                    level.attend(buffers, head, tile, Some(scores), |logits, columns, rows, blocks| {
                        weigh(logits, columns, keys, blocks.clone(), problem.coarse_shift);
                        let selected = |i| selected(bits, i, keys.len(), blocks.clone());
                        exclude(logits, columns, rows, blocks.start, selected);
                    });
                }
            }
        };
        select_rows_then(problem, batch, heads, pyramid, bytes, || level.buffers(), then)
    }

    /// Before it is written.
    pub(super) fn unset(batch: &Batch<'_>, values: &Pooled<T>) -> Self {
        let row = values.width + 2;
        Self { states: Buffer::scratch(batch.rows() * row), row }
    }

    /// The state of a block of queries of a flat head.
    pub(crate) fn state(&self, batch: &Batch<'_>, head: usize, i: usize) -> StartState<'_, T> {
        let state = &self.states[batch.row(head, i) * self.row..][..self.row];
        StartState { maximum: state[0], sum: state[1], values: &state[2..] }
    }
}

/// What all tiles of the coarse level share.
struct CoarseLevel<'a, T> {
    problem: &'a Problem<'a>,
    batch: &'a Batch<'a>,
    pyramid: &'a Pyramid<T>,
    values: &'a Pooled<T>,
    /// For each sequence, its pooled keys as tokens.
    pooled_keys: Vec<Blocks>,
    states: Chunks<'a, T>,
}

/// What a thread reuses from tile to tile.
type CoarseBuffers<T> = (Attend<T>, KeyBatch<T>);

impl<'a, T: Scalar> CoarseLevel<'a, T> {
    fn new(
        problem: &'a Problem<'a>,
        batch: &'a Batch<'a>,
        pyramid: &'a Pyramid<T>,
        values: &'a Pooled<T>,
        coarse: &'a mut Coarse<T>,
    ) -> Self {
        let states = Chunks::new(&mut coarse.states, coarse.row);
        Self { problem, batch, pyramid, values, pooled_keys: pooled_keys(batch), states }
    }

    fn buffers(&self) -> CoarseBuffers<T> {
        let (problem, width) = (self.problem, self.values.width);
        let columns = coarse_tile_columns::<T>(problem);
        (Attend::new(problem, columns, width), KeyBatch::new(problem, self.pyramid.keys.width, width))
    }

    /// Attends from a tile of blocks of queries, with the scores of the head if they are there; `adjust` makes the logits, one row
    /// of lanes for each of some blocks, those of the coarse level.
    ///
    /// # Safety
    /// - Nothing else holds the states of this tile.
    unsafe fn attend(
        &self,
        (attend, keys): &mut CoarseBuffers<T>,
        head: usize,
        tile: usize,
        scores: Option<&Scores<T>>,
        adjust: impl Fn(&mut [T], usize, Range<usize>, Range<usize>),
    ) {
        let (problem, batch, group) = (self.problem, self.batch, self.batch.group(head));
        let all = &self.pooled_keys[head / problem.heads];
        let (key_means, value_means) = (self.pyramid.keys.of_group(batch, group), self.values.of_group(batch, group));
        let source = KeySource::new(problem, key_means, value_means, all);
        let rows = nth_tile(tile, batch.segment(head).rows.len());
        let pooled = self.pyramid.queries.of_head(batch, head);
        attend.start(rows.clone().map(|i| &pooled.row(i)[..problem.head_dim]), None);
        attend.number_queries(Stream::Coarse, batch.dropout_head(head), rows.clone());
        for_parts(all.total(), KeyBatch::<T>::capacity(problem), |blocks| {
            keys.clear();
            keys.push(&source, blocks.clone());
            let columns = attend.columns;
            attend.attend(keys, &source, &[], scores.map(|scores| scores.tile(tile, blocks.clone())), |logits| {
                adjust(logits, columns, rows.clone(), blocks);
            });
        });
        for (query, i) in rows.enumerate() {
            // SAFETY: the caller's.
            write_state(attend, query, unsafe { self.states.get_mut(batch.row(head, i)) });
        }
    }
}

/// Writes the softmax of one query of a tile.
pub(super) fn write_state<T: Scalar>(attend: &Attend<T>, query: usize, state: &mut [T]) {
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

/// For each sequence, its pooled keys as tokens.
pub(crate) fn pooled_keys(batch: &Batch<'_>) -> Vec<Blocks> {
    batch.segments.iter().map(|segment| Blocks::all(0..segment.keys.len(), 1)).collect()
}

/// Makes the logits of pooled keys, one row of `columns` for each of `blocks`, those of the coarse level: one lane for each of
/// the blocks of queries `rows`.
#[allow(clippy::too_many_arguments, reason = "a place in the matrix of blocks, and its logits")]
pub(crate) fn adjust<T: Scalar>(
    problem: &Problem<'_>,
    batch: &Batch<'_>,
    plan: &BlockPlan,
    head: usize,
    rows: Range<usize>,
    blocks: Range<usize>,
    logits: &mut [T],
    columns: usize,
) {
    let segment = batch.segment(head);
    add_mean_bias(problem, segment, head % problem.heads, rows.clone(), blocks.clone(), logits, columns);
    weigh(logits, columns, &segment.keys, blocks.clone(), problem.coarse_shift);
    exclude_selected(batch, plan, head, rows, blocks, logits, columns);
}

/// Sets the logits of selected blocks to `-inf`, among those of `blocks` and `rows`.
pub(crate) fn exclude_selected<T: Scalar>(
    batch: &Batch<'_>,
    plan: &BlockPlan,
    head: usize,
    rows: Range<usize>,
    blocks: Range<usize>,
    logits: &mut [T],
    columns: usize,
) {
    exclude(logits, columns, rows, blocks.start, |i| {
        let selected = plan.row(batch, head, i);
        let first = selected.partition_point(|&j| (j as usize) < blocks.start);
        selected[first..].iter().map(|&j| j as usize).take_while(|&j| j < blocks.end)
    });
}

/// Sets the logits of selected blocks to `-inf`. `selected` gives those of a row from `first` on, the block of the first logits.
fn exclude<T: Scalar, I: Iterator<Item = usize>>(
    logits: &mut [T],
    columns: usize,
    rows: Range<usize>,
    first: usize,
    selected: impl Fn(usize) -> I,
) {
    for (column, i) in rows.enumerate() {
        for j in selected(i) {
            logits[(j - first) * columns + column] = T::NEG_INFINITY;
        }
    }
}
