//! The register tile of products whose rows lie anywhere in memory; that of matrices is in `gemm`.

use crate::simd::{Scalar, Simd};

/// `sums[r][v] = sum over k of a[r][k] * b[k * stride..]`, a tile of which stays in registers.
///
/// # Safety
/// - `count` numbers are readable from each of `a`, and `VECTORS` vectors from `count` places from `b` on, `stride` apart.
#[inline(always)]
pub(super) unsafe fn dot_tile<T: Scalar, S: Simd<T>, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    a: &[*const T; ROWS],
    b: *const T,
    stride: usize,
    count: usize,
) -> [[S::V; VECTORS]; ROWS] {
    // As in the product of matrices: fewer tests for the end.
    const UNROLL: usize = 2;
    let mut sums = [[simd.splat(T::ZERO); VECTORS]; ROWS];
    let whole = count - count % UNROLL;
    for first in (0..whole).step_by(UNROLL) {
        for k in first..first + UNROLL {
            // SAFETY: the caller's.
            unsafe { add_step(simd, a, k, b.add(k * stride), &mut sums) };
        }
    }
    for k in whole..count {
        // SAFETY: the caller's.
        unsafe { add_step(simd, a, k, b.add(k * stride), &mut sums) };
    }
    sums
}

/// Adds the products of the numbers at `k` of the rows `a` and the vectors at `b`.
///
/// # Safety
/// - Those numbers and `VECTORS` vectors are readable.
#[inline(always)]
unsafe fn add_step<T: Scalar, S: Simd<T>, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    a: &[*const T; ROWS],
    k: usize,
    b: *const T,
    sums: &mut [[S::V; VECTORS]; ROWS],
) {
    let mut vectors = [simd.splat(T::ZERO); VECTORS];
    for v in 0..VECTORS {
        // SAFETY: the caller's.
        vectors[v] = unsafe { simd.load(b.add(v * S::LANES)) };
    }
    for r in 0..ROWS {
        // SAFETY: the caller's.
        let weight = simd.splat(unsafe { *a[r].add(k) });
        for v in 0..VECTORS {
            sums[r][v] = simd.mul_add(weight, vectors[v], sums[r][v]);
        }
    }
}
