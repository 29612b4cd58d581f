//! A umask of a thread's own. Linux keeps umask and working directory in one place that threads
//! share until one of them asks for its own (`CLONE_FS` of unshare(2)).
//!
//! A thread that is started by one with a umask of its own begins with that one, and must not take
//! it for the usual. So the usual is the one that the process has: 0, from the start of the file
//! system on.
//!
//! The filters of some containers forbid unshare(2). Then the process's umask changes, and threads take
//! turns: who creates something with a umask holds a lock. With 0 for all others, no thread may create
//! anything without asking here, once guests leave umasks to the daemon.

use std::cell::Cell;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use log::warn;
use rustix::fs::Mode;
use rustix::io::{Errno, Result};
use rustix::process::umask;
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Whose umask a thread changes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Umask {
    NotKnown,
    Own,
    /// That of the process, which takes [`SHARED`].
    Shared,
}

thread_local! {
    static UMASK: Cell<Umask> = const { Cell::new(Umask::NotKnown) };
}

/// Held by the thread that has changed the umask of the process.
static SHARED: Mutex<()> = Mutex::new(());

/// The calling thread has another umask until this is dropped; 0 afterwards.
#[derive(Debug)]
#[must_use = "the umask is changed back when this is dropped"]
pub struct UmaskGuard {
    /// Let go of after the umask is changed back.
    _turn: Option<MutexGuard<'static, ()>>,
}

/// Sets the umask of the calling thread, and of no other. The first call of a thread gives it a
/// working directory of its own as well, which stays where it is.
pub fn set_thread_umask(mask: Mode) -> Result<UmaskGuard> {
    if UMASK.get() == Umask::NotKnown {
        UMASK.set(umask_of_thread()?);
    }
    let turn = || SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    let guard = UmaskGuard { _turn: (UMASK.get() == Umask::Shared).then(turn) };
    umask(mask);
    Ok(guard)
}

fn umask_of_thread() -> Result<Umask> {
    // SAFETY: what stops being shared is working directory, root directory and umask. No code
    // relies on a later change of these by one thread for another.
    match unsafe { unshare_unsafe(UnshareFlags::FS) } {
        Ok(()) => Ok(Umask::Own),
        // Memory may be there the next time.
        Err(Errno::NOMEM) => Err(Errno::NOMEM),
        Err(errno) => {
            static TOLD: Once = Once::new();
            TOLD.call_once(|| {
                warn!(
                    "unshare(2) is forbidden here ({errno}), so with --posix-acl files are created one at a \
                     time; allow it in the container's filter of system calls"
                );
            });
            Ok(Umask::Shared)
        }
    }
}

impl Drop for UmaskGuard {
    fn drop(&mut self) {
        umask(Mode::empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

    #[test]
    fn threads_do_not_share_it() {
        let directory = tempfile::tempdir().unwrap();
        let mode_of_new = |name: &str| {
            let mut options = std::fs::OpenOptions::new();
            let file = options.write(true).create_new(true).mode(0o666).open(directory.path().join(name));
            file.unwrap().metadata().unwrap().mode() & 0o777
        };
        umask(Mode::empty());
        std::thread::scope(|scope| {
            for i in 0..4u32 {
                let mode_of_new = &mode_of_new;
                scope.spawn(move || {
                    for round in 0..200 {
                        let guard = set_thread_umask(Mode::from_raw_mode(0o100 << i | 0o066)).unwrap();
                        assert_eq!(mode_of_new(&format!("{i}-{round}")), 0o666 & !(0o100 << i | 0o066));
                        drop(guard);
                        assert_eq!(mode_of_new(&format!("{i}-{round}-after")), 0o666);
                    }
                });
            }
        });
        // One that is started meanwhile keeps nothing of it.
        let guard = set_thread_umask(Mode::from_raw_mode(0o077)).unwrap();
        let mode_of_new = &mode_of_new;
        std::thread::scope(|scope| {
            scope.spawn(move || {
                drop(set_thread_umask(Mode::from_raw_mode(0o011)).unwrap());
                assert_eq!(mode_of_new("child"), 0o666);
            });
        });
        assert_eq!(mode_of_new("guarded"), 0o600);
        drop(guard);
        assert_eq!(mode_of_new("after"), 0o666);
    }
}
