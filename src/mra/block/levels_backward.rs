//! Backward among the pooled tokens of all levels.
//!
//! Each level has the gradient of [`coarse_backward`](super::coarse_backward), with sums over its own blocks of queries and, below the
//! coarsest one, over the candidates of each row alone. A token has a share in the gradients of the means of all levels. They are
//! gathered level by level: what the mean of a block hands to its tokens goes to the means of the blocks in it, in proportion to how
//! many tokens these stand for, and those of the finest blocks hand it on.

use super::coarse_backward::{BlockSums, CoarseGradients, CoarsePass, one_pass};
use super::levels::{adjust_batch, below, for_batches};
use crate::exec::{Chunks, threads};
use crate::mra::attend::{GradientTile, KeyBatch, KeySums, QueryTerms, tiles};
use crate::mra::inputs::Inputs;
use crate::mra::problem::Blocks;
use crate::mra::pyramid::{BlockLevel, LevelMeans};
use crate::mra::select::{BlockPlan, Children};
use crate::simd::{Element, Scalar};
use crate::tensor::Tensor;

/// Computes the gradients of the means of the finest blocks, with the shares that they have in those of all levels. `terms` are those of
/// all queries.
pub(super) fn coarse_backward<E: Element>(
    levels: &[BlockLevel<'_>],
    plans: &[BlockPlan],
    inputs: &Inputs<'_, E>,
    grad_out: &Tensor<'_, E>,
    terms: &[QueryTerms<E::Compute>],
) -> Option<CoarseGradients<E::Compute>> {
    passes(levels, plans, inputs, grad_out, terms).fold(None, |above, pass| {
        let mut gradients = pass.gradients();
        if let (Some(above), Some(children)) = (above, &pass.children) {
            add_shares(children, &above, &mut gradients);
        }
        Some(gradients)
    })
}

/// The pooled tokens of each level, the coarsest first.
pub(super) fn passes<'a, E: Element>(
    levels: &'a [BlockLevel<'a>],
    plans: &'a [BlockPlan],
    inputs: &Inputs<'a, E>,
    grad_out: &Tensor<'a, E>,
    terms: &'a [QueryTerms<E::Compute>],
) -> impl Iterator<Item = LevelPass<'a, E::Compute>> {
    let means = LevelMeans::of_levels(levels, &inputs.query, &inputs.key, Some(&inputs.value));
    let grad_out = *grad_out;
    means.into_iter().zip(levels).zip(plans).enumerate().map(move |(index, ((means, level), plan))| {
        let (problem, batch) = (level.problem, &level.batch);
        let children = index.checked_sub(1).map(|above| below(&levels[above..=index], &plans[above]));
        let sums = match &children {
            None => BlockSums::of_all(problem, batch, &grad_out, terms, plan),
            Some(children) => BlockSums::of_children(children, &grad_out, terms, plan),
        };
        let means = (means.pyramid, means.values.expect("pooled above"));
        LevelPass { coarse: CoarsePass::new(problem, batch, means, sums, plan, grad_out.shape()[3]), children }
    })
}

/// One level.
pub(super) struct LevelPass<'a, T: Scalar> {
    pub(super) coarse: CoarsePass<'a, T>,
    /// Which blocks rows may select, unless it is any.
    pub(super) children: Option<Children<'a>>,
}

impl<T: Scalar> LevelPass<'_, T> {
    fn gradients(&self) -> CoarseGradients<T> {
        let Some(children) = &self.children else { return self.coarse.gradients() };
        ChildPass { coarse: &self.coarse, children, own: self.coarse.plan }.gradients()
    }
}

/// A level below another one.
struct ChildPass<'a, T: Scalar> {
    coarse: &'a CoarsePass<'a, T>,
    children: &'a Children<'a>,
    own: &'a BlockPlan,
}

/// What a thread reuses.
type Buffers<T> = (GradientTile<T>, KeyBatch<T>);

impl<T: Scalar> ChildPass<'_, T> {
    fn gradients(&self) -> CoarseGradients<T> {
        let Children { problem, batch, .. } = *self.children;
        let mut gradients = self.coarse.unset();
        let products = self.children.pairs().saturating_mul(3 * (gradients.key_width + gradients.value_width));
        let threads = problem.threads_for(products);
        if one_pass(batch.groups(), threads) {
            self.by_groups(threads, &mut gradients);
        } else {
            self.by_rows(threads, &mut gradients);
            self.by_columns(threads, &mut gradients);
        }
        gradients
    }

    /// One task for each group of heads that share keys: all gradients in one pass.
    fn by_groups(&self, threads: usize, gradients: &mut CoarseGradients<T>) {
        let Children { batch, batch_above, .. } = *self.children;
        let (key_width, value_width) = (gradients.key_width, gradients.value_width);
        let (to_dq, to_dk, to_dv) =
            (Chunks::new(&mut gradients.dq, key_width), Chunks::new(&mut gradients.dk, 1), Chunks::new(&mut gradients.dv, 1));
        threads::for_each(
            threads,
            batch.groups(),
            || self.coarse.buffers(),
            |buffers, group| {
                let (first, count) = (batch.column(group, 0), batch.segment_of_group(group).keys.len());
                let of = |width: usize| first * width..(first + count) * width;
                // SAFETY: each task has its own group of heads.
                let (dk, dv) = unsafe { (to_dk.range_mut(of(key_width)), to_dv.range_mut(of(value_width))) };
                dk.fill(T::ZERO);
                dv.fill(T::ZERO);
                for head in batch.heads_of(group) {
                    for row_above in 0..batch_above.segment(head).rows.len() {
                        let mut sums = KeySums { dk: &mut *dk, dv: &mut *dv, first: 0 };
                        // SAFETY: each task has its own heads.
                        unsafe { self.rows(head, row_above, buffers, Some(&mut sums), &to_dq) };
                    }
                }
            },
        );
    }

    /// One task for each row of the level above: dq.
    fn by_rows(&self, threads: usize, gradients: &mut CoarseGradients<T>) {
        let above = self.children.batch_above;
        let to_dq = Chunks::new(&mut gradients.dq, gradients.key_width);
        threads::for_each(
            threads,
            above.rows(),
            || self.coarse.buffers(),
            |buffers, task| {
                let (head, row_above) = above.row_at(task);
                // SAFETY: each task has its own rows.
                unsafe { self.rows(head, row_above, buffers, None, &to_dq) };
            },
        );
    }

    /// One task for each column of the level above: dk and dv.
    fn by_columns(&self, threads: usize, gradients: &mut CoarseGradients<T>) {
        let (children, above) = (self.children, self.children.batch_above);
        let (batch, key_width, value_width) = (children.batch, gradients.key_width, gradients.value_width);
        let (to_dk, to_dv) = (Chunks::new(&mut gradients.dk, 1), Chunks::new(&mut gradients.dv, 1));
        threads::for_each(
            threads,
            above.columns(),
            || self.coarse.buffers(),
            |(tile, keys), task| {
                let (group, column_above) = above.column_at(task);
                let first_head = batch.heads_of(group).start;
                let blocks = children.columns_of(first_head, column_above);
                let first = batch.column(group, 0);
                let of = |width: usize| (first + blocks.start) * width..(first + blocks.end) * width;
                // SAFETY: each task has its own blocks of keys.
                let (dk, dv) = unsafe { (to_dk.range_mut(of(key_width)), to_dv.range_mut(of(value_width))) };
                dk.fill(T::ZERO);
                dv.fill(T::ZERO);
                let source = self.coarse.source(first_head);
                keys.clear();
                keys.push(&source, blocks.clone());
                for head in batch.heads_of(group) {
                    for &row_above in children.refined.column(above, head, column_above) {
                        for rows in tiles(children.rows(head, row_above as usize).1) {
                            self.coarse.start(head, rows.clone(), tile);
                            let sums = KeySums { dk: &mut *dk, dv: &mut *dv, first: blocks.start };
                            tile.add(keys, &source, false, Some(sums), |logits, columns| {
                                adjust_batch(children.problem, batch, self.own, head, &rows, keys, logits, columns);
                            });
                        }
                    }
                }
            },
        );
    }

    /// The rows of one of the level above against their candidates: dq, and dk and dv if wanted.
    ///
    /// # Safety
    /// - Nothing else holds these rows of `to_dq`.
    unsafe fn rows(
        &self,
        head: usize,
        row_above: usize,
        (tile, keys): &mut Buffers<T>,
        mut sums: Option<&mut KeySums<'_, T>>,
        to_dq: &Chunks<'_, T>,
    ) {
        let (children, source) = (self.children, self.coarse.source(head));
        for rows in tiles(children.rows(head, row_above).1) {
            self.coarse.start(head, rows.clone(), tile);
            for_batches(children, head, row_above, keys, &source, |keys| {
                tile.add(keys, &source, true, sums.as_deref_mut().map(KeySums::reborrow), |logits, columns| {
                    adjust_batch(children.problem, children.batch, self.own, head, &rows, keys, logits, columns);
                });
            });
            for (query, i) in rows.enumerate() {
                // SAFETY: the caller's.
                let to = unsafe { to_dq.get_mut(children.batch.row(head, i)) };
                to.copy_from_slice(&tile.dq[query * tile.key_width..][..tile.key_width]);
            }
        }
    }
}

/// Adds to the gradients of the means of blocks their shares in those of the blocks around them.
fn add_shares<T: Scalar>(children: &Children<'_>, above: &CoarseGradients<T>, to: &mut CoarseGradients<T>) {
    let Children { problem, batch, batch_above, .. } = *children;
    let (key_width, value_width) = (to.key_width, to.value_width);
    let threads = problem.threads_to_read(to.dq.len() + to.dk.len() + to.dv.len());
    let dq = Chunks::new(&mut to.dq, key_width);
    threads::for_each(
        threads,
        batch.rows(),
        || (),
        |(), task| {
            let (head, i) = batch.row_at(task);
            let (segment, around, row_above) = (batch.segment(head), batch_above.segment(head), children.row_above(head, i));
            // The mean of a block with a valid query has no share of those without one in it.
            if segment.is_live(i) == around.is_live(row_above) {
                let share = share(&segment.queries, i, &around.queries, row_above);
                // SAFETY: each task has its own row.
                add(unsafe { dq.get_mut(task) }, share, above.dq(batch_above, head, row_above));
            }
        },
    );
    let (dk, dv) = (Chunks::new(&mut to.dk, key_width), Chunks::new(&mut to.dv, value_width));
    threads::for_each(
        threads,
        batch.columns(),
        || (),
        |(), task| {
            let (group, j) = batch.column_at(task);
            let column_above = j / children.ratio();
            let (keys, around) = (&batch.segment_of_group(group).keys, &batch_above.segment_of_group(group).keys);
            let share = share(keys, j, around, column_above);
            // SAFETY: each task has its own row.
            unsafe {
                add(dk.get_mut(task), share, above.dk(batch_above, group, column_above));
                add(dv.get_mut(task), share, above.dv(batch_above, group, column_above));
            }
        },
    );
}

/// Which part of the tokens of a block lies in one of the blocks in it.
fn share<T: Scalar>(blocks: &Blocks, block: usize, above: &Blocks, block_above: usize) -> T {
    T::from_f64(blocks.count(block) as f64 / above.count(block_above).max(1) as f64)
}

fn add<T: Scalar>(to: &mut [T], factor: T, from: &[T]) {
    to.iter_mut().zip(from).for_each(|(to, &x)| *to += factor * x);
}
