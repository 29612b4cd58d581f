//! The whole server over a real directory: what it is asked for stays inside of it, the thread is the
//! daemon again after each request, and nothing is left open.
//!
//! The directory lies on a tmpfs beside another one that no guest may see or change, and links lead there.
//! Now and then the host changes what the guest looks at.
//!
//! The server runs inside the daemon's sandbox, in a thread of its own: mount and network namespaces, an
//! empty root, the daemon's capabilities, and its filter of system calls. The thread of libFuzzer stays
//! outside and plays the host. What cannot be on:
//!
//! - The PID namespace and a process of its own: libFuzzer has to count coverage in the memory that the
//!   server runs in, and a process cannot change its own PID namespace.
//! - The sandbox on all threads: libFuzzer reads and writes its corpus by path. A fourth thread, in the sandbox
//!   but without the filter, sets the file system up, as the daemon does before it installs the filter.
//! - `--seccomp=kill`: a forbidden call becomes SIGSYS and then an abort, which is a finding like any other.
//!
//! A panic is passed on to libFuzzer's thread, which keeps the input. After a memory error or a forbidden call
//! libFuzzer writes the input from within the sandbox, where no path leads out: `fuzz/run` gives it a
//! directory by the number of a descriptor, below the working directory, which is `/proc/self/fd` here and there.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, symlink};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;

use lanefsd::config::{CachePolicy, CapabilityChanges, FeatureMode, FsConfig, InodeFileHandles, Seccomp};
use lanefsd::fs::FileSystem;
use lanefsd::fs::passthrough::PassthroughFs;
use lanefsd::fs::read_only::ReadOnly;
use lanefsd::limits::Limits;
use lanefsd::process;
use lanefsd::sandbox::{self, RequiredCaps};
use lanefsd::state_file::StateFile;
use rustix::fs::{AtFlags, CWD, Dev, FileType, Mode, RenameFlags, mknodat, renameat_with, unlinkat};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::process::{Resource, Rlimit, getgroups, setrlimit, umask};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags, capabilities, unshare_unsafe};

use crate::input::Input;
use crate::server::{Guest, TestConfig, Workload, run};

/// Of `/sys` nothing is needed here, and it is there on every machine.
const BASE: &str = "/sys";
const SHARE: &str = "/sys/share";
const OUTSIDE: &str = "/sys/outside";
const SECRET: &[u8] = b"what no guest may ever read: 9b1d6c";
/// A mount inside the share.
const SUBMOUNT: &str = "/sys/share/b";
/// Descriptors where they are few; a quarter of them is kept from guests.
const FEW: u64 = 64;
const ENOUGH: u64 = 1024;

/// The name of the threads in the sandbox.
const INSIDE: &str = "inside";

/// What goes to the threads inside: one input.
struct Job {
    data: Vec<u8>,
    choice: u8,
}

/// What they ask of the host, or tell it.
enum Message {
    /// The host is to change something, as this byte says.
    Disturb(u8),
    /// All requests are served; or a check failed, with these words.
    Done(Result<(), String>),
}

/// The way to the threads inside.
struct Inside {
    jobs: Sender<Job>,
    messages: Receiver<Message>,
    /// Answers to [`Message::Disturb`].
    disturbed: Sender<()>,
}

/// Serves the requests that `data` tells: a byte for the settings, then requests.
pub fn serve(data: &[u8]) {
    static INSIDE: OnceLock<Mutex<Inside>> = OnceLock::new();
    let inside = INSIDE.get_or_init(|| {
        make_base();
        Mutex::new(start_inside())
    });
    let inside = inside.lock().expect("the only thread that uses it");
    let choice = data.first().copied().unwrap_or_default();
    populate();
    let descriptors = if choice & 1 == 0 { ENOUGH } else { FEW };
    let descriptors = Rlimit { current: Some(descriptors), maximum: Some(ENOUGH) };
    setrlimit(Resource::Nofile, descriptors).expect("the limit can be set");
    let open_before = open_descriptors();
    let outside = ParentFd::now();
    inside.jobs.send(Job { data: data.to_vec(), choice }).expect("the threads inside run");
    loop {
        match inside.messages.recv().expect("the threads inside run") {
            Message::Disturb(what) => {
                disturb(what);
                inside.disturbed.send(()).expect("the threads inside run");
            }
            Message::Done(result) => break result.unwrap_or_else(|words| panic!("{words}")),
        }
    }
    assert_eq!(open_descriptors(), open_before, "descriptors are left open");
    assert_eq!(ParentFd::now(), outside, "something was changed outside of the share");
}

/// Starts the thread that sets file systems up, and the one that serves them.
fn start_inside() -> Inside {
    let (jobs, next_job) = channel();
    let (tell, messages) = channel();
    let (disturbed, when_disturbed) = channel();
    // A panic inside is told to libFuzzer's thread, whose hook then ends the process.
    let abort = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| match thread::current().name() {
        Some(INSIDE) => eprintln!("{info}\n{}", std::backtrace::Backtrace::force_capture()),
        _ => abort(info),
    }));
    let set_up = move || set_up(&next_job, tell, when_disturbed);
    thread::Builder::new().name(INSIDE.into()).spawn(set_up).expect("a thread can be started");
    // Descriptors are counted from then on.
    let ready = messages.recv().expect("the sandbox is entered");
    assert!(matches!(ready, Message::Done(Ok(()))));
    Inside { jobs, messages, disturbed }
}

/// Enters the sandbox and gives up capabilities as the daemon does, and sets a file system up for each job.
fn set_up(jobs: &Receiver<Job>, tell: Sender<Message>, disturbed: Receiver<()>) {
    block_signals();
    let sandboxed = sandbox::enter_with_thread(Path::new(SHARE)).expect("the sandbox can be entered");
    let needs = RequiredCaps { readonly: false, xattr: true, file_handles: true };
    sandbox::give_up_capabilities(needs, CapabilityChanges::NONE).expect("capabilities can be given up");
    let (serve, next) = channel::<(Job, PassthroughFs)>();
    let serving = move || {
        sandbox::install_seccomp_on_thread(Seccomp::Trap, sandbox::Uses { file_handles: true, rings: false })
            .expect("the filter can be installed");
        let host = Arc::new(Host {
            tell: tell.clone(),
            disturbed: Mutex::new(disturbed),
            capabilities: capabilities(None).expect("capget(2) works"),
        });
        tell.send(Message::Done(Ok(()))).expect("libFuzzer's thread runs");
        for (job, fs) in next {
            let result = catch_unwind(AssertUnwindSafe(|| serve_inside(&job, fs, Arc::clone(&host))));
            let words = |panic: Box<dyn std::any::Any + Send>| match panic.downcast::<String>() {
                Ok(words) => *words,
                Err(_) => "a panic inside".to_owned(),
            };
            tell.send(Message::Done(result.map_err(words))).expect("libFuzzer's thread runs");
        }
    };
    thread::Builder::new().name(INSIDE.into()).spawn(serving).expect("a thread can be started");
    process::prepare_for_requests(&sandboxed.proc_self_fd).expect("a directory can be entered");
    for job in jobs {
        let copy = |fd: &OwnedFd| fd.try_clone().expect("a descriptor is free");
        let (root, proc_self_fd) = (copy(&sandboxed.root), copy(&sandboxed.proc_self_fd));
        let limits = Limits::of_the_process(&proc_self_fd).expect("descriptors can be counted");
        let fs = PassthroughFs::new(
            root,
            proc_self_fd,
            limits,
            config(job.choice),
            &StateFile::create().expect("memory"),
        )
        .expect("the share can be served");
        serve.send((job, fs)).expect("the serving thread runs");
    }
}

fn serve_inside(job: &Job, passthrough: PassthroughFs, host: Arc<Host>) {
    let fs: Arc<dyn FileSystem> = match job.choice >> 6 {
        3 => Arc::new(ReadOnly::new(passthrough)),
        _ => Arc::new(passthrough),
    };
    let mut input = Input::new(&job.data);
    input.byte();
    run(&mut input, TestConfig { fs, workload: host, keeps_data: true, waits_end: false });
}

/// Leaves libFuzzer's alarms to its own thread, and makes a forbidden call a finding.
fn block_signals() {
    extern "C" fn abort(_signal: libc::c_int) {
        // SAFETY: it ends the process.
        unsafe { libc::abort() }
    }
    // SAFETY: the set is made empty before it is read; the handler does nothing but abort(3), which a signal
    // handler may.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGALRM);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        libc::signal(libc::SIGSYS, abort as extern "C" fn(libc::c_int) as libc::sighandler_t);
    }
}

fn config(choice: u8) -> FsConfig {
    let yes = |bit: u8| choice & bit != 0;
    FsConfig {
        inode_file_handles: if yes(2) { InodeFileHandles::Prefer } else { InodeFileHandles::Never },
        cache: if yes(4) { CachePolicy::Never } else { CachePolicy::Auto },
        writeback: yes(8),
        posix_acl: if yes(16) { FeatureMode::Auto } else { FeatureMode::Never },
        allow_direct_io: yes(32),
        tmpfile: true,
        announce_submounts: yes(64),
        xattr: true,
        posix_lock: true,
        flock: true,
        ..FsConfig::default()
    }
}

/// A tmpfs that this process alone sees and that ends with it.
fn make_base() {
    assert!(rustix::process::geteuid().is_root(), "run this target as root: it mounts a file system");
    // SAFETY: nothing here counts on sharing its mounts and its working directory with other threads.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }.expect("mounts of its own");
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).expect("private mounts");
    let in_memory =
        |place: &str| mount("none", place, "tmpfs", MountFlags::empty(), Some(c"size=4m,nr_inodes=2k"));
    in_memory(BASE).expect("a tmpfs can be mounted");
    [OUTSIDE, SHARE, SUBMOUNT].iter().for_each(|path| fs::create_dir(path).expect("an empty tmpfs has room"));
    in_memory(SUBMOUNT).expect("a tmpfs can be mounted");
    fs::write(format!("{OUTSIDE}/secret"), SECRET).expect("an empty tmpfs has room");
}

/// The share as every input finds it: links out of it, a FIFO, and the mount.
fn populate() {
    empty(SUBMOUNT);
    empty(SHARE);
    symlink("../outside", format!("{SHARE}/a")).expect("an empty share has room");
    symlink("/sys/outside/secret", format!("{SUBMOUNT}/a")).expect("an empty share has room");
    make_node(&format!("{SUBMOUNT}/b"), FileType::Fifo);
}

/// Removes what is in a directory, but no mounts.
fn empty(path: &str) {
    for entry in fs::read_dir(path).expect("the directory can be read").flatten() {
        remove(&entry.path());
    }
}

/// Removes a file or a whole directory, if it is there and no mount.
fn remove(path: &Path) {
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.is_dir() => fs::remove_file(path).expect("files can be removed"),
        Ok(_) if path != Path::new(SUBMOUNT) => fs::remove_dir_all(path).expect("directories can be removed"),
        _ => {}
    }
}

fn make_node(path: &str, kind: FileType) {
    // A device that is not there.
    let device: Dev = rustix::fs::makedev(0xfff, 0);
    let _ = mknodat(CWD, path, kind, Mode::from_raw_mode(0o666), device);
}

fn open_descriptors() -> usize {
    fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

/// What lies beside the share.
#[derive(Debug, PartialEq, Eq)]
struct ParentFd {
    names: Vec<String>,
    content: Vec<u8>,
    /// Mode, owner, links and times of the directory and of the file.
    attributes: Vec<[i64; 7]>,
}

impl ParentFd {
    fn now() -> ParentFd {
        let names = |path| {
            let entries = fs::read_dir(path).expect("the directory can be read").flatten();
            entries.map(|entry| entry.path().display().to_string())
        };
        let mut names: Vec<_> = names(BASE).chain(names(OUTSIDE)).collect();
        names.sort_unstable();
        let secret = format!("{OUTSIDE}/secret");
        let attributes = [OUTSIDE, &secret].map(|path| {
            let of = fs::symlink_metadata(path).expect("it is there");
            let [uid, gid, mode] = [of.uid(), of.gid(), of.mode()].map(i64::from);
            [
                mode,
                uid,
                gid,
                of.nlink().cast_signed(),
                of.mtime_nsec(),
                of.ctime_nsec(),
                of.size().cast_signed(),
            ]
        });
        ParentFd { names, content: fs::read(secret).expect("it is there"), attributes: attributes.to_vec() }
    }
}

/// The host around the share, as the serving thread reaches it.
struct Host {
    tell: Sender<Message>,
    disturbed: Mutex<Receiver<()>>,
    capabilities: CapabilitySets,
}

impl Workload for Host {
    fn after_request(&self, _guest: &Guest, reply: &[u8]) {
        assert!(!reply.windows(SECRET.len()).any(|part| part == SECRET), "a guest read what lies outside");
        // The thread is the daemon's again.
        assert!(rustix::process::geteuid().is_root() && rustix::process::getegid().is_root());
        assert_eq!(getgroups().expect("getgroups(2) works"), []);
        assert_eq!(umask(Mode::empty()), Mode::empty());
        // CAP_FSETID stays as the last request needed it.
        let mut now = capabilities(None).expect("capget(2) works");
        now.effective |= self.capabilities.effective & CapabilitySet::FSETID;
        assert_eq!(now, self.capabilities);
    }

    fn disturb(&self, input: &mut Input<'_>) -> bool {
        self.tell.send(Message::Disturb(input.byte())).expect("libFuzzer's thread runs");
        self.disturbed.lock().expect("no other thread uses it").recv().expect("libFuzzer's thread runs");
        true
    }

    fn at_end(&self) {}
}

/// Changes the share behind the server's back.
fn disturb(what: u8) {
    let at = |name: &str| format!("{SHARE}/{name}");
    let swap_for_link = |name: &str, target: &str| {
        let _ = renameat_with(CWD, at(name), CWD, at("old"), RenameFlags::empty());
        let _ = symlink(target, at(name));
    };
    match what % 8 {
        0 => swap_for_link("dir", "../outside"),
        1 => swap_for_link("file", "../outside/secret"),
        2 => drop(renameat_with(CWD, at("dir"), CWD, at("file"), RenameFlags::EXCHANGE)),
        3 => {
            let _ = unlinkat(CWD, at("dir"), AtFlags::empty());
            let _ = renameat_with(CWD, at("old"), CWD, at("dir"), RenameFlags::empty());
        }
        4 => {
            remove(Path::new(&at("old")));
            let _ = fs::write(at("old"), b"by the host");
        }
        5 => {
            remove(Path::new(&at("file")));
            make_node(&at("file"), FileType::Fifo);
        }
        6 => {
            remove(Path::new(&at("a")));
            make_node(&at("a"), FileType::CharacterDevice);
        }
        _ => empty(SHARE),
    }
}
