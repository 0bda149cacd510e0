//! The means of every level of a ladder.

use std::ops::Range;

use super::{Pooled, Pyramid, Side};
use crate::mra::problem::{Batch, Form, Problem};
use crate::simd::{Element, Scalar};
use crate::tensor::Tensor;

/// The blocks of one size, and the sequences of the block form cut into them.
pub(crate) struct BlockLevel<'p> {
    pub(crate) problem: &'p Problem<'p>,
    pub(crate) batch: Batch<'p>,
}

impl<'p> BlockLevel<'p> {
    /// All levels of a call, the coarsest first.
    pub(crate) fn all(problem: &'p Problem<'p>) -> Vec<Self> {
        problem.levels().map(|level| Self { problem: level, batch: Batch::new(level, Form::Block) }).collect()
    }
}

/// The means of one level.
pub(crate) struct LevelMeans<T> {
    pub(crate) pyramid: Pyramid<T>,
    /// Of values, if they are wanted.
    pub(crate) values: Option<Pooled<T>>,
}

impl<T: Scalar> LevelMeans<T> {
    /// Before they are written.
    pub(crate) fn unset<E: Element<Compute = T>>(
        problem: &Problem<'_>,
        batch: &Batch<'_>,
        query: &Tensor<'_, E>,
        key: &Tensor<'_, E>,
        value: Option<&Tensor<'_, E>>,
    ) -> Self {
        let unset = |tensor, side| Pooled::unset(problem, batch, tensor, side);
        let pyramid = Pyramid { queries: unset(query, Side::Queries), keys: unset(key, Side::Keys) };
        Self { pyramid, values: value.map(|value| unset(value, Side::Keys)) }
    }

    /// Pools the tokens of some groups.
    pub(crate) fn pool<E: Element<Compute = T>>(
        &mut self,
        problem: &Problem<'_>,
        batch: &Batch<'_>,
        groups: &Range<usize>,
        query: &Tensor<'_, E>,
        key: &Tensor<'_, E>,
        value: Option<&Tensor<'_, E>>,
    ) {
        let Pyramid { queries, keys } = &mut self.pyramid;
        let (query, key) = ((query, Side::Queries), (key, Side::Keys));
        if let (Some(value), Some(values)) = (value, &mut self.values) {
            Pooled::fill(problem, batch, groups, [query, key, (value, Side::Keys)], [queries, keys, values]);
        } else {
            Pooled::fill(problem, batch, groups, [query, key], [queries, keys]);
        }
    }

    /// Pools the tokens at the finest level, and at each other one the means of the level below.
    pub(crate) fn of_levels<E: Element<Compute = T>>(
        levels: &[BlockLevel<'_>],
        query: &Tensor<'_, E>,
        key: &Tensor<'_, E>,
        value: Option<&Tensor<'_, E>>,
    ) -> Vec<Self> {
        let Some((finest, coarser)) = levels.split_last() else { return Vec::new() };
        let mut below = finest;
        let mut means = vec![Self::unset(finest.problem, &finest.batch, query, key, value)];
        means[0].pool(finest.problem, &finest.batch, &(0..finest.batch.groups()), query, key, value);
        for level in coarser.iter().rev() {
            let of_below = &means[means.len() - 1];
            let coarsen = |pooled: &Pooled<T>, side| pooled.coarsen(&level.batch, (below.problem, &below.batch), side);
            let pyramid = Pyramid {
                queries: coarsen(&of_below.pyramid.queries, Side::Queries),
                keys: coarsen(&of_below.pyramid.keys, Side::Keys),
            };
            let values = of_below.values.as_ref().map(|values| coarsen(values, Side::Keys));
            means.push(Self { pyramid, values });
            below = level;
        }
        means.reverse();
        means
    }
}
