//! What the token form adds to the gradient of a bias (docs/definitions.md, section 6): an exact pair the gradient of its logit, an open
//! block that is coarse to a token the gradient of its logit divided among its keys.

use std::ops::Range;

use super::backward::Pass;
use super::backward_range::{BlockBuffers, Scratch};
use super::gradient::GradientTile;
use crate::mra::bias_gradient::BiasSums;
use crate::simd::Element;

impl<'a, E: Element> Pass<'a, '_, E> {
    pub(crate) fn bias_scratch(&self) -> Scratch<'a, E::Compute> {
        let scratch = self.scratch();
        Scratch { tiles: scratch.tiles.into_iter().map(GradientTile::of_logits).collect(), ..scratch }
    }

    /// Adds the gradients of some queries of a flat head.
    pub(crate) fn add_to_bias(
        &self,
        head: usize,
        tokens: Range<usize>,
        scratch: &mut Scratch<'a, E::Compute>,
        sums: &mut BiasSums<'_>,
    ) {
        self.see(head, &tokens, &mut scratch.levels);
        self.pooled(head, &tokens, scratch, |index, _, tile, queries, means| {
            let keys_of = &self.levels[index].batch.segment(head).keys;
            let gradients = tile.gradients(means.keys.rows);
            for (lane, &query) in queries.iter().enumerate() {
                for row in 0..means.keys.rows {
                    let (numbers, gradient): (_, f64) = (keys_of.numbers(means.first + row), gradients.row(row)[lane].into());
                    if gradient == 0.0 {
                        // As of a block that is exact to the query, or hidden from it.
                        continue;
                    }
                    let share = gradient / numbers.len() as f64;
                    sums.add(tokens.start + query as usize, keys_of, numbers.clone(), numbers.map(|_| share));
                }
            }
        });
        let Scratch { tiles, rows, keys, lists, bias, levels, .. } = scratch;
        let finest = levels.len() - 1;
        let range = self.query_range(finest, head, tokens, &levels[finest]);
        let (first, keys_of, blocks) = (range.tokens.start, &range.segment.keys, range.segment.keys.len());
        lists.build(blocks, range.sights, range.plan, range.width);
        let source = self.source(self.batch.group(head));
        for place in 0..lists.present().len() {
            let buffers = BlockBuffers { tile: &mut tiles[finest], keys, bias };
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
