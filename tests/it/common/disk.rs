//! File systems of a test's own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{UnmountFlags, unmount};

use super::{disk_directory, own_mounts, run};

/// A file system on a loop device, or in memory. It lies in a mount namespace of the test's thread and of the processes that this
/// thread starts: whatever becomes of the test, the mount ends with them, and the device with the mount.
pub struct Disk {
    pub path: PathBuf,
    image: PathBuf,
    directory: tempfile::TempDir,
}

impl Disk {
    /// An ext4 of so many MiB, with these further options for mkfs.ext4.
    pub fn ext4(mebibytes: u64, mkfs: &[&str]) -> Disk {
        Disk::empty().with_ext4(mebibytes, mkfs)
    }

    /// The same with its image on another file system.
    pub fn ext4_on(store: &Disk, mebibytes: u64, mkfs: &[&str]) -> Disk {
        Disk::on(store).with_ext4(mebibytes, mkfs)
    }

    fn with_ext4(self, mebibytes: u64, mkfs: &[&str]) -> Disk {
        self.make_image(mebibytes);
        run(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).args(mkfs).arg(self.image()));
        self.mount();
        fs::remove_dir(self.path.join("lost+found")).unwrap();
        self
    }

    /// An XFS of the least size that there is.
    pub fn xfs() -> Disk {
        Disk::empty().with_xfs()
    }

    /// The same with its image on another file system.
    pub fn xfs_on(store: &Disk) -> Disk {
        Disk::on(store).with_xfs()
    }

    fn with_xfs(self) -> Disk {
        self.make_image(320);
        run(Command::new("mkfs.xfs").arg("-q").arg(self.image()));
        self.mount();
        self
    }

    /// A tmpfs of so many MiB.
    pub fn tmpfs(mebibytes: u64) -> Disk {
        let disk = Disk::empty();
        let size = format!("size={mebibytes}m");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&disk.path));
        disk
    }

    fn empty() -> Disk {
        own_mounts();
        let directory = disk_directory();
        let path = directory.path().join("mount");
        fs::create_dir(&path).unwrap();
        Disk { path, image: directory.path().join("image"), directory }
    }

    fn on(store: &Disk) -> Disk {
        let mut disk = Disk::empty();
        disk.image = store.path.join("image");
        disk
    }

    fn make_image(&self, mebibytes: u64) {
        fs::File::create(&self.image).unwrap().set_len(mebibytes << 20).unwrap();
    }

    fn mount(&self) {
        run(Command::new("mount").args(["-o", "loop"]).arg(self.image()).arg(&self.path));
    }

    /// The file that the loop device is on.
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// A directory beside it.
    pub fn beside(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // It fails if the test has unmounted it already.
        let _ = unmount(&self.path, UnmountFlags::DETACH);
    }
}
