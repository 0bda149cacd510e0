//! What the block form adds to the gradient of a bias (docs/definitions.md, section 6): an exact pair the gradient of its logit, a coarse
//! block the gradient of its logit divided among the pairs of its mean.

use std::ops::Range;

use super::backward::{Buffers, Pass};
use super::coarse_backward::CoarsePass;
use crate::mra::attend::{GradientTile, KeyBatch, QueryTerms, TILE_QUERIES, tiles};
use crate::mra::bias_gradient::BiasSums;
use crate::mra::for_parts;
use crate::mra::inputs::{Gradients, Inputs};
use crate::mra::problem::{Batch, Mode, Problem};
use crate::mra::select::BlockPlan;
use crate::simd::Element;
use crate::tensor::Tensor;

/// The sequences of this form.
pub(crate) struct BiasPass<'a, 'g, E: Element> {
    exact: Pass<'a, 'g, E>,
    coarse: Option<CoarsePass<'a, E::Compute>>,
}

/// What a thread reuses.
pub(crate) struct BiasBuffers<T> {
    exact: Buffers<T>,
    coarse: Option<(GradientTile<T>, KeyBatch<T>)>,
}

impl<'a, 'g, E: Element> BiasPass<'a, 'g, E> {
    pub(crate) fn new(
        problem: &'a Problem<'a>,
        batch: &'a Batch<'a>,
        inputs: &'a Inputs<'a, E>,
        grad_out: &'a Tensor<'a, E>,
        terms: &'a [QueryTerms<E::Compute>],
        plan: &'a BlockPlan,
        gradients: &'a Gradients<'g, E>,
    ) -> Self {
        let coarse = || CoarsePass::new(problem, batch, inputs, grad_out, terms, plan);
        Self {
            exact: Pass::new(problem, batch, inputs, grad_out, terms, plan, gradients),
            coarse: (problem.mode == Mode::Full).then(coarse),
        }
    }

    pub(crate) fn buffers(&self) -> BiasBuffers<E::Compute> {
        let exact = self.exact.buffers();
        let coarse = self.coarse.as_ref().map(CoarsePass::buffers);
        BiasBuffers {
            exact: Buffers { tile: exact.tile.of_logits(), ..exact },
            coarse: coarse.map(|(tile, keys)| (tile.of_logits(), keys)),
        }
    }

    /// Adds the gradients of some queries of a flat head.
    pub(crate) fn add(
        &self,
        head: usize,
        tokens: Range<usize>,
        buffers: &mut BiasBuffers<E::Compute>,
        sums: &mut BiasSums<'_>,
    ) {
        let rows = &self.exact.batch.segment(head).rows;
        let numbers = rows.numbers_among(&tokens);
        if numbers.is_empty() {
            return;
        }
        let blocks = rows.block_of(numbers.start)..rows.block_of(numbers.end - 1) + 1;
        for i in blocks.clone() {
            let of_block = rows.numbers(i);
            let queries = of_block.start.max(numbers.start)..of_block.end.min(numbers.end);
            self.add_exact(head, i, queries, &mut buffers.exact, sums);
        }
        if let (Some(coarse), Some(buffers)) = (&self.coarse, &mut buffers.coarse) {
            self.add_coarse(coarse, head, &blocks, &tokens, buffers, sums);
        }
    }

    /// Exact pairs of queries with these numbers, which lie in block `i`.
    fn add_exact(
        &self,
        head: usize,
        i: usize,
        queries: Range<usize>,
        Buffers { tile, keys, bias }: &mut Buffers<E::Compute>,
        sums: &mut BiasSums<'_>,
    ) {
        let Pass { problem, batch, .. } = self.exact;
        let (segment, source) = (batch.segment(head), self.exact.source(batch.group(head)));
        for queries in tiles(queries) {
            self.exact.start(head, queries.clone(), tile);
            self.exact.for_batches(head, i, keys, &source, |keys| {
                let gradients = tile.differentiate(keys, &source, None, |logits, columns| {
                    bias.apply(problem, batch, head, &queries, keys, logits, columns);
                });
                for (rows, first) in keys.spans() {
                    let numbers = first..first + rows.len();
                    for (lane, query) in queries.clone().enumerate() {
                        let of_query = rows.clone().map(|row| gradients.row(row)[lane].into());
                        sums.add(segment.rows.token(query), &segment.keys, numbers.clone(), of_query);
                    }
                }
            });
        }
    }

    /// The shares that some queries have in the coarse blocks of these rows.
    fn add_coarse(
        &self,
        coarse: &CoarsePass<'_, E::Compute>,
        head: usize,
        blocks: &Range<usize>,
        tokens: &Range<usize>,
        buffers: &mut (GradientTile<E::Compute>, KeyBatch<E::Compute>),
        sums: &mut BiasSums<'_>,
    ) {
        let Pass { problem, batch, .. } = self.exact;
        let segment = batch.segment(head);
        let averaged = segment.queries.numbers_among(tokens);
        for_parts(blocks.len(), TILE_QUERIES, |part| {
            let rows = blocks.start + part.start..blocks.start + part.end;
            coarse.start(head, rows.clone(), &mut buffers.0);
            for_parts(segment.keys.len(), KeyBatch::<E::Compute>::capacity(problem), |columns| {
                let gradients = coarse.logit_gradients(head, rows.clone(), columns.clone(), buffers);
                for (lane, i) in rows.clone().enumerate() {
                    let of_block = segment.queries.numbers(i);
                    let queries = of_block.start.max(averaged.start)..of_block.end.min(averaged.end);
                    for (row, j) in columns.clone().enumerate() {
                        let (numbers, gradient): (_, f64) = (segment.keys.numbers(j), gradients.row(row)[lane].into());
                        if gradient == 0.0 {
                            // As of an exact block.
                            continue;
                        }
                        let share = gradient / (of_block.len() * numbers.len()) as f64;
                        for query in queries.clone() {
                            let shares = numbers.clone().map(|_| share);
                            sums.add(segment.queries.token(query), &segment.keys, numbers.clone(), shares);
                        }
                    }
                }
            });
        });
    }
}
