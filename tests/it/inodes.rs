//! Which file is which: numbers that the host uses again, subvolumes, mounts below the share, and hosts whose
//! numbers and file handles mean less than those of a local disk.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::common::fuse_host::{FuseHost, HostFile};
use fuse_protocol::abi::{Attr, EntryOut};
use fuse_protocol::flags::{AttrFlags, InitFlags};
use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::session::linux_init_flags;
use lanefsd_frontend::{Backend, Client, Session, SessionOptions};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount,
};

use crate::common;

/// More inodes than the daemon may have descriptors for.
const OTHERS: usize = 80;
const FEW: &str = "--rlimit-nofile=64";

/// A file system of its own on a loop device, in the mounts of the test's thread.
struct Disk {
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Disk {
    fn new(mkfs: &[&str], mebibytes: u64) -> Disk {
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

    fn ext4() -> Disk {
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

fn serve_with(share: &Path, args: &[&str], options: SessionOptions) -> (Backend, Session) {
    let backend = common::starter().args(["--tmpfile"]).args(args).share(share).start().unwrap();
    let session = backend.connect(options).unwrap();
    (backend, session)
}

fn serve(share: &Path, args: &[&str]) -> (Backend, Session) {
    serve_with(share, args, SessionOptions::default())
}

/// A share with many files, of which a guest may know more than there are descriptors.
fn fill(share: &Path) {
    fs::create_dir(share.join("many")).unwrap();
    for number in 0..OTHERS {
        fs::write(share.join(format!("many/{number}")), "").unwrap();
    }
}

/// Looks at all of them: afterwards, what was not used lately has no descriptor.
fn look_at_others(client: &Client<'_>, many: u64) {
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
fn what_gets_the_number_of_a_removed_inode_works() {
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
    let (_backend, session) = serve(directory.path(), &["--rlimit-nofile=300"]);
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
    let options = common::queues(4);
    // The device and the socket take about 62.
    let (backend, session) = serve_with(&disk.path, &["--rlimit-nofile=72"], options);
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
    assert!(backend.descriptors().unwrap().len() <= 72);
}

fn is_submount(attr: &Attr) -> bool {
    attr.flags & AttrFlags::SUBMOUNT.bits() != 0
}

#[test]
fn a_subvolume_is_a_file_system_of_its_own() {
    let disk = Disk::new(&["mkfs.btrfs", "-q"], 160);
    for name in ["a", "b"] {
        common::run(Command::new("btrfs").args(["subvolume", "create"]).arg(disk.path.join(name)));
        fs::write(disk.path.join(name).join("file"), name).unwrap();
    }
    let (_backend, session) = serve(&disk.path, &[FEW]);
    let client = session.client();
    let fh = client.opendir(ROOT).unwrap().fh;
    for listed in client.readdirplus(ROOT, fh, 0, 4096).unwrap() {
        let entry = listed.entry.unwrap();
        assert!(listed.name.starts_with(b".") || is_submount(&entry.attr), "{listed:?}");
    }
    let mut files = Vec::new();
    for name in ["a", "b"] {
        let subvolume = client.lookup(ROOT, name).unwrap();
        assert!(is_submount(&subvolume.attr));
        let file = client.lookup(subvolume.nodeid, "file").unwrap();
        assert!(!is_submount(&file.attr));
        assert_eq!(client.read_file(file.nodeid).unwrap(), name.as_bytes());
        files.push(file);
    }
    assert_eq!(
        files[0].attr.ino, files[1].attr.ino,
        "the number is the host's, as each has its own file system"
    );
    drop(session);

    // A guest that knows no submounts has one file system, in which no two files have one number.
    let flags = linux_init_flags() - InitFlags::SUBMOUNTS;
    let (_backend, session) =
        serve_with(&disk.path, &[], SessionOptions { init_flags: flags, ..SessionOptions::default() });
    let numbers = numbers_below(&session.client(), &["a", "b"]);
    assert_ne!(numbers[0], numbers[1]);
}

/// The numbers of `file` in each of these directories, which are the same in all kinds of replies.
fn numbers_below(client: &Client<'_>, names: &[&str]) -> Vec<u64> {
    let number = |name: &&str| {
        let directory = client.lookup(ROOT, *name).unwrap();
        assert!(!is_submount(&directory.attr));
        let file = client.lookup(directory.nodeid, "file").unwrap();
        let fh = client.opendir(directory.nodeid).unwrap().fh;
        let find = |entries: Vec<lanefsd_frontend::client::DirEntry>| {
            entries.into_iter().find(|entry| entry.name == b"file").unwrap()
        };
        let listed = find(client.readdir(directory.nodeid, fh, 0, 4096).unwrap());
        let plus = find(client.readdirplus(directory.nodeid, fh, 0, 4096).unwrap());
        let all = [
            file.attr.ino,
            listed.ino,
            plus.ino,
            plus.entry.unwrap().attr.ino,
            client.getattr(file.nodeid).unwrap().ino,
            client.statx(file.nodeid, 0).unwrap().ino,
        ];
        assert_eq!(all, [file.attr.ino; 6]);
        file.attr.ino
    };
    names.iter().map(number).collect()
}

/// Two new file systems in memory below a directory: their inodes have the same numbers.
fn with_twins(share: &Path) {
    for name in ["a", "b"] {
        let path = share.join(name);
        fs::create_dir(&path).unwrap();
        mount("tmpfs", &path, "tmpfs", MountFlags::empty(), None).unwrap();
        fs::write(path.join("file"), name).unwrap();
    }
}

#[test]
fn numbers_of_mounts_differ_where_the_guest_has_one_file_system() {
    common::own_mounts();
    let directory = common::disk_directory();
    with_twins(directory.path());
    let host = ["a", "b"].map(|name| fs::metadata(directory.path().join(name).join("file")).unwrap().ino());
    assert_eq!(host[0], host[1]);
    for (args, flags) in [
        (["--no-announce-submounts"], linux_init_flags()),
        (["--announce-submounts"], linux_init_flags() - InitFlags::SUBMOUNTS),
    ] {
        let options = SessionOptions { init_flags: flags, ..SessionOptions::default() };
        let (_backend, session) = serve_with(directory.path(), &args, options);
        let numbers = numbers_below(&session.client(), &["a", "b"]);
        assert_ne!(numbers[0], numbers[1]);
    }
    let (_backend, session) = serve(directory.path(), &[]);
    let client = session.client();
    for (name, number) in ["a", "b"].iter().zip(host) {
        let entry = client.lookup(ROOT, name).unwrap();
        assert!(is_submount(&entry.attr));
        assert_eq!(client.lookup(entry.nodeid, "file").unwrap().attr.ino, number);
    }
}

/// A file that is mounted over another one cannot be announced.
#[test]
fn a_file_that_is_mounted_has_a_number_for_itself() {
    common::own_mounts();
    let directory = common::disk_directory();
    with_twins(directory.path());
    for (name, place) in [("a", "first"), ("b", "second")] {
        fs::write(directory.path().join(place), "").unwrap();
        mount_bind(directory.path().join(name).join("file"), directory.path().join(place)).unwrap();
    }
    let (_backend, session) = serve(directory.path(), &[]);
    let client = session.client();
    let [first, second] = ["first", "second"].map(|name| client.lookup(ROOT, name).unwrap());
    assert_ne!(first.attr.ino, second.attr.ino);
    assert_eq!(client.getattr(first.nodeid).unwrap().ino, first.attr.ino);
    assert_eq!(client.read_file(first.nodeid).unwrap(), b"a");
    assert_eq!(client.read_file(second.nodeid).unwrap(), b"b");
}

fn can_be_unmounted(path: &Path) -> bool {
    let deadline = Instant::now() + Duration::from_secs(5);
    while unmount(path, UnmountFlags::empty()).is_err() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}

/// Mounts of this thread that show in namespaces made from it, as those of a host with systemd do.
fn shared_mounts() {
    common::own_mounts();
    mount_change("/", MountPropagationFlags::SHARED | MountPropagationFlags::REC).unwrap();
}

#[test]
fn a_file_system_that_the_guest_has_forgotten_can_be_unmounted() {
    shared_mounts();
    for args in [&["--sandbox=none"][..], &["--sandbox=namespace"], &["--inode-file-handles=never"]] {
        let limit = if args[0].contains("never") { "--rlimit-nofile=1000" } else { FEW };
        let directory = common::disk_directory();
        fill(directory.path());
        let sub = directory.path().join("sub");
        fs::create_dir(&sub).unwrap();
        let all_args = [args, &[limit, "--keep-listening"]].concat();
        let mount_it = || {
            mount("tmpfs", &sub, "tmpfs", MountFlags::empty(), None).unwrap();
            fs::write(sub.join("file"), "").unwrap();
        };
        mount_it();
        let backend = common::starter().args(&all_args).share(directory.path()).start().unwrap();
        let session = backend.connect(SessionOptions::default()).unwrap();
        let client = session.client();
        let many = client.lookup(ROOT, "many").unwrap().nodeid;
        let know = || {
            let directory = client.lookup(ROOT, "sub").unwrap();
            assert!(is_submount(&directory.attr));
            let file = client.lookup(directory.nodeid, "file").unwrap().nodeid;
            look_at_others(&client, many);
            (directory.nodeid, file)
        };
        let (node, file) = know();
        // Forgotten, but one file is open.
        let fh = client.open(file, libc::O_RDWR).unwrap().fh;
        client.forget(file, 1).unwrap();
        client.forget(node, 1).unwrap();
        assert!(unmount(&sub, UnmountFlags::empty()).is_err(), "{all_args:?}");
        client.release(file, fh).unwrap();
        assert!(can_be_unmounted(&sub), "{all_args:?}: busy after the last FORGET");
        mount_it();
        // Now with nothing forgotten: the session's end does it.
        let (_, file) = know();
        client.open(file, libc::O_RDWR).unwrap();
        drop(session);
        assert!(can_be_unmounted(&sub), "{all_args:?}: busy after the session");
    }
}

#[test]
fn what_is_mounted_while_the_daemon_runs_is_seen_and_let_go() {
    shared_mounts();
    for sandbox in ["--sandbox=none", "--sandbox=namespace"] {
        let directory = common::disk_directory();
        fill(directory.path());
        let sub = directory.path().join("sub");
        fs::create_dir(&sub).unwrap();
        let (_backend, session) = serve(directory.path(), &[sandbox, FEW]);
        let client = session.client();
        let many = client.lookup(ROOT, "many").unwrap().nodeid;
        let before = client.lookup(ROOT, "sub").unwrap();
        for _ in 0..3 {
            mount("tmpfs", &sub, "tmpfs", MountFlags::empty(), None).unwrap();
            fs::write(sub.join("file"), "").unwrap();
            let found = client.lookup(ROOT, "sub").unwrap();
            assert!(is_submount(&found.attr) && found.nodeid != before.nodeid, "{sandbox}");
            let file = client.lookup(found.nodeid, "file").unwrap();
            look_at_others(&client, many);
            client.forget(file.nodeid, 1).unwrap();
            client.forget(found.nodeid, 1).unwrap();
            assert!(can_be_unmounted(&sub), "{sandbox}: busy");
            let again = client.lookup(ROOT, "sub").unwrap();
            assert_eq!(again.nodeid, before.nodeid);
        }
    }
}

/// A FUSE server's numbers may stand for several files, and its handles end when the kernel forgets.
#[test]
fn files_of_a_fuse_host_are_told_apart_and_keep_their_descriptors() {
    common::own_mounts();
    let directory = common::disk_directory();
    let files =
        (0..100).map(|number| HostFile { name: format!("file{number}"), shown: 1000 + number % 7 }).collect();
    let host = FuseHost::mount(directory.path(), files, |index| index as u64 + 1);
    let (status, text) =
        common::starter().args(["--inode-file-handles=mandatory"]).share(directory.path()).refuse().unwrap();
    assert_eq!(status.code(), Some(1));
    assert!(text.contains("FUSE") && text.contains("--inode-file-handles"), "{text}");
    for args in [["--sandbox=none", "--rlimit-nofile=200"], ["--sandbox=namespace", "--rlimit-nofile=200"]] {
        let (_backend, session) = serve(directory.path(), &args);
        let client = session.client();
        let nodes: Vec<u64> =
            host.names().iter().map(|name| client.lookup(ROOT, name).unwrap().nodeid).collect();
        for (name, &node) in host.names().iter().zip(&nodes) {
            assert_eq!(client.lookup(ROOT, name).unwrap().nodeid, node);
            assert_eq!(client.read_file(node).unwrap(), name.as_bytes());
        }
        assert_eq!(client.lookup(ROOT, ".").unwrap().nodeid, ROOT);
    }
}

/// The same below a share whose own inodes may be held by handle.
#[test]
fn a_fuse_file_system_below_the_share_keeps_its_descriptors() {
    common::own_mounts();
    let directory = common::disk_directory();
    fill(directory.path());
    let sub = directory.path().join("sub");
    fs::create_dir(&sub).unwrap();
    let files =
        (0..60).map(|number| HostFile { name: format!("file{number}"), shown: 1000 + number }).collect();
    let host = FuseHost::mount(&sub, files, |index| index as u64 + 1);
    for sandbox in ["--sandbox=none", "--sandbox=namespace"] {
        let (mut backend, session) =
            serve(directory.path(), &[sandbox, "--rlimit-nofile=200", "--inode-file-handles=mandatory"]);
        let client = session.client();
        let node = client.lookup(ROOT, "sub").unwrap().nodeid;
        let many = client.lookup(ROOT, "many").unwrap().nodeid;
        let nodes: Vec<u64> =
            host.names().iter().map(|name| client.lookup(node, name).unwrap().nodeid).collect();
        look_at_others(&client, many);
        // What the host's kernel does when memory is short.
        fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
        for (name, &file) in host.names().iter().zip(&nodes) {
            assert_eq!(client.read_file(file).unwrap(), name.as_bytes());
            client.forget(file, 1).unwrap();
        }
        assert!(backend.descriptors().unwrap().len() <= 200);
        // It is said once, however often the guest comes back.
        for _ in 0..3 {
            client.forget(node, u64::MAX).unwrap();
            client.lookup(ROOT, "sub").unwrap();
        }
        common::wait_for_words(&mut backend, "takes a descriptor");
        assert_eq!(backend.stderr().matches("takes a descriptor").count(), 1, "{}", backend.stderr());
    }
}

/// The guest asks once, as it has one file system.
#[test]
fn syncfs_reaches_mounts_that_are_not_announced() {
    let disk = Disk::ext4();
    let directory = common::disk_directory();
    let sub = directory.path().join("sub");
    fs::create_dir(&sub).unwrap();
    mount_bind(&disk.path, &sub).unwrap();
    let (_backend, session) = serve(directory.path(), &["--no-announce-submounts"]);
    let client = session.client();
    let node = client.lookup(ROOT, "sub").unwrap().nodeid;
    let text = b"a line that is to be found on the disk".repeat(1000);
    fs::write(sub.join("file"), &text).unwrap();
    client.lookup(node, "file").unwrap();
    let image = disk.path.parent().unwrap().join("image");
    let is_on_disk = || fs::read(&image).unwrap().windows(500).any(|bytes| *bytes == text[..500]);
    assert!(!is_on_disk());
    client.syncfs(ROOT).unwrap();
    assert!(is_on_disk());
    unmount(&sub, UnmountFlags::DETACH).unwrap();
}
