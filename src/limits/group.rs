//! The rate limits of a group of shares, in a file that their daemons map: the shares of one VM have one budget.
//!
//! The file outlives the daemons, and the rates in it are in force until a daemon changes them. Debts are times since the
//! boot, so they are forgiven after another one.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FileType, Mode, OFlags, fstat, ftruncate, open};
use rustix::process::geteuid;
use thiserror::Error;

use super::PaceHandle;
use super::pace::Pace;
use crate::sys::mapped::Mapped;
use crate::sys::shared_map::Record;

/// The first bytes of the file: "lanelim" and the number of its form.
const MAGIC: u64 = u64::from_le_bytes(*b"lanelim\x01");

/// What the file holds.
#[derive(Debug)]
#[repr(C)]
struct Contents {
    magic: AtomicU64,
    /// A checksum of the host's boot id.
    boot: AtomicU64,
    pace: Pace,
}

// SAFETY: `repr(C)`, and all fields are atomic.
unsafe impl Record for Contents {}

/// Why a file cannot hold the limits of a group. Each message is one sentence.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum GroupError {
    #[error("the file {} of --limit-group cannot be used", .0.display())]
    System(PathBuf, #[source] io::Error),
    #[error("{} of --limit-group is not a regular file", .0.display())]
    Kind(PathBuf),
    #[error("the file {} of --limit-group has to belong to the daemon's user, with mode 0600", .0.display())]
    Owner(PathBuf),
    #[error("the file {} of --limit-group holds something else: give a new name", .0.display())]
    Contents(PathBuf),
}

/// The limits in this file, which is created if it is missing.
pub fn open_group(path: &Path) -> Result<PaceHandle, GroupError> {
    let system = |errno: rustix::io::Errno| GroupError::System(path.to_owned(), errno.into());
    // A FIFO is not waited for.
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = open(path, flags, Mode::RUSR | Mode::WUSR).map_err(system)?;
    let stat = fstat(&file).map_err(system)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(GroupError::Kind(path.to_owned()));
    }
    if stat.st_uid != geteuid().as_raw() || stat.st_mode & 0o077 != 0 {
        return Err(GroupError::Owner(path.to_owned()));
    }
    let other = || GroupError::Contents(path.to_owned());
    match usize::try_from(stat.st_size) {
        // Another daemon may do the same at this moment, which changes nothing.
        Ok(0) => ftruncate(&file, size_of::<Contents>() as u64).map_err(system)?,
        Ok(size) if size == size_of::<Contents>() => {}
        _ => return Err(other()),
    }
    let contents = Mapped::<Contents>::new(&file).map_err(system)?;
    match contents.magic.compare_exchange(0, MAGIC, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) | Err(MAGIC) => {}
        Err(_) => return Err(other()),
    }
    let boot = boot();
    if contents.boot.swap(boot, Ordering::Relaxed) != boot {
        contents.pace.forgive();
    }
    Ok(PaceHandle::new(Arc::new(contents), |contents| &contents.pace))
}

/// A number for this boot of the host.
fn boot() -> u64 {
    let id = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    crc32fast::hash(&id).into()
}

#[cfg(test)]
mod tests {
    use std::fs::{File, Permissions, write};
    use std::os::unix::fs::{FileExt as _, PermissionsExt as _, symlink};
    use std::time::Duration;

    use super::*;
    use crate::limits::{Class, Limit};

    const NOW: u64 = 1 << 40;

    #[test]
    fn those_who_open_a_file_share_its_limits() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("group");
        let (one, two) = (open_group(&path).unwrap(), open_group(&path).unwrap());
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        one.set_rate(Limit::ReadOps, 1);
        one.set_burst(Duration::ZERO);
        assert_eq!(two.rate(Limit::ReadOps), 1);
        assert_eq!(two.admit(NOW, Class::Read, 0), Ok(()));
        assert!(one.admit(NOW, Class::Read, 0).is_err());
        drop((one, two));
        let later = open_group(&path).unwrap();
        assert!(later.admit(NOW, Class::Read, 0).is_err(), "the debt is in the file");
        // Another boot.
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(&[1; 8], 8).unwrap();
        let later = open_group(&path).unwrap();
        assert_eq!(later.rate(Limit::ReadOps), 1);
        assert_eq!(later.admit(NOW, Class::Read, 0), Ok(()));
    }

    #[test]
    fn files_that_are_no_group_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let fails = |name: &str| open_group(&at(name)).unwrap_err().to_string();
        let private = |name: &str| {
            std::fs::set_permissions(at(name), Permissions::from_mode(0o600)).unwrap();
        };
        write(at("text"), "nothing but a text").unwrap();
        private("text");
        write(at("same-size"), vec![7; size_of::<Contents>()]).unwrap();
        private("same-size");
        for name in ["text", "same-size"] {
            assert!(fails(name).contains("holds something else"));
        }
        write(at("open"), "").unwrap();
        std::fs::set_permissions(at("open"), Permissions::from_mode(0o660)).unwrap();
        assert!(fails("open").contains("mode 0600"));
        symlink(at("text"), at("link")).unwrap();
        for name in ["link", "missing/group", "."] {
            assert!(fails(name).contains("cannot be used"), "{name}");
        }
        rustix::fs::mknodat(rustix::fs::CWD, at("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        assert!(fails("fifo").contains("not a regular file"));
    }
}
