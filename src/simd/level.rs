//! Which instruction set runs.

use std::sync::OnceLock;

#[cfg(target_arch = "aarch64")]
use super::aarch64::Neon;
#[cfg(target_arch = "x86_64")]
use super::amx::Amx;
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
    /// As [`Self::PortableBf16`], for [`Self::Amx`].
    #[doc(hidden)]
    PortableAmx(Portable),
    /// AVX2 with FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// AVX-512F.
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    /// AVX-512F with BW, and AVX-512-BF16 for the products of bfloat16 tensors; the rest as [`Self::Avx512`].
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(Avx512Bf16),
    /// AMX for the products of bfloat16 tensors, if the operating system permits it; the rest as [`Self::Avx512Bf16`].
    #[cfg(target_arch = "x86_64")]
    Amx(Amx),
    /// NEON.
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
}

impl Level {
    /// Every level of this CPU, the best one last.
    pub fn available() -> Vec<Self> {
        Self::detect().collect()
    }

    /// The same, each looked for when its turn comes: to look for [`Self::Amx`] is to ask the system for it.
    fn detect() -> impl Iterator<Item = Self> {
        const LEVELS: &[fn() -> Option<Level>] = &[
            || Some(Level::Portable(Portable)),
            #[cfg(target_arch = "x86_64")]
            || Avx2::detect().map(Level::Avx2),
            #[cfg(target_arch = "x86_64")]
            || Avx512::detect().map(Level::Avx512),
            #[cfg(target_arch = "x86_64")]
            || Avx512Bf16::detect().map(Level::Avx512Bf16),
            #[cfg(target_arch = "x86_64")]
            || Amx::detect().map(Level::Amx),
            #[cfg(target_arch = "aarch64")]
            || Neon::detect().map(Level::Neon),
        ];
        LEVELS.iter().filter_map(|detect| detect())
    }

    /// The name, as the environment variable `MRA_ATTENTION_ISA` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable(_) => "portable",
            Self::PortableBf16(_) => "portable-bf16",
            Self::PortableAmx(_) => "portable-amx",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(_) => "avx512bf16",
            #[cfg(target_arch = "x86_64")]
            Self::Amx(_) => "amx",
            #[cfg(target_arch = "aarch64")]
            Self::Neon(_) => "neon",
        }
    }

    /// The level of that name.
    ///
    /// # Errors
    /// If this CPU has no such level.
    pub fn from_name(name: &str) -> Result<Self> {
        let twins = [Self::PortableBf16(Portable), Self::PortableAmx(Portable)];
        twins.into_iter().chain(Self::detect()).find(|level| level.name() == name).ok_or_else(|| {
            let names: Vec<_> = Self::detect().map(Self::name).collect();
            let needs = if name == "amx" { "; amx needs AMX-BF16, AVX-512-BF16 and permission from the system" } else { "" };
            Error::new(format!("{ISA_VARIABLE}={name:?}: this CPU has {}{needs}", names.join(", ")))
        })
    }

    /// The fastest one of these levels, the best one last: of them [`Self::Avx512Bf16`] is no better than the one before unless its
    /// products are fast.
    fn fastest(mut levels: Vec<Self>, fast_bf16_products: bool) -> Self {
        #[cfg(target_arch = "x86_64")]
        levels.retain(|level| fast_bf16_products || !matches!(level, Self::Avx512Bf16(_)));
        #[cfg(not(target_arch = "x86_64"))]
        let _ = fast_bf16_products;
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
                Err(_) => Ok(Self::fastest(Self::available(), has_fast_bf16_products())),
            })
            .clone()
    }
}

/// Whether products of bfloat16 pairs are faster than those of float32. AMD's CPUs that have `VDPBF16PS` do twice the work of an FMA in
/// its time; Intel's take twice the time of an FMA for it, so that widening is no slower, and rounds less.
fn has_fast_bf16_products() -> bool {
    #[cfg(not(target_arch = "x86_64"))]
    return false;
    #[cfg(target_arch = "x86_64")]
    vendor_is_amd()
}

#[cfg(target_arch = "x86_64")]
fn vendor_is_amd() -> bool {
    use std::arch::x86_64::__cpuid;
    // SAFETY: every x86-64 CPU has CPUID.
    #[allow(unused_unsafe, reason = "a safe function in later versions of Rust")]
    let vendor = unsafe { __cpuid(0) };
    [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat() == b"AuthenticAMD"
}

#[cfg(test)]
mod tests {
    use super::{Level, Portable};

    #[test]
    fn pairs_of_bfloat16_are_chosen_where_they_are_fast_and_tiles_wherever_they_are() {
        let names = |levels: &[Level]| levels.iter().map(|level| level.name()).collect::<Vec<_>>();
        let all = Level::available();
        let last = |without: &str| names(&all).into_iter().rfind(|&name| name != without);
        assert_eq!(Some(Level::fastest(all.clone(), true).name()), last(""));
        assert_eq!(Some(Level::fastest(all.clone(), false).name()), last("avx512bf16"));
        assert_eq!(names(&all).contains(&"amx"), Level::fastest(all.clone(), false).name() == "amx");
    }

    /// The twins have names, but are no levels of a CPU.
    #[test]
    fn twins_are_chosen_by_name_alone() {
        for twin in [Level::PortableBf16(Portable), Level::PortableAmx(Portable)] {
            assert_eq!(Level::from_name(twin.name()), Ok(twin));
            assert!(!Level::available().contains(&twin));
        }
    }

    /// Linux names what the CPU has and the kernel saves; the rest is its permission, which it gives to who asks.
    #[test]
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    fn tiles_are_there_where_linux_says_so() {
        let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
        let expected = has("amx_tile") && has("amx_bf16") && has("avx512_bf16");
        match Level::from_name("amx") {
            Ok(_) => assert!(expected),
            Err(error) => assert!(!expected && error.to_string().contains("permission"), "{error}"),
        }
    }

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
