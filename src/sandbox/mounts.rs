//! The mounts of the daemon's mount namespace: the share at its root, and nothing else.
//!
//! The process's root directory is another one: empty, read-only, and mounted nowhere. So an absolute
//! path leads nowhere, whoever opens it: our code, the standard library or the C library. The share
//! is held by a descriptor. It must also be mounted in the namespace, since later mounts of the host below it
//! propagate only there (mount_namespaces(7)).

use std::ffi::c_int;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::SystemTime;

use log::debug;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, mkdirat, openat, unlinkat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount_change,
    move_mount, open_tree, unmount,
};
use rustix::process::{chroot, fchdir, pivot_root};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::{SandboxError, step};

const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// Makes all mounts slaves: mounts of the host propagate here, and none of ours to the host.
///
/// `/` may be no mount, but a directory that a chroot(2) has made the root. Then the process moves to
/// the root of its mount namespace, which is a mount.
pub(super) fn receive_mounts() -> Result<(), SandboxError> {
    let change = || mount_change("/", MountPropagationFlags::DOWNSTREAM.union(MountPropagationFlags::REC));
    let changed = match change() {
        Err(Errno::INVAL) => leave_chroot().and_then(|()| change()),
        result => result,
    };
    changed.map_err(step("making mounts private"))
}

fn leave_chroot() -> Result<(), Errno> {
    let own = openat(CWD, "/proc/self/ns/mnt", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::Mount))
}

/// A copy of the mounts at and below the directory `share`, mounted nowhere yet, on which no device can
/// be opened and no program started.
///
/// Set-id bits and device nodes are stored as ever. Mounts that arrive later have the flags that the
/// host has given them.
pub(super) fn copy_share(share: BorrowedFd<'_>) -> Result<OwnedFd, SandboxError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_EMPTY_PATH;
    let copy = open_tree(share, "", flags).map_err(step("mounting the share"))?;
    match forbid_devices_and_programs(copy.as_fd()) {
        // The call is there from Linux 5.12 on, and not in every container.
        Err(errno @ (Errno::NOSYS | Errno::PERM)) => {
            debug!("the share is not mounted nodev, nosuid and noexec: mount_setattr(2) fails: {errno}");
        }
        result => result.map_err(step("mounting the share without devices and programs"))?,
    }
    Ok(copy)
}

fn forbid_devices_and_programs(mounts: BorrowedFd<'_>) -> Result<(), Errno> {
    /// `struct mount_attr` of linux/mount.h.
    #[repr(C)]
    struct MountAttr {
        attr_set: u64,
        attr_clr: u64,
        propagation: u64,
        userns_fd: u64,
    }
    let set = MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let attributes = MountAttr { attr_set: set.bits().into(), attr_clr: 0, propagation: 0, userns_fd: 0 };
    let flags: c_int = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    // SAFETY: path and struct live until the call returns, and the size is that of the struct.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mounts.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<MountAttr>(),
        )
    };
    if result < 0 { Err(crate::sys::last_errno()) } else { Ok(()) }
}

/// Makes `share` (see [`copy_share`]) the root of the namespace, and unmounts everything else.
pub(super) fn become_root(share: BorrowedFd<'_>) -> Result<(), SandboxError> {
    let old = openat(CWD, "/", DIRECTORY, Mode::empty()).map_err(step("opening the old root"))?;
    // On top of the old root, so that it does not matter where the share is, or that it is `/` itself.
    move_mount(share, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(step("mounting the share"))?;
    fchdir(share).map_err(step("changing to the share"))?;
    // With the same directory twice the old root ends up on top of the new one (pivot_root(2)).
    match pivot_root(".", ".") {
        Ok(()) => {}
        Err(Errno::INVAL) => return cover_root(),
        Err(errno) => return Err(step("pivot_root(2)")(errno)),
    }
    fchdir(&old).map_err(step("going back to the old root"))?;
    mount_change(".", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(step("cutting off the old root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(step("leaving the old root"))
}

/// The old root is that of an initramfs, which nothing can take the place of. The share lies on top of
/// it already; what else is mounted on it goes.
fn cover_root() -> Result<(), SandboxError> {
    let mut table = String::new();
    File::open("/proc/self/mountinfo").and_then(|mut file| file.read_to_string(&mut table)).map_err(
        |error| step("reading the list of mounts")(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
    )?;
    for place in mounted_on_root(&table).into_iter().rev() {
        // In a user namespace they are locked. They are out of reach below the share in any case.
        if let Err(errno) = unmount(place, UnmountFlags::DETACH) {
            debug!("{place} stays mounted below the share: {errno}");
        }
    }
    Ok(())
}

/// The places, in `/proc/PID/mountinfo`, of mounts that lie directly on the bottommost one, but not on
/// its root directory.
fn mounted_on_root(table: &str) -> Vec<&str> {
    let lines = || {
        table.lines().filter_map(|line| {
            let mut fields = line.split(' ');
            let (id, parent) = (fields.next()?, fields.next()?);
            Some((id, parent, fields.nth(2)?))
        })
    };
    let Some((root, ..)) = lines().find(|(id, parent, place)| id == parent && *place == "/") else {
        return Vec::new();
    };
    lines().filter(|(_, parent, place)| *parent == root && *place != "/").map(|(.., place)| place).collect()
}

/// An empty directory in which nothing can be created; `None` where nothing can be mounted or written.
///
/// Made before the root changes, as it may need a path.
pub(super) fn empty_directory() -> Option<OwnedFd> {
    let directory = empty_mount().or_else(|errno| {
        debug!("no tmpfs for the daemon's root: {errno}");
        removed_directory()
    });
    directory.inspect_err(|errno| debug!("no removed directory for the daemon's root: {errno}")).ok()
}

/// Makes `empty` the process's root and working directory. Where there is none, `proc_self_fd` takes
/// its place: no name in it but numbers, which no library opens.
pub(super) fn change_root(empty: Option<&OwnedFd>, proc_self_fd: &OwnedFd) -> Result<(), SandboxError> {
    fchdir(empty.unwrap_or(proc_self_fd)).map_err(step("changing to an empty directory"))?;
    chroot(".").map_err(step("chroot(2)"))
}

/// An empty tmpfs that is mounted nowhere. This takes CAP_SYS_ADMIN over the mount namespace.
fn empty_mount() -> Result<OwnedFd, Errno> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "mode", "0555")?;
    fsconfig_set_flag(&context, "ro")?;
    fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// A directory that is removed already: nothing can be made in it any more.
fn removed_directory() -> Result<OwnedFd, Errno> {
    let places = [std::env::temp_dir(), PathBuf::from("/dev/shm"), PathBuf::from("/run")];
    let mut result = Err(Errno::NOENT);
    for place in places {
        result = openat(CWD, place, DIRECTORY, Mode::empty()).and_then(|place| make_and_remove(&place));
        if result.is_ok() {
            break;
        }
    }
    result
}

fn make_and_remove(place: &OwnedFd) -> Result<OwnedFd, Errno> {
    // In a PID namespace the process's id is the same for every daemon.
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos();
    let name = format!(".lanefsd-root-{}-{now}", std::process::id());
    mkdirat(place, &name, Mode::RUSR | Mode::XUSR)?;
    let directory = openat(place, &name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty());
    unlinkat(place, &name, AtFlags::REMOVEDIR)?;
    let directory = directory?;
    // Somebody else may have put another directory under the name; nothing can be made in a removed one.
    match mkdirat(&directory, "test", Mode::empty()) {
        Err(Errno::NOENT) => Ok(directory),
        Err(errno) => Err(errno),
        Ok(()) => unlinkat(&directory, "test", AtFlags::REMOVEDIR).and(Err(Errno::AGAIN)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn a_removed_directory_stays_empty() {
        let directory = removed_directory().unwrap();
        let path = format!("/proc/self/fd/{}", directory.as_raw_fd());
        assert_eq!(std::fs::metadata(&path).unwrap().nlink(), 0);
        assert_eq!(mkdirat(&directory, "new", Mode::RWXU), Err(Errno::NOENT));
        assert_eq!(openat(&directory, "proc", DIRECTORY, Mode::empty()).unwrap_err(), Errno::NOENT);
    }

    #[test]
    fn mounts_on_an_initramfs_are_found() {
        let table = "1 1 0:2 / / rw - rootfs rootfs rw\n\
                     20 1 0:18 / /proc rw - proc proc rw\n\
                     21 1 0:19 / /sys rw,nosuid shared:3 - sysfs sysfs rw\n\
                     22 21 0:20 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n\
                     30 1 8:1 /share / rw - ext4 /dev/sda1 rw\n\
                     31 30 8:2 / /below rw - ext4 /dev/sda2 rw\n";
        assert_eq!(mounted_on_root(table), ["/proc", "/sys"]);
        assert_eq!(mounted_on_root("30 29 8:1 / / rw - ext4 /dev/sda1 rw\n"), [""; 0]);
    }
}
