//! The tensors of a call, and their shapes checked against the problem.

use super::bias_gradient::BiasGradient;
use super::problem::Problem;
use crate::error::{Error, Result};
use crate::exec::TensorMut;
use crate::simd::Element;
use crate::tensor::Tensor;

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

/// What backward gets from forward and from the caller, channels contiguous.
#[derive(Debug, Clone, Copy)]
pub struct Saved<'a, E: Element> {
    /// The gradient of `out`, `(B, H, Lq, Dv)`.
    pub grad_out: Tensor<'a, E>,
    /// The gradient of `lse`, `(B, H, Lq, 1)`, if the caller used it.
    pub grad_lse: Option<Tensor<'a, E::Compute>>,
    /// The output of forward, `(B, H, Lq, Dv)`.
    pub out: Tensor<'a, E>,
    /// The lse of forward, `(B, H, Lq, 1)`.
    pub lse: Tensor<'a, E::Compute>,
}

/// Where the gradients go; shapes as the inputs'.
#[derive(Debug)]
pub struct Gradients<'a, E> {
    /// `(B, H, Lq, D)`.
    pub query: TensorMut<'a, E>,
    /// `(B, Hk, Lk, D)`.
    pub key: TensorMut<'a, E>,
    /// `(B, Hk, Lk, Dv)`.
    pub value: TensorMut<'a, E>,
    /// `(B, H)`, if the gradients of the sinks are wanted.
    pub sinks: Option<&'a mut [f64]>,
    /// That of the additive bias, if it is wanted.
    pub bias: Option<BiasGradient<'a>>,
}

impl Problem<'_> {
    /// Checks the shapes of query and key.
    pub(crate) fn check_query_and_key(&self, query: [usize; 4], key: [usize; 4]) -> Result<()> {
        Self::expect("query", query, [self.batch, self.heads, self.query_len, self.head_dim])?;
        Self::expect("key", key, [self.batch, self.kv_heads, self.key_len, self.head_dim])
    }
}

impl<E: Element> Inputs<'_, E> {
    /// Checks the shapes against the problem and returns the channels of a value.
    pub(crate) fn validate(&self, problem: &Problem<'_>) -> Result<usize> {
        let value_dim = self.value.shape()[3];
        problem.check_query_and_key(self.query.shape(), self.key.shape())?;
        Problem::expect("value", self.value.shape(), [problem.batch, problem.kv_heads, problem.key_len, value_dim])?;
        Ok(value_dim)
    }
}

impl<E: Element> Saved<'_, E> {
    /// Checks the shapes.
    pub(crate) fn validate(&self, problem: &Problem<'_>, value_dim: usize) -> Result<()> {
        let of = |channels| [problem.batch, problem.heads, problem.query_len, channels];
        Problem::expect("grad_out", self.grad_out.shape(), of(value_dim))?;
        Problem::expect("out", self.out.shape(), of(value_dim))?;
        Problem::expect("lse", self.lse.shape(), of(1))?;
        self.grad_lse.as_ref().map_or(Ok(()), |grad_lse| Problem::expect("grad_lse", grad_lse.shape(), of(1)))
    }
}

impl<E: Element> Gradients<'_, E> {
    /// Checks the shapes.
    pub(crate) fn validate(&self, problem: &Problem<'_>, inputs: &Inputs<'_, E>) -> Result<()> {
        let heads = problem.batch * problem.heads;
        if let Some(sinks) = &self.sinks {
            if !problem.has_sinks() {
                return Err(Error::new("grad_sinks: given, expected None where there are no sinks"));
            }
            if sinks.len() != heads {
                return Err(Error::new(format!("grad_sinks: {} numbers, expected {heads}", sinks.len())));
            }
        }
        Problem::expect("grad_query", self.query.shape(), inputs.query.shape())?;
        Problem::expect("grad_key", self.key.shape(), inputs.key.shape())?;
        Problem::expect("grad_value", self.value.shape(), inputs.value.shape())?;
        self.bias.as_ref().map_or(Ok(()), |bias| bias.validate(problem))
    }
}
