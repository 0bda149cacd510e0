//! What the token form adds to the gradient of a bias (docs/definitions.md, section 6): an exact pair the gradient of its logit, an open
//! block that is coarse to a token the gradient of its logit divided among its keys.

use std::ops::Range;

use super::backward::Pass;
use super::backward_range::{BlockBuffers, Scratch};
use crate::mra::bias_gradient::BiasSums;
use crate::simd::Element;

impl<'a, E: Element> Pass<'a, '_, E> {
    pub(crate) fn bias_scratch(&self) -> Scratch<'a, E::Compute> {
        let scratch = self.scratch();
        Scratch { tile: scratch.tile.of_logits(), ..scratch }
    }

    /// Adds the gradients of some queries of a flat head.
    pub(crate) fn add_to_bias(
        &self,
        head: usize,
        tokens: Range<usize>,
        scratch: &mut Scratch<'a, E::Compute>,
        sums: &mut BiasSums<'_>,
    ) {
        let Scratch { tile, rows, keys, lists, bias, sights, plan, numbers, .. } = scratch;
        let range = self.query_range(head, tokens, sights, plan);
        let (first, keys_of, blocks) = (range.tokens.start, &range.segment.keys, range.segment.keys.len());
        self.fill(&range, &numbers[..range.tokens.len()], rows);
        self.coarse(&range, rows, numbers, &(0..blocks), tile, |tile, queries, means| {
            let gradients = tile.gradients(means.keys.rows);
            for (lane, &query) in queries.iter().enumerate() {
                for row in 0..means.keys.rows {
                    let (numbers, gradient): (_, f64) = (keys_of.numbers(means.first + row), gradients.row(row)[lane].into());
                    if gradient == 0.0 {
                        // As of a block that is exact to the query, or hidden from it.
                        continue;
                    }
                    let share = gradient / numbers.len() as f64;
                    sums.add(first + query as usize, keys_of, numbers.clone(), numbers.map(|_| share));
                }
            }
        });
        lists.build(blocks, range.sights, range.plan, range.width);
        let source = self.source(self.batch.group(head));
        for place in 0..lists.present().len() {
            let buffers = BlockBuffers { tile, keys, bias };
            self.exact(&range, rows, lists, place, &source, buffers, |tile, queries, block| {
                let (count, gradients) = (block.keys.rows, tile.gradients(block.keys.rows));
                for (lane, &query) in queries.queries.iter().enumerate() {
                    let of_query = (0..count).map(|row| gradients.row(row)[lane].into());
                    sums.add(first + query as usize, keys_of, block.first..block.first + count, of_query);
                }
            });
        }
    }
}
