//! The supervisor and the server: the process that was started, and its child in the sandbox.
//!
//! A server that is not replaced when it dies is forked ([`fork_server`]). One that is, a worker, shares the table of
//! descriptors with its parent ([`clone_worker`]).

use std::os::fd::{AsFd, BorrowedFd, FromRawFd as _, IntoRawFd, OwnedFd, RawFd};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use log::error;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitOptions, WaitStatus, getpid, kill_process,
    pidfd_open, set_parent_process_death_signal, waitid, waitpid,
};

use super::{SandboxError, step};
use crate::sync::lock;
use crate::sys::inherited::Shared;
use crate::sys::lingering;

/// The message for a process that SIGSYS has ended.
pub const KILLED_BY_SECCOMP: &str = "killed by the seccomp filter; the kernel's log has the number of the system call (type=1326). Unless this is an attack, please report it, and use --seccomp=log meanwhile";

/// The supervisor: it stays outside the sandbox, handles no guest input, and waits for the server.
#[derive(Debug)]
pub struct Parent {
    child: Pid,
}

impl Parent {
    /// Waits for the server and returns its exit status. When `signalled` gets readable, sends SIGTERM
    /// to the server. No thread is used: after unshare(2) of a PID namespace a process cannot
    /// start any.
    pub fn wait(self, signalled: BorrowedFd<'_>) -> Result<i32, SandboxError> {
        let ended = pidfd_open(self.child, PidfdFlags::empty()).map_err(step("watching the daemon"))?;
        let mut signalled_server = false;
        loop {
            let mut fds =
                [PollFd::new(&ended, PollFlags::IN), PollFd::from_borrowed_fd(signalled, PollFlags::IN)];
            let (watched, _) = fds.split_at_mut(if signalled_server { 1 } else { 2 });
            match poll(watched, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(step("waiting for the daemon")(errno)),
            }
            if let Some((_, status)) =
                waitpid(Some(self.child), WaitOptions::NOHANG).map_err(step("waiting for the daemon"))?
            {
                return Ok(exit_status(status));
            }
            if !signalled_server && fds.last().is_some_and(|fd| !fd.revents().is_empty()) {
                signalled_server = true;
                kill_process(self.child, Signal::TERM).map_err(step("ending the daemon"))?;
            }
        }
    }
}

/// The supervisor's exit status for that of the server, as shells have it.
fn exit_status(status: WaitStatus) -> i32 {
    if status.terminating_signal() == Some(libc::SIGSYS) {
        error!("{KILLED_BY_SECCOMP}");
    }
    status.exit_status().unwrap_or_else(|| 128 + status.terminating_signal().unwrap_or_default())
}

/// The supervisor, as a pidfd in the server.
#[derive(Debug)]
pub(super) struct ParentFd(OwnedFd);

impl ParentFd {
    /// The calling process, for a server that it starts.
    pub(super) fn of_this_process() -> Result<ParentFd, SandboxError> {
        pidfd_open(getpid(), PidfdFlags::empty()).map(ParentFd).map_err(step("watching the daemon"))
    }

    /// Asks for SIGTERM when the supervisor dies. A change of the user id clears that.
    ///
    /// It may be dead already, and then no signal comes. Its id does not say so in another PID namespace,
    /// where it is always 0, but its descriptor does.
    pub(super) fn die_with_it(&self) -> Result<(), SandboxError> {
        set_parent_process_death_signal(Some(Signal::TERM))
            .map_err(step("asking for the parent's death signal"))?;
        let mut ended = [PollFd::new(&self.0, PollFlags::IN)];
        match poll(&mut ended, Some(&Timespec::default())).map_err(step("watching the parent"))? {
            0 => Ok(()),
            _ => Err(SandboxError::ParentDied),
        }
    }
}

impl AsFd for ParentFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The two sides of [`fork_server`].
pub(super) enum Fork {
    Parent(Parent),
    Server(ParentFd),
}

/// Forks the server, which gets SIGTERM when the supervisor dies.
pub(super) fn fork_server() -> Result<Fork, SandboxError> {
    let parent = ParentFd::of_this_process()?;
    if let Some(child) = fork().map_err(step("fork(2)"))? {
        return Ok(Fork::Parent(Parent { child }));
    }
    parent.die_with_it()?;
    Ok(Fork::Server(parent))
}

/// The child's id in the parent, `None` in the child.
pub(super) fn fork() -> Result<Option<Pid>, Errno> {
    // SAFETY: the process has one thread, so the child may do all that the parent may.
    match unsafe { libc::fork() } {
        -1 => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::AGAIN)),
        child => Ok(Pid::from_raw(child)),
    }
}

/// How often a process that is waited for is looked at.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };
/// The same of one that cannot be waited for.
const PAUSE: Duration = Duration::from_millis(10);

/// The longest that the kernel's last work for a process is waited for.
const LAST_WORK: Duration = Duration::from_secs(1);

/// Whether a process has ended, without a wait and without reaping it.
const AT_ONCE: WaitIdOptions =
    WaitIdOptions::EXITED.union(WaitIdOptions::NOWAIT).union(WaitIdOptions::NOHANG);

/// A worker process, as its parent has it.
///
/// The descriptor is to wait with, and nothing else: the worker could put another one in its place. The id is the worker's
/// until it is reaped.
#[derive(Debug)]
pub struct Worker {
    pidfd: Shared<OwnedFd>,
    id: Pid,
}

/// A worker that has ended, and whose status was not taken. The kernel does its last work for it then, which takes
/// milliseconds if the worker has opened many descriptors by their names in /proc.
#[derive(Debug)]
pub struct Zombie(Pid);

impl Zombie {
    /// Its process id.
    pub fn id(&self) -> i32 {
        self.0.as_raw_nonzero().get()
    }

    /// The child with this id, which another program in this process has started.
    pub fn of_id(id: i32) -> Option<Zombie> {
        Pid::from_raw(id).filter(|_| id > 0).map(Zombie)
    }

    /// Takes its status, which is known. One that lingers keeps its place in the kernel's table.
    pub fn reap(self) {
        let deadline = Instant::now() + LAST_WORK;
        // It fails only if nobody is there to be reaped.
        while matches!(waitpid(Some(self.0), WaitOptions::NOHANG), Ok(None)) {
            if lingering::end_of(self.0).is_some() || Instant::now() > deadline {
                return;
            }
            std::thread::sleep(PAUSE);
        }
    }
}

/// How a worker ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkerEnd {
    /// By itself, with this status.
    Exited(i32),
    /// By this signal.
    Killed(i32),
}

impl Worker {
    /// Its process id.
    pub fn id(&self) -> u32 {
        self.id.as_raw_nonzero().get().unsigned_abs()
    }

    /// Ends it at once.
    pub fn kill(&self) {
        // It fails only if it has ended already.
        let _ = kill_process(self.id, Signal::KILL);
    }

    /// Asks it to drain.
    pub fn drain(&self) {
        // The same.
        let _ = kill_process(self.id, Signal::USR2);
    }

    /// Takes the status of a worker that has ended. Blocks until it has, or lingers: until then one of its threads may be in a
    /// system call that changes something.
    pub fn reap(&self) -> Result<WorkerEnd, Errno> {
        self.wait(WaitIdOptions::EXITED)
    }

    /// The same, but leaves the worker to [`Zombie::reap`].
    pub fn end(&self) -> Result<WorkerEnd, Errno> {
        self.wait(WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)
    }

    /// Whether it has ended but for threads that wait in the kernel to set the times of files.
    pub fn lingers(&self) -> bool {
        self.lingering_end().is_some()
    }

    fn lingering_end(&self) -> Option<WorkerEnd> {
        lingering::end_of(self.id)?;
        // Its first thread may have ended alone: after this, no other one runs an instruction of the program.
        self.kill();
        let end = lingering::end_of(self.id).map(WorkerEnd::of_status)?;
        let mut lingering = lock(&LINGERING);
        if !lingering.contains(&self.id) {
            lingering.push(self.id);
        }
        Some(end)
    }

    /// What is left of a worker that has ended.
    pub fn into_zombie(self) -> Zombie {
        Zombie(self.id)
    }

    /// Whether it has ended, or lingers.
    pub fn has_ended(&self) -> Result<bool, Errno> {
        Ok(waitid(WaitId::Pid(self.id), AT_ONCE)?.is_some() || self.lingers())
    }

    /// Whether the descriptor is what it was. Before it is reaped.
    pub fn is_intact(&self) -> bool {
        self.pidfd.is_intact() && waitid(WaitId::PidFd(self.pidfd.as_fd()), AT_ONCE).is_ok()
    }

    fn wait(&self, options: WaitIdOptions) -> Result<WorkerEnd, Errno> {
        loop {
            // Nothing tells that it lingers.
            let ended = poll(&mut [PollFd::new(self, PollFlags::IN)], Some(&LOOK));
            match waitid(WaitId::Pid(self.id), options | WaitIdOptions::NOHANG) {
                Ok(Some(status)) => {
                    let signal = || WorkerEnd::Killed(status.terminating_signal().unwrap_or(0));
                    return Ok(status.exit_status().map_or_else(signal, WorkerEnd::Exited));
                }
                Ok(None) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
            if let Some(end) = self.lingering_end() {
                return Ok(end);
            }
            if ended.is_ok_and(|ready| ready > 0) {
                // The worker has put another descriptor in its place.
                std::thread::sleep(PAUSE);
            }
        }
    }
}

impl WorkerEnd {
    /// Of a status as wait(2) has it.
    fn of_status(status: i32) -> WorkerEnd {
        match status & 0x7f {
            0 => WorkerEnd::Exited(status >> 8 & 0xff),
            signal => WorkerEnd::Killed(signal),
        }
    }
}

/// Workers of this process that were seen to linger: they have the same table of descriptors, perhaps longer than this process.
static LINGERING: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

/// Ends the process, whose workers may linger: nothing that it has open outlives it.
pub fn exit_before_workers(status: i32) -> ! {
    crate::sys::close_all();
    exit(status)
}

/// Whether a worker lingers that was there before the present one. Takes the status of those that have ended since.
pub fn workers_linger() -> bool {
    let mut lingering = lock(&LINGERING);
    lingering.retain(|id| matches!(waitpid(Some(*id), WaitOptions::NOHANG), Ok(None)));
    !lingering.is_empty()
}

/// Readable when the worker has ended.
impl AsFd for Worker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// Makes a worker: a fork of the calling process that shares its table of descriptors, so that what the worker opens
/// outlives it. `None` in the worker, which must never return to what the parent has set up, or drop it.
///
/// clone(2) and not clone3(2), which filters of containers refuse: they cannot see its flags. With these arguments it is
/// the same on all architectures that the daemon runs on. The C library has no part in it, and need not: there are no
/// other threads, whose locks it would have to free.
pub(super) fn clone_worker(pid_namespace: bool) -> Result<Option<Worker>, Errno> {
    let namespace = if pid_namespace { libc::CLONE_NEWPID } else { 0 };
    let flags = libc::CLONE_FILES | libc::CLONE_PIDFD | namespace | libc::SIGCHLD;
    let mut pidfd: RawFd = -1;
    // SAFETY: the process has one thread, and without CLONE_VM the child has a copy of its memory and stack, so the child
    // may do all that the parent may. The kernel writes a descriptor to `pidfd` of the parent.
    let child = unsafe { libc::syscall(libc::SYS_clone, flags, 0, &raw mut pidfd, 0, 0) };
    match child {
        -1 => Err(crate::sys::last_errno()),
        0 => Ok(None),
        child => {
            let id = i32::try_from(child).ok().and_then(Pid::from_raw).ok_or(Errno::CHILD)?;
            // SAFETY: the kernel has opened the descriptor for this process.
            let pidfd = Shared::new(unsafe { OwnedFd::from_raw_fd(pidfd) });
            Ok(Some(Worker { pidfd, id }))
        }
    }
}

/// Runs `run` in a child that shares the table of descriptors until it has another one, and exits with the status that
/// it returns.
pub fn run_in_child(run: impl FnOnce() -> i32) -> Result<Worker, Errno> {
    clone_worker(false)?.map_or_else(|| exit(run()), Ok)
}

/// Leaves a copy of a descriptor open for later processes of this table, and returns its number.
pub(super) fn leave_open(fd: BorrowedFd<'_>) -> Result<RawFd, Errno> {
    rustix::io::fcntl_dupfd_cloexec(fd, 0).map(IntoRawFd::into_raw_fd)
}

/// Ends a child without running what the parent has set up for its own end.
pub fn exit(status: i32) -> ! {
    // SAFETY: _exit(2) takes a number and does not return.
    unsafe { libc::_exit(status) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_parent_that_is_dead_already_is_noticed() {
        let mut parent = Command::new("true").spawn().unwrap();
        let pid = Pid::from_raw(parent.id().cast_signed()).unwrap();
        let outside = ParentFd(pidfd_open(pid, PidfdFlags::empty()).unwrap());
        parent.wait().unwrap();
        // The signal is asked for by a thread of its own, which it ends with.
        let result = std::thread::spawn(move || outside.die_with_it()).join().unwrap();
        assert!(matches!(result, Err(SandboxError::ParentDied)), "{result:?}");
        let outside = ParentFd(pidfd_open(getpid(), PidfdFlags::empty()).unwrap());
        std::thread::spawn(move || outside.die_with_it()).join().unwrap().unwrap();
    }
}
