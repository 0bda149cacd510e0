//! Forward of the block form: out and lse of every query (docs/definitions.md, section 3.6).

use std::ops::Range;

use super::coarse::Coarse;
use super::first_order::FirstOrder;
use super::levels;
use crate::error::Result;
use crate::exec::{TensorMut, threads};
use crate::kernels::Stream;
use crate::mra::attend::{Attend, BiasTile, KeyBatch, KeySource, StartState, TILE_QUERIES, tile_columns, tiles};
use crate::mra::inputs::Inputs;
use crate::mra::problem::{Batch, Mode, Problem};
use crate::mra::pyramid::{LevelMeans, Pooled, Pyramid, Side};
use crate::mra::select::{BlockPlan, select_rows, select_rows_then};
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
    if problem.expands() {
        let plan = BlockPlan::read(problem, batch, plan);
        let [queries] = Pooled::each(problem, batch, [(&inputs.query, Side::Queries)]);
        first_order_and_exact(&FirstOrder { problem, batch, inputs, plan: &plan, queries: &queries }, out, lse);
        return;
    }
    let (plan, coarse) = levels::attend(problem, inputs, plan);
    exact(problem, batch, 0..batch.flat_heads(), inputs, &plan, coarse.as_ref(), out, lse);
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
    if problem.expands() {
        let tensors = [(&inputs.query, Side::Queries), (&inputs.key, Side::Keys)];
        let [queries, keys] = Pooled::each(problem, batch, tensors);
        let pyramid = Pyramid { queries, keys };
        select_rows(problem, batch, &pyramid, plan)?;
        let plan = &BlockPlan::read(problem, batch, plan);
        first_order_and_exact(&FirstOrder { problem, batch, inputs, plan, queries: &pyramid.queries }, out, lse);
        return Ok(());
    }
    if !problem.is_ladder() && batch.flat_heads() >= problem.threads {
        return selecting_in_waves(problem, batch, inputs, plan, out, lse);
    }
    let (plan, coarse) = levels::choose_and_attend(problem, inputs, plan)?;
    exact(problem, batch, 0..batch.flat_heads(), inputs, &plan, coarse.as_ref(), out, lse);
    Ok(())
}

/// As [`forward_selecting`] with two resolutions, some groups of heads after the others: their queries, keys and values are near from
/// pooling when exact blocks are computed from them.
fn selecting_in_waves<E: Element>(
    problem: &Problem<'_>,
    batch: &Batch<'_>,
    inputs: &Inputs<'_, E>,
    bytes: &mut [u8],
    out: &TensorMut<'_, E>,
    lse: &TensorMut<'_, E::Compute>,
) -> Result<()> {
    let value = (problem.mode == Mode::Full).then_some(&inputs.value);
    let mut means = LevelMeans::unset(problem, batch, &inputs.query, &inputs.key, value);
    let mut coarse = means.values.as_ref().map(|values| Coarse::unset(batch, values));
    let mut plan = BlockPlan::unread(batch);
    for groups in waves(problem, batch, inputs) {
        means.pool(problem, batch, &groups, &inputs.query, &inputs.key, value);
        let heads = batch.heads_of_all(&groups);
        if let (Some(coarse), Some(values)) = (&mut coarse, &means.values) {
            coarse.select(problem, batch, heads.clone(), &means.pyramid, values, bytes)?;
        } else {
            select_rows_then(problem, batch, heads.clone(), &means.pyramid, bytes, || (), |(), _, _, _| ())?;
        }
        plan.read_next(problem, batch, heads.clone(), bytes);
        exact(problem, batch, heads, inputs, &plan, coarse.as_ref(), out, lse);
    }
    Ok(())
}

/// Consecutive groups of heads: as many for each thread as a cache holds queries, keys and values of, and at least one.
fn waves<E: Element>(problem: &Problem<'_>, batch: &Batch<'_>, inputs: &Inputs<'_, E>) -> impl Iterator<Item = Range<usize>> {
    /// Bytes of a second-level cache and a thread's share of the third-level one.
    const NEAR: usize = 4 << 20;
    let elements = [&inputs.query, &inputs.key, &inputs.value].map(|tensor| tensor.shape().iter().product::<usize>());
    let bytes_of_group = elements.iter().sum::<usize>() * size_of::<E>() / batch.groups().max(1);
    let groups_of_thread = (NEAR / bytes_of_group.max(1)).max(1);
    let (all, step) = (batch.groups(), groups_of_thread.saturating_mul(problem.threads));
    (0..all).step_by(step).map(move |start| start..all.min(start.saturating_add(step)))
}

/// Continues the softmax of every query of some flat heads from the coarse level over the selected blocks.
#[allow(clippy::too_many_arguments, reason = "a call, which of its heads, and what is known of them")]
fn exact<E: Element>(
    problem: &Problem<'_>,
    batch: &Batch<'_>,
    heads: Range<usize>,
    inputs: &Inputs<'_, E>,
    plan: &BlockPlan,
    coarse: Option<&Coarse<E::Compute>>,
    out: &TensorMut<'_, E>,
    lse: &TensorMut<'_, E::Compute>,
) {
    let rows = batch.rows_of(&heads);
    let multiplications = multiplications(problem, inputs, plan.num_blocks_of(&rows) * problem.block_size);
    let scratch = || buffers(problem, batch, inputs);
    threads::for_each(problem.threads_for(multiplications), rows.len(), scratch, |buffers, task| {
        let (head, i) = batch.row_at(rows.start + task);
        let start = coarse.map_or(Start::Nothing, |coarse| Start::OfBlock(coarse.state(batch, head, i)));
        // SAFETY: each task has its own block of queries, and writes only its rows.
        unsafe { BlockRow { problem, batch, inputs, plan, head, i }.compute(&start, buffers, out, lse) };
    });
}

/// Expands the coarse blocks of some blocks of queries at a time, and goes on over the selected ones.
fn first_order_and_exact<E: Element>(first_order: &FirstOrder<'_, E>, out: &TensorMut<'_, E>, lse: &TensorMut<'_, E::Compute>) {
    let FirstOrder { problem, batch, inputs, plan, .. } = *first_order;
    let size = first_order.rows_of_task();
    let tasks: Vec<(usize, Range<usize>)> =
        (0..batch.flat_heads()).flat_map(|head| batch.segment(head).row_tiles(size).map(move |rows| (head, rows))).collect();
    // A coarse block costs each of its queries as much as a key, and the mean query half as much again for each of its keys.
    let coarse = problem.heads * batch.pairs_of_blocks() * 3;
    let multiplications = multiplications(problem, inputs, plan.num_blocks() * problem.block_size + coarse);
    let scratch = || (first_order.buffers(), buffers(problem, batch, inputs));
    threads::for_each(problem.threads_for(multiplications), tasks.len(), scratch, |(of_coarse, of_exact), task| {
        let (head, rows) = tasks[task].clone();
        first_order.attend(head, rows, of_coarse, of_exact, |i, start, of_exact| {
            // SAFETY: each task has its own blocks of queries, and writes only their rows.
            unsafe { BlockRow { problem, batch, inputs, plan, head, i }.compute(start, of_exact, out, lse) };
        });
    });
}

/// Multiplications of a block of queries with so many keys, or other rows of a key and a value.
fn multiplications<E: Element>(problem: &Problem<'_>, inputs: &Inputs<'_, E>, keys: usize) -> usize {
    keys.saturating_mul(problem.block_size * (problem.head_dim + inputs.value.shape()[3]))
}

/// What a thread computes exact blocks in.
pub(super) type ExactBuffers<T> = (Attend<T>, KeyBatch<T>, BiasTile<T>);

fn buffers<E: Element>(problem: &Problem<'_>, batch: &Batch<'_>, inputs: &Inputs<'_, E>) -> ExactBuffers<E::Compute> {
    let (columns, value_dim) = (tile_columns::<E::Compute>(problem), inputs.value.shape()[3]);
    let keys = KeyBatch::new(problem, problem.head_dim, value_dim).keeping(problem, batch.most_keys());
    (Attend::for_tensors::<E>(problem, columns, value_dim), keys, BiasTile::new(problem, columns))
}

/// The softmax that the queries of a block start from.
pub(super) enum Start<'a, T> {
    /// No coarse level.
    Nothing,
    /// That of the coarse level, the same for all of them.
    OfBlock(StartState<'a, T>),
    /// That of the coarse level, of each query: equal parts for the tiles of the block.
    OfQueries(&'a [T]),
    /// That of the coarse level, of the only tile of the block, which the buffers hold.
    Started,
}

/// One block of queries of one flat head.
struct BlockRow<'a, E: Element> {
    problem: &'a Problem<'a>,
    batch: &'a Batch<'a>,
    inputs: &'a Inputs<'a, E>,
    plan: &'a BlockPlan,
    head: usize,
    i: usize,
}

impl<E: Element> BlockRow<'_, E> {
    /// # Safety
    /// - Nothing else holds the rows of this block of queries in `out` and `lse`.
    unsafe fn compute(
        &self,
        start: &Start<'_, E::Compute>,
        (attend, keys, bias): &mut ExactBuffers<E::Compute>,
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
        attend.set_biased(self.batch.segment(self.head).is_biased());
        let sink = self.problem.sink(item, head).map(E::Compute::from_f64);
        for (index, tile) in tiles(rows.numbers(self.i)).enumerate() {
            let tokens = tile.clone().map(|number| {
                let token = rows.token(number);
                // To write a line that is far waits for it, too.
                // SAFETY: the caller's.
                prefetch_far(unsafe { out.row_mut(item, head, token) });
                queries.row(token)
            });
            match start {
                Start::Nothing => attend.start(tokens, None),
                Start::OfBlock(state) => attend.start(tokens, Some(state)),
                Start::OfQueries(states) => {
                    attend.start(tokens, None);
                    let of_tile = states.len() / self.problem.block_size.div_ceil(TILE_QUERIES);
                    attend.resume(&states[index * of_tile..][..of_tile]);
                }
                Start::Started => {}
            }
            let places = tile.clone().map(|number| rows.token(number) - first);
            attend.number_queries(Stream::Exact, self.batch.dropout_head(self.head), places);
            self.attend_to_selected(attend, keys, bias, &tile);
            let after = rows.count(self.i);
            for (query, number) in tile.enumerate() {
                let token = rows.token(number);
                // This thread probably has the next block next. A few lines at a time: more would wait for each other.
                if number + after < rows.total() {
                    prefetch_far(queries.row(rows.token(number + after)));
                }
                // SAFETY: the caller's.
                unsafe { attend.finish(query, sink, out.row_mut(item, head, token), &mut lse.row_mut(item, head, token)[0]) };
            }
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
