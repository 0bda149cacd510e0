//! Each test runs in a process of its own, since a permission lasts. Without tiles nobody has it, and the same must hold.

use std::process::Command;

use super::*;
use crate::simd::Level;

/// Runs `body` in a process of its own, where `MRA_ATTENTION_ISA` is as given: the test of this name starts this binary with itself alone.
fn alone(test: &str, isa: Option<&str>, body: fn()) {
    const ALONE: &str = "MRA_ATTENTION_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return body();
    }
    let mut command = Command::new(std::env::current_exe().expect("the path of this binary"));
    command.args(["--exact", &format!("simd::amx::permission::tests::{test}")]).env(ALONE, "1").env_remove("MRA_ATTENTION_ISA");
    let output = command.envs(isa.map(|isa| ("MRA_ATTENTION_ISA", isa))).output().expect("a process");
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && printed.contains("1 passed"), "{printed}");
}

/// Whether this process has the permission.
fn has_permission() -> bool {
    const ARCH_GET_XCOMP_PERM: usize = 0x1022;
    let mut permitted = 0u64;
    // SAFETY: writes that number; where Linux does not know the call, it does nothing.
    unsafe { system_call(ARCH_PRCTL, ARCH_GET_XCOMP_PERM, (&raw mut permitted).addr()) };
    permitted & 1 << TILE_DATA != 0
}

#[test]
fn tiles_are_asked_for() {
    alone("tiles_are_asked_for", None, || {
        assert!(!has_permission());
        let names: Vec<_> = Level::available().into_iter().map(Level::name).collect();
        assert_eq!(names.contains(&"amx"), has_permission(), "{names:?}");
    });
}

#[test]
fn who_names_a_lower_level_asks_for_nothing() {
    alone("who_names_a_lower_level_asks_for_nothing", Some("portable"), || {
        assert_eq!(Level::current().map(Level::name), Ok("portable"));
        assert!(!has_permission());
    });
}

/// A small signal stack of a thread is a reason for Linux to refuse.
#[test]
fn where_tiles_are_refused_the_level_below_serves() {
    /// `stack_t`.
    #[repr(C)]
    struct Stack {
        start: *mut u8,
        flags: i32,
        size: usize,
    }
    alone("where_tiles_are_refused_the_level_below_serves", None, || {
        const SIGALTSTACK: usize = 131;
        let room = vec![0; 4096].leak();
        let stack = Stack { start: room.as_mut_ptr(), flags: 0, size: room.len() };
        // SAFETY: the room is this thread's for ever.
        assert_eq!(unsafe { system_call(SIGALTSTACK, (&raw const stack).addr(), 0) }, 0);
        assert!(!granted() && !has_permission());
        let mut names: Vec<_> = Level::available().into_iter().map(Level::name).collect();
        assert!(!names.contains(&"amx"), "{names:?}");
        names.retain(|name| *name != "avx512bf16");
        let current = Level::current().expect("a level").name();
        assert!(current == "avx512bf16" || Some(current) == names.pop(), "{current}");
        assert!(Level::from_name("amx").is_err());
    });
}
