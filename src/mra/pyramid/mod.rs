//! Means over the tokens of each block: the coarse level of queries, keys and values.

mod append;
mod coarsen;
mod given;
mod levels;

pub use append::append;
pub use given::PooledInputs;
pub(crate) use given::{Means, check};
pub(crate) use levels::{BlockLevel, LevelMeans};

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
        let counts = tensors.map(|(_, side)| match side {
            Side::Queries => batch.rows(),
            Side::Keys => batch.columns(),
        });
        let mut pooled: [Self; N] = std::array::from_fn(|which| {
            let width = problem.padded::<T>(tensors[which].0.shape()[3]);
            Self { means: Buffer::scratch(counts[which] * width), width }
        });
        let width = pooled.iter().map(|pooled| pooled.width).max().unwrap_or(0);
        let rows = pooled.each_mut().map(|pooled| Chunks::new(&mut pooled.means, pooled.width));
        let elements: usize = tensors.iter().map(|(tensor, _)| tensor.shape().iter().product::<usize>()).sum();
        threads::for_each(
            problem.threads_to_read(elements),
            counts.iter().sum(),
            || Buffer::scratch(width),
            |line, mut task| {
                let mut which = 0;
                while task >= counts[which] {
                    task -= counts[which];
                    which += 1;
                }
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
                average(problem.level, &tensor.head(item, head), blocks, block, line, mean);
            },
        );
        pooled
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

/// Writes the mean of the tokens of a block, and zeros behind its channels. `line` is scratch for a row of tokens.
pub(crate) fn average<E: Element>(
    level: Level,
    tokens: &Rows<'_, E>,
    blocks: &Blocks,
    block: usize,
    line: &mut [E::Compute],
    mean: &mut [E::Compute],
) {
    let (numbers, channels) = (blocks.numbers(block), tokens.cols());
    // In fresh memory, to read before the first write would cost a second page fault, one that stops the other threads as well.
    mean.fill(E::Compute::ZERO);
    if numbers.is_empty() {
        return;
    }
    let weight = E::Compute::from_f64(1.0 / numbers.len() as f64);
    let (first, stride) = tokens.tail(blocks.token(numbers.start));
    match E::as_compute(first) {
        Some(data) if blocks.consecutive(numbers.clone()) => {
            E::Compute::run(level, AddRows { rows: Matrix::new(data, numbers.len(), channels, stride), sums: mean });
        }
        _ => {
            for number in numbers {
                let line = &mut line[..channels];
                E::widen(tokens.row(blocks.token(number)), line);
                E::Compute::run(level, AddRows { rows: Matrix::new(line, 1, channels, channels), sums: mean });
            }
        }
    }
    for sum in mean {
        *sum = *sum * weight;
    }
}
