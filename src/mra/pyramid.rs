//! Means over the valid tokens of each block: the coarse level of queries, keys and values.

use super::blocks::Blocks;
use super::forward::Inputs;
use super::problem::Problem;
use super::scratch::Buffer;
use crate::kernels::{AddRows, Matrix};
use crate::simd::{Element, Level, Scalar};
use crate::tensor::{Rows, Tensor};
use crate::threads;
use crate::tiles::Chunks;

/// One row per block of each head, padded with zeros to whole vectors; the row of a block without valid tokens is 0.
#[derive(Debug)]
pub(crate) struct Pooled<T> {
    means: Buffer<T>,
    blocks: usize,
    pub(crate) width: usize,
}

/// A tensor to be pooled, and how the sequences of each batch item are cut.
pub(crate) type Cut<'a, 'b, E> = (&'a Tensor<'a, E>, &'a (dyn Fn(usize) -> &'b Blocks + Sync));

impl<T: Scalar> Pooled<T> {
    /// Pools tensors, all in one go: to hand over work to other threads takes as long as to pool a short sequence.
    pub(crate) fn each<E: Element<Compute = T>, const N: usize>(problem: &Problem, tensors: [Cut<'_, '_, E>; N]) -> [Self; N] {
        let mut pooled = tensors.map(|(tensor, _)| Self::scratch(problem, tensor.shape()));
        let width = pooled.iter().map(|pooled| pooled.width).max().unwrap_or(0);
        let blocks = pooled.each_ref().map(|pooled| pooled.blocks);
        let tasks: [usize; N] = std::array::from_fn(|which| {
            let [batch, heads, ..] = tensors[which].0.shape();
            batch * heads * blocks[which]
        });
        let rows = pooled.each_mut().map(|pooled| Chunks::new(&mut pooled.means, pooled.width));
        let elements: usize = tensors.iter().map(|(tensor, _)| tensor.shape().iter().product::<usize>()).sum();
        threads::for_each(
            problem.threads_to_read(elements),
            tasks.iter().sum(),
            || Buffer::scratch(width),
            |line, mut task| {
                let mut which = 0;
                while task >= tasks[which] {
                    task -= tasks[which];
                    which += 1;
                }
                let (tensor, blocks_of) = tensors[which];
                let (heads, blocks) = (tensor.shape()[1], blocks[which]);
                let (item, head, block) = (task / blocks / heads, task / blocks % heads, task % blocks);
                // SAFETY: each task has its own row.
                let mean = unsafe { rows[which].get_mut(task) };
                average(problem.level, &tensor.head(item, head), blocks_of(item), block, line, mean);
            },
        );
        pooled
    }

    fn scratch(problem: &Problem, [batch, heads, length, channels]: [usize; 4]) -> Self {
        let (blocks, width) = (length.div_ceil(problem.block_size), problem.padded::<T>(channels));
        Self { means: Buffer::scratch(batch * heads * blocks * width), blocks, width }
    }

    /// Copies means that the caller has pooled, `(B, H, blocks, D)`.
    pub(crate) fn copied(problem: &Problem, means: &Tensor<'_, T>) -> Self {
        let [batch, heads, blocks, channels] = means.shape();
        let width = problem.padded::<T>(channels);
        let mut copy = Buffer::zeros(batch * heads * blocks * width);
        for head in 0..batch * heads {
            let rows = means.head(head / heads, head % heads);
            for block in 0..blocks {
                copy[(head * blocks + block) * width..][..channels].copy_from_slice(rows.row(block));
            }
        }
        Self { means: copy, blocks, width }
    }

    /// The rows of one head; heads of all batch items are numbered through.
    pub(crate) fn head(&self, head: usize) -> Rows<'_, T> {
        let size = self.blocks * self.width;
        Rows::new(&self.means[head * size..][..size], self.blocks, self.width, self.width)
    }
}

/// The pooled queries and keys, for the selection and the coarse level.
pub(crate) struct Pyramid<T> {
    pub(crate) queries: Pooled<T>,
    pub(crate) keys: Pooled<T>,
}

impl<T: Scalar> Pyramid<T> {
    pub(crate) fn new<E: Element<Compute = T>>(problem: &Problem, query: &Tensor<'_, E>, key: &Tensor<'_, E>) -> Self {
        let [queries, keys] =
            Pooled::each(problem, [(query, &|item| problem.queries(item)), (key, &|item| problem.keys(item))]);
        Self { queries, keys }
    }

    /// With the pooled values.
    pub(crate) fn with_values<E: Element<Compute = T>>(problem: &Problem, inputs: &Inputs<'_, E>) -> (Self, Pooled<T>) {
        let keys_of = |item: usize| problem.keys(item);
        let tensors: [Cut<'_, '_, E>; 3] =
            [(&inputs.query, &|item| problem.queries(item)), (&inputs.key, &keys_of), (&inputs.value, &keys_of)];
        let [queries, keys, values] = Pooled::each(problem, tensors);
        (Self { queries, keys }, values)
    }
}

/// Writes the mean of the valid tokens of a block, and zeros behind its channels. `line` is scratch for a row of tokens.
pub(crate) fn average<E: Element>(
    level: Level,
    tokens: &Rows<'_, E>,
    blocks: &Blocks,
    block: usize,
    line: &mut [E::Compute],
    mean: &mut [E::Compute],
) {
    let (numbers, channels) = (blocks.start(block)..blocks.start(block + 1), tokens.cols());
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
