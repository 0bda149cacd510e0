//! A pool of our own, for Rust users, for a torch without a stable C interface, and for forked children.

use std::sync::{Arc, Mutex, TryLockError};

use rayon::{ThreadPool, ThreadPoolBuilder};

/// Calls `work` on up to `threads` threads at once, the caller's among them.
pub(super) fn call_on_threads(threads: usize, work: &(dyn Fn() + Sync)) {
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
