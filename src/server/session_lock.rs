//! A readers-writer lock between the requests of a session and its end.
//!
//! Every request holds the lock shared; INIT, DESTROY and a reset hold it exclusively, so that no
//! request leaves an inode, a handle or a lock behind for the next session. It is a "big reader" lock
//! (brlock): each thread has a flag in a cache line of its own, so that requests write to no memory that
//! other threads use.
//!
//! A reader sets its flag, then checks whether the lock is closed; the writer closes it, then polls all
//! flags until none is set. A SeqCst fence between the store and the load on either side makes
//! sure that at least one of the two sees the other.

use crate::sync::{Arc, AtomicBool, Mutex, Ordering, block_in_place, fence, lock, pause};

/// The lock.
#[derive(Debug, Default)]
pub struct SessionLock {
    closed: AtomicBool,
    /// The flags of all slots.
    readers: Mutex<Vec<Arc<Flag>>>,
    /// Held by the writer. Readers that find the lock closed wait for this.
    writer: Mutex<()>,
}

/// Whether a thread holds the lock shared.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Flag(AtomicBool);

/// A thread's registration as a reader.
#[derive(Debug)]
pub struct Slot {
    lock: Arc<SessionLock>,
    flag: Arc<Flag>,
}

/// Holds the lock shared; the drop releases it.
#[derive(Debug)]
#[must_use = "the lock is released when this is dropped"]
pub struct SharedGuard<'a>(&'a Flag);

impl Slot {
    /// Registers the calling thread as a reader.
    pub fn register(session_lock: &Arc<SessionLock>) -> Slot {
        let flag = Arc::<Flag>::default();
        lock(&session_lock.readers).push(Arc::clone(&flag));
        Slot { lock: Arc::clone(session_lock), flag }
    }

    /// Whether it is one of this lock.
    pub fn belongs_to(&self, session_lock: &Arc<SessionLock>) -> bool {
        Arc::ptr_eq(&self.lock, session_lock)
    }

    /// Takes the lock shared; waits while it is held exclusively.
    pub fn lock_shared(&mut self) -> SharedGuard<'_> {
        loop {
            self.flag.0.store(true, Ordering::Relaxed);
            // Pairs with the fence in `exclusive`.
            fence(Ordering::SeqCst);
            // Acquire: sees everything that the last writer did.
            if !self.lock.closed.load(Ordering::Acquire) {
                return SharedGuard(&self.flag);
            }
            self.flag.0.store(false, Ordering::Release);
            block_in_place(|| drop(lock(&self.lock.writer)));
        }
    }
}

impl SharedGuard<'_> {
    /// Leaves the lock held, until [`Slot::release`].
    pub fn keep(self) {
        std::mem::forget(self);
    }
}

impl Slot {
    /// Releases the lock, which was kept. Any thread may do that, as long as one at a time has the slot.
    pub fn release(&mut self) {
        // Release: as the drop of a guard.
        self.flag.0.store(false, Ordering::Release);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.release();
        lock(&self.lock.readers).retain(|flag| !Arc::ptr_eq(flag, &self.flag));
    }
}

impl Drop for SharedGuard<'_> {
    fn drop(&mut self) {
        // Release: the next writer sees everything that the request did.
        self.0.0.store(false, Ordering::Release);
    }
}

impl SessionLock {
    /// Runs `act` with the lock held exclusively. Calls `interrupt` repeatedly until all readers have left:
    /// it has to end requests that may block for long. The caller must not hold the lock.
    pub fn exclusive<R>(&self, interrupt: impl Fn(), act: impl FnOnce() -> R) -> R {
        let _writer = block_in_place(|| lock(&self.writer));
        let _closed = Closed::close(&self.closed);
        // Pairs with the fence in `lock_shared`.
        fence(Ordering::SeqCst);
        // A slot that is added from now on finds the lock closed.
        let readers = lock(&self.readers).clone();
        let is_held = || readers.iter().any(|flag| flag.0.load(Ordering::Acquire));
        if is_held() {
            block_in_place(|| {
                while is_held() {
                    interrupt();
                    pause();
                }
            });
        }
        act()
    }
}

/// Opens the lock again, also after a panic.
struct Closed<'a>(&'a AtomicBool);

impl Closed<'_> {
    fn close(closed: &AtomicBool) -> Closed<'_> {
        closed.store(true, Ordering::Relaxed);
        Closed(closed)
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}
