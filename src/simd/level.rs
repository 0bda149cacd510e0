//! Which instruction set runs.

use std::sync::OnceLock;

#[cfg(target_arch = "aarch64")]
use super::aarch64::Neon;
use super::portable::Portable;
#[cfg(target_arch = "x86_64")]
use super::x86::{Avx2, Avx512};
#[cfg(target_arch = "x86_64")]
use super::x86_bf16::Avx512Bf16;
use crate::error::{Error, Result};

/// The environment variable that picks a lower level than the best one of the CPU.
const ISA_VARIABLE: &str = "MRA_ATTENTION_ISA";

/// An instruction set that this CPU has; the payload is the proof.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// What the compiler makes of plain loops for the baseline of the target.
    Portable(Portable),
    /// As [`Self::Portable`], with the products of bfloat16 tensors done the way that [`Self::Avx512Bf16`] does them, only slowly:
    /// for tests. It is never picked by itself, and not among those that [`Self::available`] names.
    #[doc(hidden)]
    PortableBf16(Portable),
    /// AVX2 with FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// AVX-512F.
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    /// AVX-512F with BW, and AVX-512-BF16 for the products of bfloat16 tensors; the rest as [`Self::Avx512`].
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(Avx512Bf16),
    /// NEON.
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
}

impl Level {
    /// Every level of this CPU, the best one last.
    pub fn available() -> Vec<Self> {
        let mut levels = vec![Self::Portable(Portable)];
        #[cfg(target_arch = "x86_64")]
        {
            levels.extend(Avx2::detect().map(Self::Avx2));
            levels.extend(Avx512::detect().map(Self::Avx512));
            levels.extend(Avx512Bf16::detect().map(Self::Avx512Bf16));
        }
        #[cfg(target_arch = "aarch64")]
        levels.extend(Neon::detect().map(Self::Neon));
        levels
    }

    /// The name, as the environment variable `MRA_ATTENTION_ISA` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable(_) => "portable",
            Self::PortableBf16(_) => "portable-bf16",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(_) => "avx512bf16",
            #[cfg(target_arch = "aarch64")]
            Self::Neon(_) => "neon",
        }
    }

    /// The level of that name.
    ///
    /// # Errors
    /// If this CPU has no such level.
    pub fn from_name(name: &str) -> Result<Self> {
        let available = Self::available();
        let all = available.iter().copied().chain([Self::PortableBf16(Portable)]);
        all.into_iter().find(|level| level.name() == name).ok_or_else(|| {
            let names: Vec<_> = available.iter().map(|level| level.name()).collect();
            Error::new(format!("{ISA_VARIABLE}={name:?}: this CPU has {}", names.join(", ")))
        })
    }

    /// The fastest level of this CPU.
    fn fastest() -> Self {
        let mut levels = Self::available();
        #[cfg(target_arch = "x86_64")]
        if !has_fast_bf16_products() {
            levels.retain(|level| !matches!(level, Self::Avx512Bf16(_)));
        }
        levels.pop().unwrap_or(Self::Portable(Portable))
    }

    /// The level in use: the fastest one of the CPU, or the one that the environment variable names. Read once.
    ///
    /// # Errors
    /// If the variable names a level that this CPU does not have.
    pub fn current() -> Result<Self> {
        static LEVEL: OnceLock<Result<Level>> = OnceLock::new();
        LEVEL
            .get_or_init(|| match std::env::var(ISA_VARIABLE) {
                Ok(name) => Self::from_name(&name),
                Err(_) => Ok(Self::fastest()),
            })
            .clone()
    }
}

/// Whether products of bfloat16 pairs are faster than those of float32. AMD's CPUs that have `VDPBF16PS` do twice the work of an FMA in
/// its time; Intel's take twice the time of an FMA for it, so that widening is no slower, and rounds less.
#[cfg(target_arch = "x86_64")]
fn has_fast_bf16_products() -> bool {
    use std::arch::x86_64::__cpuid;
    // SAFETY: every x86-64 CPU has CPUID.
    #[allow(unused_unsafe, reason = "a safe function in later versions of Rust")]
    let vendor = unsafe { __cpuid(0) };
    [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat() == b"AuthenticAMD"
}

#[cfg(test)]
mod tests {
    use super::Level;

    /// Unit tests run at every level that there is. This one fails where that would leave out one that the environment requires.
    #[test]
    fn required_levels_are_there() {
        let required = std::env::var("MRA_ATTENTION_REQUIRE_ISA").unwrap_or_default();
        for name in required.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            assert!(
                Level::from_name(name).is_ok(),
                "MRA_ATTENTION_REQUIRE_ISA requires {name:?}, which this CPU does not have"
            );
        }
    }
}
