//! What only happens when something goes wrong: a panic with a full backtrace, and calls of the C library
//! that look for files. This process enters the sandbox itself, as the daemon does, and then has libraries
//! open all that they want: they find nothing, and nothing ends the process.
//!
//! The sandbox can only be entered by a process with one thread, so there is no test harness here.
#![allow(
    unsafe_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

#[path = "it/common/mod.rs"]
mod common;

use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::Command;

use lanefsd::config::{IdMaps, Sandbox, Seccomp};
use lanefsd::process::{self, Signals};
use lanefsd::sandbox::{self, RequiredCaps, Role};

use common::strace;

/// Set in the process that enters the sandbox: which one, and around what.
const INSIDE: &str = "LANEFSD_TEST_INSIDE";
/// Paths in the share that must never be opened; each is a FIFO, at which an open waits.
const TRAPS: [&str; 6] = [
    "proc/self/maps",
    "proc/self/cgroup",
    "sys/devices/system/cpu/online",
    "etc/localtime",
    "etc/passwd",
    "usr/lib/x86_64-linux-gnu/gconv/gconv-modules.cache",
];

fn main() {
    if let Ok(what) = std::env::var(INSIDE) {
        let (sandbox, share) = what.split_once(':').unwrap();
        let sandbox = if sandbox == "chroot" { Sandbox::Chroot } else { Sandbox::Namespace };
        return inside(sandbox, Path::new(share));
    }
    if std::env::args().any(|argument| argument == "--list") {
        return;
    }
    for sandbox in ["namespace", "chroot"] {
        outside(sandbox);
        println!("test panics_find_no_files ({sandbox}) ... ok");
    }
}

fn outside(sandbox: &str) {
    assert!(rustix::process::geteuid().is_root(), "run the tests as root: they enter the sandbox");
    let directory = common::disk_directory();
    let share = directory.path().join("share");
    for trap in TRAPS {
        let path = share.join(trap);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mode = rustix::fs::Mode::from_raw_mode(0o666);
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        assert!(std::fs::metadata(path).unwrap().file_type().is_fifo());
    }
    let trace = directory.path().join("trace");
    let output = Command::new("timeout")
        .args(["60", "strace"])
        .args(strace::options(&trace))
        .arg(std::env::current_exe().unwrap())
        .env(INSIDE, format!("{sandbox}:{}", share.display()))
        .env("RUST_BACKTRACE", "full")
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {stderr}", output.status);
    assert!(stderr.contains("on purpose") && stderr.contains("stack backtrace"), "{stderr}");
    let calls = strace::inside(&trace);
    let absolute: Vec<_> = calls.iter().filter(|call| !call.absolute_paths().is_empty()).collect();
    assert!(absolute.len() >= 3, "libraries look for files here, or this shows nothing: {absolute:#?}");
    for call in absolute {
        assert!(call.0.contains(" = -1 E"), "{call:?}");
    }
}

fn inside(sandbox: Sandbox, share: &Path) {
    process::prepare_libraries();
    match sandbox::enter(Some(sandbox), share, &IdMaps::default()).unwrap() {
        Role::Supervisor(parent) => {
            use std::os::fd::AsFd;
            let signals = Signals::catch().unwrap();
            std::process::exit(parent.wait(signals.as_fd()).unwrap());
        }
        Role::Server(sandboxed) => {
            let needs = RequiredCaps { readonly: false, xattr: true, file_handles: true };
            sandbox::give_up_capabilities(needs, lanefsd::config::CapabilityChanges::NONE).unwrap();
            sandbox::install_seccomp(Seccomp::Kill, sandbox::Uses { file_handles: true, rings: false })
                .unwrap();
            let threads: Vec<_> =
                (0..40).map(|number| std::thread::spawn(move || go_wrong(number))).collect();
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            drop(sandboxed);
        }
    }
}

/// In one of many threads: memory, panics, and libraries in search of their files.
fn go_wrong(number: usize) {
    let memory = vec![1u8; 1000 + number];
    let caught = std::panic::catch_unwind(|| assert!(memory.len() < 1000, "on purpose"));
    assert!(caught.is_err());
    if number > 0 {
        return;
    }
    // The time zone, the user database, character sets, counts of CPUs and of memory.
    // SAFETY: plain calls of the C library with values of this thread alone.
    unsafe {
        let mut time = std::mem::zeroed();
        libc::localtime_r(&0, &mut time);
        let converter = libc::iconv_open(c"UTF-16".as_ptr(), c"KOI8-R".as_ptr());
        assert_eq!(converter as isize, -1, "a character set was found");
        libc::sysconf(libc::_SC_NPROCESSORS_ONLN);
    }
    assert!(std::fs::File::open("/etc/passwd").is_err());
    let _ = std::thread::available_parallelism();
    assert!(std::env::current_exe().is_err());
}
