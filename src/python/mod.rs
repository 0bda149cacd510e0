//! The native module `mra_attention._core`: borrow the tensors, release the interpreter, compute, map the error.

#![allow(
    clippy::needless_pass_by_value,
    clippy::too_many_arguments,
    reason = "pyo3 passes what it extracted by value; the arguments are the operators' schema (mra_attention._ops)"
)]

#[macro_use]
mod element;
mod attention;
mod borrow;
mod settings;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::exec::threads;
use crate::{Error, Level};

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        PyValueError::new_err(error.to_string())
    }
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
    module.add_function(wrap_pyfunction!(attention::select, module)?)?;
    module.add_function(wrap_pyfunction!(attention::forward, module)?)?;
    module.add_function(wrap_pyfunction!(attention::backward, module)?)?;
    module.add_function(wrap_pyfunction!(attention::attend_cache, module)?)?;
    module.add_function(wrap_pyfunction!(attention::append, module)?)?;
    module.add_function(wrap_pyfunction!(attention::refined_blocks, module)?)?;
    module.add_function(wrap_pyfunction!(use_torch_threads, module)?)?;
    module.add_function(wrap_pyfunction!(isa, module)?)?;
    module.add_function(wrap_pyfunction!(available_isas, module)?)?;
    module.add_function(wrap_pyfunction!(kernel_rates, module)?)?;
    module.add_function(wrap_pyfunction!(build_info, module)?)
}
