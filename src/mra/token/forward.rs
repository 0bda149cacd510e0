//! Forward of the token form: out, lse and the plan of every query.

use std::ops::Range;

use super::coarse::{CoarseSource, CoarseTile, State, Tile};
use super::exact::{Chosen, ExactBlock};
use super::key_block::RangeOfHead;
use super::key_codes::KeyCodes;
use super::levels::{LevelOfRange, TokenLevel, Wanted, candidates, levels, read_plan};
use super::members::{Members, most_members};
use super::queries_of_block::QueriesOfBlocks;
use super::rank::{QueryCodes, RankedBlocks};
use super::refine::{Refiner, Refining};
use super::scaled::Scaled;
use super::visible_keys::Viewer;
use crate::exec::{Buffer, Chunks, TensorMut, threads};
use crate::mra::attend::{KeyBatch, KeySource, TILE_QUERIES, finish};
use crate::mra::inputs::Inputs;
use crate::mra::problem::{Mode, Problem, Score};
use crate::mra::pyramid::PooledInputs;
use crate::simd::{Element, Scalar};
use crate::tensor::Tensor;

/// Queries of a range, at most: enough that many of them compute each block, so that its keys and values are read from far away
/// once for all of them, and few enough that what is kept of them is not far away itself. At 8192 tokens ranges of 1024 and
/// of 4096 queries took a tenth longer.
pub(crate) const RANGE_QUERIES: usize = 2048;

/// Queries of a range where results do not depend on it: fewer if otherwise there were too few ranges for the threads.
pub(crate) fn range_for_threads(problem: &Problem<'_>, threads: usize) -> usize {
    let queries = problem.batch * problem.heads * problem.query_len;
    queries.div_ceil(4 * threads).next_multiple_of(TILE_QUERIES).clamp(RANGE_QUERIES / 4, RANGE_QUERIES)
}

/// Where the plan comes from, and goes.
pub(crate) enum PlanBytes<'a> {
    Given(&'a [u8]),
    Chosen(Option<Chunks<'a, u8>>),
}

/// Where outputs go.
pub(crate) struct Outputs<'a, 'o, E: Element> {
    pub(crate) out: &'a TensorMut<'o, E>,
    pub(crate) lse: &'a TensorMut<'o, E::Compute>,
}

/// Computes out and lse of the segments of this form. Shapes are those of the problem; `pooled` has the means of each level, the coarsest
/// first.
pub(crate) fn forward<E: Element>(
    problem: &Problem<'_>,
    inputs: &Inputs<'_, E>,
    pooled: Option<&[PooledInputs<'_, E::Compute>]>,
    plan: &PlanBytes<'_>,
    outputs: &Outputs<'_, '_, E>,
) {
    let wanted = match (problem.mode, plan) {
        (Mode::Full, _) => Wanted::KeysAndValues,
        (Mode::Sparse, PlanBytes::Chosen(_)) => Wanted::Keys,
        (Mode::Sparse, PlanBytes::Given(_)) => Wanted::Nothing,
    };
    let levels = levels(problem, inputs, pooled, wanted);
    Pass::new(problem, levels, inputs, plan, inputs.value.shape()[3]).run(|pass, scratch, head, range| {
        let (blocks, width) = (pass.finest().batch.segment(head).keys.len(), pass.width(head));
        let finest = scratch.levels.last().expect("a level");
        scratch.lists.build(blocks, &finest.sights, &finest.plan, width);
        // SAFETY: each task has its own queries.
        unsafe { pass.exact(inputs, outputs, head, range, scratch) };
    });
}

/// Writes the plan of the segments of this form.
pub(crate) fn select<E: Element>(problem: &Problem<'_>, query: &Tensor<'_, E>, key: &Tensor<'_, E>, plan: &mut [u8]) {
    if problem.is_everything() {
        return;
    }
    let inputs = Inputs { query: *query, key: *key, value: *key };
    let levels = levels(problem, &inputs, None, Wanted::Keys);
    let plan = PlanBytes::Chosen(Some(Chunks::new(plan, 1)));
    Pass::new(problem, levels, &inputs, &plan, 0).run(|_, _, _, _| ());
}

struct Pass<'a, E: Element> {
    problem: &'a Problem<'a>,
    levels: Vec<TokenLevel<'a, E::Compute>>,
    query: &'a Tensor<'a, E>,
    key: &'a Tensor<'a, E>,
    /// Codes of all blocks of each level, where these are ranked by them and that pays.
    codes: Vec<Option<KeyCodes<E::Compute>>>,
    plan: &'a PlanBytes<'a>,
    /// Whether tokens choose, and by more than means.
    ranking: bool,
    value_dim: usize,
}

/// What a thread reuses from range to range.
struct Scratch<'a, T> {
    levels: Vec<LevelOfRange<'a>>,
    lists: QueriesOfBlocks,
    codes: QueryCodes<T>,
    coarse: CoarseTile<T>,
    /// One for each level but the coarsest.
    refiners: Vec<Refiner<T>>,
    exact: ExactBlock<T>,
    keys: KeyBatch<T>,
    /// Queries of the range, if they cannot be read where they lie.
    queries: Buffer<T>,
    state: State<T>,
}

impl<'a, E: Element> Pass<'a, E> {
    fn new(
        problem: &'a Problem<'a>,
        levels: Vec<TokenLevel<'a, E::Compute>>,
        inputs: &'a Inputs<'_, E>,
        plan: &'a PlanBytes<'a>,
        value_dim: usize,
    ) -> Self {
        let ranking = problem.score == Score::Max && matches!(plan, PlanBytes::Chosen(_));
        let codes = (0..levels.len()).map(|index| {
            let codes = || KeyCodes::of_all(&levels[index], levels.get(index + 1), &inputs.key);
            ranking.then(codes).flatten()
        });
        Self { problem, codes: codes.collect(), levels, query: &inputs.query, key: &inputs.key, plan, ranking, value_dim }
    }

    /// Calls `body` with every range of queries of every flat head, whose plan and coarse state are then in the scratch.
    fn run(&self, body: impl Fn(&Self, &mut Scratch<'a, E::Compute>, usize, Range<usize>) + Sync) {
        let batch = &self.finest().batch;
        let threads = self.threads();
        let size = range_for_threads(self.problem, threads);
        let mut tasks: Vec<(usize, Range<usize>)> = Vec::new();
        for head in 0..batch.flat_heads() {
            let first = tasks.len();
            tasks.extend(batch.segment(head).ranges(size).map(|range| (head, range)));
            // In causal attention the last ranges of a head see most: they come first, so that no thread starts with one when the
            // others are done.
            tasks[first..].reverse();
        }
        let most = tasks.iter().map(|(_, range)| range.len()).max().unwrap_or(0);
        threads::for_each(
            threads,
            tasks.len(),
            || self.scratch(most),
            |scratch, task| {
                let (head, range) = tasks[task].clone();
                self.choose(head, &range, scratch);
                body(self, scratch, head, range);
            },
        );
    }

    fn scratch(&self, queries: usize) -> Scratch<'a, E::Compute> {
        let (problem, coarsest) = (self.problem, &self.levels[0]);
        let members = |index: usize| most_members(&self.levels[index], self.levels.get(index + 1));
        Scratch {
            levels: self.levels.iter().map(|_| LevelOfRange::default()).collect(),
            lists: QueriesOfBlocks::default(),
            codes: QueryCodes::new(problem),
            coarse: CoarseTile::new(coarsest.problem, &coarsest.batch, members(0), queries),
            refiners: (1..self.levels.len()).map(|index| Refiner::new(self.levels[index].problem, members(index))).collect(),
            exact: ExactBlock::new::<E>(problem, self.value_dim),
            keys: KeyBatch::new(problem, problem.head_dim, self.value_dim),
            queries: Buffer::scratch(0),
            state: State::new(queries, problem.padded::<E::Compute>(self.value_dim)),
        }
    }

    /// Threads worth starting.
    fn threads(&self) -> usize {
        let (problem, finest) = (self.problem, self.finest());
        let exact = finest.batch.segments.iter().map(|segment| {
            let blocks = if problem.is_everything() { segment.keys.len() } else { problem.plan_width(segment) };
            segment.rows.tokens().len().saturating_mul(blocks * problem.block_size)
        });
        let products = exact.fold(candidates(&self.levels), usize::saturating_add).saturating_mul(problem.heads);
        problem.threads_for(products.saturating_mul(problem.head_dim + self.value_dim))
    }

    /// The level of the finest blocks.
    fn finest(&self) -> &TokenLevel<'a, E::Compute> {
        self.levels.last().expect("a level")
    }

    /// How many numbers the plan of the finest level has for each token.
    fn width(&self, head: usize) -> usize {
        self.problem.plan_width(self.finest().batch.segment(head))
    }

    /// What the blocks of a level are ranked by for a flat head, if not by their means.
    fn ranked(&self, index: usize, head: usize) -> Option<RankedBlocks<'_, E>> {
        let (level, below) = (&self.levels[index], self.levels.get(index + 1));
        let means = level.means.as_ref().filter(|_| self.ranking)?;
        let group = level.batch.group(head);
        Some(RankedBlocks {
            members: Members::of_group(level, below, self.key, group),
            means: means.keys(&level.batch, group),
            codes: self.codes[index].as_ref().map(|codes| (codes, level.batch.column(group, 0))),
        })
    }

    /// Reads or makes the plan of a range of queries of a flat head, and starts their softmax.
    fn choose(&self, head: usize, range: &Range<usize>, scratch: &mut Scratch<'a, E::Compute>) {
        let selecting = matches!(self.plan, PlanBytes::Chosen(_));
        let (item, head_of_item) = self.finest().batch.item_and_head(head);
        let rows = self.query.head(item, head_of_item);
        for (level, of_range) in self.levels.iter().zip(&mut scratch.levels) {
            of_range.see(level, head, range, |_| false);
        }
        if self.ranking {
            scratch.codes.encode(self.problem, &rows, range);
        }
        for (index, level) in self.levels.iter().enumerate() {
            let ranked = self.ranked(index, head);
            let ranked = ranked.as_ref().map(|ranked| (ranked, &scratch.codes));
            let segment = level.batch.segment(head);
            let source = CoarseSource::new(level.problem, &level.batch, level.means.as_ref(), head, selecting);
            let width = level.problem.plan_width(segment);
            let bytes = level.plan_bytes(head, range);
            if let PlanBytes::Given(given) = self.plan {
                read_plan(&mut scratch.levels, index, level, &given[bytes.clone()]);
            } else {
                scratch.levels[index].plan.clear();
                scratch.levels[index].plan.resize(range.len() * width, -1);
            }
            let (above, from) = scratch.levels.split_at_mut(index);
            let (own, below) = from.split_first_mut().expect("a level");
            let finest = below.last().map_or(&own.sights, |finest| &finest.sights);
            if let Some(above) = above.last() {
                let blocks = self.levels[index - 1].batch.segment(head).keys.len();
                scratch.lists.build(blocks, &above.sights, &above.plan, above.width);
                let queries = Scaled::new(self.problem, &rows, range, &mut scratch.queries);
                let queries = RangeOfHead::new(&queries, &level.batch, head, range);
                let refining = Refining { sights: &own.sights, finest, lists: &scratch.lists };
                let refiner = &mut scratch.refiners[index - 1];
                refiner.choose(&source, &queries, ranked, refining, &mut own.plan, width);
                refiner.attend(&source, &queries, refining, &own.plan, width, &mut scratch.state);
            } else {
                for tokens in segment.tiles(range.clone(), TILE_QUERIES) {
                    let first = tokens.start - range.start;
                    let places = first..first + tokens.len();
                    let numbers = &mut own.plan[first * width..][..tokens.len() * width];
                    let (sights, finest) = (&own.sights[places.clone()], &finest[places]);
                    let tile = Tile { tokens, first, sights, finest };
                    scratch.coarse.compute(&source, &rows, &tile, ranked, numbers, width, &mut scratch.state);
                }
            }
            if let PlanBytes::Chosen(Some(chunks)) = self.plan {
                // SAFETY: each task has its own queries, and their bytes.
                let to = unsafe { chunks.range_mut(bytes) };
                for (to, number) in to.chunks_exact_mut(4).zip(&own.plan) {
                    to.copy_from_slice(&number.to_le_bytes());
                }
            }
        }
    }

    /// The exact blocks of a range of queries of a flat head, and their outputs.
    ///
    /// # Safety
    /// - Nothing else holds the rows of these queries in the outputs.
    unsafe fn exact(
        &self,
        inputs: &Inputs<'_, E>,
        outputs: &Outputs<'_, '_, E>,
        head: usize,
        range: Range<usize>,
        scratch: &mut Scratch<'a, E::Compute>,
    ) {
        let (problem, batch) = (self.problem, &self.finest().batch);
        let (segment, (item, head_of_item)) = (batch.segment(head), batch.item_and_head(head));
        let Scratch { levels, lists, exact, keys, queries, state, .. } = scratch;
        let (key_item, kv_head) = batch.item_and_kv_head(batch.group(head));
        let (key_rows, value_rows) = (inputs.key.head(key_item, kv_head), inputs.value.head(key_item, kv_head));
        let source = KeySource::new(problem, key_rows, value_rows, &segment.keys);
        let queries = Scaled::new(problem, &inputs.query.head(item, head_of_item), &range, queries);
        let sights = &levels.last().expect("a level").sights;
        let chosen = Chosen { sights, viewer: Viewer::new(problem, batch, head), lists };
        exact.attend(&RangeOfHead::new(&queries, batch, head, &range), &chosen, &source, keys, state);
        let sink = problem.sink(item, head_of_item).map(E::Compute::from_f64);
        for (query, token) in range.enumerate() {
            // SAFETY: the caller's.
            let (out, lse) =
                unsafe { (outputs.out.row_mut(item, head_of_item, token), outputs.lse.row_mut(item, head_of_item, token)) };
            let values = &mut state.values[query * state.width..][..out.len()];
            lse[0] = finish(state.maximum[query], state.sum[query], sink, values, out);
        }
    }
}
