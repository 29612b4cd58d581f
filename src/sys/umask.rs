//! The umask: none for the process, and for a thread that asks for it one of its own. Linux keeps
//! umask and working directory in one place that threads share until one of them asks for a copy
//! (`CLONE_FS` of unshare(2)).

use std::cell::Cell;

use rustix::fs::Mode;
use rustix::io::Result;
use rustix::process::umask;
use rustix::thread::{UnshareFlags, unshare_unsafe};

thread_local! {
    static HAS_OWN: Cell<bool> = const { Cell::new(false) };
}

/// The calling thread has a umask until this is dropped.
#[derive(Debug)]
#[must_use = "the umask goes when this is dropped"]
pub struct UmaskGuard(());

/// Leaves the process without a umask: modes are what system calls are given.
pub fn clear_umask() {
    umask(Mode::empty());
}

/// Sets the umask of the calling thread, and of no other. The first call of a thread gives it a
/// working directory of its own as well, which stays where it is.
///
/// What it was before is not asked: a thread shares the place of the one that started it, where a
/// umask may be set at the moment at which the copy is made.
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
        clear_umask();
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
        clear_umask();
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
        assert_eq!(mode_of_new("after"), 0o666);
    }

    #[test]
    fn a_thread_does_not_inherit_what_is_set_for_a_moment() {
        let threads = std::thread::scope(|scope| {
            let outer = scope.spawn(|| {
                let _guard = set_thread_umask(Mode::from_raw_mode(0o070)).unwrap();
                // It shares the place of this thread, umask included, until it asks for its own.
                let inner = std::thread::spawn(|| {
                    drop(set_thread_umask(Mode::from_raw_mode(0o007)).unwrap());
                    umask(Mode::empty())
                });
                (inner.join().unwrap(), umask(Mode::empty()))
            });
            outer.join().unwrap()
        });
        assert_eq!(threads, (Mode::empty(), Mode::from_raw_mode(0o070)));
    }
}
