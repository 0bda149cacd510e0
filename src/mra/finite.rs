//! Whether inputs have a NaN or an infinity, which a mask may have to hide.

use std::sync::atomic::{AtomicBool, Ordering};

use super::blocks::Blocks;
use super::problem::Problem;
use super::scratch::Buffer;
use crate::kernels::{AllFinite, Matrix};
use crate::simd::{Element, Scalar};
use crate::tensor::Tensor;
use crate::threads;

/// Whether a tensor, whose sequences are cut as `blocks_of(batch)` says, has a NaN or an infinity at a valid token. Where
/// pairs are masked, products must then not multiply it by the weight 0 of a hidden pair.
pub(crate) fn needs_guard<'b, E: Element>(
    problem: &Problem<'_>,
    tensor: &Tensor<'_, E>,
    blocks_of: impl Fn(usize) -> &'b Blocks + Sync,
) -> bool {
    if problem.pairs.is_none() {
        return false;
    }
    let [batch, heads, length, channels] = tensor.shape();
    let found = AtomicBool::new(false);
    let threads = problem.threads_to_read(batch * heads * length * channels);
    let scratch = || Buffer::<E::Compute>::scratch(channels);
    threads::for_each(threads, batch * heads, scratch, |line, task| {
        let (item, head) = (task / heads, task % heads);
        let (rows, blocks) = (tensor.head(item, head), blocks_of(item));
        for number in 0..blocks.start(blocks.len()) {
            let row = rows.row(blocks.token(number));
            let row = E::as_compute(row).unwrap_or_else(|| {
                E::widen(row, line);
                line
            });
            if !E::Compute::run(problem.level, AllFinite(Matrix::new(row, 1, channels, channels))) {
                found.store(true, Ordering::Relaxed);
                return;
            }
        }
    });
    found.into_inner()
}
