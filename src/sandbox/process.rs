//! The supervisor and the server: the process that was started, and its child in the sandbox.

use std::os::fd::{BorrowedFd, OwnedFd};

use log::error;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, WaitStatus, getpid, kill_process, pidfd_open,
    set_parent_process_death_signal, waitpid,
};

use super::{SandboxError, step};

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
        error!(
            "killed by the seccomp filter; the kernel's log has the number of the system call (type=1326). Unless this is an attack, please report it, and use --seccomp=log meanwhile"
        );
    }
    status.exit_status().unwrap_or_else(|| 128 + status.terminating_signal().unwrap_or_default())
}

/// The supervisor, as a pidfd in the server.
#[derive(Debug)]
pub(super) struct ParentFd(OwnedFd);

impl ParentFd {
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

/// The two sides of [`fork_server`].
pub(super) enum Fork {
    Parent(Parent),
    Server(ParentFd),
}

/// Forks the server, which gets SIGTERM when the supervisor dies.
pub(super) fn fork_server() -> Result<Fork, SandboxError> {
    let parent = pidfd_open(getpid(), PidfdFlags::empty()).map_err(step("watching the daemon"))?;
    if let Some(child) = fork().map_err(step("fork(2)"))? {
        return Ok(Fork::Parent(Parent { child }));
    }
    let parent = ParentFd(parent);
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

/// Ends a child without running what the parent has set up for its own end.
pub(super) fn exit(status: i32) -> ! {
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
