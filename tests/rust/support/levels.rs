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

/// The levels that compute, slowly and on any machine, what those that multiply bfloat16 as it is compute.
const TWINS: [&str; 2] = ["portable-bf16", "portable-amx"];

/// Every level of this CPU at which tensors of `E` are computed in a way of their own.
pub(crate) fn levels_for<E: Rounded>() -> Vec<Level> {
    let mut levels = levels();
    if E::NAME == "bf16" {
        levels.extend(TWINS.map(|name| Level::from_name(name).expect("a level of any machine")));
    }
    levels
}

/// Whether weights are rounded to `E` at this level before the values are multiplied by them.
pub(crate) fn rounds_weights<E: Rounded>(level: Level) -> bool {
    E::NAME == "bf16" && (TWINS.contains(&level.name()) || ["avx512bf16", "amx"].contains(&level.name()))
}

/// Whether weights and gradients of logits are rounded to `E` in backward.
pub(crate) fn rounds_gradients<E: Rounded>(level: Level) -> bool {
    E::NAME == "bf16" && ["portable-amx", "amx"].contains(&level.name())
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
