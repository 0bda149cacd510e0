//! Products of tiles of bfloat16 numbers: what Intel's AMX has in its TMUL unit.
//!
//! A tile is 16 rows of 64 bytes. The left operand has 16 rows of 32 numbers, the right one 16 rows of 16 pairs, which
//! follow each other along the dimension that is summed over, and the sums are 16 rows of 16 numbers in float32. A level that has them names
//! a token of [`Tmul`]; kernels are written once, generic over it, and started through [`TmulUnit::run`].

use std::marker::PhantomData;

use half::bf16;

use super::Level;
#[cfg(target_arch = "x86_64")]
use super::amx::Amx;
use super::bf16::{DotBf16, Sum, flush};
use super::portable::Portable;

/// Rows of a tile, and numbers of 32 bits in each: sums, or pairs.
pub(crate) const TILE: usize = 16;

/// Numbers in a row of a left operand.
pub(crate) const TILE_DEPTH: usize = 2 * TILE;

/// A product of `ROWS` by one or two tiles. Strides are in numbers.
#[derive(Clone, Copy)]
pub(crate) struct TileProduct<const ROWS: usize> {
    /// The first tile of each row of tiles of the left operand; the next ones follow in its rows.
    pub(crate) a: [*const bf16; ROWS],
    /// The distance of its rows.
    pub(crate) a_strides: [usize; ROWS],
    /// The first tile of the right operand: 16 rows of pairs. The next row of tiles lies below, the second column to the right.
    pub(crate) b: *const bf16,
    /// The distance of the rows of pairs.
    pub(crate) b_stride: usize,
    /// How many tiles are summed over.
    pub(crate) steps: usize,
    /// The sums.
    pub(crate) c: *mut f32,
    /// The distance of their rows.
    pub(crate) c_stride: usize,
    /// Whether they are added to; else they are overwritten.
    pub(crate) add: bool,
}

/// Operations on tiles.
///
/// Denormal numbers count as 0, in operands and in results.
pub(crate) trait Tmul: Copy {
    /// The operations on vectors, as wide as a row of sums or a part of one.
    type Pairs: DotBf16;

    /// Their token.
    fn pairs(self) -> Self::Pairs;
    /// In each sum: `c + (even + odd)`, or without c, where `even` and `odd` are the sums of the products of first and of second numbers of the 16
    /// pairs of a tile, in their order; tile after tile. Every operation is rounded, but for the products.
    ///
    /// # Safety
    /// - Tiles are configured on this thread.
    /// - All tiles that the product names are initialised numbers, and nothing else accesses the sums.
    unsafe fn multiply<const ROWS: usize, const COLUMNS: usize>(self, product: &TileProduct<ROWS>);
    /// Writes 16 rows of 16 pairs as columns. Rows are so many numbers apart.
    ///
    /// # Safety
    /// - 16 rows of 32 numbers are readable from `from` on, and writable from `to` on, which nothing else accesses.
    unsafe fn transpose_pairs(self, from: *const bf16, from_stride: usize, to: *mut bf16, to_stride: usize);
    /// Writes two vectors one after the other, rounded to nearest, ties to even.
    ///
    /// # Safety
    /// - `to` points to as many numbers as two vectors have, which nothing else accesses.
    unsafe fn store_rounded(self, to: *mut bf16, vectors: [Sum<Self::Pairs>; 2]);
}

/// A computation on tiles, written once for all instruction sets. As [`Kernel`](super::Kernel), `run` must be
/// `#[inline(always)]`.
pub(crate) trait KernelTmul {
    /// Computes with the instructions of `simd`.
    ///
    /// # Safety
    /// - Tiles are configured on this thread.
    unsafe fn run<S: Tmul>(self, simd: S);
}

#[derive(Debug, Clone, Copy)]
enum TmulLevel {
    Portable(Portable),
    #[cfg(target_arch = "x86_64")]
    Amx(Amx),
}

/// The tiles of this thread, configured for as long as the value lives: 61 ns for both ends of it, where a product of 128 keys and 32
/// queries of 64 channels takes half a microsecond. So whoever has tasks on a thread holds one for all of them.
///
/// Nothing outlives it, and nothing is taken to be there before it: other code on the thread may configure tiles as it likes.
#[derive(Debug)]
pub(crate) struct TmulUnit {
    level: TmulLevel,
    /// The configuration belongs to the thread.
    not_send: PhantomData<*const ()>,
}

impl TmulUnit {
    /// The unit of a level that has one.
    pub(crate) fn of(level: Level) -> Option<Self> {
        let level = match level {
            Level::PortableAmx(simd) => TmulLevel::Portable(simd),
            #[cfg(target_arch = "x86_64")]
            Level::Amx(simd) => {
                simd.configure();
                TmulLevel::Amx(simd)
            }
            _ => return None,
        };
        Some(Self { level, not_send: PhantomData })
    }

    /// Runs a kernel: the single place that picks an instruction set for tiles.
    pub(crate) fn run<K: KernelTmul>(&self, kernel: K) {
        match self.level {
            // SAFETY: these have no configuration.
            TmulLevel::Portable(simd) => unsafe { kernel.run(simd) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: tiles are configured on the thread of this value.
            TmulLevel::Amx(simd) => unsafe { simd.run(kernel) },
        }
    }
}

impl Drop for TmulUnit {
    fn drop(&mut self) {
        match self.level {
            TmulLevel::Portable(_) => {}
            #[cfg(target_arch = "x86_64")]
            TmulLevel::Amx(simd) => simd.release(),
        }
    }
}

/// Slower than anything else. It is here so that everything that is built on these operations is tested on any machine.
impl Tmul for Portable {
    type Pairs = Self;

    #[inline(always)]
    fn pairs(self) -> Self {
        self
    }
    unsafe fn multiply<const ROWS: usize, const COLUMNS: usize>(self, product: &TileProduct<ROWS>) {
        for r in 0..ROWS {
            for row in 0..TILE {
                for column in (0..COLUMNS * TILE).step_by(TILE) {
                    // SAFETY: the caller's, for this row of sums of one tile.
                    unsafe {
                        let c = product.c.add((TILE * r + row) * product.c_stride + column).cast::<[f32; TILE]>();
                        let mut sums = if product.add { c.read().map(flush) } else { [0.0; TILE] };
                        for step in 0..product.steps {
                            let a = product.a[r].add(row * product.a_strides[r] + step * TILE_DEPTH).cast();
                            let b = product.b.add(step * TILE * product.b_stride + 2 * column);
                            add_tile(&*a, b, product.b_stride, &mut sums);
                        }
                        c.write(sums);
                    }
                }
            }
        }
    }
    unsafe fn transpose_pairs(self, from: *const bf16, from_stride: usize, to: *mut bf16, to_stride: usize) {
        for row in 0..TILE {
            for column in 0..TILE {
                // SAFETY: the caller's.
                unsafe {
                    let pair = from.add(row * from_stride + 2 * column).cast::<[bf16; 2]>().read();
                    to.add(column * to_stride + 2 * row).cast::<[bf16; 2]>().write(pair);
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn store_rounded(self, to: *mut bf16, vectors: [Sum<Self>; 2]) {
        let rounded = vectors.map(|vector| vector.map(|x| bf16::from_f32(flush(x))));
        // SAFETY: the caller vouches for as many writable numbers; an array has the alignment of its elements.
        unsafe { to.cast::<[[bf16; 4]; 2]>().write(rounded) }
    }
}

/// Adds the products of a row of a left tile and a right tile, of which rows are `stride` numbers apart.
///
/// # Safety
/// - The right tile is initialised.
unsafe fn add_tile(a: &[bf16; TILE_DEPTH], b: *const bf16, stride: usize, sums: &mut [f32; TILE]) {
    let [mut even, mut odd] = [[0f32; TILE]; 2];
    for pair in 0..TILE {
        // SAFETY: the caller's; an array has the alignment of its elements.
        let row = unsafe { &*b.add(pair * stride).cast::<[[bf16; 2]; TILE]>() };
        let [first, second] = [a[2 * pair], a[2 * pair + 1]].map(|x| flush(x.to_f32()));
        for column in 0..TILE {
            // Products of bfloat16 numbers are exact in float32, so these are fused multiply-adds unless a product is denormal.
            even[column] = flush(even[column] + first * flush(row[column][0].to_f32()));
            odd[column] = flush(odd[column] + second * flush(row[column][1].to_f32()));
        }
    }
    for column in 0..TILE {
        sums[column] = flush(sums[column] + flush(even[column] + odd[column]));
    }
}

/// The levels that have tiles: one for any machine, and what this one has.
#[cfg(test)]
pub(crate) fn tmul_levels() -> impl Iterator<Item = Level> {
    std::iter::once(Level::PortableAmx(Portable)).chain(Level::available()).filter(|&level| TmulUnit::of(level).is_some())
}

#[cfg(test)]
mod tests;
