//! The operators: tensors borrowed, the problem made, the result written in place.

use ndarray::Array3;
use numpy::{IntoPyArray, PyArray3};
use pyo3::prelude::*;

use super::borrow::{Descriptor, Dtype, Named, Stored, check_disjoint};
use super::settings::{Boundaries, HeadTerms, Masks, Sequences, Settings};
use crate::{Error, Gradients, Inputs, Level, PooledInputs, Saved, Scalar, Selection, TensorMut};

/// Those of the tensors that were passed.
fn named<'a>(tensors: impl IntoIterator<Item = (&'a str, Option<&'a Descriptor>)>) -> Vec<Named<'a>> {
    tensors.into_iter().filter_map(|(name, tensor)| Some((name, tensor?))).collect()
}

#[pyfunction]
#[pyo3(signature = (query, key, masks, head_terms, plan, *, settings, sequences, threads))]
pub(super) fn select(
    py: Python<'_>,
    query: Descriptor,
    key: Descriptor,
    masks: Masks,
    head_terms: HeadTerms,
    plan: Descriptor,
    settings: Settings,
    sequences: Option<Boundaries>,
    threads: usize,
) -> PyResult<()> {
    py.detach(|| {
        let reads = named([("query", Some(&query)), ("key", Some(&key))].into_iter().chain(masks.named()).chain(head_terms.named()));
        check_disjoint(&[("plan", &plan)], &reads)?;
        let sequences = Sequences::new(sequences, &settings, &query, &key)?;
        // SAFETY: the Python layer keeps every tensor alive during the call, and no output shares memory with one.
        let problem = unsafe { settings.problem([query.shape("query")?, key.shape("key")?], &masks, &head_terms, &sequences, 0, threads) }?;
        with_element!(query.dtype()?, E => {
            // SAFETY: the Python layer keeps every tensor alive during the call and gives fresh outputs.
            let (query, key, plan) = unsafe { (query.tensor::<E>("query")?, key.tensor::<E>("key")?, plan.contiguous_mut::<u8>("plan")?) };
            crate::select(&problem, &query, &key, plan)
        })
    })
    .map_err(PyErr::from)
}

/// The lse `(B, H, L, 1)` of an output of this shape, in memory of our own if the caller does not want it.
///
/// # Safety
/// - As [`Descriptor::rows_mut`].
unsafe fn lse_or_own<'a, T: Scalar + Stored>(
    lse: Option<&Descriptor>,
    memory: &'a mut Vec<T>,
    [batch, heads, length, _]: [usize; 4],
) -> crate::Result<TensorMut<'a, T>> {
    if let Some(lse) = lse {
        // SAFETY: the caller's.
        return unsafe { lse.rows_mut("lse") };
    }
    memory.resize(batch * heads * length, T::ZERO);
    TensorMut::new("lse", memory, [batch, heads, length, 1], [heads * length, length, 1, 1])
}

#[pyfunction]
#[pyo3(signature = (query, key, value, masks, head_terms, plan_in, plan_out, out, lse, *, settings, sequences, seed, threads))]
pub(super) fn forward(
    py: Python<'_>,
    query: Descriptor,
    key: Descriptor,
    value: Descriptor,
    masks: Masks,
    head_terms: HeadTerms,
    plan_in: Option<Descriptor>,
    plan_out: Option<Descriptor>,
    out: Descriptor,
    lse: Option<Descriptor>,
    settings: Settings,
    sequences: Option<Boundaries>,
    seed: u64,
    threads: usize,
) -> PyResult<()> {
    py.detach(|| {
        let inputs = [("query", Some(&query)), ("key", Some(&key)), ("value", Some(&value)), ("plan_in", plan_in.as_ref())];
        let reads = named(inputs.into_iter().chain(masks.named()).chain(head_terms.named()));
        let writes = named([("plan_out", plan_out.as_ref()), ("out", Some(&out)), ("lse", lse.as_ref())]);
        check_disjoint(&writes, &reads)?;
        let sequences = Sequences::new(sequences, &settings, &query, &key)?;
        // SAFETY: the Python layer keeps every tensor alive during the call, and no output shares memory with one.
        let problem = unsafe { settings.problem([query.shape("query")?, key.shape("key")?], &masks, &head_terms, &sequences, seed, threads) }?;
        with_element!(query.dtype()?, E => {
            // SAFETY: the Python layer keeps every tensor alive during the call and gives fresh outputs.
            unsafe {
                let inputs = Inputs { query: query.tensor::<E>("query")?, key: key.tensor("key")?, value: value.tensor("value")? };
                let mut own_lse = Vec::new();
                let mut out = out.tensor_mut::<E>("out")?;
                let mut lse = lse_or_own(lse.as_ref(), &mut own_lse, out.shape())?;
                let plan_out = plan_out.as_ref().map(|plan| plan.contiguous_mut::<u8>("plan_out")).transpose()?;
                let Some(plan_in) = &plan_in else {
                    let selection = plan_out.map_or(Selection::Unkept, Selection::Chosen);
                    return crate::forward(&problem, &inputs, None, selection, &mut out, &mut lse);
                };
                let plan_in = plan_in.contiguous::<u8>("plan")?;
                if let Some(plan_out) = &plan_out && plan_out.len() != plan_in.len() {
                    return Err(Error::new(format!("plan_out: {} bytes, expected {}", plan_out.len(), plan_in.len())));
                }
                crate::forward(&problem, &inputs, None, Selection::Given(plan_in), &mut out, &mut lse)?;
                if let Some(plan_out) = plan_out {
                    plan_out.copy_from_slice(plan_in);
                }
                Ok(())
            }
        })
    })
    .map_err(PyErr::from)
}

#[pyfunction]
#[pyo3(signature = (grad_out, grad_lse, query, key, value, masks, head_terms, plan, out, lse, grad_query, grad_key, grad_value, grad_bias, grad_sinks, *, settings, sequences, seed, threads))]
pub(super) fn backward(
    py: Python<'_>,
    grad_out: Descriptor,
    grad_lse: Option<Descriptor>,
    query: Descriptor,
    key: Descriptor,
    value: Descriptor,
    masks: Masks,
    head_terms: HeadTerms,
    plan: Descriptor,
    out: Descriptor,
    lse: Descriptor,
    grad_query: Descriptor,
    grad_key: Descriptor,
    grad_value: Descriptor,
    grad_bias: Option<Descriptor>,
    grad_sinks: Option<Descriptor>,
    settings: Settings,
    sequences: Option<Boundaries>,
    seed: u64,
    threads: usize,
) -> PyResult<()> {
    py.detach(|| {
        let inputs = [
            ("grad_out", Some(&grad_out)),
            ("grad_lse", grad_lse.as_ref()),
            ("query", Some(&query)),
            ("key", Some(&key)),
            ("value", Some(&value)),
            ("out", Some(&out)),
            ("lse", Some(&lse)),
            ("plan", Some(&plan)),
        ];
        let reads = named(inputs.into_iter().chain(masks.named()).chain(head_terms.named()));
        let writes = named([
            ("grad_query", Some(&grad_query)),
            ("grad_key", Some(&grad_key)),
            ("grad_value", Some(&grad_value)),
            ("grad_bias", grad_bias.as_ref()),
            ("grad_sinks", grad_sinks.as_ref()),
        ]);
        check_disjoint(&writes, &reads)?;
        let sequences = Sequences::new(sequences, &settings, &query, &key)?;
        // SAFETY: the Python layer keeps every tensor alive during the call, and no output shares memory with one.
        let problem = unsafe { settings.problem([query.shape("query")?, key.shape("key")?], &masks, &head_terms, &sequences, seed, threads) }?;
        with_element!(query.dtype()?, E => {
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
                    sinks: grad_sinks.as_ref().map(|sinks| sinks.contiguous_mut("grad_sinks")).transpose()?,
                    bias: grad_bias.as_ref().map(|tensor| tensor.bias_gradient("grad_bias")).transpose()?,
                };
                crate::backward(&problem, &inputs, &saved, plan.contiguous::<u8>("plan")?, &mut gradients)
            }
        })
    })
    .map_err(PyErr::from)
}

/// The blocks that a plan refines at each level, the coarsest first, for each sequence `(H, rows, nk)`; those of the last level are exact.
#[pyfunction]
#[pyo3(signature = (query_shape, key_shape, masks, plan, *, settings, sequences))]
pub(super) fn refined_blocks(
    py: Python<'_>,
    query_shape: [usize; 4],
    key_shape: [usize; 4],
    masks: Masks,
    plan: Descriptor,
    settings: Settings,
    sequences: Option<Boundaries>,
) -> PyResult<Vec<Vec<Bound<'_, PyArray3<bool>>>>> {
    let levels = py.detach(|| {
        let sequences = Sequences::of_lengths(sequences, &settings, query_shape[2], key_shape[2]);
        // SAFETY: the Python layer keeps every tensor alive during the call.
        unsafe {
            let problem = settings.problem([query_shape, key_shape], &masks, &HeadTerms::default(), &sequences, 0, 1)?;
            problem.is_refined(plan.contiguous::<u8>("plan")?)
        }
    })?;
    let arrays = |level: Vec<Array3<bool>>| level.into_iter().map(|blocks| blocks.into_pyarray(py)).collect();
    Ok(levels.into_iter().map(arrays).collect())
}

/// Attention of the last tokens of cached sequences.
#[pyfunction]
#[pyo3(signature = (query, key, value, key_means, value_means, head_terms, out, lse, *, settings, offsets, key_lengths, threads))]
pub(super) fn attend_cache(
    py: Python<'_>,
    query: Descriptor,
    key: Descriptor,
    value: Descriptor,
    key_means: Vec<Descriptor>,
    value_means: Vec<Descriptor>,
    head_terms: HeadTerms,
    out: Descriptor,
    lse: Option<Descriptor>,
    settings: Settings,
    offsets: Vec<i64>,
    key_lengths: Vec<usize>,
    threads: usize,
) -> PyResult<()> {
    py.detach(|| {
        let means = means_of(&key_means, &value_means).map(|(name, tensor)| (name, Some(tensor)));
        let tensors = [("query", Some(&query)), ("key", Some(&key)), ("value", Some(&value))];
        let reads = named(tensors.into_iter().chain(means).chain(head_terms.named()));
        let writes = named([("out", Some(&out)), ("lse", lse.as_ref())]);
        check_disjoint(&writes, &reads)?;
        let sequences = Sequences::Dense { offsets, key_lengths: Some(key_lengths) };
        let shapes = [query.shape("query")?, key.shape("key")?];
        // SAFETY: there are no masks, and the descriptors keep the terms of the heads alive during the call.
        let problem = unsafe { settings.problem(shapes, &Masks::default(), &head_terms, &sequences, 0, threads) }?;
        with_element!(query.dtype()?, E => {
            // SAFETY: the Python layer keeps every tensor alive during the call and gives fresh outputs.
            unsafe {
                let inputs = Inputs { query: query.tensor::<E>("query")?, key: key.tensor("key")?, value: value.tensor("value")? };
                let of_level = |(key, value): (&Descriptor, &Descriptor)| {
                    Ok(PooledInputs { key: key.tensor("key_means")?, value: Some(value.tensor("value_means")?) })
                };
                let pooled: Vec<_> = key_means.iter().zip(&value_means).map(of_level).collect::<crate::Result<_>>()?;
                let mut own_lse = Vec::new();
                let mut out = out.tensor_mut::<E>("out")?;
                let mut lse = lse_or_own(lse.as_ref(), &mut own_lse, out.shape())?;
                crate::forward(&problem, &inputs, Some(&pooled), Selection::Unkept, &mut out, &mut lse)
            }
        })
    })
    .map_err(PyErr::from)
}

/// The means of keys and of values of every level, with their names.
fn means_of<'a>(keys: &'a [Descriptor], values: &'a [Descriptor]) -> impl Iterator<Item = Named<'a>> {
    keys.iter().map(|tensor| ("key_means", tensor)).chain(values.iter().map(|tensor| ("value_means", tensor)))
}

/// Tensors for writing.
///
/// # Safety
/// - As [`Descriptor::tensor_mut`], for each of them.
unsafe fn all_mut<'a, T: Scalar + Stored>(name: &str, tensors: &[Descriptor]) -> crate::Result<Vec<TensorMut<'a, T>>> {
    // SAFETY: the caller's.
    tensors.iter().map(|tensor| unsafe { tensor.tensor_mut(name) }).collect()
}

/// Puts new tokens behind those of a cache.
#[pyfunction]
#[pyo3(signature = (key, value, stored_key, stored_value, key_means, value_means, *, before, after, block_sizes, threads))]
pub(super) fn append(
    py: Python<'_>,
    key: Descriptor,
    value: Descriptor,
    stored_key: Descriptor,
    stored_value: Descriptor,
    key_means: Vec<Descriptor>,
    value_means: Vec<Descriptor>,
    before: Vec<usize>,
    after: Vec<usize>,
    block_sizes: Vec<usize>,
    threads: usize,
) -> PyResult<()> {
    py.detach(|| {
        let mut outputs = vec![("stored_key", &stored_key), ("stored_value", &stored_value)];
        outputs.extend(means_of(&key_means, &value_means));
        check_disjoint(&outputs, &[("key", &key), ("value", &value)])?;
        let level = Level::current()?;
        with_element!(key.dtype()?, E => {
            // SAFETY: the Python layer keeps every tensor alive during the call, and its cache owns what is written.
            unsafe {
                let (new, mut stored) = (key.tensor::<E>("key")?, stored_key.tensor_mut("stored_key")?);
                let mut means = all_mut("key_means", &key_means)?;
                crate::append(&new, &mut stored, &mut means, &before, &after, &block_sizes, threads, level)?;
                let (new, mut stored) = (value.tensor::<E>("value")?, stored_value.tensor_mut("stored_value")?);
                let mut means = all_mut("value_means", &value_means)?;
                crate::append(&new, &mut stored, &mut means, &before, &after, &block_sizes, threads, level)
            }
        })
    })
    .map_err(PyErr::from)
}
