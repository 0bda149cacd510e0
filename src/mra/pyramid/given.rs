//! Means of the blocks of keys and values for the token form: computed here, or brought by the caller.

use super::{Pooled, Side};
use crate::error::{Error, Result};
use crate::exec::Buffer;
use crate::mra::inputs::Inputs;
use crate::mra::problem::{Batch, Form, Mode, Problem};
use crate::simd::{Element, Scalar};
use crate::tensor::{Rows, Tensor};

/// Means of the blocks of keys and values of one level, as [`append`](super::append) writes them: of all blocks of which a query sees
/// every key but its own, at least.
#[derive(Debug, Clone, Copy)]
pub struct PooledInputs<'a, T> {
    /// `(B, Hk, NB, D)`.
    pub key: Tensor<'a, T>,
    /// `(B, Hk, NB, Dv)`; only full mode needs them.
    pub value: Option<Tensor<'a, T>>,
}

/// The means that a call reads.
pub(crate) struct Means<'a, T> {
    keys: Source<'a, T>,
    values: Option<Source<'a, T>>,
}

enum Source<'a, T> {
    Own(Pooled<T>),
    Given(Tensor<'a, T>),
}

impl<T: Scalar> Source<'_, T> {
    fn of(&self, batch: &Batch<'_>, group: usize) -> Rows<'_, T> {
        match self {
            Self::Own(pooled) => pooled.of_group(batch, group),
            Self::Given(tensor) => {
                let (item, head) = batch.item_and_kv_head(group);
                tensor.head(item, head)
            }
        }
    }
}

impl<'a, T: Scalar> Means<'a, T> {
    /// The means that the caller brings, or else those of the inputs; `with_values` says whether those of values are needed.
    pub(crate) fn new<E: Element<Compute = T>>(
        problem: &Problem<'_>,
        batch: &Batch<'_>,
        inputs: &Inputs<'_, E>,
        given: Option<&PooledInputs<'a, T>>,
        with_values: bool,
    ) -> Self {
        let Some(given) = given else {
            if with_values {
                let [keys, values] = Pooled::each(problem, batch, [(&inputs.key, Side::Keys), (&inputs.value, Side::Keys)]);
                return Self { keys: Source::Own(keys), values: Some(Source::Own(values)) };
            }
            let [keys] = Pooled::each(problem, batch, [(&inputs.key, Side::Keys)]);
            return Self { keys: Source::Own(keys), values: None };
        };
        // Products read whole vectors of channels of the values.
        let whole = problem.padded::<T>(inputs.value.shape()[3]) == inputs.value.shape()[3];
        let values = given
            .value
            .filter(|_| with_values)
            .map(|value| if whole { Source::Given(value) } else { Source::Own(copied(problem, batch, &value)) });
        Self { keys: Source::Given(given.key), values }
    }

    /// The means of the blocks of the level above one whose problem and batch are given.
    pub(crate) fn coarsen(&self, above: &Batch<'_>, below: (&Problem<'_>, &Batch<'_>)) -> Self {
        let coarsen = |source: &Source<'a, T>| match source {
            Source::Own(pooled) => Source::Own(pooled.coarsen(above, below, Side::Keys)),
            Source::Given(_) => unreachable!("means are given for every level or for none"),
        };
        Self { keys: coarsen(&self.keys), values: self.values.as_ref().map(coarsen) }
    }

    /// The means of the keys of a group.
    pub(crate) fn keys(&self, batch: &Batch<'_>, group: usize) -> Rows<'_, T> {
        self.keys.of(batch, group)
    }

    /// The means of the values of a group, in rows of whole vectors.
    pub(crate) fn values(&self, batch: &Batch<'_>, group: usize) -> Option<Rows<'_, T>> {
        self.values.as_ref().map(|values| values.of(batch, group))
    }
}

/// Copies means to rows of whole vectors.
fn copied<T: Scalar>(problem: &Problem<'_>, batch: &Batch<'_>, means: &Tensor<'_, T>) -> Pooled<T> {
    let channels = means.shape()[3];
    let width = problem.padded::<T>(channels);
    let mut copy = Buffer::zeros(batch.columns() * width);
    for index in 0..batch.columns() {
        let (group, block) = batch.column_at(index);
        let (item, head) = batch.item_and_kv_head(group);
        let rows = means.head(item, head);
        if block < rows.len() {
            copy[index * width..][..channels].copy_from_slice(rows.row(block));
        }
    }
    Pooled { means: copy, width }
}

/// Checks means that the caller brings, of each level.
pub(crate) fn check<T>(problem: &Problem<'_>, given: &[PooledInputs<'_, T>], value_dim: usize) -> Result<()> {
    let levels = problem.levels();
    if given.len() != levels.len() {
        return Err(Error::new(format!("pooled_key: means of {} levels, expected {}", given.len(), levels.len())));
    }
    given.iter().zip(levels).try_for_each(|(given, level)| check_level(level, given, value_dim))
}

fn check_level<T>(problem: &Problem<'_>, given: &PooledInputs<'_, T>, value_dim: usize) -> Result<()> {
    let needed = Batch::new(problem, Form::Token).most_columns();
    let check = |name: &str, shape: [usize; 4], channels: usize| {
        let [batch, heads, blocks, dim] = shape;
        if (batch, heads, dim) == (problem.batch, problem.kv_heads, channels) && blocks >= needed {
            return Ok(());
        }
        let expected = [problem.batch, problem.kv_heads, needed, channels];
        Err(Error::new(format!("{name}: shape {shape:?}, expected {expected:?} with at least so many blocks")))
    };
    check("pooled_key", given.key.shape(), problem.head_dim)?;
    match &given.value {
        Some(value) => check("pooled_value", value.shape(), value_dim),
        None if problem.mode == Mode::Full => {
            Err(Error::new("pooled_value: None, expected the means of values: full mode with pooled_key needs them"))
        }
        None => Ok(()),
    }
}
