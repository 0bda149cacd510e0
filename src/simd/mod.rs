//! The vector operations that the kernels need, and no more.
//!
//! An instruction set is a token ([`Avx2`](x86::Avx2), ...) that can only be made on a CPU that has it; possession of the token is
//! the proof that its instructions may run. The kernels are written once, generic over [`Simd`], and started through
//! [`Scalar::run`], the single place that picks an instruction set: it calls the kernel inside a function compiled
//! for that instruction set. For that to work everything a kernel calls must be inlined into it, hence
//! `#[inline(always)]` on the operations; an operation itself must not carry `#[target_feature]`. What only some instruction sets
//! have, products of bfloat16 numbers, is a trait of its own with its own starting point: [`DotBf16`], [`Bf16Level::run`]; likewise products of
//! tiles of them: [`Tmul`], [`TmulUnit::run`], and of 8-bit codes: [`DotCodes`], [`CodeLevel::run`].

#[cfg(target_arch = "x86_64")]
mod amx;
mod bf16;
mod codes;
mod exp;
mod level;
mod portable;
mod prefetch;
mod scalar;
mod tanh;
mod tmul;
#[cfg(target_arch = "x86_64")]
mod x86;
#[cfg(target_arch = "x86_64")]
mod x86_bf16;

#[cfg(target_arch = "aarch64")]
mod aarch64;

#[cfg(test)]
pub(crate) use bf16::bf16_levels;
pub(crate) use bf16::{Bf16Level, DotBf16, KernelBf16, Sum};
pub(crate) use codes::{CODE_BIAS, CODE_LANES, CodeLevel, CodeLine, DotCodes, KernelCodes};
#[cfg(test)]
pub(crate) use exp::MAX_ULPS;
pub use level::Level;
pub(crate) use prefetch::{LINE, prefetch_far, prefetch_near};
pub use scalar::{Element, Scalar};
#[cfg(test)]
pub(crate) use tmul::tmul_levels;
pub(crate) use tmul::{KernelTmul, TILE, TILE_DEPTH, TileProduct, Tmul, TmulUnit};

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
    /// `counts`, and 1 more where `a >= b`.
    #[inline(always)]
    fn count_at_least(self, counts: Self::V, a: Self::V, b: Self::V) -> Self::V
    where
        T: Scalar,
    {
        let (mut lanes, hits) = ([T::ZERO; MOST_LANES], self.at_least(a, b));
        assert!(Self::LANES <= lanes.len());
        // SAFETY: there is room for a vector, asserted above.
        unsafe { self.store(lanes.as_mut_ptr(), counts) };
        for (lane, count) in lanes.iter_mut().enumerate() {
            *count += T::from_f64(f64::from(hits >> lane & 1));
        }
        // SAFETY: `lanes` holds a whole vector.
        unsafe { self.load(lanes.as_ptr()) }
    }
    /// The largest lane; any lane where some are NaN.
    #[inline(always)]
    fn max_across(self, v: Self::V) -> T
    where
        T: Scalar,
    {
        fold_lanes(self, v, |a, b| if b > a { b } else { a })
    }
    /// The sum of all lanes: the upper half added to the lower half, until one is left.
    #[inline(always)]
    fn sum_across(self, v: Self::V) -> T
    where
        T: Scalar,
    {
        fold_lanes(self, v, |a, b| a + b)
    }
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
    #[inline(always)]
    fn exp(self, x: Self::V) -> Self::V {
        self.finish_exp(self.start_exp(x))
    }
    /// The first half of [`Self::exp`]: what the second one needs.
    ///
    /// One exponential is a long chain of operations, each of which waits for the one before it, and the few that a CPU keeps
    /// waiting are those of a few exponentials only. Of many, all first halves and then all second ones take less time.
    fn start_exp(self, x: Self::V) -> [Self::V; 2];
    /// The second half of [`Self::exp`].
    fn finish_exp(self, halfway: [Self::V; 2]) -> Self::V;
}

/// Lanes of the widest vector, AVX-512's of float32.
pub(crate) const MOST_LANES: usize = 16;

/// Combines the lower half of the lanes with the upper half, until one is left. `both` is of scalars: a closure is compiled without
/// the instructions of `simd`.
#[inline(always)]
fn fold_lanes<T: Scalar, S: Simd<T>>(simd: S, v: S::V, both: impl Fn(T, T) -> T) -> T {
    let mut lanes = [T::ZERO; MOST_LANES];
    assert!(S::LANES <= lanes.len());
    // SAFETY: there is room for a vector, asserted above.
    unsafe { simd.store(lanes.as_mut_ptr(), v) };
    let mut width = S::LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            lanes[lane] = both(lanes[lane], lanes[lane + width]);
        }
    }
    lanes[0]
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

#[cfg(test)]
mod tests {
    use super::{Kernel, Level, MOST_LANES, SQUARE, Scalar, Simd};

    /// What each operation makes of three vectors, as the trait says.
    struct Operations;

    impl<T: Scalar> Kernel<T> for Operations {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd<T>>(self, simd: S) {
            // Numbers of both signs, equal ones, zeros of both signs, infinities, and NaN on either side and on both.
            let specials = [1.5, -2.25, 0.0, -0.0, 3.0, f64::INFINITY, f64::NEG_INFINITY, f64::NAN].map(T::from_f64);
            for shift in 0..specials.len() {
                let a: [T; MOST_LANES] = std::array::from_fn(|lane| specials[lane % specials.len()]);
                let b: [T; MOST_LANES] = std::array::from_fn(|lane| specials[(lane + shift) % specials.len()]);
                let c: [T; MOST_LANES] = std::array::from_fn(|lane| T::from_f64(lane as f64 - 7.0));
                // SAFETY: the arrays hold a vector of any level.
                let (va, vb, vc) = unsafe { (simd.load(a.as_ptr()), simd.load(b.as_ptr()), simd.load(c.as_ptr())) };
                check::<T, S>(simd, "splat", simd.splat(a[shift]), |_| a[shift]);
                check::<T, S>(simd, "load", va, |lane| a[lane]);
                check::<T, S>(simd, "add", simd.add(va, vb), |lane| a[lane] + b[lane]);
                check::<T, S>(simd, "sub", simd.sub(va, vb), |lane| a[lane] - b[lane]);
                check::<T, S>(simd, "mul", simd.mul(va, vb), |lane| a[lane] * b[lane]);
                // Rounding has no say here: these products and sums are exact.
                check::<T, S>(simd, "mul_add", simd.mul_add(va, vb, vc), |lane| a[lane] * b[lane] + c[lane]);
                check::<T, S>(simd, "max", simd.max(va, vb), |lane| if a[lane] > b[lane] { a[lane] } else { b[lane] });
                check::<T, S>(simd, "min", simd.min(va, vb), |lane| if a[lane] < b[lane] { a[lane] } else { b[lane] });
                let expected = (0..S::LANES).fold(0, |bits, lane| bits | u32::from(a[lane] >= b[lane]) << lane);
                assert_eq!(simd.at_least(va, vb), expected, "at_least: {a:?} and {b:?}");
            }
            check_transpose(simd);
            check_across(simd);
        }
    }

    /// Compares a vector to the bit, but for the bits of a NaN, and sees that a store writes no more than the vector.
    #[inline(always)]
    fn check<T: Scalar, S: Simd<T>>(simd: S, operation: &str, result: S::V, expected: impl Fn(usize) -> T) {
        let untouched = T::from_f64(12345.0);
        let mut lanes = [untouched; MOST_LANES + 1];
        // SAFETY: the array has room for a vector of any level.
        unsafe { simd.store(lanes.as_mut_ptr(), result) };
        for (lane, result) in lanes.into_iter().enumerate() {
            let expected = if lane < S::LANES { expected(lane) } else { untouched };
            let same = result.total_cmp(&expected).is_eq() || (is_nan(result) && is_nan(expected));
            assert!(same, "{operation} of {} lanes: {result:?} in lane {lane} instead of {expected:?}", S::LANES);
        }
    }

    #[allow(clippy::eq_op, reason = "only NaN differs from itself")]
    fn is_nan<T: Scalar>(x: T) -> bool {
        x != x
    }

    /// A square of distinct numbers, with gaps between the rows of both sides that nothing may write.
    #[inline(always)]
    fn check_transpose<T: Scalar, S: Simd<T>>(simd: S) {
        const STRIDE: usize = SQUARE + 3;
        let number = |r: usize, c: usize| T::from_f64((r * 10 + c) as f64 + 0.5);
        let from: [[T; SQUARE]; SQUARE] = std::array::from_fn(|r| std::array::from_fn(|c| number(r, c)));
        let mut to = [T::LOWEST; SQUARE * STRIDE];
        // SAFETY: each row holds SQUARE scalars; `to` holds as many rows of STRIDE of them.
        unsafe { simd.transpose(from.each_ref().map(|row| row.as_ptr()), T::from_f64(2.0), to.as_mut_ptr(), STRIDE) };
        for (i, x) in to.into_iter().enumerate() {
            let (c, r) = (i / STRIDE, i % STRIDE);
            let expected = if r < SQUARE { number(r, c) * T::from_f64(2.0) } else { T::LOWEST };
            assert!(x.total_cmp(&expected).is_eq(), "column {c} of row {r}: {x:?} instead of {expected:?}");
        }
    }

    /// The largest number and the sum of lanes, of which each is the largest once; powers of two add up exactly.
    #[inline(always)]
    fn check_across<T: Scalar, S: Simd<T>>(simd: S) {
        for largest in 0..S::LANES {
            let lanes: [T; MOST_LANES] =
                std::array::from_fn(|lane| T::from_f64(if lane == largest { 64.0 } else { -f64::from(1 << (lane % 4)) }));
            // SAFETY: the array holds a vector of any level.
            let v = unsafe { simd.load(lanes.as_ptr()) };
            assert!(simd.max_across(v) == lanes[largest], "the largest of {lanes:?}");
            let sum = lanes[..S::LANES].iter().fold(T::ZERO, |sum, &lane| sum + lane);
            assert!(simd.sum_across(v) == sum, "the sum of {lanes:?}");
        }
    }

    #[test]
    fn operations() {
        for level in Level::available() {
            f32::run(level, Operations);
            f64::run(level, Operations);
        }
    }
}
