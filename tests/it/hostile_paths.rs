//! Ways out of the share by what lies in it: directories that are moved away, links that only the host's
//! kernel understands, and other mounts.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use lanefsd_frontend::client::{Change, ROOT};
use lanefsd_frontend::{Backend, Client, Session};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};

use crate::common;

/// A share with a neighbour that is none of the guest's business, on one file system.
struct Yard {
    backend: Backend,
    session: Session,
    directory: tempfile::TempDir,
}

impl Yard {
    fn new(args: &[&str]) -> Yard {
        Yard::with(args, |_| {})
    }

    /// `prepare` gets the share before the daemon starts.
    fn with(args: &[&str], prepare: impl FnOnce(&Path)) -> Yard {
        let directory = common::disk_directory();
        let share = directory.path().join("share");
        fs::create_dir_all(&share).unwrap();
        fs::create_dir(directory.path().join("outside")).unwrap();
        fs::write(directory.path().join("outside/secret"), "outside").unwrap();
        prepare(&share);
        let backend = common::starter().args(args).share(&share).start().unwrap();
        let session = backend.connect(common::queues(2)).unwrap();
        Yard { backend, session, directory }
    }

    fn outside(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join("outside").join(name)
    }

    /// The guest has changed nothing outside, and is served.
    fn intact(&self) {
        assert_eq!(fs::read(self.outside("secret")).unwrap(), b"outside");
        for queue in [1, 2] {
            self.session.client().on(queue).getattr(ROOT).unwrap();
        }
    }
}

/// Inode numbers that no answer may have: the neighbour and the directory of both.
fn forbidden(yard: &Yard) -> [u64; 2] {
    [yard.directory.path(), &yard.outside("")].map(|path| fs::metadata(path).unwrap().ino())
}

/// Attack: `..` again and again from a directory that was moved out of the share.
/// Outcome: ESTALE; nothing above it is found.
#[test]
fn parents_of_a_directory_that_was_moved_out() {
    for handles in ["never", "prefer"] {
        let yard = Yard::new(&["--cache=never", &format!("--inode-file-handles={handles}")]);
        fs::create_dir_all(yard.backend.path("a/b/c")).unwrap();
        let client = yard.session.client();
        let known = ["a", "a/b", "a/b/c"].map(|path| client.walk(ROOT, path).unwrap().nodeid);
        fs::rename(yard.backend.path("a"), yard.outside("a")).unwrap();
        // What is known among themselves is found still, and the chain ends there.
        assert_eq!(client.lookup(known[2], "..").unwrap().nodeid, known[1]);
        assert_eq!(client.lookup(known[1], "..").unwrap().nodeid, known[0]);
        for _ in 0..10 {
            assert_eq!(common::errno(client.lookup(known[0], "..")), libc::ESTALE);
        }
        // A name is one component, so it is no way up either.
        for name in ["../secret", "../../outside/secret"] {
            assert_eq!(common::errno(client.lookup(known[0], name)), libc::EINVAL);
        }
        assert_eq!(client.lookup(ROOT, "..").unwrap().nodeid, ROOT);
        yard.intact();
    }
}

/// Attack: a directory moved out of the share and back while the guest walks up and down in it.
/// Outcome: every answer is of the share, or an errno.
#[test]
fn a_directory_that_is_moved_out_while_the_guest_walks() {
    let yard = Yard::new(&["--cache=never"]);
    fs::create_dir_all(yard.backend.path("dir/below")).unwrap();
    fs::write(yard.backend.path("dir/below/file"), "inside").unwrap();
    let (inside, outside) = (yard.backend.path("dir"), yard.outside("dir"));
    let forbidden = forbidden(&yard);
    let client = yard.session.client();
    let dir = client.lookup(ROOT, "dir").unwrap().nodeid;
    let stop = AtomicBool::new(false);
    let (mut found, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                fs::rename(&inside, &outside).unwrap();
                std::thread::yield_now();
                fs::rename(&outside, &inside).unwrap();
            }
        });
        for round in 0..4000 {
            let client = client.on(1 + round % 2);
            for (node, name) in [(dir, ".."), (ROOT, "dir"), (dir, "below"), (ROOT, "outside")] {
                match client.lookup(node, name) {
                    Ok(entry) => {
                        assert!(!forbidden.contains(&entry.attr.ino), "{name} leads out");
                        assert!(name != ".." || entry.nodeid == ROOT);
                        found += 1;
                    }
                    Err(error) => {
                        assert!(error.errno().is_some(), "{error}");
                        refused += 1;
                    }
                }
            }
            let _ = client.create(dir, "made", libc::O_RDWR, 0o600, 0);
            let _ = client.rename(dir, "made", ROOT, "secret");
            let _ = client.unlink(ROOT, "secret");
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(found > 100 && refused > 100, "{found} found, {refused} refused: the race was not run");
    assert_eq!(fs::read_dir(yard.outside("")).unwrap().count(), 1, "something was left outside");
    yard.intact();
}

/// Tries to get through the symbolic link `name`, which the guest may only read.
fn is_only_read(client: &Client<'_>, parent: u64, name: &str) {
    let entry = client.lookup(parent, name).unwrap();
    let node = entry.nodeid;
    assert_eq!(entry.attr.mode & libc::S_IFMT, libc::S_IFLNK, "{name}");
    for flags in [libc::O_RDONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_DIRECTORY, libc::O_PATH] {
        assert_eq!(common::errno(client.open(node, flags)), libc::ELOOP, "{name}");
        assert!(common::errno(client.create(parent, name, flags, 0o600, 0)) > 0, "{name}");
    }
    assert_eq!(common::errno(client.opendir(node)), libc::ENOTDIR, "{name}");
    for below in ["secret", "etc", ".."] {
        assert_eq!(common::errno(client.lookup(node, below)), libc::ENOTDIR, "{below} below {name}");
    }
    assert!(common::errno(client.mkdir(node, "new", 0o700, 0)) > 0, "{name}");
    assert!(common::errno(client.setattr(node, Change::none().size(0))) > 0, "{name}");
    assert!(common::errno(client.setattr(node, Change::none().mode(0o777))) > 0, "{name}");
}

/// Attack: links of /proc, whose targets no path can name, and links to them.
/// Outcome: they are read, never followed.
#[test]
fn magic_links_are_never_followed() {
    common::own_mounts();
    let yard = Yard::with(&["--xattr"], |share| {
        fs::create_dir(share.join("proc")).unwrap();
        mount("proc", share.join("proc"), "proc", MountFlags::empty(), None).unwrap();
    });
    let client = yard.session.client();
    for (name, target) in [
        ("root", "/proc/self/root"),
        ("cwd", "/proc/self/cwd"),
        ("fd", "/proc/self/fd/3"),
        ("up", "../outside/secret"),
        ("absolute", "/etc/passwd"),
    ] {
        symlink(target, yard.backend.path(name)).unwrap();
        is_only_read(&client, ROOT, name);
        assert_eq!(client.readlink(client.lookup(ROOT, name).unwrap().nodeid).unwrap(), target.as_bytes());
    }
    // The real ones: those of the daemon and of the test.
    for pid in [yard.backend.pid(), std::process::id()] {
        let process = client.walk(ROOT, &format!("proc/{pid}")).unwrap().nodeid;
        for name in ["root", "cwd", "exe"] {
            is_only_read(&client, process, name);
        }
        let fds = client.lookup(process, "fd").unwrap().nodeid;
        is_only_read(&client, fds, "0");
    }
    yard.intact();
    drop(yard.session);
    unmount(yard.directory.path().join("share/proc"), UnmountFlags::DETACH).unwrap();
}

/// Attack: mount points in the share, and a mount over a directory that the guest knows.
/// Outcome: `..` stays in the share; EBUSY and EXDEV as on the host.
#[test]
fn mounts_in_the_share() {
    common::own_mounts();
    let yard = Yard::with(&[], |share| {
        fs::create_dir_all(share.join("dir/point")).unwrap();
        fs::create_dir(share.join("bound")).unwrap();
        mount("tmpfs", share.join("dir/point"), "tmpfs", MountFlags::empty(), None).unwrap();
        mount_bind(share.parent().unwrap().join("outside"), share.join("bound")).unwrap();
        fs::create_dir(share.join("dir/point/below")).unwrap();
    });
    let client = yard.session.client();
    let dir = client.lookup(ROOT, "dir").unwrap().nodeid;
    let point = client.lookup(dir, "point").unwrap().nodeid;
    let below = client.lookup(point, "below").unwrap().nodeid;
    assert_eq!(client.lookup(below, "..").unwrap().nodeid, point);
    assert_eq!(client.lookup(point, "..").unwrap().nodeid, dir);
    // What the host has mounted into the share belongs to it; what lies above that does not.
    let bound = client.lookup(ROOT, "bound").unwrap().nodeid;
    assert_eq!(client.lookup(bound, "..").unwrap().nodeid, ROOT);
    for (parent, name) in [(dir, "point"), (ROOT, "bound")] {
        assert_eq!(common::errno(client.rmdir(parent, name)), libc::EBUSY);
        assert_eq!(common::errno(client.rename(parent, name, ROOT, "moved")), libc::EBUSY);
    }
    assert_eq!(common::errno(client.rename(point, "below", ROOT, "below")), libc::EXDEV);
    let (file, _) = client.create(dir, "file", libc::O_RDWR, 0o600, 0).unwrap();
    assert_eq!(common::errno(client.link(file.nodeid, point, "link")), libc::EXDEV);
    // A mount that comes later hides nothing of what the guest holds, and is found by its name.
    mount("tmpfs", yard.backend.path("dir"), "tmpfs", MountFlags::empty(), None).unwrap();
    let over = client.lookup(ROOT, "dir").unwrap().nodeid;
    assert_ne!(over, dir);
    assert_eq!(client.lookup(over, "..").unwrap().nodeid, ROOT);
    client.lookup(dir, "file").unwrap();
    yard.intact();
    drop(yard.session);
    for name in ["dir", "dir/point", "bound"] {
        unmount(yard.directory.path().join("share").join(name), UnmountFlags::DETACH).unwrap();
    }
}
