//! The levels of the block form, one after the other (docs/definitions.md, section 5); with two resolutions there is one.
//!
//! ```text
//! level 0    scores, choice and softmax among all of its blocks                                    mra::block::coarse
//! level l    scores and choice among the children of the blocks that level l - 1 refines          mra::select::select_children
//!            softmax of each row over them, those left out that it refines: continues the one of the row of level l - 1 around it
//! tokens     continue the softmax of the last level over the keys of the blocks that it refines    mra::block::forward
//! ```

use std::ops::Range;

use super::coarse::{Coarse, adjust, pooled_keys, write_state};
use crate::error::Result;
use crate::exec::{Chunks, threads};
use crate::kernels::Stream;
use crate::mra::attend::{Attend, KeyBatch, KeySource, coarse_tile_columns, tiles};
use crate::mra::inputs::Inputs;
use crate::mra::problem::{Batch, Blocks, Mode, Problem};
use crate::mra::pyramid::{BlockLevel, LevelMeans, Pooled, Pyramid};
use crate::mra::select::{BlockPlan, Children, select_children, select_rows};
use crate::simd::{Element, Scalar};
use crate::tensor::Tensor;

/// Writes the plan of the segments of this form.
pub(crate) fn select<E: Element>(
    problem: &Problem<'_>,
    query: &Tensor<'_, E>,
    key: &Tensor<'_, E>,
    plan: &mut [u8],
) -> Result<()> {
    let levels = BlockLevel::all(problem);
    let means = LevelMeans::of_levels(&levels, query, key, None);
    choose(&levels, &means, plan).map(|_| ())
}

/// Reads the plan of each level.
pub(crate) fn read_plans(levels: &[BlockLevel<'_>], plan: &[u8]) -> Vec<BlockPlan> {
    let first = &levels[0];
    let mut plans = vec![BlockPlan::read(first.problem, &first.batch, plan)];
    for pair in levels.windows(2) {
        let children = below(pair, &plans[plans.len() - 1]);
        let own = children.read(plan);
        plans.push(own);
    }
    plans
}

/// Reads a plan: the blocks that are exact and, in full mode, what all others add to the softmax.
pub(super) fn attend<E: Element>(
    problem: &Problem<'_>,
    inputs: &Inputs<'_, E>,
    plan: &[u8],
) -> (BlockPlan, Option<Coarse<E::Compute>>) {
    let levels = BlockLevel::all(problem);
    let mut plans = read_plans(&levels, plan);
    let coarse = (problem.mode == Mode::Full).then(|| {
        let means = LevelMeans::of_levels(&levels, &inputs.query, &inputs.key, Some(&inputs.value));
        let (first, values) = (&levels[0], means[0].values.as_ref().expect("full mode"));
        let mut coarse = Coarse::new(first.problem, &first.batch, &plans[0], &means[0].pyramid, values);
        for (index, pair) in levels.windows(2).enumerate() {
            let children = below(pair, &plans[index]);
            coarse = continued(&children, &means[index + 1], &plans[index + 1], &coarse);
        }
        coarse
    });
    (plans.pop().expect("the finest level"), coarse)
}

/// Writes the plan. Returns the blocks that are exact and, in full mode, what all others add to the softmax.
pub(super) fn choose_and_attend<E: Element>(
    problem: &Problem<'_>,
    inputs: &Inputs<'_, E>,
    plan: &mut [u8],
) -> Result<(BlockPlan, Option<Coarse<E::Compute>>)> {
    let levels = BlockLevel::all(problem);
    let values = (problem.mode == Mode::Full).then_some(&inputs.value);
    let means = LevelMeans::of_levels(&levels, &inputs.query, &inputs.key, values);
    choose(&levels, &means, plan)
}

fn choose<T: Scalar>(
    levels: &[BlockLevel<'_>],
    means: &[LevelMeans<T>],
    plan: &mut [u8],
) -> Result<(BlockPlan, Option<Coarse<T>>)> {
    let (first, pyramid) = (&levels[0], &means[0].pyramid);
    let (mut coarse, mut refined) = if let Some(values) = &means[0].values {
        let (coarse, refined) = Coarse::selecting(first.problem, &first.batch, pyramid, values, plan)?;
        (Some(coarse), refined)
    } else {
        select_rows(first.problem, &first.batch, pyramid, plan)?;
        (None, BlockPlan::read(first.problem, &first.batch, plan))
    };
    for (pair, means) in levels.windows(2).zip(&means[1..]) {
        let children = below(pair, &refined);
        select_children(&children, &means.pyramid, plan)?;
        let own = children.read(plan);
        coarse = coarse.map(|above| continued(&children, means, &own, &above));
        refined = own;
    }
    Ok((refined, coarse))
}

/// The second one of two levels.
pub(super) fn below<'a>(pair: &'a [BlockLevel<'a>], refined: &'a BlockPlan) -> Children<'a> {
    let [above, level] = pair else { unreachable!("windows of two levels") };
    Children { problem: level.problem, batch: &level.batch, batch_above: &above.batch, refined }
}

/// What the blocks of all levels down to this one that are not refined add to the softmax of each of its rows.
fn continued<T: Scalar>(children: &Children<'_>, means: &LevelMeans<T>, own: &BlockPlan, above: &Coarse<T>) -> Coarse<T> {
    let (problem, batch) = (children.problem, children.batch);
    let values = means.values.as_ref().expect("full mode");
    let mut coarse = Coarse::unset(batch, values);
    let row = coarse.row;
    let level = ChildLevel { children, pyramid: &means.pyramid, values, own, pooled_keys: pooled_keys(batch), above };
    let states = Chunks::new(&mut coarse.states, row);
    threads::for_each(
        problem.threads_for(children.pairs().saturating_mul(2 * problem.head_dim)),
        children.batch_above.rows(),
        || level.buffers(),
        |(attend, keys), task| {
            let (head, row_above) = children.batch_above.row_at(task);
            for rows in tiles(children.rows(head, row_above).1) {
                level.attend(attend, keys, head, row_above, rows.clone());
                for (query, i) in rows.enumerate() {
                    // SAFETY: each task has its own rows.
                    write_state(attend, query, unsafe { states.get_mut(batch.row(head, i)) });
                }
            }
        },
    );
    coarse
}

/// What all tiles of a level share.
struct ChildLevel<'a, T> {
    children: &'a Children<'a>,
    pyramid: &'a Pyramid<T>,
    values: &'a Pooled<T>,
    own: &'a BlockPlan,
    /// For each sequence, its pooled keys as tokens.
    pooled_keys: Vec<Blocks>,
    above: &'a Coarse<T>,
}

impl<T: Scalar> ChildLevel<'_, T> {
    fn buffers(&self) -> (Attend<T>, KeyBatch<T>) {
        let (problem, width) = (self.children.problem, self.values.width);
        let attend = Attend::new(problem, coarse_tile_columns::<T>(problem), width);
        (attend, KeyBatch::new(problem, self.pyramid.keys.width, width))
    }

    /// Attends from some rows in a row of the level above to their candidates.
    fn attend(&self, attend: &mut Attend<T>, keys: &mut KeyBatch<T>, head: usize, row_above: usize, rows: Range<usize>) {
        let Children { problem, batch, batch_above, .. } = *self.children;
        let group = batch.group(head);
        let (key_means, value_means) = (self.pyramid.keys.of_group(batch, group), self.values.of_group(batch, group));
        let source = KeySource::new(problem, key_means, value_means, &self.pooled_keys[head / problem.heads]);
        let pooled = self.pyramid.queries.of_head(batch, head);
        let state = self.above.state(batch_above, head, row_above);
        attend.start(rows.clone().map(|i| &pooled.row(i)[..problem.head_dim]), Some(&state));
        attend.number_queries(Stream::Coarse, batch.dropout_head(head), rows.clone());
        for_batches(self.children, head, row_above, keys, &source, |keys| {
            let columns = attend.columns;
            attend.attend(keys, &source, &[], None, |logits| {
                adjust_batch(problem, batch, self.own, head, &rows, keys, logits, columns);
            });
        });
    }
}

/// Calls `step` with the candidates of the rows in a row of the level above, as many at a time as a batch holds.
pub(super) fn for_batches<T: Scalar>(
    children: &Children<'_>,
    head: usize,
    row_above: usize,
    keys: &mut KeyBatch<T>,
    source: &KeySource<'_, T>,
    mut step: impl FnMut(&KeyBatch<T>),
) {
    keys.clear();
    for columns in children.columns(head, row_above) {
        if !keys.push(source, columns.clone()) {
            step(keys);
            keys.clear();
            assert!(keys.push(source, columns), "an empty batch has room for the children of a block");
        }
    }
    if keys.rows() > 0 {
        step(keys);
    }
}

/// As [`adjust`], the logits of a batch of pooled keys.
#[allow(clippy::too_many_arguments, reason = "a place in the matrix of blocks, and its logits")]
pub(super) fn adjust_batch<T: Scalar>(
    problem: &Problem<'_>,
    batch: &Batch<'_>,
    plan: &BlockPlan,
    head: usize,
    rows: &Range<usize>,
    keys: &KeyBatch<T>,
    logits: &mut [T],
    columns: usize,
) {
    for (span, first) in keys.spans() {
        let blocks = first..first + span.len();
        let logits = &mut logits[span.start * columns..span.end * columns];
        adjust(problem, batch, plan, head, rows.clone(), blocks, logits, columns);
    }
}
