//! The threads that set the times of files with mapped writes, and give back windows that are not used.
//!
//! Each file system has one, since one that is frozen (fsfreeze(8)) keeps its thread inside the kernel for as long as it likes. A
//! thread starts with the first file of its file system that is mapped, rests while none has anything to settle, and ends with the share.
//! A writer that leaves a file unsettled sets `is_awake` and wakes the thread if it was not set. The thread clears it before it looks at
//! the files, so that a writer that comes later wakes it again.
//!
//! Whoever cannot wait for a frozen file system asks for a *round* and waits for its end up to [`PATIENCE`]. At the end of a session
//! the files that were not settled by then are left to their thread, which sets their times when it can.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use log::{debug, warn};

use super::Inode;
use super::mapped::MappedFile;
use crate::logging::Scope;
use crate::sync::lock;
use crate::sys::clock::monotonic;
use crate::sys::lingering::SETTLER;
use crate::sys::memory::ask_for_a_thread;
use crate::sys::pressure::MemoryPressure;

/// How long a file stays unsettled, at most.
pub const TICK: Duration = Duration::from_millis(100);
/// How long the end of a session and a process that goes on after another one wait for a file system.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often windows are looked at that nobody writes to.
const IDLE_TICK: Duration = Duration::from_secs(5);
/// Nanoseconds between two looks at the memory that the host has, at least.
const LOOK: u64 = 1_000_000_000;
/// The host is short of memory if programs have waited for it for this part of the time.
const SHORTAGE: u64 = 10;
/// Threads of a share. With more file systems, several have one.
const MAX_THREADS: usize = 8;

/// What a thread and the files of its file system share.
#[derive(Debug, Default)]
pub struct Settler {
    files: Mutex<Files>,
    /// Wakes the thread.
    changed: Condvar,
    /// A round has ended.
    ended: Condvar,
    is_awake: AtomicBool,
    memory: Option<Arc<MemoryPressure>>,
}

/// When a thread has last looked at the host's memory, and for how long programs had waited for some by then.
#[derive(Clone, Copy, Debug, Default)]
struct Looked {
    at: u64,
    stalled: u64,
}

impl Looked {
    /// Looks again, if the last time was a while ago; whether memory was short since.
    fn again(&mut self, now: u64, stalled: impl FnOnce() -> Option<u64>) -> bool {
        let passed = now.saturating_sub(self.at);
        if passed < LOOK {
            return false;
        }
        let Some(stalled) = stalled() else { return false };
        let waited = stalled.saturating_sub(self.stalled);
        let is_first = self.at == 0;
        *self = Looked { at: now, stalled };
        !is_first && waited > passed / SHORTAGE
    }
}

#[derive(Debug, Default)]
struct Files {
    inodes: Vec<Weak<Inode>>,
    /// Those that no request asks for any more.
    left: Vec<Left>,
    /// Rounds that were asked for, and the last one of them that has ended.
    asked: u64,
    ended: u64,
    stops: bool,
}

/// A file whose times are to be set, and nothing else.
#[derive(Clone, Debug)]
struct Left {
    inode: Arc<Inode>,
    /// How it was written; `None` if an earlier process has written it.
    file: Option<Arc<MappedFile>>,
}

impl Left {
    /// Sets the times; false if that has to be tried again.
    fn settle(&self) -> bool {
        match &self.file {
            Some(file) => {
                file.settle_and(&*self.inode, || ());
                !file.is_unsettled()
            }
            None => self.inode.settle_after_death(),
        }
    }
}

impl Settler {
    /// A file is unsettled.
    pub fn wake(&self) {
        if !self.is_awake.swap(true, Ordering::SeqCst) {
            let _files = self.lock();
            self.changed.notify_one();
        }
    }

    fn inodes(&self) -> Vec<Arc<Inode>> {
        let mut files = self.lock();
        files.inodes.retain(|inode| inode.upgrade().is_some_and(|inode| inode.is_mapped()));
        files.inodes.iter().filter_map(Weak::upgrade).collect()
    }

    fn has_unsettled(&self) -> bool {
        self.has_unsettled_file() || !self.lock().left.is_empty()
    }

    /// The same without those that were left.
    fn has_unsettled_file(&self) -> bool {
        self.inodes().iter().any(|inode| inode.is_unsettled())
    }

    fn lock(&self) -> MutexGuard<'_, Files> {
        lock(&self.files)
    }

    /// Waits until a file is unsettled, or for `limit`; false if the share ends.
    fn wait(&self, limit: Option<Duration>) -> bool {
        let idle = |files: &mut Files| {
            !files.stops && files.asked == files.ended && !self.is_awake.load(Ordering::SeqCst)
        };
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

    /// Waits for a tick, or until somebody waits.
    fn rest(&self) {
        let idle = |files: &mut Files| !files.stops && files.asked == files.ended;
        drop(self.changed.wait_timeout_while(self.lock(), TICK, idle));
    }

    fn run(&self) {
        let (mut limit, mut goes_on, mut looked) = (None, true, Looked::default());
        // The last round is for what was left.
        while goes_on {
            goes_on = self.wait(limit);
            if self.is_awake.load(Ordering::SeqCst) {
                self.rest();
            }
            // Before the files are looked at.
            self.is_awake.store(false, Ordering::SeqCst);
            let asked = self.lock().asked;
            let stalled = || self.memory.as_ref()?.stalled();
            let is_short = looked.again(monotonic(), stalled);
            limit = self.round(is_short).then_some(IDLE_TICK);
            self.lock().ended = asked;
            self.ended.notify_all();
        }
    }

    /// Settles all files; whether any has windows. If memory is short, none has.
    fn round(&self, memory_is_short: bool) -> bool {
        let now = monotonic();
        let mut has_windows = false;
        for inode in self.inodes() {
            inode.settle();
            has_windows |= inode.drop_windows(now, memory_is_short);
        }
        self.settle_left();
        has_windows
    }

    /// Settles those that were left. They stay in the list meanwhile, and others come behind them.
    fn settle_left(&self) {
        let left = self.lock().left.clone();
        let mut is_settled = left.iter().map(Left::settle).collect::<Vec<_>>().into_iter();
        let mut files = self.lock();
        files.left.retain(|_| !is_settled.next().unwrap_or(false));
        if !files.left.is_empty() {
            self.is_awake.store(true, Ordering::SeqCst);
        }
    }

    /// Asks the thread to settle all files now; the number of that round.
    fn ask(&self) -> u64 {
        let mut files = self.lock();
        files.asked += 1;
        self.changed.notify_one();
        files.asked
    }

    /// Waits for the end of a round; false if that has not come by then.
    fn has_ended_by(&self, round: u64, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let waited = self.ended.wait_timeout_while(self.lock(), left, |files| files.ended < round);
        waited.unwrap_or_else(PoisonError::into_inner).0.ended >= round
    }

    /// Leaves what is not settled to the thread: nothing else of the files is used any more. Returns how many there are.
    fn leave(&self) -> usize {
        let inodes = self.inodes();
        let left: Vec<_> = inodes
            .into_iter()
            .filter_map(|inode| Some(Left { file: Some(inode.leave_unsettled()?), inode }))
            .collect();
        let mut files = self.lock();
        files.left.extend(left);
        self.is_awake.store(true, Ordering::SeqCst);
        self.changed.notify_one();
        files.left.len()
    }
}

/// The file system of an inode, as its [`InodeKey`](super::InodeKey) has it.
type Device = (u32, u32);

/// The thread of one file system.
#[derive(Debug)]
struct Running {
    device: Device,
    settler: Arc<Settler>,
    thread: JoinHandle<()>,
}

/// Mapped writes of one share.
#[derive(Debug, Default)]
pub struct MappedFiles {
    threads: Mutex<Vec<Running>>,
    memory: OnceLock<Arc<MemoryPressure>>,
    /// Files that an earlier process has not settled.
    after_death: Mutex<Vec<Arc<Inode>>>,
}

impl MappedFiles {
    /// Where to see whether the host is short of memory.
    pub fn watch(&self, memory: &Arc<MemoryPressure>) {
        let _ = self.memory.set(Arc::clone(memory));
    }

    /// What files on the file system of `inode` share. It starts the thread, if that does not run; `None` if there is none. It has the
    /// rights of the calling thread.
    pub fn settler(&self, inode: &Inode) -> Option<Arc<Settler>> {
        let device = inode.key().device;
        let mut threads = lock(&self.threads);
        if let Some(running) = threads.iter().find(|running| running.device == device) {
            return Some(Arc::clone(&running.settler));
        }
        if threads.len() >= MAX_THREADS {
            return shared(&mut threads, device);
        }
        let running = start(device, self.memory.get())?;
        let settler = Arc::clone(&running.settler);
        threads.push(running);
        Some(settler)
    }

    /// The thread is to see to this file.
    pub fn add(settler: &Settler, inode: &Arc<Inode>) {
        let mut files = settler.lock();
        // Those that are not mapped any more make room.
        if files.inodes.len() == files.inodes.capacity() {
            files.inodes.retain(|inode| inode.upgrade().is_some_and(|inode| inode.is_mapped()));
        }
        files.inodes.push(Arc::downgrade(inode));
        drop(files);
        // It looks at windows from now on.
        settler.wake();
    }

    /// Settles all files, or those on the file system of this device.
    pub fn settle_all(&self, only: Option<Device>) {
        self.inodes(only).for_each(|inode| inode.settle());
    }

    /// Settles all files whose file systems answer soon.
    pub fn settle_soon(&self) {
        let late = self.late();
        if !late.is_empty() {
            debug!("{} file systems do not set the times of files that were written", late.len());
        }
    }

    /// The same files were made durable.
    pub fn synced_all(&self, only: Option<Device>) {
        self.inodes(only).for_each(|inode| inode.synced());
    }

    fn inodes(&self, only: Option<Device>) -> impl Iterator<Item = Arc<Inode>> {
        let all = self.all().into_iter().flat_map(|settler| settler.inodes());
        all.filter(move |inode| only.is_none_or(|device| inode.key().device == device))
    }

    /// The session ends: settles all files, or leaves them to the threads whose file systems do not answer soon.
    pub fn end_session(&self) {
        let left: usize = self.late().iter().map(|settler| settler.leave()).sum();
        warn_of(left);
    }

    /// An earlier process may have left this file unsettled: see [`MappedFiles::settle_after_death`].
    pub fn restore(&self, inode: &Arc<Inode>) {
        if inode.is_unsettled_after_death() {
            lock(&self.after_death).push(Arc::clone(inode));
        }
    }

    /// Settles what an earlier process has not, or leaves it to the threads.
    pub fn settle_after_death(&self) {
        for inode in std::mem::take(&mut *lock(&self.after_death)) {
            match self.settler(&inode) {
                Some(settler) => settler.lock().left.push(Left { inode, file: None }),
                None => drop(inode.settle_after_death()),
            }
        }
        warn_of(self.late().iter().map(|settler| settler.lock().left.len()).sum());
    }

    fn all(&self) -> Vec<Arc<Settler>> {
        lock(&self.threads).iter().map(|running| Arc::clone(&running.settler)).collect()
    }

    /// Asks all threads that have something to settle for a round; those that have not ended it soon.
    fn late(&self) -> Vec<Arc<Settler>> {
        let deadline = Instant::now() + PATIENCE;
        let asked = self.all().into_iter().filter(|settler| settler.has_unsettled());
        let asked: Vec<_> = asked.map(|settler| (settler.ask(), settler)).collect();
        let late = asked.into_iter().filter(|(round, settler)| !settler.has_ended_by(*round, deadline));
        late.map(|(_, settler)| settler).collect()
    }
}

/// One of those that there are.
fn shared(threads: &mut [Running], device: Device) -> Option<Arc<Settler>> {
    let is_free = |running: &Running| !running.settler.has_unsettled() && running.settler.inodes().is_empty();
    if let Some(running) = threads.iter_mut().find(|running| is_free(running)) {
        running.device = device;
        return Some(Arc::clone(&running.settler));
    }
    let index = usize::try_from(device.0 ^ device.1).unwrap_or(0) % MAX_THREADS;
    threads.get(index).map(|running| Arc::clone(&running.settler))
}

fn start(device: Device, memory: Option<&Arc<MemoryPressure>>) -> Option<Running> {
    ask_for_a_thread().ok()?;
    let settler = Arc::new(Settler { memory: memory.cloned(), ..Settler::default() });
    let (of_thread, scope) = (Arc::clone(&settler), Scope::current());
    let run = move || {
        let _scope = scope.enter();
        of_thread.run();
    };
    match thread::Builder::new().name(SETTLER.into()).spawn(run) {
        Ok(thread) => Some(Running { device, settler, thread }),
        Err(error) => {
            debug!("files are not mapped, since there is no thread for it: {error}");
            None
        }
    }
}

fn warn_of(left: usize) {
    if left > 0 {
        warn!(
            "the times of {left} files that the guest has written are not set yet, since their file systems do not answer (frozen?); that follows when they do, unless this process is gone by then"
        );
    }
}

impl Drop for MappedFiles {
    fn drop(&mut self) {
        // What the end of the session has left was waited for.
        if self.all().iter().any(|settler| settler.has_unsettled_file()) {
            self.end_session();
        }
        for Running { settler, thread, .. } in lock(&self.threads).drain(..) {
            let is_late = settler.has_unsettled();
            settler.lock().stops = true;
            settler.changed.notify_all();
            // One that waits in the kernel ends when it is let go.
            if !is_late && thread.join().is_err() {
                debug!("a thread that sets the times of files has failed");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_short_if_programs_wait_for_it() {
        let (mut looked, second) = (Looked::default(), 1_000_000_000);
        assert!(!looked.again(50 * second, || Some(40 * second)), "nobody knows when that was");
        assert!(!looked.again(50 * second + 1, || unreachable!("it is too early")));
        assert!(!looked.again(55 * second, || Some(40 * second + second / 2)));
        assert!(looked.again(60 * second, || Some(41 * second + 1)));
        assert!(!looked.again(61 * second, || None), "the file is gone");
        assert!(!looked.again(62 * second, || Some(0)), "it began anew");
        assert!(looked.again(63 * second, || Some(second)));
    }
}
