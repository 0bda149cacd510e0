//! The vector operations that the kernels need, and no more.
//!
//! An instruction set is a token ([`Avx2`](x86::Avx2), ...) that can only be made on a CPU that has it; possession of the token is
//! the proof that its instructions may run. The kernels are written once, generic over [`Simd`], and started through
//! [`Scalar::run`], the single place that picks an instruction set: it calls the kernel inside a function compiled
//! for that instruction set. For that to work everything a kernel calls must be inlined into it, hence
//! `#[inline(always)]` on the operations; an operation itself must not carry `#[target_feature]`.

mod exp;
mod level;
mod portable;
mod prefetch;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(target_arch = "aarch64")]
mod aarch64;

#[cfg(test)]
pub(crate) use exp::MAX_ULPS;
pub use level::Level;
pub(crate) use prefetch::{LINE, prefetch_far, prefetch_near};
pub use scalar::{Element, Scalar};

/// Rows and columns of the squares that [`Simd::transpose`] takes.
pub(crate) const SQUARE: usize = 8;

/// Operations on vectors of `LANES` scalars of type `T`.
pub trait Simd<T>: Copy {
    /// The vector.
    type V: Copy;
    /// Scalars per vector.
    const LANES: usize;
    /// Rows of the register tile of a matrix product: rows times two vectors of sums, beside the operands, fill the registers.
    const TILE_ROWS: usize;

    /// All lanes `x`.
    fn splat(self, x: T) -> Self::V;
    /// Reads `LANES` scalars.
    ///
    /// # Safety
    /// - `p` points to at least `LANES` initialised scalars of one allocation.
    unsafe fn load(self, p: *const T) -> Self::V;
    /// Writes `LANES` scalars.
    ///
    /// # Safety
    /// - `p` points to at least `LANES` scalars of one allocation that nothing else accesses.
    unsafe fn store(self, p: *mut T, v: Self::V);
    /// `a + b`.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once where the instruction set has fused multiply-add.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger of both lanes; `b` where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller of both lanes; `b` where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// One bit for each lane, the lowest for the first: whether `a >= b` there. Not so where either is NaN.
    fn at_least(self, a: Self::V, b: Self::V) -> u32;
    /// Writes `factor` times a square of [`SQUARE`] rows as columns: element `c` of row `r` to `to[c * stride + r]`.
    ///
    /// # Safety
    /// - Each of `rows` points to at least `SQUARE` initialised scalars, each of `SQUARE` rows of `to`, `stride` scalars apart, to at
    ///   least as many that nothing else accesses.
    #[inline(always)]
    unsafe fn transpose(self, rows: [*const T; SQUARE], factor: T, to: *mut T, stride: usize)
    where
        T: Scalar,
    {
        // Squares of 4 fit into the registers of the narrowest vectors.
        for (half, quarter) in [(0, 0), (0, 4), (4, 0), (4, 4)] {
            for c in half..half + 4 {
                for r in quarter..quarter + 4 {
                    // SAFETY: the caller's.
                    unsafe { *to.add(c * stride + r) = *rows[r].add(c) * factor };
                }
            }
        }
    }
    /// `e` to the power `x`; 0 for `-inf`, NaN for NaN. Relative error: see [`exp`](self::exp).
    fn exp(self, x: Self::V) -> Self::V;
}

/// A computation on one tile, written once for all instruction sets.
///
/// `run` must be `#[inline(always)]`: it is compiled anew inside a function that enables the instruction set.
pub trait Kernel<T> {
    /// What the computation returns.
    type Output;
    /// Computes with the instructions of `simd`.
    fn run<S: Simd<T>>(self, simd: S) -> Self::Output;
}
