//! The only place that knows how work is spread over cores.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, TryLockError};

use rayon::{ThreadPool, ThreadPoolBuilder};

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
        let mut scratch = scratch();
        loop {
            let task = next.fetch_add(1, Ordering::Relaxed);
            if task >= tasks {
                break;
            }
            body(&mut scratch, task);
        }
    };
    // The calling thread works too, so the pool needs one thread fewer; without a pool it does everything.
    let Some(pool) = pool(threads - 1) else {
        return work();
    };
    pool.in_place_scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|_| work());
        }
        work();
    });
}

/// A pool with at least `threads` threads, of this process; none if the system does not start threads.
fn pool(threads: usize) -> Option<Arc<ThreadPool>> {
    static POOL: Mutex<Option<(u32, Arc<ThreadPool>)>> = Mutex::new(None);
    // Not `lock`: in a child forked while another thread held it, it stays locked.
    let mut current = (0..1000).find_map(|_| match POOL.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => {
            std::thread::yield_now();
            None
        }
    })?;
    let process = std::process::id();
    if let Some((owner, pool)) = &*current {
        if *owner == process && pool.current_num_threads() >= threads {
            return Some(Arc::clone(pool));
        }
        if *owner != process {
            // The threads of a forked parent do not exist here, and their locks may be held for ever: never touch them.
            std::mem::forget(Arc::clone(pool));
        }
    }
    let pool =
        ThreadPoolBuilder::new().num_threads(threads).thread_name(|index| format!("mra-attention-{index}")).build().ok()?;
    let pool = Arc::new(pool);
    *current = Some((process, Arc::clone(&pool)));
    Some(pool)
}
