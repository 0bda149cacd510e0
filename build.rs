//! Passes to the crate what `build_info` reports: the compiler, the target and the profile.

use std::env;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let rustc = env::var_os("RUSTC").expect("cargo sets RUSTC");
    let version = Command::new(rustc).arg("--version").output().expect("the compiler runs").stdout;
    println!("cargo::rustc-env=MRA_ATTENTION_RUSTC={}", String::from_utf8_lossy(&version).trim());
    for variable in ["TARGET", "PROFILE"] {
        println!("cargo::rustc-env=MRA_ATTENTION_{variable}={}", env::var(variable).expect("cargo sets it"));
    }
}
