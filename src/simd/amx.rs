//! AMX: tiles, and products of tiles of bfloat16.

use std::arch::asm;
use std::arch::x86_64::{
    __m512bh, __m512i, _mm512_cvtne2ps_pbh, _mm512_loadu_si512, _mm512_setzero_si512, _mm512_shuffle_i32x4,
    _mm512_storeu_si512, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};
use std::cell::Cell;
use std::mem::transmute;

use half::bf16;

use super::bf16::Sum;
use super::tmul::{KernelTmul, TILE, TileProduct, Tmul};
use super::x86_bf16::Avx512Bf16;

mod permission;

/// Tiles, beside AVX-512 with products of bfloat16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Amx {
    pairs: Avx512Bf16,
}

impl Amx {
    /// The token, if this CPU has the instructions and the operating system lets this process use them, which it is asked for.
    pub fn detect() -> Option<Self> {
        let pairs = Avx512Bf16::detect()?;
        (permission::cpu_has_tiles() && permission::granted()).then_some(Self { pairs })
    }

    /// The token of the level below, which computes everything but products of tiles.
    pub(super) fn below(self) -> Avx512Bf16 {
        self.pairs
    }

    /// Configures the tiles of this thread, unless they are, until as many calls of [`Self::release`].
    #[allow(clippy::unused_self, reason = "the token is the proof")]
    pub(super) fn configure(self) {
        let users = USERS.get();
        if users == 0 {
            // SAFETY: the token proves the instruction; the operand is a valid configuration.
            unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIGURATION, options(nostack, preserves_flags)) }
        }
        USERS.set(users + 1);
    }

    /// Ends what a call of [`Self::configure`] began.
    #[allow(clippy::unused_self, reason = "the token is the proof")]
    pub(super) fn release(self) {
        let users = USERS.get() - 1;
        if users == 0 {
            // SAFETY: the token proves the instruction; nobody uses the tiles of this thread any more.
            unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) }
        }
        USERS.set(users);
    }

    /// Runs `kernel` compiled for these instructions.
    ///
    /// # Safety
    /// - Tiles are configured on this thread.
    #[inline]
    pub(super) unsafe fn run<K: KernelTmul>(self, kernel: K) {
        #[target_feature(enable = "avx512bf16,avx512bw,avx512f,avx2,fma")]
        fn compiled<K: KernelTmul>(simd: Amx, kernel: K) {
            // SAFETY: the caller's.
            unsafe { kernel.run(simd) }
        }
        // SAFETY: `self` exists, so `detect` of the level below has seen every feature of the list.
        unsafe { compiled(self, kernel) }
    }
}

thread_local! {
    /// How many hold the configuration of this thread.
    static USERS: Cell<usize> = const { Cell::new(0) };
}

#[repr(C, align(64))]
struct Configuration([u8; 64]);

/// Palette 1: eight tiles of 16 rows of 64 bytes.
static CONFIGURATION: Configuration = {
    let mut bytes = [0; 64];
    bytes[0] = 1;
    let mut tile = 0;
    while tile < 8 {
        bytes[16 + 2 * tile] = 64;
        bytes[48 + tile] = 16;
        tile += 1;
    }
    Configuration(bytes)
};

/// One `asm!` block for a whole product, since what is in tiles between two of them is nobody's promise. Sums are in tiles 0 to 3, left
/// operands in 4 and 5, right ones in 6 and 7.
macro_rules! multiply {
    ($product:expr, zero: $zero:literal, load: $load:literal, step: $step:literal, store: $store:literal) => {{
        let product: &TileProduct<_> = $product;
        let second = product.a.len() - 1;
        let (size, half) = (size_of::<f32>(), size_of::<bf16>());
        asm!(
            "# {a1} {a1_stride} {c1}",
            "test {add}, {add}",
            "jnz 2f",
            $zero,
            "jmp 3f",
            "2:",
            $load,
            "3:",
            "test {steps}, {steps}",
            "jz 5f",
            "4:",
            $step,
            "add {a0}, 64",
            "add {a1}, 64",
            "add {b}, {b_step}",
            "dec {steps}",
            "jnz 4b",
            "5:",
            $store,
            add = in(reg) usize::from(product.add),
            steps = inout(reg) product.steps => _,
            a0 = inout(reg) product.a[0] => _,
            a0_stride = in(reg) product.a_strides[0] * half,
            a1 = inout(reg) product.a[second] => _,
            a1_stride = in(reg) product.a_strides[second] * half,
            b = inout(reg) product.b => _,
            b_stride = in(reg) product.b_stride * half,
            b_step = in(reg) TILE * product.b_stride * half,
            c0 = in(reg) product.c,
            c1 = in(reg) product.c.wrapping_add(TILE * product.c_stride),
            c_stride = in(reg) product.c_stride * size,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack)
        );
    }};
}

impl Tmul for Amx {
    type Pairs = Avx512Bf16;

    #[inline(always)]
    fn pairs(self) -> Avx512Bf16 {
        self.pairs
    }
    #[inline(always)]
    unsafe fn multiply<const ROWS: usize, const COLUMNS: usize>(self, product: &TileProduct<ROWS>) {
        // SAFETY: the token proves the instructions; the caller vouches for the configuration and for all tiles.
        unsafe {
            match (ROWS, COLUMNS) {
                (1, 1) => multiply!(
                    product,
                    zero: "tilezero tmm0",
                    load: "tileloadd tmm0, [{c0} + {c_stride}]",
                    step: "tileloadd tmm4, [{a0} + {a0_stride}]
                           tileloadd tmm6, [{b} + {b_stride}]
                           tdpbf16ps tmm0, tmm4, tmm6",
                    store: "tilestored [{c0} + {c_stride}], tmm0"
                ),
                (1, 2) => multiply!(
                    product,
                    zero: "tilezero tmm0
                           tilezero tmm1",
                    load: "tileloadd tmm0, [{c0} + {c_stride}]
                           tileloadd tmm1, [{c0} + {c_stride} + 64]",
                    step: "tileloadd tmm4, [{a0} + {a0_stride}]
                           tileloadd tmm6, [{b} + {b_stride}]
                           tdpbf16ps tmm0, tmm4, tmm6
                           tileloadd tmm7, [{b} + {b_stride} + 64]
                           tdpbf16ps tmm1, tmm4, tmm7",
                    store: "tilestored [{c0} + {c_stride}], tmm0
                            tilestored [{c0} + {c_stride} + 64], tmm1"
                ),
                (2, 1) => multiply!(
                    product,
                    zero: "tilezero tmm0
                           tilezero tmm2",
                    load: "tileloadd tmm0, [{c0} + {c_stride}]
                           tileloadd tmm2, [{c1} + {c_stride}]",
                    step: "tileloadd tmm4, [{a0} + {a0_stride}]
                           tileloadd tmm6, [{b} + {b_stride}]
                           tdpbf16ps tmm0, tmm4, tmm6
                           tileloadd tmm5, [{a1} + {a1_stride}]
                           tdpbf16ps tmm2, tmm5, tmm6",
                    store: "tilestored [{c0} + {c_stride}], tmm0
                            tilestored [{c1} + {c_stride}], tmm2"
                ),
                (2, 2) => multiply!(
                    product,
                    zero: "tilezero tmm0
                           tilezero tmm1
                           tilezero tmm2
                           tilezero tmm3",
                    load: "tileloadd tmm0, [{c0} + {c_stride}]
                           tileloadd tmm1, [{c0} + {c_stride} + 64]
                           tileloadd tmm2, [{c1} + {c_stride}]
                           tileloadd tmm3, [{c1} + {c_stride} + 64]",
                    step: "tileloadd tmm4, [{a0} + {a0_stride}]
                           tileloadd tmm6, [{b} + {b_stride}]
                           tdpbf16ps tmm0, tmm4, tmm6
                           tileloadd tmm7, [{b} + {b_stride} + 64]
                           tdpbf16ps tmm1, tmm4, tmm7
                           tileloadd tmm5, [{a1} + {a1_stride}]
                           tdpbf16ps tmm2, tmm5, tmm6
                           tdpbf16ps tmm3, tmm5, tmm7",
                    store: "tilestored [{c0} + {c_stride}], tmm0
                            tilestored [{c0} + {c_stride} + 64], tmm1
                            tilestored [{c1} + {c_stride}], tmm2
                            tilestored [{c1} + {c_stride} + 64], tmm3"
                ),
                _ => unreachable!("one or two tiles"),
            }
        }
    }
    #[inline(always)]
    unsafe fn transpose_pairs(self, from: *const bf16, from_stride: usize, to: *mut bf16, to_stride: usize) {
        // SAFETY: the token proves the instructions; the caller vouches for 16 vectors on both sides.
        unsafe {
            let rows = std::array::from_fn(|row| _mm512_loadu_si512(from.add(row * from_stride).cast()));
            for (column, vector) in transposed(rows).into_iter().enumerate() {
                _mm512_storeu_si512(to.add(column * to_stride).cast(), vector);
            }
        }
    }
    #[inline(always)]
    unsafe fn store_rounded(self, to: *mut bf16, vectors: [Sum<Avx512Bf16>; 2]) {
        // SAFETY: the token proves the instructions; the caller vouches for a writable vector. The second operand becomes the lower
        // half. Both types are 512 bits.
        unsafe {
            let rounded = transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(vectors[1], vectors[0]));
            _mm512_storeu_si512(to.cast(), rounded);
        }
    }
}

/// Rows of 32-bit numbers as columns: pairs of rows, then fours of them, then fours of those.
///
/// # Safety
/// - The CPU has AVX-512F.
#[inline(always)]
unsafe fn transposed(rows: [__m512i; TILE]) -> [__m512i; TILE] {
    // SAFETY: the caller's.
    unsafe {
        let (mut twos, mut fours, mut columns) = (rows, rows, [_mm512_setzero_si512(); TILE]);
        for i in (0..TILE).step_by(2) {
            twos[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
            twos[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
        }
        for i in (0..TILE).step_by(4) {
            fours[i] = _mm512_unpacklo_epi64(twos[i], twos[i + 2]);
            fours[i + 1] = _mm512_unpackhi_epi64(twos[i], twos[i + 2]);
            fours[i + 2] = _mm512_unpacklo_epi64(twos[i + 1], twos[i + 3]);
            fours[i + 3] = _mm512_unpackhi_epi64(twos[i + 1], twos[i + 3]);
        }
        // Part p of vector 4 i + j now is column 4 p + j of rows 4 i to 4 i + 3.
        for j in 0..4 {
            let even = [0, 8].map(|i| _mm512_shuffle_i32x4::<0x88>(fours[i + j], fours[i + 4 + j]));
            let odd = [0, 8].map(|i| _mm512_shuffle_i32x4::<0xdd>(fours[i + j], fours[i + 4 + j]));
            columns[j] = _mm512_shuffle_i32x4::<0x88>(even[0], even[1]);
            columns[4 + j] = _mm512_shuffle_i32x4::<0x88>(odd[0], odd[1]);
            columns[8 + j] = _mm512_shuffle_i32x4::<0xdd>(even[0], even[1]);
            columns[12 + j] = _mm512_shuffle_i32x4::<0xdd>(odd[0], odd[1]);
        }
        columns
    }
}
