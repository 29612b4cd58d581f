//! Which file is which: numbers that the host uses again, and inodes that have no descriptor.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fuse_protocol::abi::EntryOut;
use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::{Backend, Client, Session, SessionOptions};
use rustix::mount::{UnmountFlags, unmount};

use crate::common;

/// More inodes than the daemon may have descriptors for.
const OTHERS: usize = 80;
/// A limit of descriptors that the daemon keeps few inodes open with.
pub const FEW: &str = "--rlimit-nofile=64";

/// A file system of its own on a loop device, in the mounts of the test's thread.
pub struct Disk {
    pub path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Disk {
    /// Makes one with this program and its options.
    pub fn new(mkfs: &[&str], mebibytes: u64) -> Disk {
        common::own_mounts();
        let directory = common::disk_directory();
        let image = directory.path().join("image");
        fs::File::create(&image).unwrap().set_len(mebibytes << 20).unwrap();
        common::run(Command::new(mkfs[0]).args(&mkfs[1..]).arg(&image));
        let path = directory.path().join("mount");
        fs::create_dir(&path).unwrap();
        common::run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&path));
        Disk { path, _directory: directory }
    }

    /// One with ext4.
    pub fn ext4() -> Disk {
        // In one group of blocks: directories get the numbers of files, too.
        Disk::new(&["mkfs.ext4", "-q", "-F", "-b", "4096"], 32)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // It fails if the test has unmounted it already.
        let _ = unmount(&self.path, UnmountFlags::DETACH);
    }
}

/// A session with a back end that serves this directory.
pub fn serve_with(share: &Path, args: &[&str], options: SessionOptions) -> (Backend, Session) {
    let backend = common::starter().args(["--tmpfile"]).args(args).share(share).start().unwrap();
    let session = backend.connect(options).unwrap();
    (backend, session)
}

/// The same with the usual session options.
pub fn serve(share: &Path, args: &[&str]) -> (Backend, Session) {
    serve_with(share, args, SessionOptions::default())
}

/// A share with many files, of which a guest may know more than there are descriptors.
pub fn fill(share: &Path) {
    fs::create_dir(share.join("many")).unwrap();
    for number in 0..OTHERS {
        fs::write(share.join(format!("many/{number}")), "").unwrap();
    }
}

/// Looks at all of them: afterwards, what was not used lately has no descriptor.
pub fn look_at_others(client: &Client<'_>, many: u64) {
    for _ in 0..2 {
        for number in 0..OTHERS {
            let entry = client.lookup(many, number.to_string()).unwrap();
            client.getattr(entry.nodeid).unwrap();
        }
    }
}

/// How a guest may come to know a file that has just been made.
const WAYS: [&str; 10] = [
    "CREATE",
    "MKDIR",
    "MKNOD",
    "SYMLINK",
    "TMPFILE",
    "LOOKUP",
    "READDIRPLUS",
    "RENAME",
    "LINK",
    "CREATE of a file that is there",
];

/// CREATE without keeping the file open.
fn create(client: &Client<'_>, name: &str) -> EntryOut {
    let (entry, open) = client.create(ROOT, name, libc::O_RDWR, 0o600, 0).unwrap();
    client.release(entry.nodeid, open.fh).unwrap();
    entry
}

/// Makes something; its node and the inode number.
fn make(client: &Client<'_>, share: &Path, way: &str, name: &str) -> (u64, u64) {
    let by_host = || fs::write(share.join(name), name).unwrap();
    let entry = match way {
        "CREATE" => create(client, name),
        "MKDIR" => client.mkdir(ROOT, name, 0o700, 0).unwrap(),
        "MKNOD" => client.mknod(ROOT, name, libc::S_IFIFO | 0o600, 0, 0).unwrap(),
        "SYMLINK" => client.symlink(ROOT, name, "target").unwrap(),
        "TMPFILE" => {
            let (entry, open) = client.tmpfile(ROOT, libc::O_RDWR, 0o600).unwrap();
            works(client, entry.nodeid, way);
            assert_eq!(client.link(entry.nodeid, ROOT, name).unwrap().nodeid, entry.nodeid);
            client.release(entry.nodeid, open.fh).unwrap();
            entry
        }
        "LOOKUP" => {
            by_host();
            client.lookup(ROOT, name).unwrap()
        }
        "READDIRPLUS" => {
            by_host();
            let fh = client.opendir(ROOT).unwrap().fh;
            let entries = client.readdirplus(ROOT, fh, 0, 1 << 16).unwrap();
            client.releasedir(ROOT, fh).unwrap();
            entries.into_iter().find(|entry| entry.name == name.as_bytes()).unwrap().entry.unwrap()
        }
        "RENAME" => {
            let other = format!("{name}-other");
            create(client, &other);
            client.rename(ROOT, &other, ROOT, name).unwrap();
            client.lookup(ROOT, name).unwrap()
        }
        "LINK" => {
            let other = create(client, &format!("{name}-other"));
            let entry = client.link(other.nodeid, ROOT, name).unwrap();
            assert_eq!(entry.nodeid, other.nodeid);
            entry
        }
        _ => {
            by_host();
            create(client, name)
        }
    };
    (entry.nodeid, entry.attr.ino)
}

/// What a guest does with a file works, and says of which type it is.
fn works(client: &Client<'_>, node: u64, way: &str) {
    let mode = client.getattr(node).unwrap().mode & libc::S_IFMT;
    match mode {
        libc::S_IFREG => {
            let fh = client.open(node, libc::O_RDWR).unwrap_or_else(|error| panic!("{way}: {error}")).fh;
            client.write(node, fh, 0, b"text").unwrap();
            client.release(node, fh).unwrap();
        }
        libc::S_IFDIR => {
            client.mkdir(node, "inside", 0o700, 0).unwrap();
            client.rmdir(node, "inside").unwrap();
        }
        libc::S_IFLNK => assert_eq!(client.readlink(node).unwrap(), b"target"),
        _ => assert_eq!(common::errno(client.open(node, libc::O_RDONLY)), libc::ENXIO),
    }
}

fn remove(path: &Path, is_directory: bool) {
    if is_directory { fs::remove_dir(path).unwrap() } else { fs::remove_file(path).unwrap() }
}

/// The host, and so the guest itself, may be given the number of a removed file at once.
#[test]
fn a_reused_inode_number_is_a_new_file() {
    let disk = Disk::ext4();
    fill(&disk.path);
    let (_backend, session) = serve(&disk.path, &[FEW]);
    let client = session.client();
    let many = client.lookup(ROOT, "many").unwrap().nodeid;
    for way in WAYS {
        for old_is_directory in [false, true] {
            let mut met = 0;
            for round in 0..6 {
                let old_path = disk.path.join("old");
                if old_is_directory {
                    fs::create_dir(&old_path).unwrap()
                } else {
                    fs::write(&old_path, "").unwrap()
                }
                let old = client.lookup(ROOT, "old").unwrap();
                look_at_others(&client, many);
                match (round % 3, old_is_directory) {
                    (0, _) => remove(&old_path, old_is_directory),
                    (1, _) => {
                        let other = if old_is_directory {
                            client.mkdir(ROOT, "other", 0o700, 0).unwrap()
                        } else {
                            create(&client, "other")
                        };
                        client.rename(ROOT, "other", ROOT, "old").unwrap();
                        assert_eq!(client.lookup(ROOT, "old").unwrap().nodeid, other.nodeid);
                        // One more is looked at, and goes before the next round.
                        remove(&old_path, old_is_directory);
                        client.forget(other.nodeid, 2).unwrap();
                    }
                    (_, true) => client.rmdir(ROOT, "old").unwrap(),
                    (_, false) => client.unlink(ROOT, "old").unwrap(),
                }
                let (node, number) = make(&client, &disk.path, way, &format!("new-{round}"));
                met += usize::from(number == old.attr.ino);
                assert_ne!(node, old.nodeid, "{way}");
                works(&client, node, way);
                assert_eq!(common::errno(client.getattr(old.nodeid)), libc::ESTALE, "{way}");
                // The old one's FORGET is not the new one's.
                client.forget(old.nodeid, 1).unwrap();
                works(&client, node, way);
                look_at_others(&client, many);
                works(&client, node, way);
            }
            for entry in fs::read_dir(&disk.path).unwrap().map(Result::unwrap) {
                if entry.file_name().to_string_lossy().starts_with("new-") {
                    remove(&entry.path(), entry.file_type().unwrap().is_dir());
                }
            }
            assert!(met > 0, "{way}: no number was used again");
        }
    }
}

/// `..` of a directory that was moved into one with the number of a removed one that the guest knows.
#[test]
fn the_parent_is_not_a_removed_directory() {
    let disk = Disk::ext4();
    fill(&disk.path);
    fs::create_dir(disk.path.join("child")).unwrap();
    let (_backend, session) = serve(&disk.path, &[FEW]);
    let client = session.client();
    let many = client.lookup(ROOT, "many").unwrap().nodeid;
    let child = client.lookup(ROOT, "child").unwrap().nodeid;
    let mut met = 0;
    for round in 0..10 {
        let (old_path, new_path) = (disk.path.join("old"), disk.path.join(format!("new-{round}")));
        fs::create_dir(&old_path).unwrap();
        let old = client.lookup(ROOT, "old").unwrap();
        look_at_others(&client, many);
        fs::remove_dir(&old_path).unwrap();
        fs::create_dir(&new_path).unwrap();
        met += usize::from(fs::metadata(&new_path).unwrap().ino() == old.attr.ino);
        fs::rename(disk.path.join("child"), new_path.join("child")).unwrap();
        // A directory that the guest does not know is not told by this.
        assert_eq!(common::errno(client.lookup(child, "..")), libc::ESTALE);
        let new = client.lookup(ROOT, format!("new-{round}")).unwrap().nodeid;
        look_at_others(&client, many);
        assert_eq!(client.lookup(child, "..").unwrap().nodeid, new);
        assert_eq!(client.lookup(child, ".").unwrap().nodeid, child);
        assert_eq!(common::errno(client.lookup(old.nodeid, ".")), libc::ESTALE);
        fs::rename(new_path.join("child"), disk.path.join("child")).unwrap();
        client.forget(old.nodeid, 1).unwrap();
    }
    assert!(met > 0, "no number was used again");
}

/// The daemon opens what it has by file handle alone before it acts as the caller, who may not.
#[test]
fn a_user_leaves_a_whiteout_in_a_directory_that_is_held_by_handle() {
    let disk = Disk::ext4();
    fill(&disk.path);
    for name in ["from", "to"] {
        fs::create_dir(disk.path.join(name)).unwrap();
        fs::set_permissions(disk.path.join(name), fs::Permissions::from_mode(0o777)).unwrap();
    }
    let (_backend, session) = serve(&disk.path, &[FEW]);
    let client = session.client();
    let [many, from, to] = ["many", "from", "to"].map(|name| client.lookup(ROOT, name).unwrap().nodeid);
    fs::write(disk.path.join("from/file"), "").unwrap();
    look_at_others(&client, many);
    let user = client.user(1000, 1000);
    user.rename2(from, "file", to, "file", libc::RENAME_WHITEOUT).unwrap();
    let whiteout = fs::metadata(disk.path.join("from/file")).unwrap();
    assert_eq!((whiteout.mode() & libc::S_IFMT, whiteout.rdev()), (libc::S_IFCHR, 0));
}

/// Lookups by several queues, while inodes give up their descriptors and the host replaces files.
#[test]
fn lookups_that_race_with_the_host_find_files_that_work() {
    let disk = Disk::ext4();
    fill(&disk.path);
    let options = common::queues(4);
    let (backend, session) = serve_with(&disk.path, &["--rlimit-nofile=128"], options);
    let many = session.client().lookup(ROOT, "many").unwrap().nodeid;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for queue in 1..=4 {
            let (client, done) = (session.client().on(queue), &done);
            scope.spawn(move || {
                let mut number = queue;
                while !done.load(Ordering::Relaxed) {
                    number = (number + 7) % OTHERS;
                    let Ok(entry) = client.lookup(many, number.to_string()) else { continue };
                    if number % 3 == 0 {
                        // It may have been replaced since.
                        let _ = client
                            .open(entry.nodeid, libc::O_RDONLY)
                            .map(|open| client.release(entry.nodeid, open.fh));
                    }
                    client.forget(entry.nodeid, 1).unwrap();
                }
            });
        }
        let begin = Instant::now();
        let mut number = 0;
        while begin.elapsed() < Duration::from_secs(3) {
            number = (number + 1) % OTHERS;
            let path = disk.path.join(format!("many/{number}"));
            fs::remove_file(&path).unwrap();
            fs::write(&path, number.to_string()).unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
    let client = session.client();
    for number in 0..OTHERS {
        let entry = client.lookup(many, number.to_string()).unwrap();
        let host = fs::metadata(disk.path.join(format!("many/{number}"))).unwrap();
        let attr = client.getattr(entry.nodeid).unwrap();
        assert_eq!((attr.ino, attr.size), (host.ino(), host.size()));
        client.forget(entry.nodeid, 1).unwrap();
    }
    assert!(backend.descriptors().unwrap().len() <= 128);
}

/// Open files that have taken more than their half leave the other half to what is looked up.
#[test]
fn inodes_give_way_where_open_files_have_taken_the_descriptors() {
    let directory = common::disk_directory();
    fill(directory.path());
    let (_backend, session) = serve(directory.path(), &["--rlimit-nofile=320"]);
    let client = session.client();
    let many = client.lookup(ROOT, "many").unwrap().nodeid;
    let nodes: Vec<u64> =
        (0..OTHERS).map(|number| client.lookup(many, number.to_string()).unwrap().nodeid).collect();
    let mut open = 0;
    let refused = std::iter::repeat_with(|| client.open(nodes[0], libc::O_RDONLY)).find(|result| {
        open += 1;
        result.is_err()
    });
    assert_eq!(common::errno(refused.unwrap()), libc::EMFILE);
    assert!(open > 200, "{open} files are open, as inodes keep their descriptors");
    // What the guest knows can be looked up and used still.
    for (number, &node) in nodes.iter().enumerate() {
        assert_eq!(client.lookup(many, number.to_string()).unwrap().nodeid, node);
        client.getattr(node).unwrap();
    }
}

/// Queues take descriptors that no share of the guest's was counted for.
#[test]
fn requests_work_where_the_process_has_no_descriptor_left() {
    let disk = Disk::ext4();
    fill(&disk.path);
    // The device and the socket take about 62, and another process for each queue two.
    let settings =
        [("--no-survive", "--rlimit-nofile=72", 72), ("--max-deaths=5", "--rlimit-nofile=100", 100)];
    for (survive, nofile, limit) in settings {
        let (backend, session) = serve_with(&disk.path, &[survive, nofile], common::queues(4));
        let client = session.client();
        let many = client.lookup(ROOT, "many").unwrap().nodeid;
        for round in 0..3 {
            look_at_others(&client, many);
            assert_eq!(client.list_names(many, 4096).unwrap().len(), OTHERS);
            let file = client.lookup(many, round.to_string()).unwrap();
            let open = client.open(file.nodeid, libc::O_RDWR).unwrap();
            client.write(file.nodeid, open.fh, 0, b"text").unwrap();
            client.release(file.nodeid, open.fh).unwrap();
            assert_eq!(client.read_file(file.nodeid).unwrap(), b"text");
        }
        assert!(backend.descriptors().unwrap().len() <= limit);
    }
}
