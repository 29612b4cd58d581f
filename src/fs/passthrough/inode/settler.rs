//! The thread that sets the times of files with mapped writes, and gives back windows that are not used.
//!
//! It starts with the first file that is mapped, rests while none has anything to settle, and ends with the share. A writer that
//! leaves a file unsettled sets `is_awake` and wakes the thread if it was not set. The thread clears it before it looks at the files, so
//! that a writer that comes later wakes it again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use log::debug;

use super::Inode;
use crate::logging::Scope;
use crate::sync::lock;
use crate::sys::clock::monotonic;
use crate::sys::memory::ask_for_a_thread;

/// How long a file stays unsettled, at most.
pub const TICK: Duration = Duration::from_millis(100);
/// How often windows are looked at that nobody writes to.
const IDLE_TICK: Duration = Duration::from_secs(5);

/// What the thread and the files share.
#[derive(Debug, Default)]
pub struct Settler {
    files: Mutex<Files>,
    /// Wakes the thread.
    changed: Condvar,
    is_awake: AtomicBool,
}

#[derive(Debug, Default)]
struct Files {
    inodes: Vec<Weak<Inode>>,
    stops: bool,
}

impl Settler {
    /// A file is unsettled.
    pub fn wake(&self) {
        if !self.is_awake.swap(true, Ordering::SeqCst) {
            let _files = self.lock();
            self.changed.notify_one();
        }
    }

    /// Settles all files.
    pub fn settle_all(&self) {
        for inode in self.inodes() {
            inode.settle();
        }
    }

    /// All of a file system was made durable.
    pub fn synced_all(&self) {
        self.inodes().iter().for_each(|inode| inode.synced());
    }

    fn inodes(&self) -> Vec<Arc<Inode>> {
        let mut files = self.lock();
        files.inodes.retain(|inode| inode.upgrade().is_some_and(|inode| inode.is_mapped()));
        files.inodes.iter().filter_map(Weak::upgrade).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Files> {
        lock(&self.files)
    }

    /// Waits until a file is unsettled, or for `limit`; false if the share ends.
    fn wait(&self, limit: Option<Duration>) -> bool {
        let idle = |files: &mut Files| !files.stops && !self.is_awake.load(Ordering::SeqCst);
        let files = match limit {
            None => self.changed.wait_while(self.lock(), idle).unwrap_or_else(PoisonError::into_inner),
            Some(limit) => {
                self.changed
                    .wait_timeout_while(self.lock(), limit, idle)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0
            }
        };
        !files.stops
    }

    /// Waits for a tick; false if the share ends.
    fn rest(&self) -> bool {
        let waited = self.changed.wait_timeout_while(self.lock(), TICK, |files| !files.stops);
        !waited.unwrap_or_else(PoisonError::into_inner).0.stops
    }

    fn run(&self) {
        let mut limit = None;
        while self.wait(limit) {
            if self.is_awake.load(Ordering::SeqCst) && !self.rest() {
                break;
            }
            // Before the files are looked at.
            self.is_awake.store(false, Ordering::SeqCst);
            let now = monotonic();
            let mut has_windows = false;
            for inode in self.inodes() {
                inode.settle();
                has_windows |= inode.drop_idle_windows(now);
            }
            limit = has_windows.then_some(IDLE_TICK);
        }
    }
}

/// Mapped writes of one share.
#[derive(Debug, Default)]
pub struct MappedFiles {
    settler: Arc<Settler>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl MappedFiles {
    /// What the files share.
    pub fn settler(&self) -> &Arc<Settler> {
        &self.settler
    }

    /// Starts the thread, if it does not run; false if there is none. It has the rights of the calling thread.
    pub fn start(&self) -> bool {
        let mut thread = lock(&self.thread);
        if thread.is_none() && ask_for_a_thread().is_ok() {
            let (settler, scope) = (Arc::clone(&self.settler), Scope::current());
            let run = move || {
                let _scope = scope.enter();
                settler.run();
            };
            match thread::Builder::new().name("settler".into()).spawn(run) {
                Ok(started) => *thread = Some(started),
                Err(error) => debug!("files are not mapped, since there is no thread for it: {error}"),
            }
        }
        thread.is_some()
    }

    /// The thread is to see to this file.
    pub fn add(&self, inode: &Arc<Inode>) {
        let mut files = self.settler.lock();
        // Those that are not mapped any more make room.
        if files.inodes.len() == files.inodes.capacity() {
            files.inodes.retain(|inode| inode.upgrade().is_some_and(|inode| inode.is_mapped()));
        }
        files.inodes.push(Arc::downgrade(inode));
        drop(files);
        // It looks at windows from now on.
        self.settler.wake();
    }
}

impl Drop for MappedFiles {
    fn drop(&mut self) {
        self.settler.lock().stops = true;
        self.settler.changed.notify_all();
        let thread = lock(&self.thread).take();
        if let Some(Err(_)) = thread.map(JoinHandle::join) {
            debug!("the thread that sets the times of files has failed");
        }
        self.settler.settle_all();
    }
}
