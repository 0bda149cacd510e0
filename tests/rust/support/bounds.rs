//! How far a result may be from the formulas, from the number of roundings: worst-case bounds to first order.
//!
//! With `u` half a unit in the last place of the compute type, a sum of `n` products is off by at most `n u` times the sum of
//! their magnitudes. Let `Q, K, V, G, O` be the largest norms of a query, key, value, gradient of an output, and
//! output; `b` the block size, `n` the number of keys.
//!
//! ```text
//! logit       off by  (D + 2 b + 8) u A,  A = |scale| Q K + ln b + max |bias|   scaled, summed, perhaps of means of b tokens
//! weight      off by a factor  1 + w:  the logit's error, and for each strip of keys a subtraction and two exponentials
//! out         (2 w + (2 n + b + 8) u) max |v|                          a quotient of sums of n weights
//! dS          p (w + (Dv + 3) u) N,  N = G V + G O + max |dlse|
//! dq          |scale| N max |k| (w + (Dv + n + b + 16) u)              the weights of a query sum to 1
//! dk, dv      likewise, times the largest sum of the weights of a key, with queries in place of keys
//! ```

use mra_attention::reference::{Attention, Saved};
use ndarray::{Array3, Array4, ArrayView4};

use super::{Case, Data, Number, Rounded};

/// The most that an exponential of the compute type is off, in units in the last place: the bound of `simd::exp`.
const EXP_ULPS: f64 = 1.5;

/// The keys that one step of the softmax takes, at least, unless the next block does not fit.
const STRIP: f64 = 128.0;

/// What docs/definitions.md, section 6, demands of float64.
const FLOAT64: f64 = 1e-10;

/// The largest admissible error of each result, before it is rounded to the type of the tensor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    pub(crate) out: f64,
    pub(crate) lse: f64,
    pub(crate) query: f64,
    pub(crate) key: f64,
    pub(crate) value: f64,
}

/// What the bounds follow from.
pub(crate) struct Magnitudes<'a> {
    pub(crate) head_dim: usize,
    pub(crate) value_dim: usize,
    pub(crate) block_size: usize,
    pub(crate) keys: usize,
    /// Queries that share a key.
    pub(crate) queries: usize,
    pub(crate) scale: f64,
    /// The largest bias.
    pub(crate) bias: f64,
    /// Steps of the running softmax.
    pub(crate) steps: f64,
    pub(crate) query: &'a Array4<f64>,
    pub(crate) key: &'a Array4<f64>,
    pub(crate) value: &'a Array4<f64>,
    pub(crate) grad_out: &'a Array4<f64>,
    pub(crate) grad_lse: Option<&'a Array3<f64>>,
    pub(crate) out: ArrayView4<'a, f64>,
    /// The largest sum of the weights of a key.
    pub(crate) column: f64,
}

impl Bounds {
    pub(crate) fn new<E: Number>(
        case: &Case,
        data: &Data,
        attention: &Attention<'_>,
        plan: ArrayView4<'_, bool>,
        saved: &Saved<'_>,
    ) -> Self {
        let (d, n) = (case.head_dim.max(1) as f64, case.key_len.max(1) as f64);
        let bias = data.bias.as_ref().map_or(0.0, largest);
        // Two steps that follow each other take more keys than fit into one; so does the coarse level with pooled keys.
        let steps = 2.0 * (2.0 * n / STRIP + 2.0);
        Self::of::<E>(&Magnitudes {
            head_dim: case.head_dim,
            value_dim: case.value_dim,
            block_size: case.block_size,
            keys: case.key_len,
            queries: case.query_len * case.group,
            scale: case.scale.unwrap_or(1.0 / d.sqrt()),
            bias,
            steps,
            query: &data.query,
            key: &data.key,
            value: &data.value,
            grad_out: &data.grad_out,
            grad_lse: data.grad_lse.as_ref(),
            out: saved.out,
            column: largest_column(case, attention, plan, saved),
        })
    }

    /// The bounds for inputs of these sizes.
    pub(crate) fn of<E: Number>(magnitudes: &Magnitudes<'_>) -> Self {
        let u = E::Compute::ROUNDOFF;
        let Magnitudes { query, key, value, grad_out, .. } = *magnitudes;
        let [d, dv, b, n, queries] =
            [magnitudes.head_dim, magnitudes.value_dim, magnitudes.block_size, magnitudes.keys, magnitudes.queries]
                .map(|count| count.max(1) as f64);
        let scale = magnitudes.scale.abs();
        let logit = scale * norm(query) * norm(key) + b.ln() + magnitudes.bias;
        let weight = (d + 2.0 * b + 8.0) * u * logit + magnitudes.steps * (2.0 * logit + n.ln() + 4.0 + 4.0 * EXP_ULPS) * u;
        let grad_lse =
            magnitudes.grad_lse.into_iter().flatten().copied().filter(|x| x.is_finite()).fold(0.0, |most, x| x.abs().max(most));
        let product = norm(grad_out) * (norm(value) + finite_norm(magnitudes.out)) + grad_lse;
        let of_query = weight + (dv + n + b + 16.0) * u;
        let of_key = (weight + (dv + queries + b + 16.0) * u) * magnitudes.column;
        let bounds = Self {
            out: (2.0 * weight + (2.0 * n + b + 8.0) * u) * largest(value),
            lse: weight + (n + 8.0) * u,
            query: scale * product * largest(key) * of_query,
            key: scale * product * largest(query) * of_key,
            value: largest(grad_out) * of_key,
        };
        if u < f32::ROUNDOFF { bounds.at_least(FLOAT64) } else { bounds }
    }

    fn at_least(self, least: f64) -> Self {
        let Self { out, lse, query, key, value } = self;
        Self { out: out.max(least), lse: lse.max(least), query: query.max(least), key: key.max(least), value: value.max(least) }
    }
}

/// The largest number of valid tokens.
pub(crate) fn largest(array: &Array4<f64>) -> f64 {
    array.iter().filter(|x| x.is_finite()).fold(0.0, |most, x| x.abs().max(most))
}

/// The largest norm of a valid token.
fn norm(array: &Array4<f64>) -> f64 {
    finite_norm(array.view())
}

fn finite_norm(array: ArrayView4<'_, f64>) -> f64 {
    array
        .rows()
        .into_iter()
        .map(|row| row.iter().map(|x| x * x).sum::<f64>().sqrt())
        .filter(|x| x.is_finite())
        .fold(0.0, f64::max)
}

/// The largest sum of the weights of a key over the queries that share it: the gradient of a value whose outputs' are 1.
fn largest_column(case: &Case, attention: &Attention<'_>, plan: ArrayView4<'_, bool>, saved: &Saved<'_>) -> f64 {
    let rows = (case.batch, case.heads(), case.query_len, 1);
    let (ones, zeros) = (Array4::ones(rows), Array4::zeros(rows));
    let value = Array4::zeros((case.batch, case.kv_heads, case.key_len, 1));
    let attention = Attention { value: value.view(), ..*attention };
    let saved = Saved { out: zeros.view(), grad_out: ones.view(), grad_lse: None, ..*saved };
    largest(&attention.backward(plan, &saved).value)
}
