//! Forward: out and lse of every query (docs/definitions.md, section 2.6).

use std::ops::Range;

use super::attend::Attend;
use super::bias_tile::BiasTile;
use super::budget::Budget;
use super::coarse::Coarse;
use super::finite::needs_guard;
use super::plan::Plan;
use super::problem::{Mode, Problem};
use super::pyramid::Pyramid;
use super::select::select_blocks;
use super::strip::{KeySource, Strip};
use super::tile::{tile_columns, tiles};
use crate::error::Result;
use crate::kernels::Stream;
use crate::simd::{Element, Scalar, prefetch_far};
use crate::tensor::Tensor;
use crate::threads;
use crate::tiles::TensorMut;

/// The inputs of the forward pass, channels contiguous.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a, E> {
    /// `(B, H, Lq, D)`.
    pub query: Tensor<'a, E>,
    /// `(B, Hk, Lk, D)`.
    pub key: Tensor<'a, E>,
    /// `(B, Hk, Lk, Dv)`.
    pub value: Tensor<'a, E>,
}

impl<E: Element> Inputs<'_, E> {
    /// Checks the shapes against the problem and returns the channels of a value.
    pub(crate) fn validate(&self, problem: &Problem) -> Result<usize> {
        let value_dim = self.value.shape()[3];
        Problem::expect("query", self.query.shape(), [problem.batch, problem.heads, problem.query_len, problem.head_dim])?;
        Problem::expect("key", self.key.shape(), [problem.batch, problem.kv_heads, problem.key_len, problem.head_dim])?;
        Problem::expect("value", self.value.shape(), [problem.batch, problem.kv_heads, problem.key_len, value_dim])?;
        Ok(value_dim)
    }
}

/// Computes `out` `(B, H, Lq, Dv)` and `lse` `(B, H, Lq, 1)`, the natural logarithm of the sum of exponentials.
///
/// Logits, sums and lse are in the compute type: float64 for float64, float32 for all others. A query that sees no key
/// has output 0 and lse `-inf`. Deterministic: the same bits for any number of threads.
///
/// # Errors
/// If a tensor does not have the shape of the problem; nothing is written then.
pub fn forward<E: Element>(
    problem: &Problem,
    inputs: &Inputs<'_, E>,
    plan: &Plan,
    out: &mut TensorMut<'_, E>,
    lse: &mut TensorMut<'_, E::Compute>,
) -> Result<()> {
    inputs.validate(problem)?;
    plan.validate(problem)?;
    let guard = needs_guard(problem, &inputs.value, |batch| problem.keys(batch));
    let coarse = (problem.mode == Mode::Full).then(|| {
        let (pyramid, values) = Pyramid::with_values(problem, inputs);
        Coarse::new(problem, plan, &pyramid, &values, guard)
    });
    exact(problem, inputs, plan, coarse.as_ref(), guard, out, lse)
}

/// Continues the softmax of every query from the coarse level over the selected blocks.
fn exact<E: Element>(
    problem: &Problem,
    inputs: &Inputs<'_, E>,
    plan: &Plan,
    coarse: Option<&Coarse<E::Compute>>,
    guard: bool,
    out: &mut TensorMut<'_, E>,
    lse: &mut TensorMut<'_, E::Compute>,
) -> Result<()> {
    let value_dim = inputs.validate(problem)?;
    Problem::expect("out", out.shape(), [problem.batch, problem.heads, problem.query_len, value_dim])?;
    Problem::expect("lse", lse.shape(), [problem.batch, problem.heads, problem.query_len, 1])?;
    let nq = problem.query_blocks();
    let multiplications = plan.num_blocks() * problem.block_size * problem.block_size * (problem.head_dim + value_dim);
    let (out, lse) = (&*out, &*lse);
    let scratch = || {
        let columns = tile_columns::<E::Compute>(problem);
        let strip = Strip::new(problem, problem.head_dim, value_dim);
        (Attend::for_tensors::<E>(problem, columns, value_dim, guard), strip, BiasTile::new(problem, columns))
    };
    threads::for_each(
        problem.threads_for(multiplications),
        problem.all_heads() * nq,
        scratch,
        |(attend, strip, bias), task| {
            let row = BlockRow { problem, inputs, plan, coarse, head: task / nq, i: task % nq };
            // SAFETY: each task has its own block of queries, and writes only its rows.
            unsafe { row.compute(attend, strip, bias, out, lse) };
        },
    );
    Ok(())
}

/// One block of queries of one head.
struct BlockRow<'a, E: Element> {
    problem: &'a Problem<'a>,
    inputs: &'a Inputs<'a, E>,
    plan: &'a Plan,
    coarse: Option<&'a Coarse<E::Compute>>,
    head: usize,
    i: usize,
}

impl<E: Element> BlockRow<'_, E> {
    /// # Safety
    /// - Nothing else holds the rows of this block of queries in `out` and `lse`.
    unsafe fn compute(
        &self,
        attend: &mut Attend<E::Compute>,
        strip: &mut Strip<E::Compute>,
        bias: &mut BiasTile<E::Compute>,
        out: &TensorMut<'_, E>,
        lse: &TensorMut<'_, E::Compute>,
    ) {
        let (batch, head) = (self.head / self.problem.heads, self.head % self.problem.heads);
        let blocks = self.problem.queries(batch);
        let queries = self.inputs.query.head(batch, head);
        if blocks.count(self.i) < blocks.range(self.i).len() {
            for token in blocks.range(self.i) {
                // SAFETY: the caller's.
                unsafe {
                    out.row_mut(batch, head, token).fill(E::default());
                    lse.row_mut(batch, head, token)[0] = E::Compute::NEG_INFINITY;
                }
            }
        }
        self.prefetch_queries_after();
        let coarse = self.coarse.map(|coarse| coarse.state(self.head, self.i));
        for tile in tiles(blocks.start(self.i)..blocks.start(self.i + 1)) {
            attend.start(tile.clone().map(|number| queries.row(blocks.token(number))), coarse.as_ref());
            attend.number_queries(Stream::Exact, self.head, tile.clone().map(|number| blocks.token(number)));
            self.attend_to_selected(attend, strip, bias, &tile);
            for (query, number) in tile.enumerate() {
                let token = blocks.token(number);
                // SAFETY: the caller's.
                unsafe { attend.finish(query, out.row_mut(batch, head, token), &mut lse.row_mut(batch, head, token)[0]) };
            }
        }
    }

    /// Brings the queries of the next block nearer, which this thread probably has next.
    fn prefetch_queries_after(&self) {
        let (batch, head) = (self.head / self.problem.heads, self.head % self.problem.heads);
        let (blocks, queries) = (self.problem.queries(batch), self.inputs.query.head(batch, head));
        if self.i + 1 < blocks.len() {
            blocks.range(self.i + 1).for_each(|token| prefetch_far(queries.row(token)));
        }
    }

    fn attend_to_selected(
        &self,
        attend: &mut Attend<E::Compute>,
        strip: &mut Strip<E::Compute>,
        bias: &mut BiasTile<E::Compute>,
        queries: &Range<usize>,
    ) {
        let (batch, kv_head) = (self.head / self.problem.heads, self.problem.kv_head(self.head % self.problem.heads));
        let (keys, values) = (self.inputs.key.head(batch, kv_head), self.inputs.value.head(batch, kv_head));
        let source = attend.source(KeySource::new(self.problem, keys, values, self.problem.keys(batch)));
        let blocks = self.plan.row(self.head, self.i);
        let blocks_of_a_strip = (Strip::<E::Compute>::capacity(self.problem) / self.problem.block_size).max(1);
        let after = if self.i + 1 < self.problem.query_blocks() { self.plan.row(self.head, self.i + 1) } else { &[] };
        let mut step = |strip: &Strip<E::Compute>, next: &[u32]| {
            let (columns, next) = (attend.columns, &next[..next.len().min(blocks_of_a_strip)]);
            attend.strip(strip, &source, next, None, |logits| {
                bias.apply(self.problem, (self.head, self.i), queries, strip, logits, columns);
            });
        };
        strip.clear();
        for (index, &j) in blocks.iter().enumerate() {
            let numbers = source.numbers(j as usize);
            if !strip.push(&source, numbers.clone()) {
                step(strip, &blocks[index..]);
                strip.clear();
                assert!(strip.push(&source, numbers), "an empty strip has room for a block");
            }
        }
        if strip.rows() > 0 {
            step(strip, after);
        }
    }
}

/// Selects blocks, writes the selection to `bits` as [`Plan::from_bits`] reads it, and computes [`forward`] with it; queries
/// and keys are pooled once for both.
///
/// # Errors
/// As [`forward`] and [`select_blocks`](super::select_blocks).
pub fn forward_selecting<E: Element>(
    problem: &Problem,
    inputs: &Inputs<'_, E>,
    budget: &Budget,
    bits: &mut [u8],
    out: &mut TensorMut<'_, E>,
    lse: &mut TensorMut<'_, E::Compute>,
) -> Result<()> {
    inputs.validate(problem)?;
    let guard = needs_guard(problem, &inputs.value, |batch| problem.keys(batch));
    let (coarse, plan) = if problem.mode == Mode::Full {
        let (pyramid, values) = Pyramid::with_values(problem, inputs);
        let (coarse, plan) = Coarse::selecting(problem, &pyramid, &values, guard, budget, bits)?;
        (Some(coarse), plan)
    } else {
        select_blocks(problem, &inputs.query, &inputs.key, budget, bits)?;
        (None, Plan::from_bits(problem, bits)?)
    };
    exact(problem, inputs, &plan, coarse.as_ref(), guard, out, lse)
}
