//! The coarse level to first order: what unselected blocks add to the softmax of each query (docs/definitions.md, section 3.8).
//!
//! Their summaries are keys and values like others, one for each block, with an offset on the logit. Unlike with means they are
//! different for each block of queries, and the softmax for each query, so that nothing of it is shared but the summaries.

use std::ops::Range;

use super::forward::{ExactBuffers, Start};
use super::summaries::{Place, ROWS, Summaries};
use crate::exec::Buffer;
use crate::kernels::Stream;
use crate::mra::attend::{Attend, KeyBatch, KeySource, TILE_QUERIES, tile_columns, tiles};
use crate::mra::inputs::Inputs;
use crate::mra::problem::{Batch, Blocks, Problem};
use crate::mra::pyramid::Pooled;
use crate::mra::select::BlockPlan;
use crate::simd::Element;

/// What all tasks share.
pub(super) struct FirstOrder<'a, E: Element> {
    pub(super) problem: &'a Problem<'a>,
    pub(super) batch: &'a Batch<'a>,
    pub(super) inputs: &'a Inputs<'a, E>,
    pub(super) plan: &'a BlockPlan,
    pub(super) queries: &'a Pooled<E::Compute>,
}

/// What a thread reuses.
pub(super) struct FirstOrderBuffers<T> {
    summaries: Summaries<T>,
    attend: Attend<T>,
    keys: KeyBatch<T>,
    states: Buffer<T>,
    /// Of the state of a tile of queries.
    state_len: usize,
}

impl<E: Element> FirstOrder<'_, E> {
    /// Rows of a task: fewer where there would be too few tasks for the threads. The result does not depend on it.
    pub(super) fn rows_of_task(&self) -> usize {
        let tasks = |rows: usize| self.batch.rows().div_ceil(rows);
        let mut rows = ROWS;
        while rows > 4 && tasks(rows) < 2 * self.problem.threads {
            rows /= 2;
        }
        rows
    }

    pub(super) fn buffers(&self) -> FirstOrderBuffers<E::Compute> {
        let (problem, value_dim) = (self.problem, self.inputs.value.shape()[3]);
        let state_len = Attend::<E::Compute>::saved_len(problem, TILE_QUERIES.min(problem.block_size), value_dim);
        FirstOrderBuffers {
            summaries: Summaries::new(problem, self.batch, value_dim),
            attend: Attend::new(problem, tile_columns::<E::Compute>(problem), value_dim),
            keys: KeyBatch::new(problem, problem.head_dim, value_dim),
            states: Buffer::scratch(ROWS * problem.block_size.div_ceil(TILE_QUERIES) * state_len),
            state_len,
        }
    }

    /// Attends from the queries of some rows of a flat head to the summaries of their coarse blocks. Calls `then` with each row and with
    /// where its queries start from in `exact`, which goes on at once if it can.
    pub(super) fn attend(
        &self,
        head: usize,
        rows: Range<usize>,
        buffers: &mut FirstOrderBuffers<E::Compute>,
        exact: &mut ExactBuffers<E::Compute>,
        mut then: impl FnMut(usize, &Start<'_, E::Compute>, &mut ExactBuffers<E::Compute>),
    ) {
        let (problem, batch) = (self.problem, self.batch);
        let segment = batch.segment(head);
        let (item, kv_head) = batch.item_and_kv_head(batch.group(head));
        let (keys, values) = (self.inputs.key.head(item, kv_head), self.inputs.value.head(item, kv_head));
        let source = KeySource::new(problem, keys, values, &segment.keys);
        buffers.summaries.start(problem, &self.queries.of_head(batch, head), rows.clone(), |_| true);
        let (len, count) = (states_of_row(problem, buffers.state_len), segment.keys.len());
        let at_once = problem.block_size <= TILE_QUERIES && exact.0.takes_compute_type();
        let mut first = 0;
        loop {
            let blocks = first..(first + buffers.summaries.capacity).min(count);
            let place = Place { head, rows: rows.clone(), blocks: blocks.clone() };
            buffers.summaries.compute(problem, batch, self.plan, &place, &source);
            for (row, i) in rows.clone().enumerate() {
                if blocks.end == count && at_once {
                    self.attend_row(&place, row, buffers, Some(&mut exact.0));
                    then(i, &Start::Started, exact);
                    continue;
                }
                self.attend_row(&place, row, buffers, None);
                if blocks.end == count {
                    then(i, &Start::OfQueries(&buffers.states[row * len..][..len]), exact);
                }
            }
            if blocks.end == count {
                return;
            }
            first = blocks.end;
        }
    }

    /// Takes the blocks of a place into the states of a row of it, or into that of `exact`, for the only tile that the row then has.
    fn attend_row(
        &self,
        place: &Place,
        row: usize,
        buffers: &mut FirstOrderBuffers<E::Compute>,
        exact: Option<&mut Attend<E::Compute>>,
    ) {
        let (problem, batch, i) = (self.problem, self.batch, place.rows.start + row);
        let FirstOrderBuffers { summaries, attend, keys, states, state_len } = buffers;
        let (item, head) = batch.item_and_head(place.head);
        let (of_rows, queries) = (&batch.segment(place.head).rows, self.inputs.query.head(item, head));
        let blocks = Blocks::all(0..place.blocks.len(), 1);
        let source = summaries.source(problem, row, &blocks, place.blocks.start);
        let (any, continues) = (summaries.any(row, blocks.total()), exact.is_some());
        if !any && place.blocks.start > 0 && !continues {
            return;
        }
        keys.clear();
        keys.push(&source, 0..blocks.total());
        let attend = exact.unwrap_or(attend);
        let states = &mut states[row * states_of_row(problem, *state_len)..];
        for (tile, state) in tiles(of_rows.numbers(i)).zip(states.chunks_exact_mut(*state_len)) {
            attend.start(tile.clone().map(|number| queries.row(of_rows.token(number))), None);
            if place.blocks.start > 0 {
                attend.resume(state);
            }
            if any {
                let lanes = attend.columns;
                attend.number_queries(Stream::Coarse, batch.dropout_head(place.head), tile.map(|_| i));
                attend.attend(keys, &source, &[], None, |logits| summaries.add_offsets(row, logits, lanes));
            }
            if !continues {
                attend.save(state);
            }
        }
    }
}

/// The length of the states of the queries of a row.
fn states_of_row(problem: &Problem<'_>, state_len: usize) -> usize {
    problem.block_size.div_ceil(TILE_QUERIES) * state_len
}
