//! Namespaces: the daemon sees the share as `/`, no other process, and no network.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_bind_recursive, mount_change, unmount};
use rustix::process::{WaitOptions, chdir, pivot_root, waitpid};
use rustix::thread::UnshareFlags;

use super::process::{end_with_parent, exit, fork, fork_server};
use super::{SandboxError, Sandboxed, Side, detach_proc_self_fd, drop_groups, id_map, open_share, step};
use crate::config::IdMaps;

/// Moves into new namespaces. The process forks: the first process of a PID namespace is a child
/// of the one that made it.
pub(super) fn enter(share: &Path, maps: &IdMaps) -> Result<Side, SandboxError> {
    // The child makes the mount namespace: this process has to keep its root, to remove the socket.
    let flags = UnshareFlags::NEWPID;
    let own_users = !rustix::process::geteuid().is_root() || !maps.is_empty();
    match own_users {
        true => id_map::unshare(flags, maps)?,
        false => unshare(flags).map_err(step("making namespaces"))?,
    }
    if let Some(parent) = fork_server()? {
        return Ok(Side::Waiting(parent));
    }
    if own_users {
        id_map::become_root()?;
        // With another id the signal is forgotten.
        end_with_parent()?;
    }
    build_walls(share).map(Side::Serving)
}

/// Whether a user without privileges may make namespaces here. Tried in a child, which leaves this
/// process as it was.
pub(super) fn user_namespaces_work() -> bool {
    match fork() {
        Ok(Some(child)) => {
            let status = waitpid(Some(child), WaitOptions::empty());
            matches!(status, Ok(Some((_, status))) if status.exit_status() == Some(0))
        }
        Ok(None) => {
            let flags =
                UnshareFlags::NEWUSER | UnshareFlags::NEWNS | UnshareFlags::NEWPID | UnshareFlags::NEWNET;
            exit(i32::from(unshare(flags).is_err()))
        }
        Err(_) => false,
    }
}

/// In the new process: a mount namespace that holds the share and nothing else.
fn build_walls(share: &Path) -> Result<Sandboxed, SandboxError> {
    drop_groups();
    unshare(UnshareFlags::NEWNS | UnshareFlags::NEWNET).map_err(step("making namespaces"))?;
    // Nothing that is mounted here shows outside; what is mounted outside still shows here.
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .map_err(step("making mounts private"))?;
    let proc_self_fd = detach_proc_self_fd().map_err(step("detaching /proc/self/fd"))?;
    mount_bind_recursive(share, share).map_err(step("mounting the share"))?;
    let root = open_share(share)?;
    become_root(&root)?;
    Ok(Sandboxed { root, proc_self_fd, forked: true })
}

/// Makes the mount that `root` stands on the root of everything, and lets go of the rest.
fn become_root(root: &OwnedFd) -> Result<(), SandboxError> {
    let old = openat(CWD, "/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let old = old.map_err(step("opening the old root"))?;
    rustix::process::fchdir(root).map_err(step("changing to the share"))?;
    // With the same directory twice the old root ends up on top of the new one (pivot_root(2)).
    pivot_root(".", ".").map_err(step("pivot_root(2)"))?;
    rustix::process::fchdir(&old).map_err(step("going back to the old root"))?;
    mount_change(".", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(step("cutting off the old root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(step("leaving the old root"))?;
    chdir("/").map_err(step("changing to the new root"))
}

pub(super) fn unshare(flags: UnshareFlags) -> Result<(), Errno> {
    // SAFETY: the descriptor table stays shared (no CLONE_FILES), which is all that could
    // invalidate what Rust code holds.
    unsafe { rustix::thread::unshare_unsafe(flags) }
}
