//! Means over the tokens of each block: the coarse level of queries, keys and values.

mod append;
mod coarsen;
mod given;
mod levels;

pub use append::append;
pub use given::PooledInputs;
pub(crate) use given::{Means, check};
pub(crate) use levels::{BlockLevel, LevelMeans};

use std::ops::Range;

use super::problem::{Batch, Blocks, Problem};
use crate::exec::{Buffer, Chunks, threads};
use crate::kernels::{AddRows, Matrix};
use crate::simd::{Element, Level, Scalar};
use crate::tensor::{Rows, Tensor};

/// A row for each block of each flat head, or of each group, padded with zeros to whole vectors; that of an empty block is 0.
#[derive(Debug)]
pub(crate) struct Pooled<T> {
    means: Buffer<T>,
    pub(crate) width: usize,
}

/// Whose blocks a tensor is pooled by.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Side {
    Queries,
    Keys,
}

impl<T: Scalar> Pooled<T> {
    /// Pools tensors, all in one go: to hand over work to other threads takes as long as to pool a short sequence.
    pub(crate) fn each<E: Element<Compute = T>, const N: usize>(
        problem: &Problem<'_>,
        batch: &Batch<'_>,
        tensors: [(&Tensor<'_, E>, Side); N],
    ) -> [Self; N] {
        let mut pooled = tensors.map(|(tensor, side)| Self::unset(problem, batch, tensor, side));
        Self::fill(problem, batch, &(0..batch.groups()), tensors, pooled.each_mut());
        pooled
    }

    /// Before it is written.
    fn unset<E: Element<Compute = T>>(problem: &Problem<'_>, batch: &Batch<'_>, tensor: &Tensor<'_, E>, side: Side) -> Self {
        let width = problem.padded::<T>(tensor.shape()[3]);
        let count = match side {
            Side::Queries => batch.rows(),
            Side::Keys => batch.columns(),
        };
        Self { means: Buffer::scratch(count * width), width }
    }

    /// Writes the means of some groups.
    fn fill<E: Element<Compute = T>, const N: usize>(
        problem: &Problem<'_>,
        batch: &Batch<'_>,
        groups: &Range<usize>,
        tensors: [(&Tensor<'_, E>, Side); N],
        pooled: [&mut Self; N],
    ) {
        let ranges = tensors.map(|(_, side)| match side {
            Side::Queries => batch.rows_of(&batch.heads_of_all(groups)),
            Side::Keys => batch.columns_of(groups),
        });
        let rows = pooled.map(|pooled| Chunks::new(&mut pooled.means, pooled.width));
        let elements: usize = tensors.iter().map(|(tensor, _)| tensor.shape().iter().product::<usize>()).sum();
        threads::for_each(
            problem.threads_to_read(elements / batch.groups().max(1) * groups.len()),
            ranges.iter().map(ExactSizeIterator::len).sum(),
            || (),
            |(), mut task| {
                let mut which = 0;
                while task >= ranges[which].len() {
                    task -= ranges[which].len();
                    which += 1;
                }
                task += ranges[which].start;
                let (tensor, side) = tensors[which];
                let (blocks, block, (item, head)) = match side {
                    Side::Queries => {
                        let (head, i) = batch.row_at(task);
                        (&batch.segment(head).queries, i, batch.item_and_head(head))
                    }
                    Side::Keys => {
                        let (group, j) = batch.column_at(task);
                        (&batch.segment_of_group(group).keys, j, batch.item_and_kv_head(group))
                    }
                };
                // SAFETY: each task has its own row.
                let mean = unsafe { rows[which].get_mut(task) };
                average(problem.level, &tensor.head(item, head), blocks, block, mean);
            },
        );
    }

    /// Consecutive rows.
    pub(crate) fn rows(&self, first: usize, count: usize) -> Rows<'_, T> {
        Rows::new(&self.means[first * self.width..][..count * self.width], count, self.width, self.width)
    }

    /// The rows of the blocks of queries of a flat head.
    pub(crate) fn of_head(&self, batch: &Batch<'_>, head: usize) -> Rows<'_, T> {
        self.rows(batch.row(head, 0), batch.segment(head).rows.len())
    }

    /// The rows of the blocks of keys of a group.
    pub(crate) fn of_group(&self, batch: &Batch<'_>, group: usize) -> Rows<'_, T> {
        self.rows(batch.column(group, 0), batch.segment_of_group(group).keys.len())
    }
}

/// The pooled queries and keys, for the selection and the coarse level.
pub(crate) struct Pyramid<T> {
    pub(crate) queries: Pooled<T>,
    pub(crate) keys: Pooled<T>,
}

/// Writes the mean of the tokens of a block, and zeros behind its channels.
pub(crate) fn average<E: Element>(level: Level, tokens: &Rows<'_, E>, blocks: &Blocks, block: usize, mean: &mut [E::Compute]) {
    let (numbers, channels) = (blocks.numbers(block), tokens.cols());
    // In fresh memory, to read before the first write would cost a second page fault, one that stops the other threads as well.
    mean.fill(E::Compute::ZERO);
    if numbers.is_empty() {
        return;
    }
    let weight = E::Compute::from_f64(1.0 / numbers.len() as f64);
    let mut add = |number: usize, count: usize| {
        let (data, stride) = tokens.tail(blocks.token(number));
        let rows = Matrix::new(data, count, channels, stride);
        E::Compute::run(level, AddRows { rows, sums: &mut *mean });
    };
    if blocks.consecutive(numbers.clone()) {
        add(numbers.start, numbers.len());
    } else {
        numbers.for_each(|number| add(number, 1));
    }
    for sum in mean {
        *sum = *sum * weight;
    }
}
