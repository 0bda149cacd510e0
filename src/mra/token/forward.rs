//! Forward of the token form: out, lse and the plan of every query.

use std::ops::Range;

use super::coarse::{CoarseSource, CoarseTile, State, Tile};
use super::exact::{ExactBlock, RangeOfHead};
use super::queries_of_block::QueriesOfBlocks;
use super::visible_keys::Viewer;
use crate::exec::{Chunks, TensorMut, threads};
use crate::mra::attend::{KeyBatch, KeySource, TILE_QUERIES, finish};
use crate::mra::inputs::Inputs;
use crate::mra::problem::{Batch, Mode, Problem, Sight};
use crate::mra::pyramid::{Means, PooledInputs};
use crate::mra::select::number;
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

/// Computes out and lse of the segments of this form. Shapes are those of the problem.
pub(crate) fn forward<E: Element>(
    problem: &Problem<'_>,
    batch: &Batch<'_>,
    inputs: &Inputs<'_, E>,
    pooled: Option<&PooledInputs<'_, E::Compute>>,
    plan: &PlanBytes<'_>,
    outputs: &Outputs<'_, '_, E>,
) {
    let full = problem.mode == Mode::Full;
    let selecting = matches!(plan, PlanBytes::Chosen(_));
    let means = ((full || selecting) && !problem.is_everything()).then(|| Means::new(problem, batch, inputs, pooled, full));
    let value_dim = inputs.value.shape()[3];
    let pass = Pass { problem, batch, query: &inputs.query, means, plan, value_dim };
    pass.run(|pass, scratch, head, range| {
        let lists = &mut scratch.lists;
        lists.build(batch.segment(head).keys.len(), &scratch.sights, &scratch.plan, pass.width(head));
        // SAFETY: each task has its own queries.
        unsafe { pass.exact(inputs, outputs, head, range, scratch) };
    });
}

/// Writes the plan of the segments of this form.
pub(crate) fn select<E: Element>(
    problem: &Problem<'_>,
    batch: &Batch<'_>,
    query: &Tensor<'_, E>,
    key: &Tensor<'_, E>,
    plan: &mut [u8],
) {
    if problem.is_everything() {
        return;
    }
    let inputs = Inputs { query: *query, key: *key, value: *key };
    let means = Some(Means::new(problem, batch, &inputs, None, false));
    let plan = PlanBytes::Chosen(Some(Chunks::new(plan, 1)));
    Pass { problem, batch, query, means, plan: &plan, value_dim: 0 }.run(|_, _, _, _| ());
}

struct Pass<'a, E: Element> {
    problem: &'a Problem<'a>,
    batch: &'a Batch<'a>,
    query: &'a Tensor<'a, E>,
    means: Option<Means<'a, E::Compute>>,
    plan: &'a PlanBytes<'a>,
    value_dim: usize,
}

/// What a thread reuses from range to range.
struct Scratch<'a, T> {
    sights: Vec<Sight<'a>>,
    plan: Vec<i32>,
    lists: QueriesOfBlocks,
    coarse: CoarseTile<T>,
    exact: ExactBlock<T>,
    keys: KeyBatch<T>,
    state: State<T>,
}

impl<'a, E: Element> Pass<'a, E> {
    /// Calls `body` with every range of queries of every flat head, whose plan and coarse state are then in the scratch.
    fn run(&self, body: impl Fn(&Self, &mut Scratch<'a, E::Compute>, usize, Range<usize>) + Sync) {
        let (problem, batch) = (self.problem, self.batch);
        let threads = self.threads();
        let size = range_for_threads(problem, threads);
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
        let problem = self.problem;
        Scratch {
            sights: Vec::with_capacity(queries),
            plan: Vec::new(),
            lists: QueriesOfBlocks::default(),
            coarse: CoarseTile::new(problem, self.batch, queries),
            exact: ExactBlock::new(problem),
            keys: KeyBatch::new(problem, problem.head_dim, self.value_dim),
            state: State::new(queries, problem.padded::<E::Compute>(self.value_dim)),
        }
    }

    /// Threads worth starting.
    fn threads(&self) -> usize {
        let problem = self.problem;
        let products = self.batch.segments.iter().map(|segment| {
            let blocks = segment.keys.len();
            let exact = if problem.is_everything() { blocks } else { problem.plan_width(segment) };
            segment.rows.tokens().len().saturating_mul(exact * problem.block_size + blocks)
        });
        let products = products.fold(0, usize::saturating_add).saturating_mul(problem.heads);
        problem.threads_for(products.saturating_mul(problem.head_dim + self.value_dim))
    }

    fn width(&self, head: usize) -> usize {
        self.problem.plan_width(self.batch.segment(head))
    }

    /// Reads or makes the plan of a range of queries of a flat head, and starts their softmax.
    fn choose(&self, head: usize, range: &Range<usize>, scratch: &mut Scratch<'a, E::Compute>) {
        let (problem, batch, width) = (self.problem, self.batch, self.width(head));
        let (segment, (item, head_of_item)) = (batch.segment(head), batch.item_and_head(head));
        let Scratch { sights, plan, coarse, state, .. } = scratch;
        sights.clear();
        sights.extend(range.clone().map(|token| problem.sight(segment, head_of_item, token)));
        let first = range.start - segment.rows.tokens().start;
        let place = problem.plan_range(segment, head_of_item).start + 4 * first * width;
        let bytes = place..place + 4 * range.len() * width;
        plan.clear();
        match self.plan {
            PlanBytes::Given(given) => plan.extend(given[bytes.clone()].chunks_exact(4).map(number)),
            PlanBytes::Chosen(_) => plan.resize(range.len() * width, -1),
        }
        let selecting = matches!(self.plan, PlanBytes::Chosen(_));
        let source = CoarseSource::new(problem, batch, self.means.as_ref(), head, selecting);
        let rows = self.query.head(item, head_of_item);
        for tokens in segment.tiles(range.clone(), TILE_QUERIES) {
            let first = tokens.start - range.start;
            let numbers = &mut plan[first * width..][..tokens.len() * width];
            let sights = &sights[first..first + tokens.len()];
            let tile = Tile { sights, finest: sights, tokens, first };
            coarse.compute(&source, &rows, &tile, numbers, width, state);
        }
        if let PlanBytes::Chosen(Some(chunks)) = self.plan {
            // SAFETY: each task has its own queries, and their bytes.
            let to = unsafe { chunks.range_mut(bytes) };
            for (to, number) in to.chunks_exact_mut(4).zip(plan) {
                to.copy_from_slice(&number.to_le_bytes());
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
        let (problem, batch) = (self.problem, self.batch);
        let (segment, (item, head_of_item)) = (batch.segment(head), batch.item_and_head(head));
        let Scratch { sights, lists, exact, keys, state, .. } = scratch;
        let (key_item, kv_head) = batch.item_and_kv_head(batch.group(head));
        let (key_rows, value_rows) = (inputs.key.head(key_item, kv_head), inputs.value.head(key_item, kv_head));
        let source = KeySource::new(problem, key_rows, value_rows, &segment.keys);
        let queries = RangeOfHead {
            rows: &inputs.query.head(item, head_of_item),
            dropout_head: batch.dropout_head(head),
            first_token: segment.rows.tokens().start,
            tokens: range.clone(),
            sights,
            viewer: Viewer::new(problem, batch, head),
            lists,
        };
        exact.attend(&queries, &source, keys, state);
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
