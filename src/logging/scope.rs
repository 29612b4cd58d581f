//! The share and the queue that a thread works for, which every message of the thread names.
//!
//! They belong to the thread and not to the message: a file system or a decoder that finds fault with a request does
//! not learn which queue it came from, and need not. A thread states its scope once, when it is started, so a request
//! costs nothing, and a message two thread-local reads.

use std::cell::RefCell;
use std::fmt;
use std::sync::Arc;

thread_local! {
    static SCOPE: RefCell<Scope> = const { RefCell::new(Scope { share: None, queue: None }) };
}

/// What a thread works for: a share, a queue of it, or neither (the whole process).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    share: Option<Arc<str>>,
    queue: Option<usize>,
}

impl Scope {
    /// The scope of a thread that works for the share `name`.
    pub fn of_share(name: &Arc<str>) -> Scope {
        Scope { share: Some(Arc::clone(name)), queue: None }
    }

    /// The scope of the calling thread, for one that it starts.
    pub fn current() -> Scope {
        // A thread that is ending has none left.
        SCOPE.try_with(|scope| scope.borrow().clone()).unwrap_or_default()
    }

    /// The scope of the calling thread, narrowed to a queue of its share.
    pub fn of_queue(index: usize) -> Scope {
        Scope { queue: Some(index), ..Scope::current() }
    }

    /// Makes this the scope of the calling thread, until the guard is dropped.
    pub fn enter(self) -> ScopeGuard {
        ScopeGuard(SCOPE.replace(self))
    }
}

/// What stands before a message: `share NAME, queue 2: `.
impl fmt::Display for Scope {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.share, self.queue) {
            (Some(share), Some(queue)) => write!(out, "share {share}, queue {queue}: "),
            (Some(share), None) => write!(out, "share {share}: "),
            (None, Some(queue)) => write!(out, "queue {queue}: "),
            (None, None) => Ok(()),
        }
    }
}

/// Gives the calling thread its former scope back when it is dropped.
#[derive(Debug)]
#[must_use = "the scope ends when this is dropped"]
pub struct ScopeGuard(Scope);

impl Drop for ScopeGuard {
    fn drop(&mut self) {
        SCOPE.set(std::mem::take(&mut self.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_belongs_to_its_thread_and_ends_with_its_guard() {
        assert_eq!(Scope::current().to_string(), "");
        let share = Scope::of_share(&"vm1".into()).enter();
        assert_eq!(Scope::current().to_string(), "share vm1: ");
        {
            let _queue = Scope::of_queue(2).enter();
            assert_eq!(Scope::current().to_string(), "share vm1, queue 2: ");
            let other = std::thread::spawn(|| Scope::current().to_string());
            assert_eq!(other.join().unwrap(), "");
        }
        assert_eq!(Scope::current().to_string(), "share vm1: ");
        drop(share);
        assert_eq!(Scope::of_queue(2).to_string(), "queue 2: ");
    }
}
