//! Backward of a range of queries: against pooled blocks tile by tile, then against exact blocks one after the other.

use std::ops::Range;

use super::backward::Pass;
use super::coarse::{add_mean_distances, exclude, for_steps, matrix, span_of_open};
use super::exact::dropout_key;
use super::forward::RANGE_QUERIES;
use super::gradient::{GradientTile, KeyRows, RangeRows};
use super::levels::{LevelOfRange, TokenLevel, read_plan};
use super::queries_of_block::QueriesOfBlocks;
use super::query_tile::{QueryTile, for_query_tiles};
use super::refine::{block_name, leaves_some, read_row, weights_of};
use super::visible_keys::{BiasColumns, Viewer};
use crate::exec::Buffer;
use crate::kernels::{AllFinite, Matrix, Stream};
use crate::mra::attend::{KeyBatch, KeySource, KeySums, TILE_QUERIES};
use crate::mra::problem::{Segment, Sight};
use crate::mra::select::child_columns;
use crate::mra::weigh;
use crate::simd::{Element, Scalar};

/// A range of queries of a flat head, with what they see and what they have chosen, at one level.
pub(crate) struct QueryRange<'a> {
    /// The level.
    index: usize,
    /// The flat head.
    pub(crate) head: usize,
    pub(crate) segment: &'a Segment,
    pub(crate) tokens: Range<usize>,
    pub(crate) sights: &'a [Sight<'a>],
    pub(crate) plan: &'a [i32],
    /// How many numbers of the plan each query has.
    pub(crate) width: usize,
    pub(crate) viewer: Viewer<'a>,
    /// What dropout calls the head and the first token.
    place: (usize, usize),
}

/// What a thread reuses.
pub(crate) struct Scratch<'a, T> {
    /// One for each level; the last one is that of the exact blocks as well.
    pub(crate) tiles: Vec<GradientTile<T>>,
    pub(crate) rows: RangeRows<T>,
    pub(crate) keys: KeyBatch<T>,
    pub(crate) lists: QueriesOfBlocks,
    pub(crate) bias: BiasColumns<T>,
    /// That of the children of a block.
    pub(crate) child_bias: BiasColumns<T>,
    pub(crate) levels: Vec<LevelOfRange<'a>>,
    /// The queries of a range, counted.
    pub(crate) numbers: Vec<u32>,
    /// The gradient of the queries of a range: a row of whole vectors for each.
    pub(crate) dq: Buffer<T>,
}

/// The part of the scratch that a block of keys is computed in.
pub(crate) struct BlockBuffers<'s, T> {
    pub(crate) tile: &'s mut GradientTile<T>,
    pub(crate) keys: &'s mut KeyBatch<T>,
    pub(crate) bias: &'s mut BiasColumns<T>,
}

/// Sums of the gradients of all tokens of a group, and of all its pooled ones, of each level.
pub(crate) struct GroupSums<'a, T> {
    pub(crate) exact: KeySums<'a, T>,
    pub(crate) pooled: Vec<KeySums<'a, T>>,
}

impl<'a, E: Element> Pass<'a, '_, E> {
    pub(crate) fn scratch(&self) -> Scratch<'a, E::Compute> {
        let (problem, (key_width, value_width)) = (self.problem, self.widths());
        let queries = problem.query_len.min(RANGE_QUERIES);
        let columns = problem.padded::<E::Compute>(TILE_QUERIES);
        let children = self.levels.iter().filter_map(|level| level.problem.children()).max().unwrap_or(0);
        Scratch {
            tiles: self
                .levels
                .iter()
                .map(|level| GradientTile::for_tensors::<E>(level.problem, queries, self.value_dim))
                .collect(),
            rows: RangeRows::new(queries, key_width, value_width),
            keys: KeyBatch::new(problem, problem.head_dim, self.value_dim),
            lists: QueriesOfBlocks::default(),
            bias: BiasColumns::new(problem, columns),
            child_bias: BiasColumns::of_keys(children, columns),
            levels: self.levels.iter().map(|_| LevelOfRange::default()).collect(),
            numbers: (0..u32::try_from(queries).expect("a size of a range")).collect(),
            dq: Buffer::scratch(queries * key_width),
        }
    }

    /// Finds out what the queries of a range see, and reads their plan. Idle ones see nothing.
    pub(crate) fn see(&self, head: usize, tokens: &Range<usize>, levels: &mut [LevelOfRange<'a>]) {
        let terms = self.terms_of(head);
        for (level, of_range) in self.levels.iter().zip(&mut *levels) {
            of_range.see(level, head, tokens, |token| terms[token].idle);
        }
        for (index, level) in self.levels.iter().enumerate() {
            read_plan(levels, index, level, &self.plan[level.plan_bytes(head, tokens)]);
        }
    }

    /// The queries of a range at a level, as [`Self::see`] has found them.
    pub(crate) fn query_range<'s>(
        &self,
        index: usize,
        head: usize,
        tokens: Range<usize>,
        of_range: &'s LevelOfRange<'a>,
    ) -> QueryRange<'s>
    where
        'a: 's,
    {
        let TokenLevel { problem, batch, .. } = &self.levels[index];
        let segment = batch.segment(head);
        let place = (batch.dropout_head(head), tokens.start - segment.rows.tokens().start);
        let LevelOfRange { sights, plan, width } = of_range;
        QueryRange {
            index,
            head,
            segment,
            tokens,
            sights,
            plan,
            width: *width,
            viewer: Viewer::new(problem, batch, head),
            place,
        }
    }

    /// A range of queries: dq, and the sums for keys and values if wanted.
    ///
    /// # Safety
    /// - Nothing else holds the rows of these queries in the gradient of the queries.
    pub(crate) unsafe fn range(
        &self,
        head: usize,
        tokens: Range<usize>,
        scratch: &mut Scratch<'a, E::Compute>,
        mut sums: Option<&mut GroupSums<'_, E::Compute>>,
    ) {
        let key_width = self.widths().0;
        scratch.dq[..tokens.len() * key_width].fill(E::Compute::ZERO);
        let mut dq = std::mem::replace(&mut scratch.dq, Buffer::scratch(0));
        self.see(head, &tokens, &mut scratch.levels);
        self.pooled(head, &tokens, scratch, |index, rows, tile, queries, keys| {
            tile.add(rows, queries, keys, sums.as_mut().map(|sums| &mut sums.pooled[index]), Some(&mut dq));
        });
        let Scratch { tiles, rows, keys, lists, bias, levels, .. } = scratch;
        let finest = levels.len() - 1;
        let range = self.query_range(finest, head, tokens, &levels[finest]);
        lists.build(range.segment.keys.len(), range.sights, range.plan, range.width);
        let source = self.source(self.batch.group(head));
        for place in 0..lists.present().len() {
            let buffers = BlockBuffers { tile: &mut tiles[finest], keys, bias };
            self.exact(&range, rows, lists, place, &source, buffers, |tile, queries, keys| {
                GradientTile::prefetch(rows, Some(&dq), queries.next);
                tile.add(rows, queries.queries, keys, sums.as_mut().map(|sums| &mut sums.exact), Some(&mut dq));
            });
        }
        let (item, head_of_item) = self.batch.item_and_head(head);
        for (query, token) in range.tokens.clone().enumerate() {
            // SAFETY: the caller's.
            let to = unsafe { self.gradients.query.row_mut(item, head_of_item, token) };
            E::narrow(&dq[query * key_width..][..to.len()], to);
        }
        scratch.dq = dq;
    }

    /// Copies the rows of the queries of a range, and differentiates pooled keys and values of every level. Calls `then` with the level, the
    /// rows, and what is to be added of some keys for a few queries.
    pub(crate) fn pooled(
        &self,
        head: usize,
        tokens: &Range<usize>,
        scratch: &mut Scratch<'a, E::Compute>,
        mut then: impl FnMut(usize, &RangeRows<E::Compute>, &mut GradientTile<E::Compute>, &[u32], KeyRows<'_, E::Compute>),
    ) {
        let Scratch { tiles, rows, lists, child_bias, levels, numbers, .. } = scratch;
        for (index, tile) in tiles.iter_mut().enumerate() {
            let range = self.query_range(index, head, tokens.clone(), &levels[index]);
            let Some(above) = index.checked_sub(1) else {
                self.fill(&range, &numbers[..range.tokens.len()], rows);
                self.coarse(&range, rows, numbers, &(0..range.segment.keys.len()), tile, |tile, queries, keys| {
                    then(index, rows, tile, queries, keys);
                });
                continue;
            };
            let (blocks, above) = (self.levels[above].batch.segment(head).keys.len(), &levels[above]);
            lists.build(blocks, &above.sights, &above.plan, above.width);
            for place in 0..lists.present().len() {
                self.children(&range, rows, lists, place, (tile, child_bias), |tile, queries, keys| {
                    then(index, rows, tile, queries, keys);
                });
            }
        }
    }

    /// Copies the rows of some queries of a range.
    pub(crate) fn fill(&self, range: &QueryRange<'_>, numbers: &[u32], rows: &mut RangeRows<E::Compute>) {
        let (item, head_of_item) = self.batch.item_and_head(range.head);
        let (query, grad) = (self.inputs.query.head(item, head_of_item), self.grad_out.head(item, head_of_item));
        let terms = &self.terms_of(range.head)[range.tokens.clone()];
        rows.fill(self.problem.level, range.tokens.len(), numbers, |number| {
            let token = range.tokens.start + number;
            (query.row(token), grad.row(token), terms[number])
        });
    }

    /// Differentiates the pooled keys and values of the children of a block that queries refine above, given by its place among those
    /// present, and calls `then` with what is to be added for a few of these queries.
    fn children(
        &self,
        range: &QueryRange<'_>,
        rows: &RangeRows<E::Compute>,
        lists: &QueriesOfBlocks,
        place: usize,
        (tile, bias): (&mut GradientTile<E::Compute>, &mut BiasColumns<E::Compute>),
        mut then: impl FnMut(&mut GradientTile<E::Compute>, &[u32], KeyRows<'_, E::Compute>),
    ) {
        let TokenLevel { problem, batch, means } = &self.levels[range.index];
        let (segment, group, (_, head)) = (range.segment, batch.group(range.head), batch.item_and_head(range.head));
        let Some(means) = means else { return };
        let (keys, Some(values)) = (means.keys(batch, group), means.values(batch, group)) else { return };
        let blocks = child_columns(segment, lists.present()[place], problem.children().expect("a level below another one"));
        let row = |query: usize| &range.plan[query * range.width..][..range.width];
        let left = |&query: &u32| leaves_some(&range.sights[query as usize], row(query as usize), &blocks);
        let queries: Vec<u32> = lists.all_of(place).iter().copied().filter(left).collect();
        let dropping = problem.dropout.is_some();
        let names: Vec<u32> = blocks.clone().filter(|_| dropping).map(block_name).collect();
        let mut weights = Vec::new();
        weights_of(problem, segment, &blocks, &mut weights);
        let column = batch.column(group, 0);
        let finite = self.finite_means[range.index][column + blocks.start..column + blocks.end].iter().all(|&finite| finite);
        for queries in queries.chunks(TILE_QUERIES) {
            let guard = !(finite && rows.are_finite(queries));
            tile.start(rows, queries, Stream::Coarse, range.place, guard);
            let of_children = KeyRows {
                keys: matrix(&keys, blocks.clone()),
                values: matrix(&values, blocks.clone()),
                first: blocks.start,
                names: &names,
                guard,
                bf16: None,
            };
            tile.differentiate(of_children, |logits, columns| {
                let read = |query: usize, biases: &mut [E::Compute]| {
                    let (sight, place) = (&range.sights[query], (head, range.tokens.start + query));
                    read_row(problem, segment, place, sight, row(query), (&blocks, &weights), biases);
                };
                bias.add(problem.level, queries.iter().map(|&query| query as usize), read, logits, columns);
            });
            then(tile, queries, of_children);
        }
    }

    /// Differentiates some pooled keys and values of the coarsest level, and calls `then` with what is to be added of each part of them for a few queries.
    /// `numbers` are those of the queries of the range.
    pub(crate) fn coarse(
        &self,
        range: &QueryRange<'_>,
        rows: &RangeRows<E::Compute>,
        numbers: &[u32],
        blocks: &Range<usize>,
        tile: &mut GradientTile<E::Compute>,
        mut then: impl FnMut(&mut GradientTile<E::Compute>, &[u32], KeyRows<'_, E::Compute>),
    ) {
        let TokenLevel { problem, batch, means } = &self.levels[range.index];
        let (segment, group, (_, head)) = (range.segment, batch.group(range.head), batch.item_and_head(range.head));
        let Some(means) = means else { return };
        let (keys, Some(values)) = (means.keys(batch, group), means.values(batch, group)) else { return };
        let dropping = problem.dropout.is_some();
        for tokens in segment.tiles(range.tokens.clone(), TILE_QUERIES) {
            let queries = tokens.start - range.tokens.start..tokens.end - range.tokens.start;
            let sights = &range.sights[queries.clone()];
            let open = span_of_open(sights);
            let visible = blocks.start.max(open.start)..blocks.end.min(open.end);
            if visible.is_empty() {
                continue;
            }
            let plan = &range.plan[queries.start * range.width..queries.end * range.width];
            let numbers = &numbers[queries];
            // Gradient 0 times a mean or a query that is not finite would be NaN. All that is multiplied decides, so that what
            // some query does not see has no say in how the others are computed.
            let column = batch.column(group, 0);
            let finite_means = &self.finite_means[range.index][column + visible.start..column + visible.end];
            let guard = !(rows.are_finite(numbers) && finite_means.iter().all(|&finite| finite));
            tile.start(rows, numbers, Stream::Coarse, range.place, guard);
            for_steps(&visible, |part| {
                let names: Vec<u32> = part.clone().filter(|_| dropping).map(block_name).collect();
                let of_part = KeyRows {
                    keys: matrix(&keys, part.clone()),
                    values: matrix(&values, part.clone()),
                    first: part.start,
                    names: &names,
                    guard,
                    bf16: None,
                };
                tile.differentiate(of_part, |logits, columns| {
                    add_mean_distances(problem, segment, head, &tokens, &part, logits, columns);
                    hide(segment, head, &tokens, sights, &part, logits, columns);
                    weigh(logits, columns, &segment.keys, part.clone(), problem.coarse_shift);
                    exclude(logits, columns, sights, plan, range.width, &part);
                });
                then(tile, numbers, of_part);
            });
        }
    }

    /// Differentiates a block of keys and values, given by its place among those present, for the queries that compute it, and calls
    /// `then` with what is to be added for a few of them.
    #[allow(clippy::too_many_arguments, reason = "queries, keys, the buffers, and what is wanted")]
    pub(crate) fn exact(
        &self,
        range: &QueryRange<'_>,
        rows: &RangeRows<E::Compute>,
        lists: &QueriesOfBlocks,
        place: usize,
        source: &KeySource<'_, E>,
        BlockBuffers { tile, keys, bias }: BlockBuffers<'_, E::Compute>,
        mut then: impl FnMut(&mut GradientTile<E::Compute>, &QueryTile<'_>, KeyRows<'_, E::Compute>),
    ) {
        let numbers = source.numbers(lists.present()[place]);
        keys.clear();
        assert!(keys.push(source, numbers.clone()), "an empty batch has room for a block");
        let Some(part) = keys.parts(source).next() else { return };
        let dropping = self.problem.dropout.is_some();
        let names: Vec<u32> = numbers.clone().filter(|_| dropping).map(|number| dropout_key(source, number)).collect();
        let finite = |matrix: Matrix<'_, E::Compute>| E::Compute::run(self.problem.level, AllFinite(matrix));
        let mut keys_are_finite = None;
        #[allow(clippy::cast_possible_truncation, reason = "tokens have 32 bits where there are tiles")]
        let tokens: Vec<u32> = numbers.clone().filter(|_| tile.on_tiles()).map(|number| source.token(number) as u32).collect();
        let bf16 = source.all_bf16().filter(|_| tile.on_tiles()).map(|(keys, values)| (keys, values, &tokens[..]));
        for_query_tiles(lists, place, |queries| {
            // Gradient 0 times a key or a query that is not finite would be NaN.
            let guard = queries.partly
                && !(rows.are_finite(queries.queries)
                    && *keys_are_finite.get_or_insert_with(|| finite(part.keys) && finite(part.values)));
            tile.start(rows, queries.queries, Stream::Exact, range.place, guard);
            let of_block = KeyRows { keys: part.keys, values: part.values, first: numbers.start, names: &names, guard, bf16 };
            tile.differentiate(of_block, |logits, columns| {
                if queries.partly || range.viewer.is_biased() {
                    let seen = queries
                        .queries
                        .iter()
                        .map(|&query| (range.tokens.start + query as usize, &range.sights[query as usize]));
                    bias.apply(&range.viewer, seen, &numbers, logits, columns);
                }
            });
            then(tile, queries, of_block);
        });
    }
}

/// Adds mean biases to the logits of some blocks, and sets those that a query does not see all of to `-inf`.
fn hide<T: Scalar>(
    segment: &Segment,
    head: usize,
    tokens: &Range<usize>,
    sights: &[Sight<'_>],
    blocks: &Range<usize>,
    logits: &mut [T],
    columns: usize,
) {
    for (lane, (sight, token)) in sights.iter().zip(tokens.clone()).enumerate() {
        let means = segment.mean_biases(head, token);
        for block in blocks.clone() {
            let logit = &mut logits[(block - blocks.start) * columns + lane];
            if !sight.is_open(block) {
                *logit = T::NEG_INFINITY;
            } else if let Some(means) = means {
                *logit += T::from_f64(means[block]);
            }
        }
    }
}
