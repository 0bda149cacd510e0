//! Forward of the causal form: out, lse and the plan of every query.

use std::ops::Range;

use super::coarse::{CoarseSource, CoarseTile, State};
use super::exact::{ExactBlock, RangeOfHead};
use super::lists::BlockLists;
use super::pooled::{Means, PooledInputs};
use super::problem::{CausalBudget, CausalProblem, Sight};
use crate::error::{Error, Result};
use crate::mra::forward::Inputs;
use crate::mra::problem::{Mode, Problem};
use crate::mra::strip::{KeySource, Strip};
use crate::mra::tile::TILE_QUERIES;
use crate::simd::{Element, Scalar};
use crate::threads;
use crate::tiles::{Chunks, TensorMut};

/// Queries of a range, at most: enough that many of them meet each block, so that its keys and values are read from far away
/// once for all of them, and few enough that what is kept of them is not far away itself. At 8192 tokens ranges of 1024 and
/// of 4096 queries took a tenth longer.
pub(crate) const RANGE_QUERIES: usize = 2048;

/// Queries of a range where results do not depend on it: fewer if otherwise there were too few ranges for the threads.
pub(crate) fn range_for_threads(problem: &CausalProblem, threads: usize) -> usize {
    let queries = problem.inner.all_heads() * problem.inner.query_len;
    queries.div_ceil(4 * threads).next_multiple_of(TILE_QUERIES).clamp(RANGE_QUERIES / 4, RANGE_QUERIES)
}

/// Computes `out` `(B, H, Lq, Dv)` and `lse` `(B, H, Lq, 1)` for a given plan: `width` numbers for each query, its exact blocks.
/// Numbers that are no block visible to the query, and repeated ones, are left out.
///
/// Deterministic: the same bits for any number of threads, and for a query alone or among others.
///
/// # Errors
/// If a tensor does not have the shape of the problem; nothing is written then.
pub fn causal_forward<E: Element>(
    problem: &CausalProblem,
    inputs: &Inputs<'_, E>,
    pooled: Option<&PooledInputs<'_, E::Compute>>,
    plan: &[i32],
    out: &mut TensorMut<'_, E>,
    lse: &mut TensorMut<'_, E::Compute>,
) -> Result<()> {
    let width = plan_width(problem, plan.len())?;
    compute(problem, inputs, pooled, &Selection::Given(plan), width, out, lse)
}

/// As [`causal_forward`], with the blocks that each query chooses; they are written to `plan`, of
/// [`CausalProblem::plan_width`] numbers for each query: the blocks ascending, then -1.
///
/// # Errors
/// As [`causal_forward`], or if the budget is invalid.
pub fn causal_forward_selecting<E: Element>(
    problem: &CausalProblem,
    inputs: &Inputs<'_, E>,
    pooled: Option<&PooledInputs<'_, E::Compute>>,
    budget: &CausalBudget,
    plan: &mut [i32],
    out: &mut TensorMut<'_, E>,
    lse: &mut TensorMut<'_, E::Compute>,
) -> Result<()> {
    budget.validate()?;
    let width = problem.plan_width(budget);
    let expected = problem.inner.all_heads() * problem.inner.query_len * width;
    if plan.len() != expected {
        return Err(Error::new(format!("plan: {} numbers, expected {expected}: {width} for each query", plan.len())));
    }
    compute(problem, inputs, pooled, &Selection::Chosen(budget, Chunks::new(plan, width)), width, out, lse)
}

/// How many numbers a plan of this length has for each query.
pub(crate) fn plan_width(problem: &CausalProblem, len: usize) -> Result<usize> {
    let queries = problem.inner.all_heads() * problem.inner.query_len;
    let width = len.checked_div(queries).unwrap_or(0);
    if width * queries == len {
        return Ok(width);
    }
    Err(Error::new(format!("plan: {len} numbers, expected as many for each of {queries} queries")))
}

enum Selection<'a> {
    Given(&'a [i32]),
    Chosen(&'a CausalBudget, Chunks<'a, i32>),
}

fn compute<E: Element>(
    problem: &CausalProblem,
    inputs: &Inputs<'_, E>,
    pooled: Option<&PooledInputs<'_, E::Compute>>,
    selection: &Selection<'_>,
    width: usize,
    out: &mut TensorMut<'_, E>,
    lse: &mut TensorMut<'_, E::Compute>,
) -> Result<()> {
    let inner = &problem.inner;
    let value_dim = inputs.validate(inner)?;
    Problem::expect("out", out.shape(), [inner.batch, inner.heads, inner.query_len, value_dim])?;
    Problem::expect("lse", lse.shape(), [inner.batch, inner.heads, inner.query_len, 1])?;
    let full = inner.mode == Mode::Full;
    let means =
        (full || matches!(selection, Selection::Chosen(..))).then(|| Means::new(problem, inputs, pooled, full)).transpose()?;
    let pass = Pass { problem, inputs, means, selection, width, value_dim, out, lse };
    let threads = pass.threads();
    let size = range_for_threads(problem, threads);
    let ranges = inner.query_len.div_ceil(size);
    threads::for_each(
        threads,
        inner.all_heads() * ranges,
        || Scratch::new(&pass, size.min(inner.query_len)),
        |scratch, task| {
            // The last ranges of a head see most: they come first, so that no thread starts with one when the others are done.
            let (head, index) = (task / ranges, ranges - 1 - task % ranges);
            let range = index * size..((index + 1) * size).min(inner.query_len);
            // SAFETY: each task has its own queries.
            unsafe { pass.range(head, range, scratch) };
        },
    );
    Ok(())
}

struct Pass<'a, 'o, E: Element> {
    problem: &'a CausalProblem,
    inputs: &'a Inputs<'a, E>,
    means: Option<Means<'a, E::Compute>>,
    selection: &'a Selection<'a>,
    width: usize,
    value_dim: usize,
    out: &'a TensorMut<'o, E>,
    lse: &'a TensorMut<'o, E::Compute>,
}

/// What a thread reuses from range to range.
struct Scratch<T> {
    sights: Vec<Sight>,
    plan: Vec<i32>,
    lists: BlockLists,
    coarse: CoarseTile<T>,
    exact: ExactBlock<T>,
    strip: Strip<T>,
    state: State<T>,
}

impl<T: Scalar> Scratch<T> {
    fn new<E: Element<Compute = T>>(pass: &Pass<'_, '_, E>, queries: usize) -> Self {
        let (problem, inner) = (pass.problem, &pass.problem.inner);
        let width = inner.padded::<T>(pass.value_dim);
        Self {
            sights: Vec::with_capacity(queries),
            plan: Vec::with_capacity(queries * pass.width),
            lists: BlockLists::default(),
            coarse: CoarseTile::new(problem, queries),
            exact: ExactBlock::new(problem),
            strip: Strip::new(inner, inner.head_dim, pass.value_dim),
            state: State::new(queries, width),
        }
    }
}

impl<E: Element> Pass<'_, '_, E> {
    /// Threads worth starting.
    fn threads(&self) -> usize {
        let inner = &self.problem.inner;
        let keys = self.width * inner.block_size + inner.key_blocks();
        inner.threads_for(
            inner
                .all_heads()
                .saturating_mul(inner.query_len)
                .saturating_mul(keys)
                .saturating_mul(inner.head_dim + self.value_dim),
        )
    }

    /// A range of queries of a head; heads of all batch items are numbered through.
    ///
    /// # Safety
    /// - Nothing else holds the rows of these queries in the outputs.
    unsafe fn range(&self, head: usize, range: Range<usize>, scratch: &mut Scratch<E::Compute>) {
        let (inner, width) = (&self.problem.inner, self.width);
        let (batch, head_of_item) = (head / inner.heads, head % inner.heads);
        let rows = self.inputs.query.head(batch, head_of_item);
        let Scratch { sights, plan, lists, coarse, exact, strip, state } = scratch;
        sights.clear();
        sights.extend(range.clone().map(|token| self.problem.sight(batch, token)));
        let first_row = head * inner.query_len + range.start;
        plan.clear();
        plan.resize(range.len() * width, -1);
        let budget = match self.selection {
            Selection::Given(given) => {
                plan.copy_from_slice(&given[first_row * width..][..range.len() * width]);
                None
            }
            Selection::Chosen(budget, _) => Some(*budget),
        };
        let source = CoarseSource::new(self.problem, self.means.as_ref(), head, budget);
        for tile in self.problem.cut(batch, range.clone(), TILE_QUERIES) {
            let first = tile.start - range.start;
            let (tile_sights, tile_plan) =
                (&sights[first..first + tile.len()], &mut plan[first * width..][..tile.len() * width]);
            coarse.compute(&source, &rows, tile, tile_sights, tile_plan, width, state, first);
        }
        if let Selection::Chosen(_, chunks) = self.selection {
            for query in 0..range.len() {
                // SAFETY: the caller's.
                unsafe { chunks.get_mut(first_row + query) }.copy_from_slice(&plan[query * width..][..width]);
            }
        }
        let blocks = sights.last().map_or(0, |sight| sight.blocks);
        lists.build(blocks, sights, plan, width);
        let kv_head = inner.kv_head(head_of_item);
        let (keys, values) = (self.inputs.key.head(batch, kv_head), self.inputs.value.head(batch, kv_head));
        let source = KeySource::new(inner, keys, values, inner.keys(batch));
        let queries = RangeOfHead { rows: &rows, head, tokens: range.clone(), sights, lists };
        exact.attend(&queries, &source, strip, state);
        for (query, token) in range.enumerate() {
            // SAFETY: the caller's.
            let (out, lse) =
                unsafe { (self.out.row_mut(batch, head_of_item, token), self.lse.row_mut(batch, head_of_item, token)) };
            finish(state, query, out, &mut lse[0]);
        }
    }
}

/// Writes the output and the lse of a query.
fn finish<E: Element>(state: &mut State<E::Compute>, query: usize, out: &mut [E], lse: &mut E::Compute) {
    let sum = state.sum[query];
    if sum == E::Compute::ZERO {
        out.fill(E::default());
        *lse = E::Compute::NEG_INFINITY;
        return;
    }
    E::narrow_scaled(&mut state.values[query * state.width..][..out.len()], E::Compute::from_f64(1.0) / sum, out);
    *lse = state.maximum[query] + sum.ln();
}
