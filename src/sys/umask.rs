//! A umask of a thread's own. Linux keeps umask and working directory in one place that threads
//! share until one of them asks for its own (`CLONE_FS` of unshare(2)).
//!
//! A thread that is started by one with a umask of its own begins with that one, and must not take
//! it for the usual. So the usual is the one that the process has: 0, from the start of the file
//! system on.

use std::cell::Cell;

use rustix::fs::Mode;
use rustix::io::Result;
use rustix::process::umask;
use rustix::thread::{UnshareFlags, unshare_unsafe};

thread_local! {
    static HAS_OWN: Cell<bool> = const { Cell::new(false) };
}

/// The calling thread has another umask until this is dropped; 0 afterwards.
#[derive(Debug)]
#[must_use = "the umask is changed back when this is dropped"]
pub struct UmaskGuard(());

/// Sets the umask of the calling thread, and of no other. The first call of a thread gives it a
/// working directory of its own as well, which stays where it is.
pub fn set_thread_umask(mask: Mode) -> Result<UmaskGuard> {
    if !HAS_OWN.get() {
        // SAFETY: what stops being shared is working directory, root directory and umask. No code
        // relies on a later change of these by one thread for another.
        unsafe { unshare_unsafe(UnshareFlags::FS) }?;
        HAS_OWN.set(true);
    }
    umask(mask);
    Ok(UmaskGuard(()))
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
