//! The coarse level: attention among pooled tokens, without the selected blocks.
//!
//! It is the same softmax as the exact one, over pooled keys, with two differences: a pooled key stands for as many keys
//! as its block has valid ones, so the logarithm of that count is added to its logits; and where a block is selected its logit
//! is `-inf`. A bias adds its mean, and hides what it hides: see [`adjust`].

use std::ops::Range;

use super::attend::Attend;
use super::bias::Kind;
use super::blocks::Blocks;
use super::budget::Budget;
use super::plan::Plan;
use super::problem::Problem;
use super::pyramid::{Pooled, Pyramid};
use super::scores::Scores;
use super::scratch::Buffer;
use super::select::{select_blocks_from, select_then};
use super::strip::{KeySource, Strip};
use super::tile::{TILE_QUERIES, coarse_tile_columns, nth_tile};
use crate::error::Result;
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
    pub(crate) fn new(problem: &Problem<'_>, plan: &Plan, pyramid: &Pyramid<T>, values: &Pooled<T>, guard: bool) -> Self {
        let mut coarse = Self::zeros(problem, values);
        let tiles = coarse.blocks.div_ceil(TILE_QUERIES);
        let level = CoarseLevel::new(problem, pyramid, values, guard, &mut coarse);
        let work = problem.all_heads() * problem.query_blocks() * problem.key_blocks();
        let threads = problem.threads_for(work * 2 * problem.head_dim);
        threads::for_each(
            threads,
            problem.all_heads() * tiles,
            || level.buffers(),
            |buffers, task| {
                let (head, tile) = (task / tiles, task % tiles);
                // SAFETY: each task has its own rows.
                unsafe {
                    level.attend(buffers, head, tile, None, |logits, columns, rows, blocks| {
                        adjust(problem, plan, head, rows, blocks, logits, columns);
                    });
                }
            },
        );
        coarse
    }

    /// Selects blocks, which it writes to `bits` as [`select_blocks`](super::select_blocks) does, and attends to the others. Returns the
    /// plan as well.
    ///
    /// # Errors
    /// As `select_blocks`.
    pub(crate) fn selecting(
        problem: &Problem<'_>,
        pyramid: &Pyramid<T>,
        values: &Pooled<T>,
        guard: bool,
        budget: &Budget,
        bits: &mut [u8],
    ) -> Result<(Self, Plan)> {
        if problem.all_heads() < problem.threads || bits.is_empty() {
            // A head is selected by one thread, but its coarse level can be shared: worth more than to keep its scores.
            select_blocks_from(problem, pyramid, budget, bits)?;
            let plan = Plan::from_bits(problem, bits)?;
            return Ok((Self::new(problem, &plan, pyramid, values, guard), plan));
        }
        let mut coarse = Self::zeros(problem, values);
        let level = CoarseLevel::new(problem, pyramid, values, guard, &mut coarse);
        let then = |buffers: &mut CoarseBuffers<T>, head: usize, scores: &Scores<T>, bits: &[u8]| {
            let keys = problem.keys(head / problem.heads);
            for tile in 0..scores.tiles() {
                // SAFETY: each head is given to this function once, and its tiles have their own rows.
                unsafe {
                    level.attend(buffers, head, tile, Some(scores), |logits, columns, rows, blocks| {
                        weigh(logits, columns, keys, blocks.clone());
                        let selected = |i| Plan::selected(bits, i, problem.key_blocks(), blocks.clone());
                        exclude(logits, columns, rows, blocks.start, selected);
                    });
                }
            }
        };
        select_then(problem, pyramid, budget, bits, || level.buffers(), then)?;
        Ok((coarse, Plan::from_bits(problem, bits)?))
    }

    fn zeros(problem: &Problem<'_>, values: &Pooled<T>) -> Self {
        let (row, blocks) = (values.width + 2, problem.query_blocks());
        Self { states: Buffer::scratch(problem.all_heads() * blocks * row), row, blocks }
    }

    /// The state of a block of queries. Heads of all batch items are numbered through.
    pub(crate) fn state(&self, head: usize, i: usize) -> CoarseState<'_, T> {
        let state = &self.states[(head * self.blocks + i) * self.row..][..self.row];
        CoarseState { maximum: state[0], sum: state[1], values: &state[2..] }
    }
}

/// What all tiles of the coarse level share.
struct CoarseLevel<'a, T> {
    problem: &'a Problem<'a>,
    pyramid: &'a Pyramid<T>,
    values: &'a Pooled<T>,
    guard: bool,
    all: Blocks,
    states: Chunks<'a, T>,
}

/// What a thread reuses from tile to tile.
type CoarseBuffers<T> = (Attend<T>, Strip<T>);

impl<'a, T: Scalar> CoarseLevel<'a, T> {
    fn new(
        problem: &'a Problem<'a>,
        pyramid: &'a Pyramid<T>,
        values: &'a Pooled<T>,
        guard: bool,
        coarse: &'a mut Coarse<T>,
    ) -> Self {
        let states = Chunks::new(&mut coarse.states, coarse.row);
        Self { problem, pyramid, values, guard, all: Blocks::new(problem.key_blocks(), 1), states }
    }

    fn buffers(&self) -> CoarseBuffers<T> {
        let (problem, width) = (self.problem, self.values.width);
        (
            Attend::new(problem, coarse_tile_columns::<T>(problem), width, self.guard),
            Strip::new(problem, self.pyramid.keys.width, width),
        )
    }

    /// Attends from a tile of blocks of queries, with the scores of the head if they are there; `adjust` makes the logits, one row
    /// of lanes for each of some blocks, those of the coarse level.
    ///
    /// # Safety
    /// - Nothing else holds the states of this tile.
    unsafe fn attend(
        &self,
        (attend, strip): &mut CoarseBuffers<T>,
        head: usize,
        tile: usize,
        scores: Option<&Scores<T>>,
        adjust: impl Fn(&mut [T], usize, Range<usize>, Range<usize>),
    ) {
        let (problem, kv) = (self.problem, self.problem.kv_row(head));
        let source = KeySource::new(problem, self.pyramid.keys.head(kv), self.values.head(kv), &self.all);
        let nq = problem.query_blocks();
        let rows = nth_tile(tile, nq);
        let pooled = self.pyramid.queries.head(head);
        attend.start(rows.clone().map(|i| &pooled.row(i)[..problem.head_dim]), None);
        attend.number_queries(Stream::Coarse, head, rows.clone());
        for_strips(problem.key_blocks(), Strip::<T>::capacity(problem), |blocks| {
            strip.clear();
            strip.push(&source, blocks.clone());
            let columns = attend.columns;
            attend.strip(strip, &source, &[], scores.map(|scores| scores.tile(tile, blocks.clone())), |logits| {
                adjust(logits, columns, rows.clone(), blocks);
            });
        });
        for (query, i) in rows.enumerate() {
            // SAFETY: the caller's.
            let state = unsafe { self.states.get_mut(head * nq + i) };
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
    add_bias(problem, head, rows.clone(), blocks.clone(), logits, columns);
    weigh(logits, columns, problem.keys(head / problem.heads), blocks.clone());
    exclude(logits, columns, rows, blocks.start, |i| {
        let selected = plan.row(head, i);
        let first = selected.partition_point(|&j| (j as usize) < blocks.start);
        selected[first..].iter().map(|&j| j as usize).take_while(|&j| j < blocks.end)
    });
}

/// Adds the mean bias to the logits of pooled keys, laid out as for [`adjust`]; where a mask cuts or hides a block they become
/// `-inf`.
pub(crate) fn add_bias<T: Scalar>(
    problem: &Problem<'_>,
    head: usize,
    rows: Range<usize>,
    blocks: Range<usize>,
    logits: &mut [T],
    columns: usize,
) {
    let Some(pairs) = &problem.pairs else { return };
    let (pairs, additive) = (pairs.head(head), !pairs.is_mask());
    for (column, i) in rows.enumerate() {
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
        match keys.count(block) {
            // Its mean is 0, and 0 times a query that is no number is none.
            0 => row.fill(T::NEG_INFINITY),
            count => {
                let weight = weight(count);
                for logit in row {
                    *logit += weight;
                }
            }
        }
    }
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
