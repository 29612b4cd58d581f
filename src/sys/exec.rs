//! Other programs: in place of the one of this process, and in a child that inherits next to nothing.

use std::ffi::{CString, OsString, c_char, c_int, c_uint};
use std::os::fd::{AsRawFd as _, BorrowedFd, RawFd};
use std::os::unix::ffi::OsStringExt as _;
use std::path::Path;
use std::ptr;

use rustix::io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd};
use rustix::thread::UnshareFlags;

use super::{inherited, last_errno};

/// `CLOSE_RANGE_UNSHARE` of close_range(2).
const UNSHARE: c_uint = 2;

/// Arguments and environment of a program.
#[derive(Debug)]
pub struct Program {
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

impl Program {
    /// The arguments, the first of which is the program's name, and the variables of its environment.
    pub fn new(
        arguments: impl IntoIterator<Item = OsString>,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Program {
        // Neither has a zero inside: they were a program's.
        let text = |text: OsString| CString::new(text.into_vec()).unwrap_or_default();
        let variable = |(mut name, value): (OsString, OsString)| {
            name.push("=");
            name.push(value);
            text(name)
        };
        Program {
            arguments: arguments.into_iter().map(text).collect(),
            environment: environment.into_iter().map(variable).collect(),
        }
    }

    /// Replaces the program of this process by the one at `path`. Returns only if that fails, and then nothing has changed.
    ///
    /// Descriptors without FD_CLOEXEC stay open ([`keep`]). The process has one thread.
    pub fn execute(&self, path: &Path) -> Errno {
        let Ok(path) = CString::new(path.as_os_str().to_owned().into_vec()) else { return Errno::INVAL };
        let (arguments, environment) = (pointers(&self.arguments), pointers(&self.environment));
        // SAFETY: both lists end with a null pointer, and their strings live until the call is over.
        unsafe { libc::execve(path.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
        last_errno()
    }

    /// The same with a program that is open, and may have no path any more.
    pub fn execute_file(&self, file: BorrowedFd<'_>) -> Errno {
        let (arguments, environment) = (pointers(&self.arguments), pointers(&self.environment));
        let (file, empty) = (file.as_raw_fd(), c"".as_ptr());
        // SAFETY: as above.
        unsafe {
            libc::syscall(
                libc::SYS_execveat,
                file,
                empty,
                arguments.as_ptr(),
                environment.as_ptr(),
                libc::AT_EMPTY_PATH,
            )
        };
        last_errno()
    }
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect()
}

/// Keeps a descriptor open when another program is executed.
pub fn keep(fd: RawFd) -> Result<(), Errno> {
    set_flags(fd, FdFlags::empty())
}

/// The reverse.
pub fn let_go(fd: RawFd) -> Result<(), Errno> {
    set_flags(fd, FdFlags::CLOEXEC)
}

/// Whether it would be closed.
pub fn is_closed_by_exec(fd: RawFd) -> bool {
    // SAFETY: borrowed for one system call only; a descriptor that is not open answers EBADF.
    fcntl_getfd(unsafe { BorrowedFd::borrow_raw(fd) }).is_ok_and(|flags| flags.contains(FdFlags::CLOEXEC))
}

fn set_flags(fd: RawFd, flags: FdFlags) -> Result<(), Errno> {
    // SAFETY: borrowed for one system call only; a descriptor that is not open answers EBADF.
    fcntl_setfd(unsafe { BorrowedFd::borrow_raw(fd) }, flags)
}

/// Prepares a child that shares its parent's table of descriptors for another program: it gets a table of its own, with
/// standard input, `output` as standard output and error, and `kept`. It ends by SIGALRM after `seconds`, and writes no
/// more than `bytes` bytes to a file.
pub fn isolate(kept: RawFd, output: RawFd, seconds: u32, bytes: u64) -> std::io::Result<()> {
    unshare_table(kept.max(output))?;
    for standard in [libc::STDOUT_FILENO, libc::STDERR_FILENO] {
        // SAFETY: the table is this process's own, and it prints nothing before the other program does.
        if unsafe { libc::dup2(output, standard) } < 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    inherited::close_all_but(vec![kept])?;
    keep(kept)?;
    // SAFETY: alarm(2) takes a number.
    unsafe { libc::alarm(seconds) };
    let limit = rustix::process::Rlimit { current: Some(bytes), maximum: Some(bytes) };
    rustix::process::setrlimit(rustix::process::Resource::Fsize, limit)?;
    Ok(())
}

/// Gives the process a table of its own. Descriptors up to `last` are copied; of the others, of which there may be
/// a million, none unless the host forbids close_range(2).
fn unshare_table(last: RawFd) -> Result<(), Errno> {
    let first = c_uint::try_from(last).map_err(|_| Errno::BADF)?.saturating_add(1);
    // SAFETY: what is closed is closed in the new table only, which nobody has used.
    if unsafe { libc::syscall(libc::SYS_close_range, first, c_int::MAX, UNSHARE) } == 0 {
        return Ok(());
    }
    // SAFETY: the same descriptors stay open in the new table.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FILES) }
}
