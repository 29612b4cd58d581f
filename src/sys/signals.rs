//! Signals: interrupting a thread in a blocking system call, those that end the daemon, and a known state of all of
//! them whatever the launcher has set. The process-wide ones are set by [`crate::process`] only.

use std::os::fd::{FromRawFd as _, OwnedFd};
use std::sync::Once;

use rustix::io::{Errno, Result};

/// The signal that is used; its handler does nothing, which is enough to end a system call.
const SIGNAL: i32 = libc::SIGUSR1;

/// The signals that end the daemon in any case.
pub const ENDINGS: [i32; 2] = [libc::SIGTERM, libc::SIGINT];
/// The signal by which a process that serves is told to drain.
pub const DRAIN: i32 = libc::SIGUSR2;

/// A thread of this process that may be woken.
#[derive(Clone, Copy, Debug)]
pub struct ThreadId(i32);

impl ThreadId {
    /// The calling thread. From the first call on the process handles the signal.
    pub fn current() -> Result<ThreadId> {
        handle()?;
        Ok(ThreadId(rustix::thread::gettid().as_raw_nonzero().get()))
    }
}

/// Resets signals. The launcher may have blocked or ignored any of them, and both survive execve(2): a blocked SIGUSR1
/// interrupts no thread, an ignored SIGTERM ends nothing, and with SIGCHLD ignored a child leaves no exit status. SIGHUP stays ignored, which is what nohup(1) does it for.
///
/// Must be called before the first thread and the first child are started, since they get the same mask.
pub fn reset() -> Result<()> {
    // One that is pending must not end the daemon as soon as it is let through.
    handle()?;
    ignore_file_size_limit();
    // SAFETY: the default action of SIGCHLD runs no code. The set is initialised by sigemptyset(3) before it is
    // read, and no handler but our own, which does nothing, can run by the change of the mask.
    let result = unsafe {
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::pthread_sigmask(libc::SIG_SETMASK, &none, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(Errno::from_raw_os_error(result)) }
}

/// Makes the process handle the signal.
fn handle() -> Result<()> {
    static INSTALLED: Once = Once::new();
    let mut result = Ok(());
    INSTALLED.call_once(|| result = install_handler(SIGNAL));
    result
}

/// Ends the system call that `thread` is in, if any, with EINTR. The thread must be alive.
pub fn wake(thread: ThreadId) {
    // SAFETY: tgkill(2) takes numbers only; a wrong one is an error that changes nothing.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread.0, SIGNAL) };
}

/// A descriptor that is readable when the process is told to end. The signals do nothing else from now on.
pub fn endings_by_descriptor() -> Result<OwnedFd> {
    for signal in [libc::SIGCHLD, SIGNAL, DRAIN, libc::SIGHUP, libc::SIGINT] {
        // SAFETY: ignoring a signal runs no code.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    // SAFETY: the set is initialised by sigemptyset(3) before it is read; what signalfd(2) returns is checked, and is
    // nobody else's.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::pthread_sigmask(libc::SIG_SETMASK, &set, std::ptr::null_mut());
        let fd = libc::signalfd(-1, &set, libc::SFD_CLOEXEC);
        if fd < 0 { Err(super::last_errno()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

extern "C" fn do_nothing(_signal: libc::c_int) {}

fn install_handler(signal: i32) -> Result<()> {
    // Without SA_RESTART, or the system call would go on waiting.
    // SAFETY: the handler does nothing and so is safe at any moment; the struct is all zeros
    // (no flags, empty mask) but for it.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = do_nothing as extern "C" fn(libc::c_int) as usize;
        libc::sigaction(signal, &action, std::ptr::null_mut())
    };
    if result < 0 { Err(Errno::INVAL) } else { Ok(()) }
}

/// Lets writes past a limit on the length of files (RLIMIT_FSIZE) fail with EFBIG, which the guest
/// gets; by default SIGXFSZ would end the daemon.
fn ignore_file_size_limit() {
    // SAFETY: ignoring a signal runs no code, and nobody else handles this one.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// The signals that end the daemon cleanly: SIGTERM, SIGINT, and SIGHUP (a terminal that is closed)
/// unless the launcher ignores it, as nohup(1) does.
pub fn endings() -> Vec<i32> {
    let mut signals = ENDINGS.to_vec();
    if !is_ignored(libc::SIGHUP) {
        signals.push(libc::SIGHUP);
    }
    signals
}

/// Ignores the signals that end the daemon, in a process that ends when another one says so.
pub fn ignore_endings() {
    for signal in ENDINGS {
        // SAFETY: ignoring a signal runs no code.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

fn is_ignored(signal: i32) -> bool {
    // SAFETY: without a new action the call only fills in the old one, for which all zeros are valid.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &mut action) == 0 && action.sa_sigaction == libc::SIG_IGN
    }
}

/// Blocks the signals of [`endings`] until [`release`]: one that arrives during the start stays pending.
pub fn hold() {
    change_mask(libc::SIG_BLOCK);
}

/// Unblocks them.
pub fn release() {
    change_mask(libc::SIG_UNBLOCK);
}

fn change_mask(how: i32) {
    // SAFETY: the set is initialised by sigemptyset(3) before it is read, and the calls fail only
    // for numbers that are no signals.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaddset(&mut set, signal);
        }
        libc::pthread_sigmask(how, &set, std::ptr::null_mut());
    }
}
/// Lets the end of a child interrupt a wait.
pub fn wake_by_children() -> Result<()> {
    install_handler(libc::SIGCHLD)
}
