//! Means over the valid tokens of each block: the coarse level of queries, keys and values.

use super::blocks::Blocks;
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

impl<T: Scalar> Pooled<T> {
    /// Pools a tensor whose sequences are cut as `blocks_of(batch)` says.
    pub(crate) fn new<'b, E: Element<Compute = T>>(
        problem: &Problem,
        tensor: &Tensor<'_, E>,
        blocks_of: impl Fn(usize) -> &'b Blocks + Sync,
    ) -> Self {
        let [batch, heads, length, channels] = tensor.shape();
        let width = problem.padded::<T>(channels);
        let blocks = length.div_ceil(problem.block_size);
        let mut means = Buffer::zeros(batch * heads * blocks * width);
        let rows = Chunks::new(&mut means, width);
        // An element is read for a single addition, and to read it takes as long as several multiplications.
        let threads = problem.threads_for((batch * heads * length * channels).saturating_mul(8));
        threads::for_each(
            threads,
            batch * heads * blocks,
            || Buffer::scratch(width),
            |line, task| {
                let (item, head, block) = (task / blocks / heads, task / blocks % heads, task % blocks);
                // SAFETY: each task has its own row.
                let mean = unsafe { rows.get_mut(task) };
                average(problem.level, &tensor.head(item, head), blocks_of(item), block, line, mean);
            },
        );
        Self { means, blocks, width }
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

/// Adds the mean of the valid tokens of a block to zeros. `line` is scratch for a row of tokens.
pub(crate) fn average<E: Element>(
    level: Level,
    tokens: &Rows<'_, E>,
    blocks: &Blocks,
    block: usize,
    line: &mut [E::Compute],
    mean: &mut [E::Compute],
) {
    let (numbers, channels) = (blocks.start(block)..blocks.start(block + 1), tokens.cols());
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
