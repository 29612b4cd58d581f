//! SIGHUP, and whether a terminal was closed or a process has sent it.

use std::ffi::{c_int, c_void};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use rustix::io::{Errno, Result};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Pid;

/// Where the handler says that there was a signal; -1 before it is installed.
static WRITER: AtomicI32 = AtomicI32::new(-1);
/// A process has sent it with [`REOPEN`].
static REOPENS: AtomicBool = AtomicBool::new(false);
/// A process has sent it.
static SENT: AtomicBool = AtomicBool::new(false);
/// The kernel has: the terminal was closed.
static CLOSED: AtomicBool = AtomicBool::new(false);

/// The handler of SIGHUP, of which a process has one.
#[derive(Debug)]
pub struct Hangups {
    reader: OwnedFd,
    writer: OwnedFd,
    ignores_terminal: bool,
}

/// What a SIGHUP means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hangup {
    /// The terminal was closed.
    Terminal,
    /// A process has sent it.
    Sent,
    /// The same, by [`ask_to_reopen`].
    Reopen,
}

/// The value that a signal comes with which asks for [`Hangup::Reopen`].
const REOPEN: usize = 1;

/// Asks a process by a SIGHUP to open its share anew.
pub fn ask_to_reopen(process: Pid) -> Result<()> {
    let value = libc::sigval { sival_ptr: std::ptr::without_provenance_mut(REOPEN) };
    // SAFETY: a system call with plain numbers; the pointer is only a value.
    match unsafe { libc::sigqueue(process.as_raw_pid(), libc::SIGHUP, value) } {
        0 => Ok(()),
        _ => Err(super::last_errno()),
    }
}

impl Hangups {
    /// Handles the signal from now on. If it is ignored, as nohup(1) sets it, or `ignores_terminal` is true, a terminal
    /// that is closed has no meaning.
    pub fn catch(ignores_terminal: bool) -> Result<Hangups> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        WRITER.store(writer.as_raw_fd(), Ordering::SeqCst);
        // SAFETY: the handler makes one system call and stores to atomics, and so is safe at any moment. The structs are
        // valid with all zeros but for the handler, the flags, and the mask, which is empty.
        let before = unsafe {
            let mut before: libc::sigaction = std::mem::zeroed();
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = note as extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
            if libc::sigaction(libc::SIGHUP, &raw const action, &raw mut before) != 0 {
                return Err(Errno::INVAL);
            }
            before.sa_sigaction
        };
        let ignores_terminal = ignores_terminal || before == libc::SIG_IGN;
        Ok(Hangups { reader, writer, ignores_terminal })
    }

    /// Whether a terminal that is closed has no meaning.
    pub fn ignores_terminal(&self) -> bool {
        self.ignores_terminal
    }

    /// What has come since the last call. The end of the terminal comes first.
    pub fn take(&self) -> Option<Hangup> {
        let mut bytes = [0; 64];
        while matches!(rustix::io::read(&self.reader, &mut bytes), Ok(1..) | Err(Errno::INTR)) {}
        let (closed, sent) = (CLOSED.swap(false, Ordering::SeqCst), SENT.swap(false, Ordering::SeqCst));
        match (closed && !self.ignores_terminal, sent) {
            (true, _) => Some(Hangup::Terminal),
            (false, true) => Some(Hangup::Sent),
            (false, false) => REOPENS.swap(false, Ordering::SeqCst).then_some(Hangup::Reopen),
        }
    }

    /// Its descriptors.
    pub fn descriptors(&self) -> [RawFd; 2] {
        [self.reader.as_raw_fd(), self.writer.as_raw_fd()]
    }
}

/// Readable when a signal has come.
impl AsFd for Hangups {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }
}

extern "C" fn note(_signal: c_int, info: *mut libc::siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel passes a valid pointer to a handler with SA_SIGINFO.
    let (code, value) = unsafe { ((*info).si_code, (*info).si_value().sival_ptr) };
    let which = match code {
        1.. => &CLOSED,
        libc::SI_QUEUE if value.addr() == REOPEN => &REOPENS,
        _ => &SENT,
    };
    which.store(true, Ordering::SeqCst);
    // SAFETY: errno is the thread's, and is what it was when the handler is over; write(2) is safe in a handler, and the
    // byte lives until it returns. A pipe that is full says enough.
    unsafe {
        let errno = *libc::__errno_location();
        libc::write(WRITER.load(Ordering::SeqCst), c"!".as_ptr().cast(), 1);
        *libc::__errno_location() = errno;
    }
}

/// Ignores the signal from now on.
pub fn ignore() {
    // SAFETY: ignoring a signal runs no code.
    unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
}
