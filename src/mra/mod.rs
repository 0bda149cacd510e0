//! The algorithm: what is pooled, what is selected, and how the two levels are summed. Plain Rust over the kernels.
//!
//! [`forward`], [`backward`] and [`select`] check a call and hand its segments to the two forms.

mod attend;
mod bias_gradient;
mod block;
mod inputs;
mod problem;
mod pyramid;
mod query_terms;
mod select;
mod token;

use std::ops::Range;

pub use bias_gradient::BiasGradient;
pub use inputs::{Gradients, Inputs, Saved};
use problem::{Batch, Blocks, Form};
pub use problem::{Bias, BiasData, Budget, Coarse, CoarserLevel, Layout, Mask, Mode, Options, Problem, Score, Window};
pub use pyramid::{PooledInputs, append};

use crate::error::{Error, Result};
use crate::exec::{Chunks, TensorMut};
use crate::simd::{Element, Scalar};
use crate::tensor::Tensor;

/// Which blocks are exact.
#[derive(Debug)]
pub enum Selection<'a> {
    /// Those of a plan.
    Given(&'a [u8]),
    /// Those that are chosen, which the plan then holds.
    Chosen(&'a mut [u8]),
    /// Those that are chosen; the plan is not kept.
    Unkept,
}

/// Writes the plan of a call: [`Problem::plan_bytes`] bytes.
///
/// Deterministic: the same bytes for any number of threads.
///
/// # Errors
/// If a tensor does not have the shape of the problem, `plan` not the length of its plan, or scores do not fit in memory.
pub fn select<E: Element>(problem: &Problem<'_>, query: &Tensor<'_, E>, key: &Tensor<'_, E>, plan: &mut [u8]) -> Result<()> {
    problem.check_query_and_key(query.shape(), key.shape())?;
    problem.check_plan_length(plan)?;
    problem.start_plan(plan);
    let batch = Batch::new(problem, Form::Block);
    if batch.flat_heads() > 0 {
        block::select(problem, query, key, plan)?;
    }
    let batch = Batch::new(problem, Form::Token);
    if batch.flat_heads() > 0 {
        token::select(problem, query, key, plan);
    }
    Ok(())
}

/// Computes `out` `(B, H, Lq, Dv)` and `lse` `(B, H, Lq, 1)`, the natural logarithm of the sum of exponentials.
///
/// Logits, sums and lse are in the compute type: float64 for float64, float32 for all others. A query that sees no key
/// has output 0 and lse `-inf`. Deterministic: the same bits for any number of threads. `pooled` are means of blocks that the caller
/// has, for each level, the coarsest first; only the token form takes them.
///
/// # Errors
/// If a tensor does not have the shape of the problem, or the plan not its length; nothing is written then. Or if scores do not fit in
/// memory.
pub fn forward<E: Element>(
    problem: &Problem<'_>,
    inputs: &Inputs<'_, E>,
    pooled: Option<&[PooledInputs<'_, E::Compute>]>,
    selection: Selection<'_>,
    out: &mut TensorMut<'_, E>,
    lse: &mut TensorMut<'_, E::Compute>,
) -> Result<()> {
    let value_dim = inputs.validate(problem)?;
    Problem::expect("out", out.shape(), [problem.batch, problem.heads, problem.query_len, value_dim])?;
    Problem::expect("lse", lse.shape(), [problem.batch, problem.heads, problem.query_len, 1])?;
    match &selection {
        Selection::Given(plan) => problem.check_plan(plan)?,
        Selection::Chosen(plan) => problem.check_plan_length(plan)?,
        Selection::Unkept => {}
    }
    let (blocks, tokens) = (Batch::new(problem, Form::Block), Batch::new(problem, Form::Token));
    if let Some(pooled) = pooled {
        pyramid::check(problem, pooled, value_dim)?;
        if blocks.flat_heads() > 0 {
            return Err(Error::new(
                "pooled_key: given, expected None where queries are averaged: only the token form takes means",
            ));
        }
    }
    let (out, lse) = (&*out, &*lse);
    let mut own = Vec::new();
    let (given, mut chosen) = match selection {
        Selection::Given(plan) => (Some(plan), None),
        Selection::Chosen(plan) => {
            problem.start_plan(plan);
            (None, Some(plan))
        }
        Selection::Unkept => (None, None),
    };
    if blocks.flat_heads() > 0 {
        if let Some(plan) = given {
            block::forward(problem, &blocks, inputs, plan, out, lse);
        } else {
            let plan = chosen.as_deref_mut().unwrap_or_else(|| {
                // Fresh zeros cost nothing until they are written to.
                own = vec![0; problem.plan_bytes()];
                &mut own
            });
            block::forward_selecting(problem, &blocks, inputs, plan, out, lse)?;
        }
    }
    if tokens.flat_heads() > 0 {
        let plan = match given {
            Some(plan) => token::PlanBytes::Given(plan),
            None => token::PlanBytes::Chosen(chosen.map(|plan| Chunks::new(plan, 1))),
        };
        token::forward(problem, inputs, pooled, &plan, &token::Outputs { out, lse });
    }
    Ok(())
}

/// Computes the gradients with respect to query, key, value and, if they are wanted, bias and sinks, for the plan of forward.
///
/// Deterministic: the same bits for any number of threads. Gradients of padded tokens are 0.
///
/// # Errors
/// If a tensor does not have the shape of the problem, the plan not its length, or the gradient of a bias is wanted with the first-order
/// coarse term; nothing is written then.
pub fn backward<E: Element>(
    problem: &Problem<'_>,
    inputs: &Inputs<'_, E>,
    saved: &Saved<'_, E>,
    plan: &[u8],
    gradients: &mut Gradients<'_, E>,
) -> Result<()> {
    let value_dim = inputs.validate(problem)?;
    saved.validate(problem, value_dim)?;
    gradients.validate(problem, inputs)?;
    problem.check_plan(plan)?;
    let (blocks, tokens) = (Batch::new(problem, Form::Block), Batch::new(problem, Form::Token));
    if gradients.bias.is_some() && problem.expands() && !blocks.segments.is_empty() {
        return Err(Error::new("grad_bias: given, expected None with the first-order coarse term"));
    }
    let terms = query_terms::query_terms(problem, saved);
    clear_behind_keys(problem, gradients);
    if let Some(sinks) = &mut gradients.sinks {
        query_terms::sink_gradients(problem, &terms, sinks);
    }
    if !blocks.segments.is_empty() {
        block::backward(problem, &blocks, inputs, &saved.grad_out, &terms, plan, gradients);
    }
    if !tokens.segments.is_empty() {
        token::backward(problem, &tokens, inputs, &saved.grad_out, &terms, plan, gradients);
    }
    if let Some(bias) = &gradients.bias {
        bias.compute(problem, [&blocks, &tokens], inputs, &saved.grad_out, &terms, plan, gradients);
    }
    Ok(())
}

/// Gradients of keys and values behind the last key of a batch item, which belong to no block.
fn clear_behind_keys<E: Element>(problem: &Problem<'_>, gradients: &mut Gradients<'_, E>) {
    for segment in problem.segments.iter().filter(|_| problem.packed.is_none()) {
        for (head, token) in
            (0..problem.kv_heads).flat_map(|head| (segment.keys.tokens().end..problem.key_len).map(move |token| (head, token)))
        {
            // SAFETY: the gradients are borrowed for this call alone.
            unsafe {
                gradients.key.row_mut(segment.batch, head, token).fill(E::default());
                gradients.value.row_mut(segment.batch, head, token).fill(E::default());
            }
        }
    }
}

/// Calls `body` with consecutive ranges of at most `most` out of `0..len`.
fn for_parts(len: usize, most: usize, mut body: impl FnMut(Range<usize>)) {
    (0..len).step_by(most).for_each(|start| body(start..(start + most).min(len)));
}

/// Adds what a block counts to the logits of each pooled key: the logarithm of the number of valid keys, and the shift of coarse blocks.
/// A block without any valid key gets `-inf`.
fn weigh<T: Scalar>(logits: &mut [T], columns: usize, keys: &Blocks, blocks: Range<usize>, shift: f64) {
    let weight = |count: usize| T::from_f64((count as f64).ln() + shift);
    if let Some(count) = keys.count_of_each(blocks.clone()) {
        // As nearly always. A logarithm for each block would take as long as its dot products.
        let weight = weight(count);
        logits[..blocks.len() * columns].iter_mut().for_each(|logit| *logit += weight);
        return;
    }
    for (row, block) in logits.chunks_exact_mut(columns).zip(blocks) {
        match keys.count(block) {
            // Its mean is 0, and 0 times a query that is NaN is NaN.
            0 => row.fill(T::NEG_INFINITY),
            count => {
                let weight = weight(count);
                for logit in row {
                    *logit += weight;
                }
            }
        }
    }
}
