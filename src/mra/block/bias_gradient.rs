//! What the block form adds to the gradient of a bias (docs/definitions.md, section 6): an exact pair the gradient of its logit, a coarse
//! block the gradient of its logit divided among the pairs of its mean.

use std::ops::Range;

use super::backward::{Buffers, Pass};
use super::levels::for_batches;
use super::levels_backward::{LevelPass, passes};
use crate::mra::attend::{GradientTile, KeyBatch, QueryTerms, TILE_QUERIES, tiles};
use crate::mra::bias_gradient::BiasSums;
use crate::mra::for_parts;
use crate::mra::inputs::{Gradients, Inputs};
use crate::mra::problem::Mode;
use crate::mra::pyramid::BlockLevel;
use crate::mra::select::BlockPlan;
use crate::simd::{Element, Scalar};
use crate::tensor::Tensor;

/// The sequences of this form.
pub(crate) struct BiasPass<'a, 'g, E: Element> {
    exact: Pass<'a, 'g, E>,
    /// None in sparse mode.
    coarse: Vec<LevelPass<'a, E::Compute>>,
}

/// What a thread reuses.
pub(crate) struct BiasBuffers<T> {
    exact: Buffers<T>,
    coarse: Option<(GradientTile<T>, KeyBatch<T>)>,
}

impl<'a, 'g, E: Element> BiasPass<'a, 'g, E> {
    pub(crate) fn new(
        levels: &'a [BlockLevel<'a>],
        plans: &'a [BlockPlan],
        inputs: &'a Inputs<'a, E>,
        grad_out: &'a Tensor<'a, E>,
        terms: &'a [QueryTerms<E::Compute>],
        gradients: &'a Gradients<'g, E>,
    ) -> Self {
        let finest = levels.len() - 1;
        let BlockLevel { problem, batch } = &levels[finest];
        Self {
            exact: Pass::new(problem, batch, inputs, grad_out, terms, &plans[finest], gradients),
            coarse: match problem.mode {
                Mode::Full => passes(levels, plans, inputs, grad_out, terms).collect(),
                Mode::Sparse => Vec::new(),
            },
        }
    }

    pub(crate) fn buffers(&self) -> BiasBuffers<E::Compute> {
        let exact = self.exact.buffers();
        let coarse = self.coarse.first().map(|pass| pass.coarse.buffers());
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
        if let Some(buffers) = &mut buffers.coarse {
            self.coarse.iter().for_each(|pass| pass.add_to_bias(head, &tokens, buffers, sums));
        }
    }

    /// Exact pairs of queries with these numbers, which lie in block `i`.
    fn add_exact(
        &self,
        head: usize,
        i: usize,
        queries: Range<usize>,
        Buffers { tile, keys, bias, .. }: &mut Buffers<E::Compute>,
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
}

impl<T: Scalar> LevelPass<'_, T> {
    /// Adds the shares that some queries have in the coarse blocks of a level.
    fn add_to_bias(
        &self,
        head: usize,
        tokens: &Range<usize>,
        buffers: &mut (GradientTile<T>, KeyBatch<T>),
        sums: &mut BiasSums<'_>,
    ) {
        let rows = &self.coarse.batch.segment(head).rows;
        let numbers = rows.numbers_among(tokens);
        let rows = rows.block_of(numbers.start)..rows.block_of(numbers.end - 1) + 1;
        let (tile, keys) = buffers;
        let Some(children) = &self.children else {
            for_parts(rows.len(), TILE_QUERIES, |part| {
                let rows = rows.start + part.start..rows.start + part.end;
                self.coarse.start(head, rows.clone(), tile);
                for_parts(self.coarse.batch.segment(head).keys.len(), KeyBatch::<T>::capacity(self.coarse.problem), |blocks| {
                    let source = self.coarse.source(head);
                    keys.clear();
                    keys.push(&source, blocks);
                    self.add_batch_to_bias(head, tokens, &rows, (tile, keys), sums);
                });
            });
            return;
        };
        for row_above in children.row_above(head, rows.start)..=children.row_above(head, rows.end - 1) {
            let of_row = children.rows(head, row_above).1;
            for part in tiles(of_row.start.max(rows.start)..of_row.end.min(rows.end)) {
                self.coarse.start(head, part.clone(), tile);
                for_batches(children, head, row_above, keys, &self.coarse.source(head), |keys| {
                    self.add_batch_to_bias(head, tokens, &part, (tile, keys), sums);
                });
            }
        }
    }

    /// The shares in the blocks of some rows, with which the tile has started, and of a batch of pooled keys.
    fn add_batch_to_bias(
        &self,
        head: usize,
        tokens: &Range<usize>,
        rows: &Range<usize>,
        (tile, keys): (&mut GradientTile<T>, &KeyBatch<T>),
        sums: &mut BiasSums<'_>,
    ) {
        let segment = self.coarse.batch.segment(head);
        let averaged = segment.queries.numbers_among(tokens);
        let gradients = self.coarse.logit_gradients(head, rows, tile, keys);
        for (lane, i) in rows.clone().enumerate() {
            let of_block = segment.queries.numbers(i);
            let queries = of_block.start.max(averaged.start)..of_block.end.min(averaged.end);
            for (row, j) in keys.spans().flat_map(|(span, first)| span.clone().zip(first..first + span.len())) {
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
    }
}
