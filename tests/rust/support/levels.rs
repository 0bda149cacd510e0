//! Which instruction sets are tested.

use mra_attention::Level;

/// The environment variable that names levels that must not be missing, separated by commas.
const REQUIRED: &str = "MRA_ATTENTION_REQUIRE_ISA";

/// Every level of this CPU.
///
/// # Panics
/// If a level that the environment requires is missing.
pub(crate) fn levels() -> Vec<Level> {
    levels_required(std::env::var(REQUIRED).ok().as_deref())
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
