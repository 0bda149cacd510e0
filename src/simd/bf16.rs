//! Products of bfloat16 numbers as they are, two at a time, with sums in float32.
//!
//! Instruction sets that multiply bfloat16 take it in pairs: a lane of 32 bits holds two numbers that follow each other along the
//! dimension that is summed over, and is multiplied by another such pair. A level that has them names a token of [`DotBf16`];
//! kernels are written once, generic over it, and started through [`Bf16Level::run`].

use half::bf16;

use super::portable::Portable;
#[cfg(target_arch = "x86_64")]
use super::x86_bf16::Avx512Bf16;
use super::{Level, Simd};

/// The vector of float32 that belongs to the pairs of `S`.
pub(crate) type Sum<S> = <<S as DotBf16>::Float as Simd<f32>>::V;

/// Operations on vectors of pairs of bfloat16, as many pairs as a vector has lanes of float32.
///
/// Denormal numbers may count as 0, in operands and in results.
pub(crate) trait DotBf16: Copy {
    /// The operations of the vectors of float32.
    type Float: Simd<f32>;
    /// A vector of pairs.
    type Pairs: Copy;

    /// The token of the vectors of float32.
    fn float(self) -> Self::Float;
    /// All pairs that of the two numbers at `p`.
    ///
    /// # Safety
    /// - `p` points to at least two initialised numbers.
    unsafe fn splat_pair(self, p: *const bf16) -> Self::Pairs;
    /// All pairs `x` and 0.
    fn splat_single(self, x: bf16) -> Self::Pairs;
    /// Reads as many pairs as there are lanes.
    ///
    /// # Safety
    /// - `p` points to at least two initialised numbers for each lane.
    unsafe fn load_pairs(self, p: *const bf16) -> Self::Pairs;
    /// Writes as many pairs as there are lanes.
    ///
    /// # Safety
    /// - `p` points to at least two numbers for each lane that nothing else accesses.
    unsafe fn store_pairs(self, p: *mut bf16, pairs: Self::Pairs);
    /// Pairs of a number at `first` and the one in the same place at `second`, one number of each for each lane.
    ///
    /// # Safety
    /// - Each points to at least one initialised number for each lane.
    unsafe fn zip(self, first: *const bf16, second: *const bf16) -> Self::Pairs;
    /// Pairs of a lane of `first` and the same lane of `second`, rounded to nearest, ties to even.
    fn round(self, first: Sum<Self>, second: Sum<Self>) -> Self::Pairs;
    /// `sum + a.1 * b.1 + a.0 * b.0` in each lane, rounded after each of the two sums.
    fn dot(self, a: Self::Pairs, b: Self::Pairs, sum: Sum<Self>) -> Sum<Self>;
}

/// A computation on bfloat16 numbers, written once for all instruction sets. As [`Kernel`](super::Kernel), `run` must be
/// `#[inline(always)]`.
pub(crate) trait KernelBf16 {
    /// Computes with the instructions of `simd`.
    fn run<S: DotBf16>(self, simd: S);
}

/// A level that multiplies bfloat16 numbers as they are; the payload is the proof.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Bf16Level {
    Portable(Portable),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512Bf16),
}

impl Bf16Level {
    /// What `level` has of this.
    pub(crate) fn of(level: Level) -> Option<Self> {
        match level {
            Level::PortableBf16(simd) | Level::PortableAmx(simd) => Some(Self::Portable(simd)),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16(simd) => Some(Self::Avx512(simd)),
            #[cfg(target_arch = "x86_64")]
            Level::Amx(simd) => Some(Self::Avx512(simd.below())),
            _ => None,
        }
    }

    /// Runs a kernel: the single place that picks an instruction set for bfloat16.
    pub(crate) fn run<K: KernelBf16>(self, kernel: K) {
        match self {
            Self::Portable(simd) => kernel.run(simd),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(simd) => simd.run(kernel),
        }
    }
}

const LANES: usize = <Portable as Simd<f32>>::LANES;

/// Slower than widening to float32 first, which is what the portable level does. It is here so that everything that is built on
/// these operations is tested on any machine.
impl DotBf16 for Portable {
    type Float = Self;
    type Pairs = [[bf16; 2]; LANES];

    #[inline(always)]
    fn float(self) -> Self {
        self
    }
    #[inline(always)]
    unsafe fn splat_pair(self, p: *const bf16) -> Self::Pairs {
        // SAFETY: the caller vouches for two readable numbers; an array has the alignment of its elements.
        [unsafe { p.cast::<[bf16; 2]>().read() }; LANES]
    }
    #[inline(always)]
    fn splat_single(self, x: bf16) -> Self::Pairs {
        [[x, bf16::ZERO]; LANES]
    }
    #[inline(always)]
    unsafe fn load_pairs(self, p: *const bf16) -> Self::Pairs {
        // SAFETY: the caller vouches for as many readable numbers; an array has the alignment of its elements.
        unsafe { p.cast::<Self::Pairs>().read() }
    }
    #[inline(always)]
    unsafe fn store_pairs(self, p: *mut bf16, pairs: Self::Pairs) {
        // SAFETY: the caller vouches for as many writable numbers; an array has the alignment of its elements.
        unsafe { p.cast::<Self::Pairs>().write(pairs) }
    }
    #[inline(always)]
    unsafe fn zip(self, first: *const bf16, second: *const bf16) -> Self::Pairs {
        // SAFETY: the caller vouches for a number for each lane at both places.
        std::array::from_fn(|lane| unsafe { [*first.add(lane), *second.add(lane)] })
    }
    #[inline(always)]
    fn round(self, first: [f32; LANES], second: [f32; LANES]) -> Self::Pairs {
        std::array::from_fn(|lane| [first[lane], second[lane]].map(|x| bf16::from_f32(flush(x))))
    }
    #[inline(always)]
    fn dot(self, a: Self::Pairs, b: Self::Pairs, sum: [f32; LANES]) -> [f32; LANES] {
        // Products of bfloat16 numbers are exact in float32, so these are fused multiply-adds unless a product is denormal.
        let add = |sum: f32, a: bf16, b: bf16| flush(sum + flush(a.to_f32()) * flush(b.to_f32()));
        std::array::from_fn(|lane| {
            let sum = add(flush(sum[lane]), a[lane][1], b[lane][1]);
            add(sum, a[lane][0], b[lane][0])
        })
    }
}

/// 0 in place of a denormal number, as AVX-512-BF16 and AMX have it.
#[inline(always)]
pub(super) fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

/// The levels that multiply bfloat16 numbers as they are: one for any machine, and what this one has.
#[cfg(test)]
pub(crate) fn bf16_levels() -> impl Iterator<Item = Level> {
    std::iter::once(Level::PortableBf16(Portable)).chain(Level::available()).filter(|&level| Bf16Level::of(level).is_some())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::float_cmp, reason = "these results are exact")]

    use super::{Bf16Level, DotBf16, KernelBf16, LANES, Portable, Simd, bf16, bf16_levels};

    /// Lanes of the widest vector.
    const MOST_LANES: usize = 16;

    /// What each operation makes of some vectors.
    struct Operations<'a> {
        name: &'a str,
        numbers: &'a [bf16; 2 * MOST_LANES],
        others: &'a [bf16; 2 * MOST_LANES],
        sums: &'a [f32; MOST_LANES],
    }

    impl KernelBf16 for Operations<'_> {
        #[inline(always)]
        fn run<S: DotBf16>(self, simd: S) {
            let (name, lanes) = (self.name, <S::Float as Simd<f32>>::LANES);
            let (numbers, others) = (self.numbers.as_ptr(), self.others.as_ptr());
            // SAFETY: the arrays hold two numbers, or one sum, for each lane of any level.
            let (a, b, sums) =
                unsafe { (simd.load_pairs(numbers), simd.load_pairs(others), simd.float().load(self.sums.as_ptr())) };
            check_pairs(simd, name, a, |lane| [self.numbers[2 * lane], self.numbers[2 * lane + 1]]);
            // SAFETY: the arrays hold more than two numbers.
            let splat = unsafe { simd.splat_pair(numbers.add(1)) };
            check_pairs(simd, name, splat, |_| [self.numbers[1], self.numbers[2]]);
            check_pairs(simd, name, simd.splat_single(self.numbers[3]), |_| [self.numbers[3], bf16::ZERO]);
            // SAFETY: the arrays hold a number for each lane and one more.
            let zipped = unsafe { simd.zip(numbers.add(1), others) };
            check_pairs(simd, name, zipped, |lane| [self.numbers[lane + 1], self.others[lane]]);
            let third = |x: f32| x / 3.0;
            let thirds = self.sums.map(third);
            // SAFETY: as above.
            let rounded = simd.round(sums, unsafe { simd.float().load(thirds.as_ptr()) });
            check_pairs(simd, name, rounded, |lane| [self.sums[lane], third(self.sums[lane])].map(bf16::from_f32));
            let mut results = [f32::NAN; MOST_LANES];
            // SAFETY: the array has room for a vector of any level.
            unsafe { simd.float().store(results.as_mut_ptr(), simd.dot(a, b, sums)) };
            for lane in (0..lanes).step_by(LANES) {
                let pairs = |from: &[bf16]| std::array::from_fn(|l| [from[2 * (lane + l)], from[2 * (lane + l) + 1]]);
                let expected =
                    Portable.dot(pairs(self.numbers), pairs(self.others), std::array::from_fn(|l| self.sums[lane + l]));
                assert_eq!(results[lane..][..LANES].map_bits(), expected[..].map_bits(), "{name}: dot, from lane {lane}");
            }
        }
    }

    trait MapBits {
        fn map_bits(&self) -> Vec<u32>;
    }

    impl MapBits for [f32] {
        fn map_bits(&self) -> Vec<u32> {
            self.iter().map(|x| x.to_bits()).collect()
        }
    }

    /// Compares to the bit, and sees that a store writes no more than the vector.
    #[inline(always)]
    fn check_pairs<S: DotBf16>(simd: S, name: &str, pairs: S::Pairs, expected: impl Fn(usize) -> [bf16; 2]) {
        let lanes = <S::Float as Simd<f32>>::LANES;
        let mut stored = [[bf16::MAX; 2]; MOST_LANES + 1];
        // SAFETY: the array has room for a vector of any level.
        unsafe { simd.store_pairs(stored.as_mut_ptr().cast(), pairs) };
        for (lane, stored) in stored.into_iter().enumerate() {
            let expected = if lane < lanes { expected(lane) } else { [bf16::MAX; 2] };
            assert_eq!(stored.map(bf16::to_bits), expected.map(bf16::to_bits), "{name}: lane {lane} of {lanes}");
        }
    }

    /// Numbers of both signs and different sizes, whose sums are rounded.
    #[test]
    fn operations() {
        let number = |seed: usize| bf16::from_f32(((seed * 37 % 101) as f32 - 50.0) * ((seed % 7) as f32 - 3.0).exp2());
        for level in bf16_levels() {
            for shift in 0..200 {
                Bf16Level::of(level).expect("one of these levels").run(Operations {
                    name: level.name(),
                    numbers: &std::array::from_fn(|i| number(i + shift)),
                    others: &std::array::from_fn(|i| number(3 * i + 2 * shift)),
                    sums: &std::array::from_fn(|i| 0.1 * (i + shift) as f32 - 7.3),
                });
            }
        }
    }

    /// By hand; the second product of a pair is added first, which its rounding shows.
    #[test]
    fn a_pair_is_two_products() {
        let pair = |x: f32, y: f32| [[bf16::from_f32(x), bf16::from_f32(y)]; LANES];
        assert_eq!(Portable.dot(pair(1.5, 2.0), pair(-4.0, 5.0), [0.25; LANES]), [4.25; LANES]);
        let large = 2f32.powi(26);
        assert_eq!(Portable.dot(pair(-large, 1.0), pair(1.0, 1.0), [large; LANES]), [0.0; LANES]);
        assert_eq!(Portable.dot(pair(1.0, -large), pair(1.0, 1.0), [large; LANES]), [1.0; LANES]);
        assert_eq!(Portable.dot(pair(1e-39, 0.0), pair(1.0, 0.0), [1e-39; LANES]), [0.0; LANES]);
    }
}
