//! The back end process under test.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::error::{Error, Result};
use crate::session::{Session, SessionOptions};

/// The descriptor number that `--fd` gets.
const SOCKET_FD: i32 = 3;

/// A running back end, its socket and its share. Dropping it kills the process.
#[derive(Debug)]
pub struct Backend {
    program: PathBuf,
    child: Child,
    socket: PathBuf,
    share: PathBuf,
    stderr: fs::File,
    /// Holds socket and share, unless the share is the caller's.
    _directory: TempDir,
}

/// How to start a back end.
#[derive(Debug)]
pub struct Starter {
    command: Command,
    program: PathBuf,
    share: Option<PathBuf>,
    by_fd: bool,
    bare: bool,
}

impl Backend {
    /// Prepares the start of a program that has virtiofsd's options.
    pub fn of(program: impl AsRef<OsStr>) -> Starter {
        let program = PathBuf::from(program.as_ref());
        Starter { command: Command::new(&program), program, share: None, by_fd: false, bare: false }
    }
}

impl Starter {
    /// Adds options.
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Starter {
        self.command.args(args);
        self
    }

    /// Sets a variable in its environment.
    pub fn env(mut self, name: &str, value: &str) -> Starter {
        self.command.env(name, value);
        self
    }

    /// Shares this directory instead of a fresh temporary one.
    pub fn share(mut self, directory: impl Into<PathBuf>) -> Starter {
        self.share = Some(directory.into());
        self
    }

    /// Hands over a listening socket with `--fd` instead of `--socket-path`.
    pub fn by_fd(mut self) -> Starter {
        self.by_fd = true;
        self
    }

    /// Adds neither `--shared-dir` nor `--socket-path` nor `--fd`: the caller's options are all there is.
    pub fn bare(mut self) -> Starter {
        self.bare = true;
        self
    }

    /// Starts the process in this directory.
    pub fn current_dir(mut self, directory: impl AsRef<Path>) -> Starter {
        self.command.current_dir(directory);
        self
    }

    /// Starts the process; does not wait for its socket.
    pub fn spawn(mut self) -> Result<Backend> {
        let directory = tempfile::Builder::new()
            .prefix("lanefsd-")
            .tempdir()
            .map_err(Error::system("make a temporary directory"))?;
        let socket = directory.path().join("socket");
        let share = match self.share.take() {
            Some(share) => share,
            None => {
                let share = directory.path().join("share");
                fs::create_dir(&share).map_err(Error::system(format!("make {}", share.display())))?;
                share
            }
        };
        // Lives until the child has its own copy.
        let mut listener = None;
        if self.by_fd {
            let listening = UnixListener::bind(&socket)
                .map_err(Error::system(format!("listen on {}", socket.display())))?;
            pass_fd(&mut self.command, listening.as_raw_fd());
            listener = Some(listening);
        }
        match (self.bare, self.by_fd) {
            (true, _) => {}
            (false, true) => {
                self.command.arg("--shared-dir").arg(&share).arg(format!("--fd={SOCKET_FD}"));
            }
            (false, false) => {
                self.command.arg("--shared-dir").arg(&share).arg("--socket-path").arg(&socket);
            }
        }
        // A file shows at once what was written: a pipe would need a thread, which may be late.
        let make_file = || tempfile::tempfile().and_then(|file| Ok((file.try_clone()?, file)));
        let (stderr, childs) = make_file().map_err(Error::system("make a file for what is said"))?;
        self.command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(childs);
        let child =
            self.command.spawn().map_err(Error::system(format!("start {}", self.program.display())))?;
        drop(listener);
        Ok(Backend { program: self.program, child, socket, share, stderr, _directory: directory })
    }

    /// Starts the process and waits until its socket is there.
    pub fn start(self) -> Result<Backend> {
        let mut backend = self.spawn()?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while !backend.socket.exists() {
            if let Some(status) = backend.try_wait()? {
                return Err(backend.complaint(format!("ended at start with {status}")));
            }
            if Instant::now() > deadline {
                return Err(backend.complaint("made no socket in 10 seconds".into()));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(backend)
    }

    /// Runs the process to its end, which is to come by itself, and returns status and stderr.
    pub fn refuse(self) -> Result<(ExitStatus, String)> {
        let mut backend = self.spawn()?;
        let status = backend.wait(Duration::from_secs(10))?;
        Ok((status, backend.stderr()))
    }
}

/// Makes the child inherit `fd` as [`SOCKET_FD`].
fn pass_fd(command: &mut Command, fd: i32) {
    let hand_over = move || {
        // dup2 onto itself would leave close-on-exec set.
        let result = if fd == SOCKET_FD {
            // SAFETY: plain system call on a number, allowed between fork and exec.
            unsafe { libc::fcntl(fd, libc::F_SETFD, 0) }
        } else {
            // SAFETY: as above.
            unsafe { libc::dup2(fd, SOCKET_FD) }
        };
        if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: the closure only makes async-signal-safe calls and allocates nothing.
    unsafe { command.pre_exec(hand_over) };
}

impl Backend {
    /// The socket's path.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The shared directory.
    pub fn share(&self) -> &Path {
        &self.share
    }

    /// A path in the shared directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.share.join(name)
    }

    /// A session over the socket, INIT done.
    pub fn connect(&self, options: SessionOptions) -> Result<Session> {
        Session::connect(&self.socket, options)
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What the process and its children have written to stderr so far.
    pub fn stderr(&self) -> String {
        let mut text = vec![0; self.stderr.metadata().map_or(0, |file| file.len() as usize)];
        // At an offset, as the children write at the one that is shared with them.
        match self.stderr.read_exact_at(&mut text, 0) {
            Ok(()) => String::from_utf8_lossy(&text).into_owned(),
            Err(error) => format!("(stderr cannot be read: {error})"),
        }
    }

    /// The exit status if the process has ended.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().map_err(Error::system("wait for the back end"))
    }

    /// Waits for the process to end by itself.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                return Err(self.complaint(format!("still runs after {timeout:?}")));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits for a clean end: exit status 0.
    pub fn expect_success(&mut self) -> Result<()> {
        let status = self.wait(Duration::from_secs(10))?;
        if status.success() {
            return Ok(());
        }
        let how = match status.signal() {
            Some(signal) => format!("was ended by signal {signal}"),
            None => format!("ended with {status}"),
        };
        Err(self.complaint(how))
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) -> Result<()> {
        send(self.pid(), signal)
    }

    /// The worker: the child of the process that was started, if it has one that lives.
    pub fn worker(&self) -> Option<u32> {
        child_of(self.pid())
    }

    /// Sends a signal that ends it to the worker, and waits until another one is there.
    pub fn replace_worker(&self, signal: i32) -> Result<()> {
        self.replacing_worker(|victim| send(victim, signal))
    }

    /// Has the back end upgraded to the program that is where it was started from, and waits until another worker is there.
    pub fn upgrade(&self) -> Result<()> {
        self.replacing_worker(|_| self.signal(libc::SIGHUP))
    }

    fn replacing_worker(&self, act: impl FnOnce(u32) -> Result<()>) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(10);
        let victim = self.worker().ok_or_else(|| self.complaint("has no worker".into()))?;
        act(victim)?;
        while self.worker().is_none_or(|worker| worker == victim) {
            if Instant::now() > deadline {
                return Err(self.complaint(format!("makes no worker in place of {victim}")));
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    /// Memory of the process that was started, and of the memory files that it has open: both anonymous and shared
    /// resident pages, and pages that nobody has mapped, in KiB.
    pub fn lasting_kib(&self) -> Result<usize> {
        let pid = self.pid();
        let folder = format!("/proc/{pid}/fd");
        let mut bytes = 0;
        for entry in
            fs::read_dir(&folder).map_err(Error::system(format!("list {folder}")))?.filter_map(|e| e.ok())
        {
            let target = fs::read_link(entry.path()).unwrap_or_default();
            let name = target.to_string_lossy();
            if name.contains("memfd:") && !name.contains("memfd:lanefsd-frontend") {
                bytes += fs::metadata(entry.path()).map_or(0, |found| found.blocks() * 512);
            }
        }
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let own = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap_or_default();
        let own: usize = own.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0);
        Ok(own + usize::try_from(bytes / 1024).unwrap_or(usize::MAX))
    }

    /// Open descriptors of the process that serves, and what they are.
    pub fn descriptors(&self) -> Result<Vec<String>> {
        // A process that serves may end and be followed by another one.
        let deadline = Instant::now() + Duration::from_secs(1);
        loop {
            match self.list_descriptors() {
                Ok(found) if !found.is_empty() => return Ok(found),
                result if Instant::now() > deadline => return result,
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    fn list_descriptors(&self) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for entry in self.proc("fd").read_dir().map_err(Error::system("list the back end's descriptors"))? {
            // A descriptor may be closed between readdir and readlink.
            if let Some(target) = entry.ok().and_then(|entry| fs::read_link(entry.path()).ok()) {
                found.push(target.to_string_lossy().into_owned());
            }
        }
        Ok(found)
    }

    /// Resident memory in KiB, without what it shares with the front end.
    pub fn resident_kib(&self) -> Result<usize> {
        self.status_field("RssAnon:")
    }

    /// Number of threads.
    pub fn threads(&self) -> Result<usize> {
        self.status_field("Threads:")
    }

    /// CPU time of user and kernel together.
    pub fn cpu_time(&self) -> Result<Duration> {
        let stat =
            fs::read_to_string(self.proc("stat")).map_err(Error::system("read the back end's stat"))?;
        // The name in parentheses may hold spaces; utime and stime are fields 14 and 15.
        let after_name = stat.rsplit(')').next().unwrap_or_default();
        let ticks: u64 = after_name
            .split_whitespace()
            .skip(11)
            .take(2)
            .filter_map(|field| field.parse::<u64>().ok())
            .sum();
        // SAFETY: sysconf has no preconditions.
        let per_second = u64::try_from(unsafe { libc::sysconf(libc::_SC_CLK_TCK) }).unwrap_or(100).max(1);
        Ok(Duration::from_millis(ticks * 1000 / per_second))
    }

    fn status_field(&self, field: &str) -> Result<usize> {
        let status =
            fs::read_to_string(self.proc("status")).map_err(Error::system("read the back end's status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default();
        line.split_whitespace()
            .next()
            .and_then(|number| number.parse().ok())
            .ok_or_else(|| self.complaint(format!("has no {field} in /proc")))
    }

    /// A file in /proc of the process that serves: with a sandbox that may be a child of the one started.
    pub fn proc(&self, file: &str) -> PathBuf {
        let mut pid = self.pid();
        let mut seen = BTreeSet::new();
        while seen.insert(pid) {
            match child_of(pid) {
                Some(child) => pid = child,
                None => break,
            }
        }
        PathBuf::from(format!("/proc/{pid}/{file}"))
    }

    fn complaint(&self, problem: String) -> Error {
        let stderr = self.stderr();
        let problem =
            if stderr.is_empty() { problem } else { format!("{problem}; stderr: {}", stderr.trim_end()) };
        Error::Backend { program: self.program.display().to_string(), problem }
    }
}

/// The first child of a process that lives: it is neither a zombie (Z) nor being reaped (X), and not the monitor, which
/// serves no front end.
fn child_of(pid: u32) -> Option<u32> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let children = fs::read_to_string(path).unwrap_or_default();
    let mut pids = children.split_whitespace().filter_map(|pid| pid.parse().ok());
    pids.find(|pid: &u32| {
        if fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "lanefsd-monitor")
        {
            return false;
        }
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(['Z', 'X']))
    })
}

fn send(pid: u32, signal: i32) -> Result<()> {
    let pid = i32::try_from(pid).unwrap_or(i32::MAX);
    // SAFETY: a plain system call. The process is our child, not yet waited for, or a child of that.
    match unsafe { libc::kill(pid, signal) } {
        0 => Ok(()),
        _ => Err(Error::system(format!("send signal {signal}"))(std::io::Error::last_os_error())),
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
