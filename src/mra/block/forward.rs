//! Forward of the block form: out and lse of every query (docs/definitions.md, section 3.6).

use std::ops::Range;

use super::coarse::Coarse;
use super::levels;
use crate::error::Result;
use crate::exec::{TensorMut, threads};
use crate::kernels::Stream;
use crate::mra::attend::{Attend, BiasTile, KeyBatch, KeySource, tile_columns, tiles};
use crate::mra::inputs::Inputs;
use crate::mra::problem::{Batch, Problem};
use crate::mra::select::BlockPlan;
use crate::simd::{Element, Scalar, prefetch_far};

/// Computes out and lse of the segments of this form for a given plan. Shapes are those of the problem.
pub(crate) fn forward<E: Element>(
    problem: &Problem<'_>,
    batch: &Batch<'_>,
    inputs: &Inputs<'_, E>,
    plan: &[u8],
    out: &TensorMut<'_, E>,
    lse: &TensorMut<'_, E::Compute>,
) {
    let (plan, coarse) = levels::attend(problem, inputs, plan);
    exact(problem, batch, inputs, &plan, coarse.as_ref(), out, lse);
}

/// As [`forward`], with a selection that is written to `plan`; queries and keys are pooled once for both.
pub(crate) fn forward_selecting<E: Element>(
    problem: &Problem<'_>,
    batch: &Batch<'_>,
    inputs: &Inputs<'_, E>,
    plan: &mut [u8],
    out: &TensorMut<'_, E>,
    lse: &TensorMut<'_, E::Compute>,
) -> Result<()> {
    let (plan, coarse) = levels::choose_and_attend(problem, inputs, plan)?;
    exact(problem, batch, inputs, &plan, coarse.as_ref(), out, lse);
    Ok(())
}

/// Continues the softmax of every query from the coarse level over the selected blocks.
fn exact<E: Element>(
    problem: &Problem<'_>,
    batch: &Batch<'_>,
    inputs: &Inputs<'_, E>,
    plan: &BlockPlan,
    coarse: Option<&Coarse<E::Compute>>,
    out: &TensorMut<'_, E>,
    lse: &TensorMut<'_, E::Compute>,
) {
    let value_dim = inputs.value.shape()[3];
    let multiplications = plan.num_blocks() * problem.block_size * problem.block_size * (problem.head_dim + value_dim);
    let scratch = || {
        let columns = tile_columns::<E::Compute>(problem);
        let keys = KeyBatch::new(problem, problem.head_dim, value_dim);
        (Attend::for_tensors::<E>(problem, columns, value_dim), keys, BiasTile::new(problem, columns))
    };
    threads::for_each(problem.threads_for(multiplications), batch.rows(), scratch, |(attend, keys, bias), task| {
        let (head, i) = batch.row_at(task);
        let row = BlockRow { problem, batch, inputs, plan, coarse, head, i };
        // SAFETY: each task has its own block of queries, and writes only its rows.
        unsafe { row.compute(attend, keys, bias, out, lse) };
    });
}

/// One block of queries of one flat head.
struct BlockRow<'a, E: Element> {
    problem: &'a Problem<'a>,
    batch: &'a Batch<'a>,
    inputs: &'a Inputs<'a, E>,
    plan: &'a BlockPlan,
    coarse: Option<&'a Coarse<E::Compute>>,
    head: usize,
    i: usize,
}

impl<E: Element> BlockRow<'_, E> {
    /// # Safety
    /// - Nothing else holds the rows of this block of queries in `out` and `lse`.
    unsafe fn compute(
        &self,
        attend: &mut Attend<E::Compute>,
        keys: &mut KeyBatch<E::Compute>,
        bias: &mut BiasTile<E::Compute>,
        out: &TensorMut<'_, E>,
        lse: &TensorMut<'_, E::Compute>,
    ) {
        let (item, head) = self.batch.item_and_head(self.head);
        let rows = &self.batch.segment(self.head).rows;
        let (first, queries) = (rows.tokens().start, self.inputs.query.head(item, head));
        if rows.count(self.i) < rows.range(self.i).len() {
            for token in rows.range(self.i) {
                // SAFETY: the caller's.
                unsafe {
                    out.row_mut(item, head, token).fill(E::default());
                    lse.row_mut(item, head, token)[0] = E::Compute::NEG_INFINITY;
                }
            }
        }
        self.prefetch_queries_after();
        attend.set_biased(self.batch.segment(self.head).is_biased());
        let coarse = self.coarse.map(|coarse| coarse.state(self.batch, self.head, self.i));
        let sink = self.problem.sink(item, head).map(E::Compute::from_f64);
        for tile in tiles(rows.numbers(self.i)) {
            attend.start(tile.clone().map(|number| queries.row(rows.token(number))), coarse.as_ref());
            let places = tile.clone().map(|number| rows.token(number) - first);
            attend.number_queries(Stream::Exact, self.batch.dropout_head(self.head), places);
            self.attend_to_selected(attend, keys, bias, &tile);
            for (query, number) in tile.enumerate() {
                let token = rows.token(number);
                // SAFETY: the caller's.
                unsafe { attend.finish(query, sink, out.row_mut(item, head, token), &mut lse.row_mut(item, head, token)[0]) };
            }
        }
    }

    /// Prefetches the queries of the next block, which this thread probably has next.
    fn prefetch_queries_after(&self) {
        let (item, head) = self.batch.item_and_head(self.head);
        let (rows, queries) = (&self.batch.segment(self.head).rows, self.inputs.query.head(item, head));
        if self.i + 1 < rows.len() {
            rows.range(self.i + 1).for_each(|token| prefetch_far(queries.row(token)));
        }
    }

    fn attend_to_selected(
        &self,
        attend: &mut Attend<E::Compute>,
        batch: &mut KeyBatch<E::Compute>,
        bias: &mut BiasTile<E::Compute>,
        queries: &Range<usize>,
    ) {
        let segment = self.batch.segment(self.head);
        let (item, kv_head) = self.batch.item_and_kv_head(self.batch.group(self.head));
        let (keys, values) = (self.inputs.key.head(item, kv_head), self.inputs.value.head(item, kv_head));
        let source = attend.source(KeySource::new(self.problem, keys, values, &segment.keys));
        let blocks = self.plan.row(self.batch, self.head, self.i);
        let blocks_of_a_batch = (KeyBatch::<E::Compute>::capacity(self.problem) / self.problem.block_size).max(1);
        let after = if self.i + 1 < segment.rows.len() { self.plan.row(self.batch, self.head, self.i + 1) } else { &[] };
        let mut step = |batch: &KeyBatch<E::Compute>, next: &[u32]| {
            let (columns, next) = (attend.columns, &next[..next.len().min(blocks_of_a_batch)]);
            attend.attend(batch, &source, next, None, |logits| {
                bias.apply(self.problem, self.batch, self.head, queries, batch, logits, columns);
            });
        };
        batch.clear();
        for (index, &j) in blocks.iter().enumerate() {
            let numbers = source.numbers(j as usize);
            if !batch.push(&source, numbers.clone()) {
                step(batch, &blocks[index..]);
                batch.clear();
                assert!(batch.push(&source, numbers), "an empty batch has room for a block");
            }
        }
        if batch.rows() > 0 {
            step(batch, after);
        }
    }
}
