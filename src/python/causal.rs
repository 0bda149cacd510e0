//! The causal form.

use pyo3::prelude::*;

use super::borrow::{Descriptor, Dtype, check_disjoint};
use super::{lse_or_own, named};
use crate::{
    CausalBudget, CausalOptions, CausalProblem, Error, Gradients, Inputs, Level, Mode, PooledInputs, Problem, Saved,
    causal_backward as backward, causal_forward as forward, causal_forward_selecting as forward_selecting,
};

/// The numbers that forward and backward take.
struct Settings {
    offsets: Vec<i64>,
    key_lengths: Option<Vec<usize>>,
    scale: f64,
    block_size: usize,
    sparse: bool,
    dropout_p: f64,
    seed: u64,
    threads: usize,
}

impl Settings {
    fn problem(&self, query: &Descriptor, key: &Descriptor) -> crate::Result<CausalProblem> {
        let options = CausalOptions {
            block_size: self.block_size,
            scale: Some(self.scale),
            mode: if self.sparse { Mode::Sparse } else { Mode::Full },
            offsets: &self.offsets,
            key_lengths: self.key_lengths.as_deref(),
            dropout: self.dropout_p,
            seed: self.seed,
            threads: self.threads,
            level: Level::current()?,
        };
        CausalProblem::new(query.shape("query")?, key.shape("key")?, &options)
    }
}

/// Checks that a plan has numbers for each query.
fn check_plan(name: &str, plan: &Descriptor, query: &Descriptor, width: Option<usize>) -> crate::Result<()> {
    let (shape, [batch, heads, length, _]) = (plan.shape(name)?, query.shape("query")?);
    Problem::expect(name, shape, [batch, heads, length, width.unwrap_or(shape[3])])
}

#[pyfunction]
#[pyo3(signature = (query, key, value, pooled_key, pooled_value, plan_in, plan_out, out, lse, *, offsets, key_lengths, scale, block_size, sparse, blocks, local_blocks, first_blocks, dropout_p, seed, threads))]
pub(super) fn causal_forward(
    py: Python<'_>,
    query: Descriptor,
    key: Descriptor,
    value: Descriptor,
    pooled_key: Option<Descriptor>,
    pooled_value: Option<Descriptor>,
    plan_in: Option<Descriptor>,
    plan_out: Option<Descriptor>,
    out: Descriptor,
    lse: Option<Descriptor>,
    offsets: Vec<i64>,
    key_lengths: Option<Vec<usize>>,
    scale: f64,
    block_size: usize,
    sparse: bool,
    blocks: usize,
    local_blocks: usize,
    first_blocks: usize,
    dropout_p: f64,
    seed: u64,
    threads: usize,
) -> PyResult<()> {
    let settings = Settings { offsets, key_lengths, scale, block_size, sparse, dropout_p, seed, threads };
    let budget = CausalBudget { blocks, local_blocks, first_blocks };
    py.detach(|| {
        let reads = named([
            ("query", Some(&query)),
            ("key", Some(&key)),
            ("value", Some(&value)),
            ("pooled_key", pooled_key.as_ref()),
            ("pooled_value", pooled_value.as_ref()),
            ("plan_in", plan_in.as_ref()),
        ]);
        let writes = named([("plan_out", plan_out.as_ref()), ("out", Some(&out)), ("lse", lse.as_ref())]);
        check_disjoint(&writes, &reads)?;
        budget.validate()?;
        let problem = settings.problem(&query, &key)?;
        if let (None, Some(_)) = (&pooled_key, &pooled_value) {
            return Err(Error::new("pooled_key: None, expected the means of keys beside those of values"));
        }
        with_element!(query.dtype(), E => {
            // SAFETY: the Python layer keeps every tensor alive during the call and gives fresh outputs.
            unsafe {
                let inputs = Inputs { query: query.tensor::<E>("query")?, key: key.tensor("key")?, value: value.tensor("value")? };
                let pooled_value = pooled_value.as_ref().map(|tensor| tensor.tensor("pooled_value")).transpose()?;
                let pooled = pooled_key.as_ref().map(|tensor| tensor.tensor("pooled_key")).transpose()?;
                let pooled = pooled.map(|key| PooledInputs { key, value: pooled_value });
                // What the caller does not want is computed all the same, in memory of our own.
                let (mut own_numbers, mut own_lse) = (Vec::new(), Vec::new());
                let mut out = out.tensor_mut::<E>("out")?;
                let mut lse = lse_or_own(lse.as_ref(), &mut own_lse, out.shape())?;
                let numbers = plan_out.as_ref().map(|plan| plan.contiguous_mut::<i32>("plan_out")).transpose()?;
                let Some(plan_in) = &plan_in else {
                    let width = problem.plan_width(&budget);
                    let numbers = if let (Some(plan_out), Some(numbers)) = (&plan_out, numbers) {
                        check_plan("plan_out", plan_out, &query, Some(width))?;
                        numbers
                    } else {
                        let [batch, heads, length, _] = query.shape("query")?;
                        own_numbers.resize(batch * heads * length * width, -1);
                        &mut own_numbers
                    };
                    return forward_selecting(&problem, &inputs, pooled.as_ref(), &budget, numbers, &mut out, &mut lse);
                };
                check_plan("plan", plan_in, &query, None)?;
                let plan = plan_in.contiguous::<i32>("plan")?;
                let (Some(plan_out), Some(numbers)) = (&plan_out, numbers) else {
                    return Err(Error::new("plan_out: None, expected room for a copy of the given plan"));
                };
                Problem::expect("plan_out", plan_out.shape("plan_out")?, plan_in.shape("plan")?)?;
                numbers.copy_from_slice(plan);
                forward(&problem, &inputs, pooled.as_ref(), plan, &mut out, &mut lse)
            }
        })
    })
    .map_err(PyErr::from)
}

#[pyfunction]
#[pyo3(signature = (grad_out, grad_lse, query, key, value, out, lse, plan, grad_query, grad_key, grad_value, *, offsets, key_lengths, scale, block_size, sparse, dropout_p, seed, threads))]
pub(super) fn causal_backward(
    py: Python<'_>,
    grad_out: Descriptor,
    grad_lse: Option<Descriptor>,
    query: Descriptor,
    key: Descriptor,
    value: Descriptor,
    out: Descriptor,
    lse: Descriptor,
    plan: Descriptor,
    grad_query: Descriptor,
    grad_key: Descriptor,
    grad_value: Descriptor,
    offsets: Vec<i64>,
    key_lengths: Option<Vec<usize>>,
    scale: f64,
    block_size: usize,
    sparse: bool,
    dropout_p: f64,
    seed: u64,
    threads: usize,
) -> PyResult<()> {
    let settings = Settings { offsets, key_lengths, scale, block_size, sparse, dropout_p, seed, threads };
    py.detach(|| {
        let reads = named([
            ("grad_out", Some(&grad_out)),
            ("grad_lse", grad_lse.as_ref()),
            ("query", Some(&query)),
            ("key", Some(&key)),
            ("value", Some(&value)),
            ("out", Some(&out)),
            ("lse", Some(&lse)),
            ("plan", Some(&plan)),
        ]);
        check_disjoint(&[("grad_query", &grad_query), ("grad_key", &grad_key), ("grad_value", &grad_value)], &reads)?;
        let problem = settings.problem(&query, &key)?;
        check_plan("plan", &plan, &query, None)?;
        with_element!(query.dtype(), E => {
            // SAFETY: the Python layer keeps every tensor alive during the call and gives fresh outputs.
            unsafe {
                let inputs = Inputs { query: query.tensor::<E>("query")?, key: key.tensor("key")?, value: value.tensor("value")? };
                let saved = Saved {
                    grad_out: grad_out.tensor("grad_out")?,
                    grad_lse: grad_lse.as_ref().map(|tensor| tensor.rows("grad_lse")).transpose()?,
                    out: out.tensor("out")?,
                    lse: lse.rows("lse")?,
                };
                let mut gradients = Gradients {
                    query: grad_query.tensor_mut("grad_query")?,
                    key: grad_key.tensor_mut("grad_key")?,
                    value: grad_value.tensor_mut("grad_value")?,
                };
                backward(&problem, &inputs, &saved, plan.contiguous::<i32>("plan")?, &mut gradients)
            }
        })
    })
    .map_err(PyErr::from)
}

/// Puts new tokens behind those of a cache.
#[pyfunction]
#[pyo3(signature = (key, value, stored_key, stored_value, key_means, value_means, *, before, after, block_size, threads))]
pub(super) fn append(
    py: Python<'_>,
    key: Descriptor,
    value: Descriptor,
    stored_key: Descriptor,
    stored_value: Descriptor,
    key_means: Descriptor,
    value_means: Descriptor,
    before: Vec<usize>,
    after: Vec<usize>,
    block_size: usize,
    threads: usize,
) -> PyResult<()> {
    py.detach(|| {
        let outputs = [
            ("stored_key", &stored_key),
            ("stored_value", &stored_value),
            ("key_means", &key_means),
            ("value_means", &value_means),
        ];
        check_disjoint(&outputs, &[("key", &key), ("value", &value)])?;
        with_element!(key.dtype(), E => {
            // SAFETY: the Python layer keeps every tensor alive during the call, and its cache owns what is written.
            unsafe {
                let (new, mut stored) = (key.tensor::<E>("key")?, stored_key.tensor_mut("stored_key")?);
                crate::append(&new, &mut stored, &mut key_means.tensor_mut("key_means")?, &before, &after, block_size, threads)?;
                let (new, mut stored) = (value.tensor::<E>("value")?, stored_value.tensor_mut("stored_value")?);
                crate::append(&new, &mut stored, &mut value_means.tensor_mut("value_means")?, &before, &after, block_size, threads)
            }
        })
    })
    .map_err(PyErr::from)
}
