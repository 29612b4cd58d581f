//! The namespace sandbox: no mount but the share, no other process, no network.

use std::os::fd::AsFd as _;

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::process::{WaitOptions, waitpid};
use rustix::thread::UnshareFlags;

use super::config::IdMaps;
use super::process::{Fork, exit, fork, fork_server};
use super::{Role, SandboxError, Sandboxed, Share, detach_proc_self_fd, drop_groups, id_map, mounts, step};

/// Moves into new namespaces. The process forks: the first process of a PID namespace is a child
/// of the one that made it.
pub(super) fn enter(share: &Share<'_>, maps: &IdMaps) -> Result<Role, SandboxError> {
    // The child makes the mount namespace: this process has to keep its root, to remove the socket.
    let flags = UnshareFlags::NEWPID;
    let own = (rustix::process::geteuid(), rustix::process::getegid());
    let own_users = !own.0.is_root() || !maps.is_empty();
    match own_users {
        true => id_map::unshare(flags, maps)?,
        false => unshare(flags).map_err(step("making namespaces"))?,
    }
    let parent = match fork_server()? {
        Fork::Parent(parent) => return Ok(Role::Supervisor(parent)),
        Fork::Server(parent) => parent,
    };
    // With the rights of the user who started the daemon.
    share.enter()?;
    if own_users {
        id_map::become_server(own, maps)?;
        // With another id the signal is forgotten.
        parent.die_with_it()?;
    }
    enter_namespaces().map(Role::Server)
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

/// Moves the new process into a mount namespace that holds the share and nothing else, with an empty root directory.
/// The share is the working directory.
pub(super) fn enter_namespaces() -> Result<Sandboxed, SandboxError> {
    drop_groups();
    // The working directory moves along: in the new namespace it is the same directory of the copied
    // mount, wherever its path leads by now.
    unshare(UnshareFlags::NEWNS | UnshareFlags::NEWNET).map_err(step("making namespaces"))?;
    let flags = OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let share = open_tree(CWD, "", flags).map_err(step("opening the share"))?;
    mounts::receive_mounts()?;
    let proc_self_fd = detach_proc_self_fd().map_err(step("detaching /proc/self/fd"))?;
    let root = mounts::copy_share(share.as_fd())?;
    drop(share);
    let empty = mounts::empty_directory();
    mounts::become_root(root.as_fd())?;
    mounts::change_root(empty.as_ref(), &proc_self_fd)?;
    Ok(Sandboxed { root, proc_self_fd, forked: true })
}

pub(super) fn unshare(flags: UnshareFlags) -> Result<(), Errno> {
    // SAFETY: the descriptor table stays shared (no CLONE_FILES), which is all that could
    // invalidate what Rust code holds.
    unsafe { rustix::thread::unshare_unsafe(flags) }
}
