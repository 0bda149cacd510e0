//! Hints to bring memory nearer before it is read. They change no result, and nothing happens where there is no instruction for it.

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// Brings the cache line of `p`, which may be any address, into the first-level cache.
#[inline(always)]
pub(crate) fn prefetch_near<T>(p: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: it reads nothing, and every x86-64 has the instruction.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// Brings a row into the second-level cache.
#[inline(always)]
pub(crate) fn prefetch_far<T>(row: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for byte in (0..size_of_val(row)).step_by(LINE) {
        // SAFETY: it reads nothing, and every x86-64 has the instruction.
        unsafe {
            let line = row.as_ptr().cast::<i8>().wrapping_add(byte);
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(line);
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = row;
}
