//! New tokens behind stored ones, and the means of the blocks that they complete: what a cache of keys or values does.

use std::ops::Range;

use super::coarsen;
use crate::error::{Error, Result};
use crate::exec::{TensorMut, threads};
use crate::mra::problem::{Blocks, Problem, threads_for};
use crate::mra::pyramid::average;
use crate::simd::{Element, Level, Scalar};
use crate::tensor::{Rows, Tensor};

/// Copies new tokens `(B, H, n, D)` behind those that are stored, and writes the means of the blocks that become complete.
///
/// Batch item `i` has `before[i]` tokens and gets the first `after[i] - before[i]` new ones. `stored` is `(B, H, capacity, D)`,
/// its tokens one behind the other. For each level, the coarsest first, there is a size of blocks and a tensor of means,
/// `(B, H, ceil(capacity / block_size), D)`. The means have the same bits as those that [`forward`](crate::forward) computes itself,
/// however a sequence is cut into pieces.
///
/// # Errors
/// If the size of the finest blocks is not 1 to [`Problem::MAX_BLOCK`], another one not a multiple of the next one, or shapes or lengths do
/// not fit; nothing is written then.
#[allow(clippy::too_many_arguments, reason = "new tokens, where they go, and how")]
pub fn append<E: Element>(
    new: &Tensor<'_, E>,
    stored: &mut TensorMut<'_, E>,
    means: &mut [TensorMut<'_, E::Compute>],
    before: &[usize],
    after: &[usize],
    block_sizes: &[usize],
    threads: usize,
    level: Level,
) -> Result<()> {
    let [batch, heads, count, channels] = new.shape();
    let finest = check_sizes(block_sizes)?;
    if threads == 0 {
        return Err(Error::new("threads: 0, expected at least 1"));
    }
    let capacity = stored.shape()[2];
    Problem::expect("stored", stored.shape(), [batch, heads, capacity, channels])?;
    if means.len() != block_sizes.len() {
        return Err(Error::new(format!("means: {} tensors, expected one for each of {block_sizes:?}", means.len())));
    }
    for (means, size) in means.iter().zip(block_sizes) {
        Problem::expect("means", means.shape(), [batch, heads, capacity.div_ceil(*size), channels])?;
    }
    stored.check_adjacent_rows("stored")?;
    let fits = |(&start, &end): (&usize, &usize)| start <= end && end - start <= count && end <= capacity;
    if before.len() != batch || after.len() != batch || !before.iter().zip(after).all(fits) {
        return Err(Error::new(format!(
            "before: {before:?} and after: {after:?}, expected {batch} lengths each, at most {capacity}, that grow by at most {count}"
        )));
    }
    let grown = Grown { before, after };
    let (stored, of_finest) = (&*stored, &means[means.len() - 1]);
    let (most, whole) = (grown.most(finest), Blocks::all(0..finest, finest));
    threads::for_each(
        threads_for(threads, batch * heads * count * channels),
        batch * heads * most,
        || (),
        |(), task| {
            let (item, head) = (task / most / heads, task / most % heads);
            let block = grown.touched(item, finest).start + task % most;
            let start = block * finest;
            let (from, to) = (start.max(before[item]), (start + finest).min(after[item]));
            if from >= to {
                return;
            }
            let rows = new.head(item, head);
            // SAFETY: each task has its own block of tokens.
            let tokens = unsafe { stored.rows_mut(item, head, start..to) };
            for (row, token) in tokens[(from - start) * channels..].chunks_exact_mut(channels.max(1)).zip(from..to) {
                row.copy_from_slice(rows.row(token - before[item]));
            }
            if to == start + finest {
                // SAFETY: each task has its own block.
                let mean = unsafe { of_finest.row_mut(item, head, block) };
                average(level, &Rows::new(tokens, finest, channels, channels), &whole, 0, mean);
            }
        },
    );
    for index in (0..means.len() - 1).rev() {
        grown.coarsen((&means[index], block_sizes[index]), (&means[index + 1], block_sizes[index + 1]), threads);
    }
    Ok(())
}

/// Checks the sizes of the blocks of every level and returns that of the finest ones.
fn check_sizes(block_sizes: &[usize]) -> Result<usize> {
    let finest = block_sizes.last().copied().unwrap_or(0);
    if !(1..=Problem::MAX_BLOCK).contains(&finest) {
        return Err(Error::new(format!("block_size: {finest}, expected 1 to {}", Problem::MAX_BLOCK)));
    }
    if !block_sizes.windows(2).all(|pair| pair[0] > pair[1] && pair[0].is_multiple_of(pair[1])) {
        return Err(Error::new(format!("block sizes: {block_sizes:?}, expected each to be a multiple of the next one")));
    }
    Ok(finest)
}

/// The lengths of sequences before and after they grow.
struct Grown<'a> {
    before: &'a [usize],
    after: &'a [usize],
}

impl Grown<'_> {
    /// The blocks that a sequence gets tokens of.
    fn touched(&self, item: usize, size: usize) -> Range<usize> {
        self.before[item] / size..self.after[item].div_ceil(size)
    }

    /// The most blocks that a sequence gets tokens of.
    fn most(&self, size: usize) -> usize {
        (0..self.before.len()).map(|item| self.touched(item, size).len()).max().unwrap_or(0)
    }

    /// Writes the means of the blocks of a level that become complete, from those of the level below.
    fn coarsen<T: Scalar>(
        &self,
        (means, size): (&TensorMut<'_, T>, usize),
        (below, size_below): (&TensorMut<'_, T>, usize),
        threads: usize,
    ) {
        let ([batch, heads, _, channels], most, children) = (means.shape(), self.most(size), size / size_below);
        let tasks = batch * heads * most;
        threads::for_each(
            threads_for(threads, tasks * children * channels * 8),
            tasks,
            || (),
            |(), task| {
                let (item, head) = (task / most / heads, task / most % heads);
                let block = self.touched(item, size).start + task % most;
                if (block + 1) * size > self.after[item] {
                    return;
                }
                // SAFETY: each task has its own block.
                let mean = unsafe { means.row_mut(item, head, block) };
                mean.fill(T::ZERO);
                let children = block * children..(block + 1) * children;
                // SAFETY: each task has its own block, and so its own children of it.
                coarsen::average(mean, children.map(|child| (size_below, unsafe { &*below.row_mut(item, head, child) })));
            },
        );
    }
}
