//! Requests that block on another request of the same guest.
//!
//! A request for bytes that another request is writing has to wait, and blocks the worker that serves
//! it. With enough of those, all workers of a queue would be blocked, and no request of the queue would
//! be served. So code that blocks for this reason calls [`block_in_place`], and the worker pool has a
//! hook in each of its threads, by which it lets another worker take over. (tokio has the same under
//! the same name.)

use std::cell::{Cell, RefCell};
use std::time::Instant;

/// What a thread pool does when one of its threads blocks.
pub trait Hook {
    /// The calling thread is about to block. Returns whether another one may take over.
    fn begin_blocking(&self) -> bool;

    /// The calling thread goes on, for which [`Hook::begin_blocking`] has returned `begun`.
    fn end_blocking(&self, begun: bool);
}

thread_local! {
    static HOOK: RefCell<Option<Box<dyn Hook>>> = const { RefCell::new(None) };
    static HAS_BLOCKED: Cell<bool> = const { Cell::new(false) };
    static WAITED: Cell<u64> = const { Cell::new(0) };
}

/// Removes the calling thread's hook when it is dropped.
#[derive(Debug)]
#[must_use = "the hook is removed when this is dropped"]
pub struct HookGuard(());

impl HookGuard {
    /// Gives the calling thread a hook.
    pub fn install(hook: Box<dyn Hook>) -> HookGuard {
        HOOK.set(Some(hook));
        HookGuard(())
    }
}

impl Drop for HookGuard {
    fn drop(&mut self) {
        HOOK.set(None);
    }
}

/// Calls [`Hook::end_blocking`], also after a panic.
struct Blocking(bool);

impl Drop for Blocking {
    fn drop(&mut self) {
        HOOK.with_borrow(|hook| hook.iter().for_each(|hook| hook.end_blocking(self.0)));
    }
}

/// Runs `wait`, which may block until another request of the same guest is done.
pub fn block_in_place<T>(wait: impl FnOnce() -> T) -> T {
    let begun = HOOK.with_borrow(|hook| hook.as_ref().is_some_and(|hook| hook.begin_blocking()));
    HAS_BLOCKED.set(HAS_BLOCKED.get() || begun);
    let _blocking = Blocking(begun);
    let since = Instant::now();
    let result = wait();
    // At least 1, so that a wait is seen.
    let waited = u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX).max(1);
    WAITED.set(WAITED.get().saturating_add(waited));
    result
}

/// Nanoseconds for which the calling thread has waited since the last call.
#[inline]
pub fn take_waited() -> u64 {
    WAITED.take()
}

/// Whether the calling thread has blocked since the last call, and another one may have taken over.
pub fn take_blocked() -> bool {
    HAS_BLOCKED.get() && HAS_BLOCKED.take()
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::rc::Rc;

    use super::*;

    struct Count(Rc<Cell<i32>>);

    impl Hook for Count {
        fn begin_blocking(&self) -> bool {
            self.0.set(self.0.get() + 1);
            true
        }

        fn end_blocking(&self, begun: bool) {
            assert!(begun);
            self.0.set(self.0.get() - 1);
        }
    }

    #[test]
    fn a_hook_is_told_of_both_ends_of_each_wait() {
        let waiting = Rc::new(Cell::new(0));
        assert_eq!(block_in_place(|| waiting.get()), 0);
        assert!(!take_blocked());
        let guard = HookGuard::install(Box::new(Count(Rc::clone(&waiting))));
        assert_eq!(block_in_place(|| waiting.get()), 1);
        assert_eq!(waiting.get(), 0);
        let failed = catch_unwind(AssertUnwindSafe(|| block_in_place(|| -> () { panic!("it fails") })));
        assert!(failed.is_err());
        assert_eq!(waiting.get(), 0);
        assert!(take_blocked() && !take_blocked());
        drop(guard);
        assert_eq!(block_in_place(|| waiting.get()), 0);
    }
}
