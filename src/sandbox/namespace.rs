//! The namespace sandbox: no mount but the share, no other process, no network.

use std::os::fd::{AsFd as _, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::process::{WaitOptions, waitpid};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use super::config::IdMaps;
use super::process::{Fork, exit, fork, fork_server};
use super::{Role, SandboxError, Sandboxed, Share, detach_proc_self, drop_groups, id_map, mounts, step};

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
    make().map(|made| made.sandboxed)
}

/// New namespaces, and what another process needs to join them.
pub(super) struct Made {
    pub sandboxed: Sandboxed,
    /// The root directory, if there is one.
    pub empty: Option<OwnedFd>,
    /// The mount namespace and the network namespace.
    pub namespaces: [OwnedFd; 2],
}

/// The same as [`enter_namespaces`], for a process that others will follow.
pub(super) fn make() -> Result<Made, SandboxError> {
    drop_groups();
    // The working directory moves along: in the new namespace it is the same directory of the copied
    // mount, wherever its path leads by now.
    unshare(UnshareFlags::NEWNS | UnshareFlags::NEWNET).map_err(step("making namespaces"))?;
    let flags = OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let share = open_tree(CWD, "", flags).map_err(step("opening the share"))?;
    mounts::receive_mounts()?;
    let namespaces = own_namespaces()?;
    let proc_self = detach_proc_self().map_err(step("detaching /proc/self/fd"))?;
    let [proc_self_fd, proc_self_fdinfo] = proc_self;
    let root = mounts::copy_share(share.as_fd())?;
    drop(share);
    let empty = mounts::empty_directory();
    mounts::become_root(root.as_fd())?;
    mounts::change_root(empty.as_ref(), &proc_self_fd)?;
    Ok(Made {
        sandboxed: Sandboxed { root, proc_self_fd, proc_self_fdinfo, forked: true },
        empty,
        namespaces,
    })
}

/// Descriptors of the calling process's mount namespace and network namespace.
fn own_namespaces() -> Result<[OwnedFd; 2], SandboxError> {
    let open = |path| openat(CWD, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let both = open("/proc/self/ns/mnt").and_then(|mounts| Ok([mounts, open("/proc/self/ns/net")?]));
    both.map_err(step("opening the namespaces"))
}

/// Moves the new process into namespaces that an earlier process has made, and returns its `/proc/self/fd` and
/// `/proc/self/fdinfo`.
pub(super) fn join([mounts, network]: &[OwnedFd; 2]) -> Result<[OwnedFd; 2], SandboxError> {
    drop_groups();
    // Out of reach in the namespaces, which hold the share and nothing else.
    let proc_self = match detach_proc_self() {
        // In a user namespace mounts can be copied only from a mount namespace that belongs to it.
        Err(Errno::PERM) => {
            unshare(UnshareFlags::NEWNS).map_err(step("making namespaces"))?;
            detach_proc_self()
        }
        result => result,
    };
    let proc_self = proc_self.map_err(step("detaching /proc/self/fd"))?;
    let join = |fd: &OwnedFd, kind| move_into_link_name_space(fd.as_fd(), Some(kind));
    join(network, LinkNameSpaceType::Network)
        .and_then(|()| join(mounts, LinkNameSpaceType::Mount))
        .map_err(step("setns(2)"))?;
    Ok(proc_self)
}

pub(super) fn unshare(flags: UnshareFlags) -> Result<(), Errno> {
    // SAFETY: the descriptor table stays shared (no CLONE_FILES), which is all that could
    // invalidate what Rust code holds.
    unsafe { rustix::thread::unshare_unsafe(flags) }
}
