//! New tokens behind stored ones, and the means of the blocks that they complete: what a cache of keys or values does.

use crate::error::{Error, Result};
use crate::exec::{Buffer, TensorMut, threads};
use crate::mra::problem::{Blocks, Problem, threads_for};
use crate::mra::pyramid::average;
use crate::simd::{Element, Level};
use crate::tensor::{Rows, Tensor};

/// Copies new tokens `(B, H, n, D)` behind those that are stored, and writes the means of the blocks that become complete.
///
/// Batch item `i` has `before[i]` tokens and gets the first `after[i] - before[i]` new ones. `stored` is `(B, H, capacity, D)`,
/// its tokens one behind the other; `means` is `(B, H, ceil(capacity / block_size), D)`. The means have the same bits as those that
/// [`forward`](crate::forward) computes itself, however a sequence is cut into pieces.
///
/// # Errors
/// If the block size is not 1 to [`Problem::MAX_BLOCK`], or shapes or lengths do not fit; nothing is written then.
#[allow(clippy::too_many_arguments, reason = "new tokens, where they go, and how")]
pub fn append<E: Element>(
    new: &Tensor<'_, E>,
    stored: &mut TensorMut<'_, E>,
    means: &mut TensorMut<'_, E::Compute>,
    before: &[usize],
    after: &[usize],
    block_size: usize,
    threads: usize,
    level: Level,
) -> Result<()> {
    let [batch, heads, count, channels] = new.shape();
    if !(1..=Problem::MAX_BLOCK).contains(&block_size) {
        return Err(Error::new(format!("block_size: {block_size}, expected 1 to {}", Problem::MAX_BLOCK)));
    }
    if threads == 0 {
        return Err(Error::new("threads: 0, expected at least 1"));
    }
    let capacity = stored.shape()[2];
    Problem::expect("stored", stored.shape(), [batch, heads, capacity, channels])?;
    Problem::expect("means", means.shape(), [batch, heads, capacity.div_ceil(block_size), channels])?;
    stored.check_adjacent_rows("stored")?;
    let fits = |(&start, &end): (&usize, &usize)| start <= end && end - start <= count && end <= capacity;
    if before.len() != batch || after.len() != batch || !before.iter().zip(after).all(fits) {
        return Err(Error::new(format!(
            "before: {before:?} and after: {after:?}, expected {batch} lengths each, at most {capacity}, that grow by at most {count}"
        )));
    }
    let touched = |item: usize| before[item] / block_size..after[item].div_ceil(block_size);
    let most = (0..batch).map(|item| touched(item).len()).max().unwrap_or(0);
    let (stored, means, whole) = (&*stored, &*means, Blocks::all(0..block_size, block_size));
    threads::for_each(
        threads_for(threads, batch * heads * count * channels),
        batch * heads * most,
        || Buffer::scratch(channels),
        |line, task| {
            let (item, head) = (task / most / heads, task / most % heads);
            let block = touched(item).start + task % most;
            let start = block * block_size;
            let (from, to) = (start.max(before[item]), (start + block_size).min(after[item]));
            if from >= to {
                return;
            }
            let rows = new.head(item, head);
            // SAFETY: each task has its own block of tokens.
            let tokens = unsafe { stored.rows_mut(item, head, start..to) };
            for (row, token) in tokens[(from - start) * channels..].chunks_exact_mut(channels.max(1)).zip(from..to) {
                row.copy_from_slice(rows.row(token - before[item]));
            }
            if to == start + block_size {
                // SAFETY: each task has its own block.
                let mean = unsafe { means.row_mut(item, head, block) };
                average(level, &Rows::new(tokens, block_size, channels, channels), &whole, 0, line, mean);
            }
        },
    );
    Ok(())
}
