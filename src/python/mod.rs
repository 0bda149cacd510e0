//! The native module `mra_attention._core`: borrow the tensors, release the interpreter, compute, map the error.

#![allow(
    clippy::needless_pass_by_value,
    clippy::too_many_arguments,
    reason = "pyo3 passes what it extracted by value; the arguments are the operators' schema (mra_attention._ops)"
)]

#[macro_use]
mod element;
mod borrow;
mod causal;

use numpy::{IntoPyArray, PyArray4, PyReadonlyArray4, ndarray::Array4};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::threads;
use crate::{
    Budget, Error, Gradients, Inputs, Level, Mode, Options, Plan, Problem, Saved, Scalar, TensorMut, backward, forward,
    forward_selecting,
};

use borrow::{Descriptor, Dtype, Named, Stored, check_disjoint};

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        PyValueError::new_err(error.to_string())
    }
}

/// Those of the tensors that were passed.
fn named<'a, const N: usize>(tensors: [(&'a str, Option<&'a Descriptor>); N]) -> Vec<Named<'a>> {
    tensors.into_iter().filter_map(|(name, tensor)| Some((name, tensor?))).collect()
}

/// The numbers that every call takes.
#[derive(Clone, Copy)]
struct Settings {
    scale: f64,
    block_size: usize,
    sparse: bool,
    dropout_p: f64,
    seed: u64,
    threads: usize,
}

/// What hides tokens or pairs of them.
#[derive(Clone, Copy)]
struct Masks<'a> {
    key: Option<&'a Descriptor>,
    query: Option<&'a Descriptor>,
    bias: Option<&'a Descriptor>,
}

impl Settings {
    /// # Safety
    /// - The masks belong to tensors that live, unchanged, as long as the problem.
    unsafe fn problem<'a>(self, query: &Descriptor, key: &Descriptor, masks: Masks<'_>) -> crate::Result<Problem<'a>> {
        // SAFETY: the caller's; `Descriptor` checks the rest.
        let mask = |name, mask: Option<&Descriptor>| mask.map(|mask| unsafe { mask.mask(name) }).transpose();
        let options = Options {
            block_size: self.block_size,
            scale: Some(self.scale),
            mode: if self.sparse { Mode::Sparse } else { Mode::Full },
            key_mask: mask("key_mask", masks.key)?,
            query_mask: mask("query_mask", masks.query)?,
            // SAFETY: the caller's; `Descriptor` checks the rest.
            bias: masks.bias.map(|bias| unsafe { bias.bias("attn_bias") }).transpose()?,
            dropout: self.dropout_p,
            seed: self.seed,
            threads: self.threads,
            level: Level::current()?,
        };
        Problem::new(query.shape("query")?, key.shape("key")?, &options)
    }
}

#[pyfunction]
#[pyo3(signature = (query, key, key_mask, query_mask, attn_bias, plan, *, scale, block_size, blocks_per_row, num_blocks, first_blocks, diagonal_blocks, threads))]
fn select_blocks(
    py: Python<'_>,
    query: Descriptor,
    key: Descriptor,
    key_mask: Option<Descriptor>,
    query_mask: Option<Descriptor>,
    attn_bias: Option<Descriptor>,
    plan: Descriptor,
    scale: f64,
    block_size: usize,
    blocks_per_row: f64,
    num_blocks: Option<usize>,
    first_blocks: usize,
    diagonal_blocks: usize,
    threads: usize,
) -> PyResult<()> {
    let settings = Settings { scale, block_size, sparse: false, dropout_p: 0.0, seed: 0, threads };
    let budget = Budget { blocks_per_row, num_blocks, first_blocks, diagonal_blocks };
    py.detach(|| {
        let reads = named([
            ("query", Some(&query)),
            ("key", Some(&key)),
            ("key_mask", key_mask.as_ref()),
            ("query_mask", query_mask.as_ref()),
            ("attn_bias", attn_bias.as_ref()),
        ]);
        check_disjoint(&[("plan", &plan)], &reads)?;
        let masks = Masks { key: key_mask.as_ref(), query: query_mask.as_ref(), bias: attn_bias.as_ref() };
        // SAFETY: the Python layer keeps every tensor alive during the call, and no output shares memory with one.
        let problem = unsafe { settings.problem(&query, &key, masks) }?;
        with_element!(query.dtype(), E => {
            // SAFETY: the Python layer keeps every tensor alive during the call and gives fresh outputs.
            let (query, key, bits) = unsafe { (query.tensor::<E>("query")?, key.tensor::<E>("key")?, plan.contiguous_mut::<u8>("plan")?) };
            crate::select_blocks(&problem, &query, &key, &budget, bits)
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

#[pyfunction(name = "forward")]
#[pyo3(signature = (query, key, value, key_mask, query_mask, attn_bias, plan_in, plan_out, out, lse, *, scale, block_size, sparse, dropout_p, seed, blocks_per_row, num_blocks, first_blocks, diagonal_blocks, threads))]
fn forward_py(
    py: Python<'_>,
    query: Descriptor,
    key: Descriptor,
    value: Descriptor,
    key_mask: Option<Descriptor>,
    query_mask: Option<Descriptor>,
    attn_bias: Option<Descriptor>,
    plan_in: Option<Descriptor>,
    plan_out: Option<Descriptor>,
    out: Descriptor,
    lse: Option<Descriptor>,
    scale: f64,
    block_size: usize,
    sparse: bool,
    dropout_p: f64,
    seed: u64,
    blocks_per_row: f64,
    num_blocks: Option<usize>,
    first_blocks: usize,
    diagonal_blocks: usize,
    threads: usize,
) -> PyResult<()> {
    let settings = Settings { scale, block_size, sparse, dropout_p, seed, threads };
    let budget = Budget { blocks_per_row, num_blocks, first_blocks, diagonal_blocks };
    py.detach(|| {
        let reads = named([
            ("query", Some(&query)),
            ("key", Some(&key)),
            ("value", Some(&value)),
            ("key_mask", key_mask.as_ref()),
            ("query_mask", query_mask.as_ref()),
            ("attn_bias", attn_bias.as_ref()),
            ("plan_in", plan_in.as_ref()),
        ]);
        let writes = named([("plan_out", plan_out.as_ref()), ("out", Some(&out)), ("lse", lse.as_ref())]);
        check_disjoint(&writes, &reads)?;
        let masks = Masks { key: key_mask.as_ref(), query: query_mask.as_ref(), bias: attn_bias.as_ref() };
        // SAFETY: the Python layer keeps every tensor alive during the call, and no output shares memory with one.
        let problem = unsafe { settings.problem(&query, &key, masks) }?;
        with_element!(query.dtype(), E => {
            // SAFETY: the Python layer keeps every tensor alive during the call and gives fresh outputs.
            unsafe {
                let inputs = Inputs { query: query.tensor::<E>("query")?, key: key.tensor("key")?, value: value.tensor("value")? };
                // What the caller does not want is computed all the same, in memory of our own.
                let (mut own_bits, mut own_lse) = (Vec::new(), Vec::new());
                let bits = if let Some(plan_out) = &plan_out {
                    plan_out.contiguous_mut::<u8>("plan_out")?
                } else {
                    own_bits.resize(Plan::bytes(&problem), 0);
                    &mut own_bits
                };
                let mut out = out.tensor_mut::<E>("out")?;
                let mut lse = lse_or_own(lse.as_ref(), &mut own_lse, out.shape())?;
                let Some(plan_in) = plan_in else {
                    return forward_selecting(&problem, &inputs, &budget, bits, &mut out, &mut lse);
                };
                let plan_in = plan_in.contiguous::<u8>("plan")?;
                let plan = Plan::from_bits(&problem, plan_in)?;
                if bits.len() != plan_in.len() {
                    return Err(Error::new(format!("plan_out: {} bytes, expected {}", bits.len(), plan_in.len())));
                }
                bits.copy_from_slice(plan_in);
                forward(&problem, &inputs, &plan, &mut out, &mut lse)
            }
        })
    })
    .map_err(PyErr::from)
}

#[pyfunction(name = "backward")]
#[pyo3(signature = (grad_out, grad_lse, query, key, value, out, lse, key_mask, query_mask, attn_bias, plan, grad_query, grad_key, grad_value, *, scale, block_size, sparse, dropout_p, seed, threads))]
fn backward_py(
    py: Python<'_>,
    grad_out: Descriptor,
    grad_lse: Option<Descriptor>,
    query: Descriptor,
    key: Descriptor,
    value: Descriptor,
    out: Descriptor,
    lse: Descriptor,
    key_mask: Option<Descriptor>,
    query_mask: Option<Descriptor>,
    attn_bias: Option<Descriptor>,
    plan: Descriptor,
    grad_query: Descriptor,
    grad_key: Descriptor,
    grad_value: Descriptor,
    scale: f64,
    block_size: usize,
    sparse: bool,
    dropout_p: f64,
    seed: u64,
    threads: usize,
) -> PyResult<()> {
    let settings = Settings { scale, block_size, sparse, dropout_p, seed, threads };
    py.detach(|| {
        let reads = named([
            ("grad_out", Some(&grad_out)),
            ("grad_lse", grad_lse.as_ref()),
            ("query", Some(&query)),
            ("key", Some(&key)),
            ("value", Some(&value)),
            ("out", Some(&out)),
            ("lse", Some(&lse)),
            ("key_mask", key_mask.as_ref()),
            ("query_mask", query_mask.as_ref()),
            ("attn_bias", attn_bias.as_ref()),
            ("plan", Some(&plan)),
        ]);
        check_disjoint(&[("grad_query", &grad_query), ("grad_key", &grad_key), ("grad_value", &grad_value)], &reads)?;
        let masks = Masks { key: key_mask.as_ref(), query: query_mask.as_ref(), bias: attn_bias.as_ref() };
        // SAFETY: the Python layer keeps every tensor alive during the call, and no output shares memory with one.
        let problem = unsafe { settings.problem(&query, &key, masks) }?;
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
                let plan = Plan::from_bits(&problem, plan.contiguous::<u8>("plan")?)?;
                backward(&problem, &inputs, &saved, &plan, &mut gradients)
            }
        })
    })
    .map_err(PyErr::from)
}

/// One bool per block from a plan's bits.
#[pyfunction]
fn block_mask<'py>(
    py: Python<'py>,
    plan: PyReadonlyArray4<'py, u8>,
    num_key_blocks: usize,
) -> PyResult<Bound<'py, PyArray4<bool>>> {
    let plan = plan.as_array();
    let (batch, heads, rows, bytes) = plan.dim();
    if bytes != Plan::row_bytes(num_key_blocks) {
        return Err(PyValueError::new_err(format!(
            "plan: {bytes} bytes in a row, expected {} for {num_key_blocks} key blocks",
            Plan::row_bytes(num_key_blocks)
        )));
    }
    let mask =
        Array4::from_shape_fn((batch, heads, rows, num_key_blocks), |(b, h, i, j)| plan[[b, h, i, j / 8]] >> (j % 8) & 1 == 1);
    Ok(mask.into_pyarray(py))
}

/// Makes torch's own threads do the work: `address` is that of `torch_parallel_for`, not 0.
#[pyfunction]
fn use_torch_threads(address: usize) -> PyResult<()> {
    if address == 0 {
        return Err(PyValueError::new_err("address: 0, expected the address of torch_parallel_for"));
    }
    let function = std::ptr::with_exposed_provenance::<()>(address);
    // SAFETY: the Python layer looks the function up in torch's own library, which is never unloaded.
    unsafe { threads::use_torch(std::mem::transmute::<*const (), threads::ParallelFor>(function)) };
    Ok(())
}

/// The instruction set in use.
#[pyfunction]
fn isa() -> PyResult<&'static str> {
    Ok(Level::current()?.name())
}

/// The instruction sets of this CPU, the best one last.
#[pyfunction]
fn available_isas() -> Vec<&'static str> {
    Level::available().into_iter().map(Level::name).collect()
}

/// Rates of one thread in GFLOP/s: fused multiply-adds alone, the products of the exact level, and with their softmax.
#[pyfunction]
fn kernel_rates(py: Python<'_>) -> PyResult<(f64, f64, f64)> {
    let level = Level::current()?;
    Ok(py.detach(|| crate::bench::rates(level)))
}

/// How the module was built.
#[pyfunction]
fn build_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let info = PyDict::new(py);
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    info.set_item("profile", env!("MRA_ATTENTION_PROFILE"))?;
    info.set_item("rustc", env!("MRA_ATTENTION_RUSTC"))?;
    info.set_item("target", env!("MRA_ATTENTION_TARGET"))?;
    Ok(info)
}

/// Native functions of the package; `mra_attention.functional` is the public surface.
#[pymodule(gil_used = false)]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_function(wrap_pyfunction!(select_blocks, module)?)?;
    module.add_function(wrap_pyfunction!(forward_py, module)?)?;
    module.add_function(wrap_pyfunction!(backward_py, module)?)?;
    module.add_function(wrap_pyfunction!(causal::causal_forward, module)?)?;
    module.add_function(wrap_pyfunction!(causal::causal_backward, module)?)?;
    module.add_function(wrap_pyfunction!(causal::append, module)?)?;
    module.add_function(wrap_pyfunction!(block_mask, module)?)?;
    module.add_function(wrap_pyfunction!(use_torch_threads, module)?)?;
    module.add_function(wrap_pyfunction!(isa, module)?)?;
    module.add_function(wrap_pyfunction!(available_isas, module)?)?;
    module.add_function(wrap_pyfunction!(kernel_rates, module)?)?;
    module.add_function(wrap_pyfunction!(build_info, module)?)
}
