//! The process that was started, and the one that serves in its place.

use std::os::fd::BorrowedFd;

use log::error;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, WaitStatus, kill_process, pidfd_open,
    set_parent_process_death_signal, waitpid,
};

use super::{SandboxError, step};

/// The process that was started, while another one serves in its place.
#[derive(Debug)]
pub struct Parent {
    child: Pid,
}

impl Parent {
    /// Waits for the serving process and returns its exit status. When `signalled` gets readable,
    /// it is sent SIGTERM. No thread is used: after unshare(2) of a PID namespace a process cannot
    /// start any.
    pub fn wait(self, signalled: BorrowedFd<'_>) -> Result<i32, SandboxError> {
        let ended = pidfd_open(self.child, PidfdFlags::empty()).map_err(step("watching the daemon"))?;
        let mut told = false;
        loop {
            let mut fds =
                [PollFd::new(&ended, PollFlags::IN), PollFd::from_borrowed_fd(signalled, PollFlags::IN)];
            let (watched, _) = fds.split_at_mut(if told { 1 } else { 2 });
            match poll(watched, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(step("waiting for the daemon")(errno)),
            }
            if let Some((_, status)) =
                waitpid(Some(self.child), WaitOptions::NOHANG).map_err(step("waiting for the daemon"))?
            {
                return Ok(exit_status(status));
            }
            if !told && fds.last().is_some_and(|fd| !fd.revents().is_empty()) {
                told = true;
                kill_process(self.child, Signal::TERM).map_err(step("ending the daemon"))?;
            }
        }
    }
}

/// The status to exit with for that of the serving process, as shells have it.
fn exit_status(status: WaitStatus) -> i32 {
    if status.terminating_signal() == Some(libc::SIGSYS) {
        error!(
            "the daemon made a system call that its filter forbids, and was ended; the kernel's log has the call's number (type=1326). If no attack is behind it, please report it, and start with --seccomp=log meanwhile"
        );
    }
    status.exit_status().unwrap_or_else(|| 128 + status.terminating_signal().unwrap_or_default())
}

/// Forks the process that is to serve: `None` in it, and what waits for it in the other. It gets
/// SIGTERM when the other one dies.
pub(super) fn fork_server() -> Result<Option<Parent>, SandboxError> {
    if let Some(child) = fork().map_err(step("fork(2)"))? {
        return Ok(Some(Parent { child }));
    }
    end_with_parent()?;
    Ok(None)
}

/// Asks for SIGTERM when the process that waits for this one dies.
pub(super) fn end_with_parent() -> Result<(), SandboxError> {
    set_parent_process_death_signal(Some(Signal::TERM)).map_err(step("asking for the parent's death signal"))
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
