//! The process that was started, and the one that serves in its place.

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, set_parent_process_death_signal, waitpid};

use super::{SandboxError, step};

/// The process that was started, while another one serves in its place.
#[derive(Debug)]
pub struct Parent {
    child: Pid,
}

impl Parent {
    /// Waits for the serving process and returns its exit status. A signal that `signalled`
    /// reports is passed on to it.
    pub fn wait(self, wait_for_signal: impl FnOnce() + Send + 'static) -> i32 {
        let child = self.child;
        std::thread::spawn(move || {
            wait_for_signal();
            // It fails only if the child has gone.
            let _ = kill_process(child, Signal::TERM);
        });
        loop {
            match waitpid(Some(child), WaitOptions::empty()) {
                Ok(Some((_, status))) => {
                    return status
                        .exit_status()
                        .unwrap_or_else(|| 128 + status.terminating_signal().unwrap_or_default());
                }
                Err(Errno::INTR) | Ok(None) => {}
                Err(_) => return 1,
            }
        }
    }
}

/// Forks the process that is to serve: `None` in it, and what waits for it in the other. It gets
/// SIGTERM when the other one dies.
pub(super) fn fork_server() -> Result<Option<Parent>, SandboxError> {
    if let Some(child) = fork().map_err(step("fork(2)"))? {
        return Ok(Some(Parent { child }));
    }
    set_parent_process_death_signal(Some(Signal::TERM))
        .map_err(step("asking for the parent's death signal"))?;
    Ok(None)
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
