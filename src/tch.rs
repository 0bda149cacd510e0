//! Adapter for Rust users of libtorch (feature `tch`): forward and backward on [`tch::Tensor`]s.
//!
//! tch pins one libtorch release exactly, so this is never part of a Python wheel. There is no custom autograd in tch: call
//! [`backward`] with what [`forward`] returned.

use tch::{Device, Kind, Tensor as TorchTensor};

use crate::error::{Error, Result};
use crate::{Gradients, Inputs, Options, Problem, Saved, Selection, Tensor, TensorMut};

/// What [`forward`] returns, and [`backward`] takes.
#[derive(Debug)]
pub struct Output {
    /// `(B, H, Lq, Dv)`, the dtype of the inputs.
    pub out: TorchTensor,
    /// `(B, H, Lq)`, float32 (float64 for float64 inputs).
    pub lse: TorchTensor,
    /// `(B, bytes)`, uint8: the plan.
    pub plan: TorchTensor,
}

/// Calls `$body` with `$element` as the element type of a kind.
macro_rules! with_element {
    ($kind:expr, $element:ident => $body:expr) => {
        match $kind {
            Kind::Float => {
                type $element = f32;
                $body
            }
            Kind::Double => {
                type $element = f64;
                $body
            }
            Kind::BFloat16 => {
                type $element = half::bf16;
                $body
            }
            Kind::Half => {
                type $element = half::f16;
                $body
            }
            kind => Err(Error::new(format!("query: kind {kind:?}, expected Float, Double, BFloat16 or Half"))),
        }
    };
}

/// Selects blocks and computes the attention of `query` `(B, H, Lq, D)` over `key` `(B, Hk, Lk, D)` and `value` `(B, Hk, Lk, Dv)`.
///
/// # Errors
/// If a tensor is not on the CPU, not of the kind of `query`, or does not fit; the message names it.
pub fn forward(query: &TorchTensor, key: &TorchTensor, value: &TorchTensor, options: &Options<'_>) -> Result<Output> {
    let (kind, [query, key, value]) =
        (query.kind(), [("query", query), ("key", key), ("value", value)].map(|(name, t)| rows(name, t)));
    let (query, key, value) = (query?, key?, value?);
    let problem = Problem::new(shape("query", &query)?, shape("key", &key)?, options)?;
    let [batch, heads, length, _] = shape("query", &query)?;
    let lse_kind = if kind == Kind::Double { Kind::Double } else { Kind::Float };
    let empty =
        |sizes: &[usize], kind| TorchTensor::empty(sizes.iter().map(|&n| signed(n)).collect::<Vec<_>>(), (kind, Device::Cpu));
    let output = Output {
        out: empty(&[batch, heads, length, shape("value", &value)?[3]], kind),
        lse: empty(&[batch, heads, length, 1], lse_kind),
        plan: empty(&[batch, problem.plan_bytes().checked_div(batch).unwrap_or(0)], Kind::Uint8),
    };
    with_element!(kind, E => {
        // SAFETY: the outputs are fresh, and all tensors outlive the borrows.
        unsafe {
            let inputs = Inputs { query: view::<E>("query", kind, &query)?, key: view("key", kind, &key)?, value: view("value", kind, &value)? };
            let plan = bytes_mut(&output.plan);
            let mut out = view_mut::<E>("out", &output.out)?;
            let mut lse = view_mut("lse", &output.lse)?;
            crate::forward(&problem, &inputs, None, Selection::Chosen(plan), &mut out, &mut lse)
        }
    })?;
    Ok(Output { lse: output.lse.squeeze_dim(-1), ..output })
}

/// The gradients of query, key and value, given that of `output.out`; those of a bias and of sinks are not computed.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    grad_out: &TorchTensor,
    [query, key, value]: [&TorchTensor; 3],
    output: &Output,
    options: &Options<'_>,
) -> Result<[TorchTensor; 3]> {
    let kind = query.kind();
    let (query, key, value) = (rows("query", query)?, rows("key", key)?, rows("value", value)?);
    let (grad_out, out, lse, plan) = (
        rows("grad_out", grad_out)?,
        rows("out", &output.out)?,
        output.lse.unsqueeze(-1).contiguous(),
        output.plan.contiguous(),
    );
    let problem = Problem::new(shape("query", &query)?, shape("key", &key)?, options)?;
    let gradients = [&query, &key, &value].map(|tensor| TorchTensor::empty(tensor.size(), (kind, Device::Cpu)));
    with_element!(kind, E => {
        // SAFETY: the gradients are fresh, and all tensors outlive the borrows.
        unsafe {
            let inputs = Inputs { query: view::<E>("query", kind, &query)?, key: view("key", kind, &key)?, value: view("value", kind, &value)? };
            let lse_kind = if kind == Kind::Double { Kind::Double } else { Kind::Float };
            let saved = Saved {
                grad_out: view("grad_out", kind, &grad_out)?,
                grad_lse: None,
                out: view("out", kind, &out)?,
                lse: view("lse", lse_kind, &lse)?,
            };
            let plan = bytes(&plan)?;
            let mut to = Gradients {
                query: view_mut("grad_query", &gradients[0])?,
                key: view_mut("grad_key", &gradients[1])?,
                value: view_mut("grad_value", &gradients[2])?,
                sinks: None,
                bias: None,
            };
            crate::backward(&problem, &inputs, &saved, plan, &mut to)
        }
    })?;
    Ok(gradients)
}

/// The tensor itself, or a copy if its channels are not contiguous.
fn rows(name: &str, tensor: &TorchTensor) -> Result<TorchTensor> {
    if tensor.device() != Device::Cpu {
        return Err(Error::new(format!("{name}: device {:?}, expected Cpu", tensor.device())));
    }
    Ok(if tensor.stride().last() == Some(&1) { tensor.shallow_clone() } else { tensor.contiguous() })
}

fn shape(name: &str, tensor: &TorchTensor) -> Result<[usize; 4]> {
    dims(name, &tensor.size())
}

fn dims(name: &str, dims: &[i64]) -> Result<[usize; 4]> {
    let sizes: Option<Vec<usize>> = dims.iter().map(|&n| usize::try_from(n).ok()).collect();
    sizes
        .and_then(|sizes| sizes.try_into().ok())
        .ok_or_else(|| Error::new(format!("{name}: shape or strides {dims:?}, expected 4 dimensions, none negative")))
}

fn signed(n: usize) -> i64 {
    i64::try_from(n).expect("a size")
}

/// Borrows a tensor for reading.
///
/// # Safety
/// - The tensor outlives the view, and nothing writes to it meanwhile.
unsafe fn view<'a, E>(name: &str, kind: Kind, tensor: &TorchTensor) -> Result<Tensor<'a, E>> {
    if tensor.kind() != kind {
        return Err(Error::new(format!("{name}: kind {:?}, expected {kind:?}", tensor.kind())));
    }
    let (shape, strides) = (shape(name, tensor)?, dims(name, &tensor.stride())?);
    let len = crate::tensor::span(&shape, &strides).unwrap_or(0);
    // SAFETY: a CPU tensor spans this many elements; the rest is the caller's.
    let data = if len == 0 { &[] } else { unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<E>(), len) } };
    Tensor::new(name, data, shape, strides)
}

/// Borrows a fresh contiguous tensor of element type `E` for writing.
///
/// # Safety
/// - The tensor outlives the view, its kind is that of `E`, and nothing else uses it meanwhile.
unsafe fn view_mut<'a, E>(name: &str, tensor: &TorchTensor) -> Result<TensorMut<'a, E>> {
    let (shape, strides) = (shape(name, tensor)?, dims(name, &tensor.stride())?);
    let len = tensor.numel();
    // SAFETY: a contiguous CPU tensor spans this many elements; the rest is the caller's.
    let data = if len == 0 { &mut [] } else { unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<E>(), len) } };
    TensorMut::new(name, data, shape, strides)
}

/// Borrows a contiguous tensor of bytes for reading.
///
/// # Safety
/// - The tensor outlives the borrow, and nothing writes to it meanwhile.
unsafe fn bytes<'a>(tensor: &TorchTensor) -> Result<&'a [u8]> {
    if tensor.kind() != Kind::Uint8 || tensor.device() != Device::Cpu {
        return Err(Error::new(format!("plan: {:?} on {:?}, expected Uint8 on Cpu", tensor.kind(), tensor.device())));
    }
    let len = tensor.numel();
    // SAFETY: a contiguous CPU tensor of bytes has this many; the rest is the caller's.
    Ok(if len == 0 { &[] } else { unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), len) } })
}

/// Borrows a fresh contiguous tensor of bytes for writing.
///
/// # Safety
/// - The tensor outlives the borrow, and nothing else uses it meanwhile.
unsafe fn bytes_mut<'a>(tensor: &TorchTensor) -> &'a mut [u8] {
    let len = tensor.numel();
    // SAFETY: a contiguous CPU tensor of bytes has this many; the rest is the caller's.
    if len == 0 { &mut [] } else { unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), len) } }
}
