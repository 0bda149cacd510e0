//! The only place that knows how work is spread over cores.

mod pool;
mod torch;

use std::sync::atomic::{AtomicUsize, Ordering};

#[cfg(feature = "python")]
pub(crate) use torch::{ParallelFor, use_torch};

/// Runs `body(scratch, task)` for every task in `0..tasks`, on at most `threads` threads.
///
/// Each thread has a part of the tasks of its own, does them in order, one at a time, and then takes from what is left of the
/// parts of others, so long ones balance by themselves. Each thread makes its own scratch.
/// What a task computes must not depend on the thread or on other tasks: results are then the same bits for any
/// number of threads. With one thread everything runs inline. A panic in a task reaches the caller.
///
/// Why parts: neighbours in memory are first touched by one thread. Two that take turns wait for each other in the page
/// faults of a long output, a tenth of the time at 65536 tokens.
pub(crate) fn for_each<S>(threads: usize, tasks: usize, scratch: impl Fn() -> S + Sync, body: impl Fn(&mut S, usize) + Sync) {
    let threads = threads.min(tasks);
    if threads <= 1 {
        let mut scratch = scratch();
        (0..tasks).for_each(|task| body(&mut scratch, task));
        return;
    }
    let start = |part| tasks / threads * part + (tasks % threads).min(part);
    let next: Vec<AtomicUsize> = (0..threads).map(|part| AtomicUsize::new(start(part))).collect();
    let arrived = AtomicUsize::new(0);
    let claim = |part: usize| {
        let task = next[part].fetch_add(1, Ordering::Relaxed);
        (task < start(part + 1)).then_some(task)
    };
    let work = || {
        let own = arrived.fetch_add(1, Ordering::Relaxed);
        let parts = (0..threads).map(|other| (own + other) % threads);
        let mut tasks = parts.flat_map(|part| std::iter::from_fn(move || claim(part)));
        let Some(first) = tasks.next() else { return };
        let mut scratch = scratch();
        std::iter::once(first).chain(tasks).for_each(|task| body(&mut scratch, task));
    };
    // Any number of calls of `work`, one after the other or at once, does all tasks.
    if !torch::call_on_threads(threads, &work) {
        pool::call_on_threads(threads, &work);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_is_done_once() {
        for (threads, tasks) in [(1, 3), (2, 1), (2, 2), (2, 7), (3, 8), (4, 3), (5, 64), (8, 0)] {
            let done: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            for_each(
                threads,
                tasks,
                || (),
                |(), task| {
                    // One long task: others must take what is left of that thread's part.
                    if task == 0 {
                        std::thread::sleep(std::time::Duration::from_millis(5));
                    }
                    done[task].fetch_add(1, Ordering::Relaxed);
                },
            );
            assert!(done.iter().all(|count| count.load(Ordering::Relaxed) == 1), "{threads} threads, {tasks} tasks: {done:?}");
        }
    }
}
