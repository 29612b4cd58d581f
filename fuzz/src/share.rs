//! The whole server over a real directory: what it is asked for stays inside of it, the thread is the
//! daemon again after each request, and nothing is left open.
//!
//! The directory lies on a tmpfs beside another one that no guest may see or change, and links lead there.
//! Now and then the host changes what the guest looks at.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use lanefsd::config::{CachePolicy, FsConfig, InodeFileHandles, Insistence};
use lanefsd::fs::FileSystem;
use lanefsd::fs::passthrough::PassthroughFs;
use lanefsd::fs::read_only::ReadOnly;
use rustix::fs::{
    AtFlags, CWD, Dev, FileType, Mode, OFlags, RenameFlags, mknodat, openat, renameat_with, unlinkat,
};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::process::{Resource, Rlimit, getgroups, setrlimit, umask};
use rustix::thread::{CapabilitySets, UnshareFlags, capabilities, unshare_unsafe};

use crate::input::Input;
use crate::server::{Ground, Guest, Setting, run};

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

/// Serves the requests that `data` tells: a byte for the settings, then requests.
pub fn serve(data: &[u8]) {
    static BASE_IS_MADE: OnceLock<()> = OnceLock::new();
    BASE_IS_MADE.get_or_init(make_base);
    let mut input = Input::new(data);
    let choice = input.byte();
    populate();
    let descriptors = if choice & 1 == 0 { ENOUGH } else { FEW };
    let descriptors = Rlimit { current: Some(descriptors), maximum: Some(ENOUGH) };
    setrlimit(Resource::Nofile, descriptors).expect("the limit can be set");
    let open_before = open_descriptors();
    let passthrough = PassthroughFs::new(directory(SHARE), directory("/proc/self/fd"), config(choice));
    let passthrough = passthrough.expect("the share can be served");
    let fs: Arc<dyn FileSystem> = match choice >> 6 {
        3 => Arc::new(ReadOnly::new(passthrough)),
        _ => Arc::new(passthrough),
    };
    let ground = Host { outside: Outside::now(), capabilities: capabilities(None).expect("capget(2) works") };
    let setting = Setting { fs, ground: Arc::new(ground), keeps_data: true, waits_end: false };
    run(&mut input, setting);
    assert_eq!(open_descriptors(), open_before, "descriptors are left open");
}

fn config(choice: u8) -> FsConfig {
    let yes = |bit: u8| choice & bit != 0;
    FsConfig {
        inode_file_handles: if yes(2) { InodeFileHandles::Prefer } else { InodeFileHandles::Never },
        cache: if yes(4) { CachePolicy::Never } else { CachePolicy::Auto },
        writeback: yes(8),
        posix_acl: if yes(16) { Insistence::Auto } else { Insistence::Never },
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

fn directory(path: &str) -> OwnedFd {
    openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).expect("it is there")
}

fn open_descriptors() -> usize {
    fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

/// What lies beside the share.
#[derive(Debug, PartialEq, Eq)]
struct Outside {
    names: Vec<String>,
    content: Vec<u8>,
    /// Mode, owner, links and times of the directory and of the file.
    attributes: Vec<[i64; 7]>,
}

impl Outside {
    fn now() -> Outside {
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
        Outside { names, content: fs::read(secret).expect("it is there"), attributes: attributes.to_vec() }
    }
}

/// The host around the share.
struct Host {
    outside: Outside,
    capabilities: CapabilitySets,
}

impl Ground for Host {
    fn after_request(&self, _guest: &Guest, reply: &[u8]) {
        assert!(!reply.windows(SECRET.len()).any(|part| part == SECRET), "a guest read what lies outside");
        // The thread is the daemon's again.
        assert!(rustix::process::geteuid().is_root() && rustix::process::getegid().is_root());
        assert_eq!(getgroups().expect("getgroups(2) works"), []);
        assert_eq!(umask(Mode::empty()), Mode::empty());
        assert_eq!(capabilities(None).expect("capget(2) works"), self.capabilities);
    }

    fn disturb(&self, input: &mut Input<'_>) -> bool {
        let at = |name: &str| format!("{SHARE}/{name}");
        let swap_for_link = |name: &str, target: &str| {
            let _ = renameat_with(CWD, at(name), CWD, at("old"), RenameFlags::empty());
            let _ = symlink(target, at(name));
        };
        match input.byte() % 8 {
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
        true
    }

    fn at_end(&self) {
        assert_eq!(Outside::now(), self.outside, "something was changed outside of the share");
    }
}
