//! Which instruction sets are tested.

use mra_attention::Level;

use super::Rounded;

/// The environment variable that names levels that must not be missing, separated by commas.
const REQUIRED: &str = "MRA_ATTENTION_REQUIRE_ISA";

/// Every level of this CPU.
///
/// # Panics
/// If a level that the environment requires is missing.
pub(crate) fn levels() -> Vec<Level> {
    levels_required(std::env::var(REQUIRED).ok().as_deref())
}

/// The level that computes, slowly and on any machine, what levels that multiply bfloat16 as it is compute.
const PORTABLE_BF16: &str = "portable-bf16";

/// Every level of this CPU at which tensors of `E` are computed in a way of their own.
pub(crate) fn levels_for<E: Rounded>() -> Vec<Level> {
    let mut levels = levels();
    if E::NAME == "bf16" {
        levels.push(Level::from_name(PORTABLE_BF16).expect("a level of any machine"));
    }
    levels
}

/// Whether weights are rounded to `E` at this level before the values are multiplied by them.
pub(crate) fn rounds_weights<E: Rounded>(level: Level) -> bool {
    E::NAME == "bf16" && [PORTABLE_BF16, "avx512bf16"].contains(&level.name())
}

/// As [`levels`], with these names required.
pub(crate) fn levels_required(required: Option<&str>) -> Vec<Level> {
    let levels = Level::available();
    for name in required.into_iter().flat_map(|names| names.split(',')).map(str::trim).filter(|name| !name.is_empty()) {
        assert!(
            levels.iter().any(|level| level.name() == name),
            "{REQUIRED} requires {name:?}, which this CPU does not have: it has {:?}",
            levels.iter().map(|level| level.name()).collect::<Vec<_>>()
        );
    }
    levels
}
