//! torch's own threads, borrowed where a torch with a stable C interface (2.10 or later) is in the process.
//!
//! torch's workers spin for a while after each of its operators. A second pool competes with them for the cores: inside a
//! model that costs more than any kernel here (README, "Threads").

use std::any::Any;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;
use std::sync::OnceLock;

/// A function that is called with a part of a range and the context of the caller.
type Body = unsafe extern "C" fn(i64, i64, *mut c_void);

/// `torch_parallel_for` of torch's stable C interface: calls the body for parts of `begin..end` on torch's threads, and
/// returns 0 when all are done. Where a thread of torch is the caller, or torch has one thread, it calls the body itself.
pub(crate) type ParallelFor = unsafe extern "C" fn(i64, i64, i64, Body, *mut c_void) -> i32;

/// The function, and the process in which its threads exist.
static TORCH: OnceLock<(ParallelFor, u32)> = OnceLock::new();

/// Uses torch's threads from now on.
///
/// # Safety
/// - `parallel_for` is torch's function of that name, and stays loaded.
#[cfg(feature = "python")]
pub(crate) unsafe fn use_torch(parallel_for: ParallelFor) {
    TORCH.get_or_init(|| (parallel_for, std::process::id()));
}

struct Call<'a> {
    work: &'a (dyn Fn() + Sync),
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// Calls `work` on up to `threads` of torch's threads at once, the caller's among them. False if there is no torch, or if
/// its threads are those of a parent from which this process was forked: they do not exist here.
pub(super) fn call_on_threads(threads: usize, work: &(dyn Fn() + Sync)) -> bool {
    let Some(&(parallel_for, process)) = TORCH.get() else {
        return false;
    };
    if process != std::process::id() {
        return false;
    }
    let call = Call { work, panic: Mutex::new(None) };
    let context = (&raw const call).cast_mut().cast();
    let threads = i64::try_from(threads).unwrap_or(i64::MAX);
    // SAFETY: `use_torch` has it from torch; the body reads `call` shared, and torch returns when all parts are done.
    let status = unsafe { parallel_for(0, threads, 1, body, context) };
    if let Some(panic) = call.panic.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        resume_unwind(panic);
    }
    // A torch that failed to start its threads leaves the work to the next pool; what was done is not done again.
    status == 0
}

/// Does the work of a [`Call`] once, whatever part of the range it is for. A panic must not pass through C++.
unsafe extern "C" fn body(_begin: i64, _end: i64, context: *mut c_void) {
    // SAFETY: `call_on_threads` passes a `Call` that outlives every part.
    let call = unsafe { &*context.cast_const().cast::<Call<'_>>() };
    if let Err(panic) = catch_unwind(AssertUnwindSafe(call.work)) {
        *call.panic.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(panic);
    }
}
