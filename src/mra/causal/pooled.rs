//! Means of blocks of keys and values: computed here, or brought by the caller.

use super::problem::CausalProblem;
use crate::error::{Error, Result};
use crate::mra::blocks::Blocks;
use crate::mra::forward::Inputs;
use crate::mra::problem::Problem;
use crate::mra::pyramid::Pooled;
use crate::simd::{Element, Scalar};
use crate::tensor::{Rows, Tensor};

/// Means of the blocks of keys and values, as [`append`](super::append) writes them: of all blocks that a query sees as past
/// ones, at least.
#[derive(Debug, Clone, Copy)]
pub struct PooledInputs<'a, T> {
    /// `(B, Hk, NB, D)`.
    pub key: Tensor<'a, T>,
    /// `(B, Hk, NB, Dv)`; only full mode needs them.
    pub value: Option<Tensor<'a, T>>,
}

/// The means that a call reads. Only whole past blocks of its queries count, so nothing behind the last query is read.
pub(crate) struct Means<'a, T> {
    keys: Source<'a, T>,
    values: Option<Source<'a, T>>,
}

enum Source<'a, T> {
    Own(Pooled<T>),
    Given(Tensor<'a, T>),
}

impl<T: Scalar> Source<'_, T> {
    fn head(&self, problem: &Problem, kv: usize) -> Rows<'_, T> {
        match self {
            Self::Own(pooled) => pooled.head(kv),
            Self::Given(tensor) => tensor.head(kv / problem.kv_heads, kv % problem.kv_heads),
        }
    }
}

impl<'a, T: Scalar> Means<'a, T> {
    /// The means that the caller brings, or else those of the inputs; `with_values` says whether those of values are needed.
    pub(crate) fn new<E: Element<Compute = T>>(
        problem: &CausalProblem,
        inputs: &Inputs<'_, E>,
        given: Option<&PooledInputs<'a, T>>,
        with_values: bool,
    ) -> Result<Self> {
        let Some(given) = given else {
            let blocks = past_blocks(problem);
            let (inner, past) = (&problem.inner, |item: usize| &blocks[item]);
            let (keys, values): (_, Option<Pooled<T>>) = if with_values {
                let [keys, values] = Pooled::each(inner, [(&inputs.key, &past), (&inputs.value, &past)]);
                (keys, Some(values))
            } else {
                let [keys] = Pooled::each(inner, [(&inputs.key, &past)]);
                (keys, None)
            };
            return Ok(Self { keys: Source::Own(keys), values: values.map(Source::Own) });
        };
        let value_dim = inputs.value.shape()[3];
        check(problem, "pooled_key", given.key.shape(), problem.inner.head_dim)?;
        if let Some(value) = &given.value {
            check(problem, "pooled_value", value.shape(), value_dim)?;
        }
        if with_values && given.value.is_none() {
            return Err(Error::new("pooled_value: None, expected the means of values: full mode with pooled_key needs them"));
        }
        // Products read whole vectors of channels of the values.
        let whole = problem.inner.padded::<T>(value_dim) == value_dim;
        let values = given
            .value
            .filter(|_| with_values)
            .map(|value| if whole { Source::Given(value) } else { Source::Own(Pooled::copied(&problem.inner, &value)) });
        Ok(Self { keys: Source::Given(given.key), values })
    }

    /// The means of the keys of a key head; key heads of all batch items are numbered through.
    pub(crate) fn keys(&self, problem: &Problem, kv: usize) -> Rows<'_, T> {
        self.keys.head(problem, kv)
    }

    /// The means of the values of a key head, in rows of whole vectors.
    pub(crate) fn values(&self, problem: &Problem, kv: usize) -> Option<Rows<'_, T>> {
        self.values.as_ref().map(|values| values.head(problem, kv))
    }
}

/// The tokens of each batch item that lie in blocks which some query sees as past ones.
pub(crate) fn past_blocks(problem: &CausalProblem) -> Vec<Blocks> {
    let inner = &problem.inner;
    (0..inner.batch).map(|batch| Blocks::new(inner.keys(batch).start(problem.pooled_blocks(batch)), inner.block_size)).collect()
}

fn check(problem: &CausalProblem, name: &str, shape: [usize; 4], channels: usize) -> Result<()> {
    let inner = &problem.inner;
    let needed = (0..inner.batch).map(|batch| problem.pooled_blocks(batch)).max().unwrap_or(0);
    let [batch, heads, blocks, dim] = shape;
    if (batch, heads, dim) == (inner.batch, inner.kv_heads, channels) && blocks >= needed {
        return Ok(());
    }
    let expected = [inner.batch, inner.kv_heads, needed, channels];
    Err(Error::new(format!("{name}: shape {shape:?}, expected {expected:?} with at least so many blocks")))
}
