//! How far a result may be from the formulas, from the number of roundings: worst-case bounds to first order.
//!
//! With `u` half a unit in the last place of the compute type, a sum of `n` products is off by at most `n u` times the sum of
//! their magnitudes. Let `Q, K, V, G, O` be the largest norms of a query, key, value, gradient of an output, and
//! output; `b` the block size, `n` the number of keys.
//!
//! ```text
//! logit       off by  (D + 2 b + 8) u A,  A = |scale| Q K + ln b + max |bias|   scaled, summed, perhaps of means of b tokens; a softcap: 8 more
//! weight      off by a factor  1 + w:  the logit's error, and for each strip of keys a subtraction and two exponentials
//! out         (2 w + (2 n + b + 8) u) max |v|                          a quotient of sums of n weights
//! dS          p (w + (Dv + 3) u) N,  N = G V + G O + max |dlse|
//! dq          |scale| N max |k| (w + (Dv + n + b + 16) u)              the weights of a query sum to 1
//! of a bias   the bound of dS with p <= 1, for each pair that shares the number
//! first order logit and weight: 1 + 2 A times that, since keys are weighted by weights; gradients: N is 3 + 4 A times that
//! dk, dv      likewise, times the largest sum of the weights of a key, with queries in place of keys
//! ```

use mra_attention::reference::{Attention, Form, Refined, Saved, TokenLadder};
use mra_attention::{Coarse, Level};
use ndarray::{Array3, Array4, ArrayView4};

use super::{Case, Data, Number, Rounded, rounds_gradients, rounds_weights};

/// The most that an exponential of the compute type is off, in units in the last place: the bound of `simd::exp`.
const EXP_ULPS: f64 = 1.5;

/// The keys that one step of the softmax takes, at least, unless the next block does not fit.
const STRIP: f64 = 128.0;

/// What docs/definitions.md, section 7, demands of float64.
const FLOAT64: f64 = 1e-10;

/// The largest admissible error of each result, before it is rounded to the type of the tensor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    pub(crate) out: f64,
    pub(crate) lse: f64,
    pub(crate) query: f64,
    pub(crate) key: f64,
    pub(crate) value: f64,
    /// Of the gradient of a pair's logit.
    pub(crate) pair: f64,
    /// What the gradients of queries, keys and values are off by, at most, if weights and gradients of logits are off by themselves.
    pub(crate) rounded: [f64; 3],
}

impl Bounds {
    pub(crate) fn new<E: Number>(
        case: &Case,
        data: &Data,
        attention: &Attention<'_>,
        selected: &[Array3<bool>],
        saved: &Saved<'_>,
    ) -> Self {
        let column = |attention: &Attention<'_>, saved: &Saved<'_>| largest(&attention.backward(selected, saved).value);
        let column = largest_column(case, attention, saved, column);
        Self::with_column::<E>(case, data, attention, column, saved)
    }

    /// As [`Self::new`], where the weights of a key sum to `column` at most.
    pub(crate) fn with_column<E: Number>(
        case: &Case,
        data: &Data,
        attention: &Attention<'_>,
        column: f64,
        saved: &Saved<'_>,
    ) -> Self {
        let expands = case.coarse_term() == Coarse::FirstOrder && attention.forms().contains(&Form::Block);
        Self::of::<E>(case, data, case.block_size, steps(attention, case), expands, column, saved)
    }

    /// As [`Self::new`], in the token form with several levels.
    pub(crate) fn of_ladder<E: Number>(
        case: &Case,
        data: &Data,
        ladder: &TokenLadder<'_>,
        refined: &Refined,
        saved: &Saved<'_>,
    ) -> Self {
        let column = |attention: &Attention<'_>, saved: &Saved<'_>| {
            largest(&TokenLadder { attention: *attention, coarser: ladder.coarser.clone() }.backward(refined, saved).value)
        };
        let column = largest_column(case, &ladder.attention, saved, column);
        // A step for each block of each level.
        let steps: usize =
            ladder.coarser.iter().chain([&case.block_size]).map(|size| 2 * case.key_len.div_ceil(*size) + 4).sum();
        Self::of::<E>(
            case,
            data,
            ladder.coarser.first().copied().unwrap_or(case.block_size),
            steps as f64,
            false,
            column,
            saved,
        )
    }

    #[allow(clippy::too_many_arguments, reason = "a case, and what is known of its sums")]
    fn of<E: Number>(
        case: &Case,
        data: &Data,
        block_size: usize,
        steps: f64,
        expands: bool,
        column: f64,
        saved: &Saved<'_>,
    ) -> Self {
        let u = E::Compute::ROUNDOFF;
        let [d, dv, b, n, queries] =
            [case.head_dim, case.value_dim, block_size, case.key_len, case.query_len * case.group].map(|x| x.max(1) as f64);
        let Data { query, key, value, grad_out, .. } = data;
        let scale = case.scale.unwrap_or(1.0 / d.sqrt()).abs();
        let logit = scale * norm(query) * norm(key) + b.ln() + data.largest_bias() + largest_by_distance(case, data);
        let weight = (d + 2.0 * b + if case.softcap.is_some() { 16.0 } else { 8.0 }) * u * logit
            + steps * (2.0 * logit + n.ln() + 4.0 + 4.0 * EXP_ULPS) * u;
        let weight = if expands { weight * (1.0 + 2.0 * logit) } else { weight };
        let grad_lse = data.grad_lse.iter().flatten().filter(|x| x.is_finite()).fold(0.0, |most, x| x.abs().max(most));
        let product = norm(grad_out) * (norm(value) + finite_norm(saved.out)) + grad_lse;
        let product = if expands { product * (3.0 + 4.0 * logit) } else { product };
        let of_query = weight + (dv + n + b + 16.0) * u;
        let of_key = (weight + (dv + queries + b + 16.0) * u) * column;
        let bounds = Self {
            out: (2.0 * weight + (2.0 * n + b + 8.0) * u) * largest(value),
            lse: weight + (n + 8.0) * u,
            query: scale * product * largest(key) * of_query,
            key: scale * product * largest(query) * of_key,
            value: largest(grad_out) * of_key,
            pair: product * of_query,
            rounded: [scale * product * largest(key), scale * product * largest(query) * column, largest(grad_out) * column],
        };
        if u < f32::ROUNDOFF { bounds.at_least(FLOAT64) } else { bounds }
    }

    /// The same for a sum of so many levels.
    pub(crate) fn times(self, levels: f64) -> Self {
        let Self { out, lse, query, key, value, pair, rounded } = self;
        Self {
            out: out * levels,
            lse: lse * levels,
            query: query * levels,
            key: key * levels,
            value: value * levels,
            pair: pair * levels,
            rounded,
        }
    }

    /// At levels that multiply bfloat16 as it is, weights are rounded first, at those that do so in backward gradients of logits too, and
    /// denormal numbers may be taken for 0.
    pub(crate) fn at<E: Number>(mut self, level: Level, case: &Case, data: &Data) -> Self {
        if !rounds_weights::<E>(level) {
            return self;
        }
        // The weights of a query sum to 1, and each is off by a factor.
        self.out += E::ROUNDOFF * largest(&data.value);
        let Self { out, lse, query, key, value, rounded, .. } = &mut self;
        if rounds_gradients::<E>(level) {
            for (bound, rounded) in [&mut *query, &mut *key, &mut *value].into_iter().zip(rounded) {
                *bound += E::ROUNDOFF * *rounded;
            }
        }
        for bound in [out, lse, query, key, value] {
            *bound += flushed(case, data);
        }
        self
    }

    fn at_least(self, least: f64) -> Self {
        let Self { out, lse, query, key, value, pair, rounded } = self;
        Self {
            out: out.max(least),
            lse: lse.max(least),
            query: query.max(least),
            key: key.max(least),
            value: value.max(least),
            pair: pair.max(least),
            rounded,
        }
    }
}

/// The largest bias by distance.
fn largest_by_distance(case: &Case, data: &Data) -> f64 {
    let slope = data.alibi_slopes.iter().flatten().fold(0.0, |most: f64, slope| most.max(*slope));
    let offset = case.offsets.iter().map(|offset| offset.unsigned_abs()).max().unwrap_or(0);
    slope * ((case.query_len + case.key_len) as f64 + offset as f64)
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

/// Steps of the running softmax. In the block form two steps that follow each other take more keys than fit into one, and so does
/// the coarse level with pooled keys; in the token form each block may be a step.
fn steps(attention: &Attention<'_>, case: &Case) -> f64 {
    let by_strips = 2.0 * case.key_len as f64 / STRIP + 2.0;
    let by_blocks = case.key_len.div_ceil(case.block_size) as f64 + 2.0;
    2.0 * if attention.forms().contains(&Form::Token) { by_blocks } else { by_strips }
}

/// What taking denormal numbers for 0 may cost: each term of a sum is smaller than the smallest normal number times the other factor.
pub(crate) fn flushed(case: &Case, data: &Data) -> f64 {
    let terms = (case.key_len + case.query_len * case.group + case.head_dim + case.value_dim) as f64;
    let factor = [&data.query, &data.key, &data.value, &data.grad_out].map(largest).into_iter().fold(1.0, f64::max);
    terms * factor * factor * f64::from(f32::MIN_POSITIVE)
}

/// The largest sum of the weights of a key over the queries that share it: the gradient of a value whose outputs' are 1.
fn largest_column(
    case: &Case,
    attention: &Attention<'_>,
    saved: &Saved<'_>,
    largest: impl FnOnce(&Attention<'_>, &Saved<'_>) -> f64,
) -> f64 {
    let rows = (case.batch, case.heads(), case.query_len, 1);
    let (ones, zeros) = (Array4::ones(rows), Array4::zeros(rows));
    let value = Array4::zeros((case.batch, case.kv_heads, case.key_len, 1));
    let attention = Attention { value: value.view(), ..*attention };
    let saved = Saved { out: zeros.view(), grad_out: ones.view(), grad_lse: None, ..*saved };
    largest(&attention, &saved)
}
