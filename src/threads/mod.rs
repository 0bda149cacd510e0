//! The only place that knows how work is spread over cores.

mod pool;
mod torch;

use std::sync::atomic::{AtomicUsize, Ordering};

#[cfg(feature = "python")]
pub(crate) use torch::{ParallelFor, use_torch};

/// Runs `body(scratch, task)` for every task in `0..tasks`, on at most `threads` threads.
///
/// Tasks are claimed in order, one at a time, so long ones balance by themselves. Each thread makes its own scratch.
/// What a task computes must not depend on the thread or on other tasks: results are then the same bits for any
/// number of threads. With one thread everything runs inline. A panic in a task reaches the caller.
pub(crate) fn for_each<S>(threads: usize, tasks: usize, scratch: impl Fn() -> S + Sync, body: impl Fn(&mut S, usize) + Sync) {
    let threads = threads.min(tasks);
    if threads <= 1 {
        let mut scratch = scratch();
        (0..tasks).for_each(|task| body(&mut scratch, task));
        return;
    }
    let next = AtomicUsize::new(0);
    let work = || {
        let mut task = next.fetch_add(1, Ordering::Relaxed);
        if task >= tasks {
            return;
        }
        let mut scratch = scratch();
        while task < tasks {
            body(&mut scratch, task);
            task = next.fetch_add(1, Ordering::Relaxed);
        }
    };
    // Any number of calls of `work`, one after the other or at once, does all tasks.
    if !torch::call_on_threads(threads, &work) {
        pool::call_on_threads(threads, &work);
    }
}
