//! The sandbox: namespaces and an empty root directory ([`enter`]), then fewer capabilities
//! ([`give_up_capabilities`]), then a seccomp filter ([`install_seccomp`]). A supervisor stays outside and is confined by
//! itself ([`confine_supervisor`]).
//!
//! Guarantees of the file system do not depend on it: with [`Sandbox::None`] it reaches nothing outside the share
//! either. The sandbox limits the damage of a bug in it.

mod capabilities;
pub mod config;
mod id_map;
mod monitor;
mod mounts;
mod namespace;
mod optional_calls;
mod process;
mod seccomp;
mod share;
mod supervisor;
mod workers;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use log::warn;
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::thread::{CapabilitySet, UnshareFlags, capabilities};
use thiserror::Error;

pub use self::capabilities::{
    CapabilityError, RequiredCaps, clear_ambient as clear_ambient_capabilities,
    give_up as give_up_capabilities, make_ambient as make_capabilities_ambient, without_capabilities,
};
use self::config::{IdMaps, Sandbox};
pub use self::monitor::confine as confine_monitor;
use self::process::Fork;
pub use self::process::{
    KILLED_BY_SECCOMP, Parent, Worker, WorkerEnd, Zombie, exit, exit_before_workers, run_in_child,
    workers_linger,
};
pub use self::seccomp::{
    SeccompError, Uses, install as install_seccomp, install_on_thread as install_seccomp_on_thread,
};
pub use self::supervisor::{ConfineError, confine as confine_supervisor};
pub use self::workers::{Entered, Prepared, Workers};

/// Why the sandbox cannot be set up.
#[derive(Debug, Error)]
pub enum SandboxError {
    /// The share is missing, no directory, or may not be looked at.
    #[error("cannot open the shared directory {path}; {advice}", path = path.display(), advice = share::advice(path, *source))]
    Share {
        /// The directory.
        path: PathBuf,
        /// What the system call said.
        source: Errno,
    },
    /// chroot(2) takes a privilege.
    #[error("--sandbox=chroot needs root; start the daemon as root, or with --sandbox=none")]
    ChrootNeedsRoot,
    /// The ids cannot be mapped into the user namespace.
    #[error("cannot map the ids of --uid-map and --gid-map: {0}")]
    Ids(String),
    /// The supervisor has died meanwhile.
    #[error("the parent process has died")]
    ParentDied,
    /// A step failed.
    #[error("cannot set up the sandbox: {step} failed; try --sandbox=chroot or --sandbox=none")]
    Step {
        /// What was tried.
        step: &'static str,
        /// What the system call said.
        source: Errno,
    },
}

/// What the daemon holds inside the sandbox.
#[derive(Debug)]
pub struct Sandboxed {
    /// The share: an O_PATH descriptor of its directory.
    pub root: OwnedFd,
    /// The directory `/proc/self/fd` of the serving process.
    pub proc_self_fd: OwnedFd,
    /// The directory `/proc/self/fdinfo`, the same.
    pub proc_self_fdinfo: OwnedFd,
    /// Whether a supervisor waits for this process and removes the socket.
    pub forked: bool,
}

/// What the calling process is after the fork, if there was one.
#[derive(Debug)]
pub enum Role {
    /// The process that serves requests.
    Server(Sandboxed),
    /// The process that was started: it waits for the server and exits with its status.
    Supervisor(Parent),
}

/// Enters the sandbox `wanted` with `share` in it, or the strongest one that is available.
///
/// Must be called while the process has one thread, since it may fork.
pub fn enter(wanted: Option<Sandbox>, share: &Path, ids: &IdMaps) -> Result<Role, SandboxError> {
    let share = Share { path: share, directory: open_share(share)? };
    let is_root = rustix::process::geteuid().is_root();
    match wanted.unwrap_or_else(|| strongest(is_root, ids)) {
        Sandbox::None => unsandboxed(share.directory),
        Sandbox::Chroot if !is_root => Err(SandboxError::ChrootNeedsRoot),
        Sandbox::Chroot => chroot(share.directory),
        Sandbox::Namespace => namespace::enter(&share, ids),
    }
}

/// Moves the calling thread alone into the namespace sandbox, without a process of its own and so without a
/// PID namespace: for tests and fuzzing, whose other threads stay outside.
pub fn enter_with_thread(share: &Path) -> Result<Sandboxed, SandboxError> {
    // The working directory changes first, and is to be the thread's own by then.
    namespace::unshare(UnshareFlags::FS).map_err(step("unshare(2)"))?;
    Share { path: share, directory: open_share(share)? }.enter()?;
    namespace::enter_namespaces()
}

/// The shared directory, before the sandbox.
struct Share<'a> {
    path: &'a Path,
    directory: OwnedFd,
}

impl Share<'_> {
    /// Makes it the working directory.
    fn enter(&self) -> Result<(), SandboxError> {
        let failed = |source| SandboxError::Share { path: self.path.to_owned(), source };
        rustix::process::fchdir(&self.directory).map_err(failed)
    }
}

/// The strongest sandbox that is available here.
fn strongest(is_root: bool, ids: &IdMaps) -> Sandbox {
    let may = |capability| capabilities(None).is_ok_and(|sets| sets.effective.contains(capability));
    match is_root {
        // There is no other way to have these ids.
        _ if !ids.is_empty() => Sandbox::Namespace,
        true if may(CapabilitySet::SYS_ADMIN) => Sandbox::Namespace,
        true if may(CapabilitySet::SYS_CHROOT) => {
            warn!(
                "namespaces need CAP_SYS_ADMIN: falling back to chroot(2); --sandbox=chroot silences this warning"
            );
            Sandbox::Chroot
        }
        false if namespace::user_namespaces_work() => Sandbox::Namespace,
        _ => {
            warn!(
                "user namespaces are not available: running without a sandbox; start the daemon as root to have one, or silence this warning with --sandbox=none"
            );
            Sandbox::None
        }
    }
}

/// An O_PATH descriptor of the share.
fn open_share(share: &Path) -> Result<OwnedFd, SandboxError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(CWD, share, flags, Mode::empty())
        .map_err(|source| SandboxError::Share { path: share.to_owned(), source })
}

fn unsandboxed(root: OwnedFd) -> Result<Role, SandboxError> {
    drop_groups();
    let [proc_self_fd, proc_self_fdinfo] = open_proc_self()?;
    Ok(Role::Server(Sandboxed { root, proc_self_fd, proc_self_fdinfo, forked: false }))
}

/// An empty directory becomes the root: no absolute path leads into the share, which guests fill, or to the
/// host. It forks as well: only a process outside can remove the socket at the end.
fn chroot(root: OwnedFd) -> Result<Role, SandboxError> {
    if let Fork::Parent(parent) = process::fork_server()? {
        return Ok(Role::Supervisor(parent));
    }
    let (sandboxed, _) = enter_chroot(root, mounts::empty_directory())?;
    Ok(Role::Server(sandboxed))
}

/// Changes the root to the directory `empty`, which is also returned.
fn enter_chroot(root: OwnedFd, empty: Option<OwnedFd>) -> Result<(Sandboxed, Option<OwnedFd>), SandboxError> {
    drop_groups();
    let [proc_self_fd, proc_self_fdinfo] = match detach_proc_self() {
        // Root of a container may lack the privilege, and old kernels the call.
        Err(Errno::PERM | Errno::NOSYS | Errno::INVAL) => open_proc_self()?,
        result => result.map_err(step("detaching /proc/self/fd"))?,
    };
    mounts::change_root(empty.as_ref(), &proc_self_fd)?;
    Ok((Sandboxed { root, proc_self_fd, proc_self_fdinfo, forked: true }, empty))
}

/// Lets go of the supplementary groups: a worker has those of its caller, and no others.
fn drop_groups() {
    // Without the privilege they stay, and callers' groups cannot be taken on either.
    let _ = rustix::thread::set_thread_groups(&[]);
}

fn step(step: &'static str) -> impl Fn(Errno) -> SandboxError {
    move |source| SandboxError::Step { step, source }
}

/// What a process has to know of its own descriptors: the descriptors, and what they are.
const PROC_SELF: [&str; 2] = ["/proc/self/fd", "/proc/self/fdinfo"];

/// Both directories of the calling process, so not to be opened before a fork.
fn open_proc_self() -> Result<[OwnedFd; 2], SandboxError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    both(|path| openat(CWD, path, flags, Mode::empty())).map_err(step("opening /proc/self/fd"))
}

/// The same directories as roots of mounts that are mounted nowhere, so that no way leads up from
/// them: neither to other processes nor to sysctls, which uid 0 can write even without
/// capabilities.
fn detach_proc_self() -> Result<[OwnedFd; 2], Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    both(|path| open_tree(CWD, path, flags))
}

fn both(open: impl Fn(&str) -> Result<OwnedFd, Errno>) -> Result<[OwnedFd; 2], Errno> {
    let [fd, fdinfo] = PROC_SELF.map(open);
    Ok([fd?, fdinfo?])
}
