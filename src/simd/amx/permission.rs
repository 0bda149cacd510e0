//! Whether tiles may be used.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
use std::sync::OnceLock;

/// Whether the CPU has tiles and their products of bfloat16, and the operating system saves them.
pub(super) fn cpu_has_tiles() -> bool {
    const OSXSAVE: u32 = 1 << 27;
    const AMX_BF16_AND_TILE: u32 = 1 << 22 | 1 << 24;
    const TILE_STATE: u64 = 1 << 17 | 1 << 18;
    #[target_feature(enable = "xsave")]
    fn saved_state() -> u64 {
        // SAFETY: register 0 exists wherever the instruction does.
        unsafe { _xgetbv(0) }
    }
    // SAFETY: every x86-64 CPU has CPUID; XGETBV is there where OSXSAVE says so.
    #[allow(unused_unsafe, reason = "safe functions in later versions of Rust")]
    unsafe {
        __cpuid(0).eax >= 7
            && __cpuid(1).ecx & OSXSAVE != 0
            && __cpuid_count(7, 0).edx & AMX_BF16_AND_TILE == AMX_BF16_AND_TILE
            && saved_state() & TILE_STATE == TILE_STATE
    }
}

/// Whether this process may use tiles: Linux wants to be asked, because of the room that their state takes. Asked once, for all threads
/// and all that are forked. It is refused where a thread has an alternate signal stack that is too small for that state.
pub(super) fn granted() -> bool {
    static GRANTED: OnceLock<bool> = OnceLock::new();
    *GRANTED.get_or_init(|| cfg!(target_os = "linux") && ask())
}

fn ask() -> bool {
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    // SAFETY: takes numbers, and changes what it says it does.
    unsafe { system_call(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
}

/// The system call that asks for tiles, and about them.
const ARCH_PRCTL: usize = 158;

/// What Linux calls the state of tiles (`XFEATURE_XTILEDATA`).
const TILE_DATA: usize = 18;

/// A system call of Linux: 0, or a negative number that says what is wrong.
///
/// # Safety
/// - That call with these arguments is sound.
unsafe fn system_call(number: usize, first: usize, second: usize) -> isize {
    let result: isize;
    // SAFETY: the caller's; Linux changes no other registers.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") first,
            in("rsi") second,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack)
        );
    }
    result
}

#[cfg(all(test, target_os = "linux"))]
mod tests;
