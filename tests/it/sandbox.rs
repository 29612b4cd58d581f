//! The sandbox, looked at from outside.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use lanefsd_frontend::SessionOptions;
use lanefsd_frontend::client::{Change, ROOT};

use crate::common;

pub fn as_root() {
    assert!(rustix::process::geteuid().is_root(), "run the tests as root: without it there is no sandbox");
}

fn identity(path: impl AsRef<Path>) -> (u64, u64) {
    let metadata = fs::metadata(path).unwrap();
    (metadata.dev(), metadata.ino())
}

/// Starts a daemon in a sandbox, has it serve a little, and ends it; `look` sees the serving process.
fn in_sandbox(sandbox: &str, look: impl FnOnce(u32, &Path)) {
    as_root();
    let mut backend = common::starter().args([&format!("--sandbox={sandbox}"), "--xattr"]).start().unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    let client = session.client();
    let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    client.write(entry.nodeid, open.fh, 0, b"inside").unwrap();
    client.setattr(entry.nodeid, Change::default().mode(0o640)).unwrap();
    client.symlink(ROOT, "link", "/etc/passwd").unwrap();
    // What goes by a name below /proc/self/fd works without /proc in sight.
    client.link(entry.nodeid, ROOT, "second").unwrap();
    assert!(client.listxattr(entry.nodeid, 100).is_ok());
    assert_eq!(fs::read(backend.path("second")).unwrap(), b"inside");
    look(common::serving_process(backend.pid()), &backend.path(""));
    drop(session);
    backend.expect_success().unwrap();
    assert!(!backend.socket().exists(), "the socket is left behind");
}

/// Where one gets from a directory that the process has open by going up for as long as it goes.
fn top_of(directory: &Path) -> std::path::PathBuf {
    let mut path = directory.join(".");
    while identity(&path) != identity(path.join("..")) {
        path.push("..");
    }
    path
}

/// All directories that the process has in its hands: open ones, the working one, the root.
fn directories_of(pid: u32) -> Vec<std::path::PathBuf> {
    let process = std::path::PathBuf::from(format!("/proc/{pid}"));
    let open = fs::read_dir(process.join("fd")).unwrap().map(|entry| entry.unwrap().path());
    let all = open.chain([process.join("cwd"), process.join("root")]);
    all.filter(|path| fs::metadata(path).is_ok_and(|metadata| metadata.is_dir())).collect()
}

/// No directory that the process holds leads anywhere but to the share, its list of descriptors, and the
/// empty root.
fn no_way_out(pid: u32, share: &Path) {
    let descriptors = format!("/proc/{pid}/cwd");
    assert_eq!(identity(&descriptors), identity(format!("/proc/{pid}/fd")));
    let directories = directories_of(pid);
    assert!(directories.len() >= 4, "the root, the descriptors twice, the share: {directories:?}");
    for directory in directories {
        let top = identity(top_of(&directory));
        let allowed = [identity(share), identity(&descriptors), identity(format!("/proc/{pid}/root/"))];
        assert!(allowed.contains(&top), "{directory:?} leads out: {:?}", fs::read_link(&directory));
    }
}

/// The root directory of the process is empty, stays so, and is not the share.
pub fn has_an_empty_root(pid: u32, share: &Path) {
    let root = PathBuf::from(format!("/proc/{pid}/root/"));
    assert_ne!(identity(&root), identity(share));
    // In a directory that is removed nothing can be listed or made.
    let removed = fs::metadata(&root).unwrap().nlink() == 0;
    match fs::read_dir(&root) {
        Ok(entries) => assert_eq!(entries.count(), 0),
        Err(error) => assert!(removed && error.raw_os_error() == Some(libc::ENOENT), "{error}"),
    }
    let error = fs::write(root.join("new"), "").unwrap_err().raw_os_error();
    assert_eq!(error, Some(if removed { libc::ENOENT } else { libc::EROFS }));
}

/// The mounts in the mount namespace of the process, as `/proc/PID/mountinfo` has them for one whose root
/// is that of the namespace: the process's own root is elsewhere.
#[allow(unsafe_code)]
fn mounts_of(pid: u32) -> Vec<String> {
    use rustix::fs::{CWD, Mode, OFlags, openat};
    use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};
    use std::io::Read;
    use std::os::fd::AsFd;
    let look = move || {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let proc = openat(CWD, "/proc", flags | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let namespace = fs::File::open(format!("/proc/{pid}/ns/mnt")).unwrap();
        // SAFETY: this thread does nothing else, and shares neither its root nor its working directory.
        unsafe { unshare_unsafe(UnshareFlags::FS) }.unwrap();
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount)).unwrap();
        let mut text = String::new();
        let table = openat(&proc, "thread-self/mountinfo", flags, Mode::empty()).unwrap();
        fs::File::from(table).read_to_string(&mut text).unwrap();
        text.lines().map(str::to_owned).collect()
    };
    std::thread::spawn(look).join().unwrap()
}

#[test]
fn namespaces_hold_the_share_and_nothing_else() {
    in_sandbox("namespace", |pid, share| {
        for namespace in ["mnt", "pid", "net"] {
            let own = fs::read_link(format!("/proc/self/ns/{namespace}")).unwrap();
            assert_ne!(fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap(), own, "{namespace}");
        }
        let mounts = mounts_of(pid);
        assert_eq!(mounts.len(), 1, "more than the share is mounted: {mounts:#?}");
        for flag in ["nodev", "nosuid", "noexec"] {
            assert!(mounts[0].contains(flag), "the share is not {flag}: {}", mounts[0]);
        }
        assert_eq!(fs::read_to_string(format!("/proc/{pid}/mounts")).unwrap(), "");
        has_an_empty_root(pid, share);
        no_way_out(pid, share);
    });
}

#[test]
fn chroot_has_an_empty_root() {
    in_sandbox("chroot", |pid, share| {
        has_an_empty_root(pid, share);
        // From here one gets out of the share, as the daemon's root is not ours; but not to /proc.
        let descriptors = format!("/proc/{pid}/cwd");
        assert!(
            directories_of(pid).iter().filter(|path| identity(path) == identity(&descriptors)).count() > 1
        );
        assert_eq!(identity(format!("{descriptors}/..")), identity(&descriptors));
    });
}

/// All mounts of the share are nodev, nosuid and noexec for the daemon, and that changes nothing of what
/// is stored.
#[test]
fn devices_and_set_id_bits_are_stored_and_have_no_effect_for_the_daemon() {
    as_root();
    common::own_mounts();
    let share = tempfile::tempdir().unwrap();
    for place in ["", "below"] {
        let path = share.path().join(place);
        fs::create_dir_all(&path).unwrap();
        rustix::mount::mount("none", &path, "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
    }
    let mut backend = common::starter().args(["--sandbox=namespace"]).share(share.path()).start().unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    let client = session.client();
    let mounts = mounts_of(common::serving_process(backend.pid()));
    assert_eq!(mounts.len(), 2, "{mounts:#?}");
    assert!(mounts.iter().all(|mount| mount.contains("nosuid,nodev,noexec")), "{mounts:#?}");
    let below = client.lookup(ROOT, "below").unwrap().nodeid;
    for (directory, path) in [(ROOT, share.path().to_owned()), (below, share.path().join("below"))] {
        client.mknod(directory, "null", libc::S_IFCHR | 0o666, 0x103, 0).unwrap();
        assert_eq!(fs::metadata(path.join("null")).unwrap().rdev(), 0x103);
        let (program, _) = client.create(directory, "program", libc::O_RDWR, 0o755, 0).unwrap();
        client.setattr(program.nodeid, Change::default().mode(0o6755)).unwrap();
        assert_eq!(fs::metadata(path.join("program")).unwrap().mode() & 0o7777, 0o6755);
    }
    // Outside the mounts are as they were: what the guest has made works there.
    let outside = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let of_share = |line: &&str| line.contains(share.path().to_str().unwrap());
    assert!(outside.lines().filter(of_share).all(|line| !line.contains("nodev")), "{outside}");
    drop(session);
    backend.expect_success().unwrap();
    for place in ["below", ""] {
        let path = share.path().join(place);
        rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

/// Containers have filters that do not know the newer system calls.
#[test]
fn namespaces_work_without_the_newer_calls_for_mounts() {
    for call in ["mount_setattr", "fsopen", "fsmount"] {
        let mut backend = under_strace(&[&format!("inject={call}:error=ENOSYS")], &["--sandbox=namespace"]);
        let session = backend.connect(SessionOptions::default()).unwrap();
        session.client().mkdir(ROOT, call, 0o755, 0).unwrap();
        has_an_empty_root(common::serving_process(outer_of(&backend)), &backend.path(""));
        drop(session);
        backend.expect_success().unwrap();
    }
}

/// The daemon under strace(1), which makes system calls fail or late.
pub fn under_strace(injections: &[&str], args: &[&str]) -> lanefsd_frontend::Backend {
    as_root();
    assert!(Path::new("/usr/bin/strace").exists(), "strace is missing: apt-get install strace");
    let mut strace = vec!["-f", "-o", "/dev/null"];
    strace.extend(injections.iter().flat_map(|injection| ["-e", *injection]));
    let starter = lanefsd_frontend::Backend::of("strace").args(strace).args([common::program()]);
    starter.args(args).start().unwrap()
}

/// The process that strace has started.
pub fn outer_of(strace: &lanefsd_frontend::Backend) -> u32 {
    common::serving_process(strace.pid())
}

#[test]
fn the_root_of_the_host_can_be_shared() {
    as_root();
    for sandbox in ["namespace", "chroot", "none"] {
        let sandbox = format!("--sandbox={sandbox}");
        let mut backend = common::starter().args([&sandbox]).share("/").start().unwrap();
        let session = backend.connect(SessionOptions::default()).unwrap();
        let client = session.client();
        let proc = client.lookup(ROOT, "proc").unwrap().nodeid;
        assert_eq!(client.getattr(proc).unwrap().mode & libc::S_IFMT, libc::S_IFDIR, "{sandbox}");
        let handle = client.opendir(ROOT).unwrap().fh;
        let names = client.readdir(ROOT, handle, 0, 65536).unwrap();
        assert!(names.iter().any(|entry| entry.name == b"usr"), "{sandbox}");
        drop(session);
        backend.expect_success().unwrap();
    }
}

/// As a build environment does that is entered by chroot(1): the root is no mount.
#[test]
fn namespaces_work_in_a_chroot() {
    as_root();
    common::own_mounts();
    let root = tempfile::tempdir().unwrap();
    let tmp = std::env::temp_dir();
    let program = PathBuf::from(common::program());
    let places = [
        "/usr",
        "/lib",
        "/lib64",
        "/proc",
        tmp.to_str().unwrap(),
        program.parent().unwrap().to_str().unwrap(),
    ];
    for place in places.iter().filter(|place| Path::new(place).exists()) {
        let inside = root.path().join(place.trim_start_matches('/'));
        fs::create_dir_all(&inside).unwrap();
        rustix::mount::mount_bind_recursive(*place, &inside).unwrap();
    }
    let starter =
        lanefsd_frontend::Backend::of("chroot").args([root.path().as_os_str(), program.as_os_str()]);
    let mut backend = starter.args(["--sandbox=namespace"]).start().unwrap();
    let session = backend.connect(SessionOptions::default()).unwrap();
    session.client().mkdir(ROOT, "dir", 0o755, 0).unwrap();
    let (pid, share) = (common::serving_process(backend.pid()), backend.path(""));
    assert!(share.join("dir").exists());
    assert_eq!(mounts_of(pid).len(), 1);
    has_an_empty_root(pid, &share);
    drop(session);
    backend.expect_success().unwrap();
    rustix::mount::mount_change(root.path().join("proc"), rustix::mount::MountPropagationFlags::PRIVATE)
        .unwrap();
    for place in places.iter().rev().filter(|place| Path::new(place).exists()) {
        let inside = root.path().join(place.trim_start_matches('/'));
        rustix::mount::unmount(inside, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

/// As in an initramfs: the root of the namespace is the kernel's first file system, which nothing can take
/// the place of. Every machine has it below its root, empty in most.
#[test]
fn namespaces_work_on_an_initramfs() {
    use rustix::fs::{CWD, Mode, OFlags, openat};
    use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount};
    use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
    use std::os::fd::AsFd;
    as_root();
    common::own_mounts();
    let tmp = std::env::temp_dir();
    let program = PathBuf::from(common::program());
    let places = [
        "/usr",
        "/lib",
        "/lib64",
        "/proc",
        "/dev",
        tmp.to_str().unwrap(),
        program.parent().unwrap().to_str().unwrap(),
    ];
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let places = places.iter().filter(|place| Path::new(place).exists());
    let copies: Vec<_> = places.map(|place| (place, open_tree(CWD, *place, flags).unwrap())).collect();
    let own = openat(CWD, "/proc/thread-self/ns/mnt", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    unmount("/", UnmountFlags::DETACH).unwrap();
    move_into_link_name_space(own.unwrap().as_fd(), Some(LinkNameSpaceType::Mount)).unwrap();
    let mut made = Vec::new();
    for (place, copy) in &copies {
        let place = Path::new(place);
        let missing = place.ancestors().take_while(|path| !path.exists()).map(Path::to_owned);
        made.extend(missing);
        fs::create_dir_all(place).unwrap();
        move_mount(copy, "", CWD, place, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).unwrap();
    }
    for sandbox in ["namespace", "chroot"] {
        let sandbox = format!("--sandbox={sandbox}");
        let mut backend = common::starter().args([&sandbox]).start().unwrap();
        let session = backend.connect(SessionOptions::default()).unwrap();
        session.client().mkdir(ROOT, "dir", 0o755, 0).unwrap();
        let (pid, share) = (common::serving_process(backend.pid()), backend.path(""));
        assert!(share.join("dir").exists());
        has_an_empty_root(pid, &share);
        if sandbox.ends_with("namespace") {
            assert_eq!(mounts_of(pid).len(), 1, "{:#?}", mounts_of(pid));
            no_way_out(pid, &share);
        }
        drop(session);
        backend.expect_success().unwrap();
    }
    copies.iter().rev().for_each(|(place, _)| unmount(**place, UnmountFlags::DETACH).unwrap());
    made.iter().for_each(|path| drop(fs::remove_dir(path)));
}

/// What the host mounts below the share later is there, if the host's mounts are shared, as systemd makes
/// them.
#[test]
fn mounts_that_come_later_are_seen() {
    use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
    as_root();
    common::own_mounts();
    let share = tempfile::tempdir().unwrap();
    mount("none", share.path(), "tmpfs", MountFlags::empty(), None).unwrap();
    mount_change(share.path(), MountPropagationFlags::SHARED).unwrap();
    for sandbox in ["namespace", "chroot", "none"] {
        let place = share.path().join(sandbox);
        fs::create_dir(&place).unwrap();
        let args = [&format!("--sandbox={sandbox}"), "--announce-submounts"];
        let mut backend = common::starter().args(args).share(share.path()).start().unwrap();
        let session = backend.connect(SessionOptions::default()).unwrap();
        let client = session.client();
        let before = client.lookup(ROOT, sandbox).unwrap();
        mount("none", &place, "tmpfs", MountFlags::empty(), None).unwrap();
        fs::write(place.join("file"), "inside").unwrap();
        let after = client.lookup(ROOT, sandbox).unwrap();
        assert_ne!(after.nodeid, before.nodeid, "{sandbox}");
        assert_eq!(after.attr.flags, 1, "{sandbox}: it is not announced as another mount");
        client.lookup(after.nodeid, "file").unwrap();
        drop(session);
        backend.expect_success().unwrap();
        unmount(&place, UnmountFlags::DETACH).unwrap();
    }
    unmount(share.path(), UnmountFlags::DETACH).unwrap();
}

/// A volume that the host unmounts is free at once: the daemon's namespace has no copy of it.
#[test]
fn file_systems_outside_the_share_are_not_kept() {
    use rustix::fs::inotify;
    use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
    as_root();
    common::own_mounts();
    let maps = ["--sandbox=namespace", "--uid-map=:0:0:65536:", "--gid-map=:0:0:65536:"];
    for args in [&maps[..1], &maps[..], &["--sandbox=chroot"], &["--sandbox=none"]] {
        let volume = tempfile::tempdir().unwrap();
        mount("none", volume.path(), "tmpfs", MountFlags::empty(), None).unwrap();
        let mut backend = common::starter().args(args).start().unwrap();
        let session = backend.connect(SessionOptions::default()).unwrap();
        session.client().getattr(ROOT).unwrap();
        let events = inotify::init(inotify::CreateFlags::NONBLOCK).unwrap();
        inotify::add_watch(&events, volume.path(), inotify::WatchFlags::ATTRIB).unwrap();
        unmount(volume.path(), UnmountFlags::empty()).unwrap();
        // The kernel tells of the end of the file system itself, which is when nobody has it mounted.
        let mut buffer = [std::mem::MaybeUninit::uninit(); 512];
        let mut reader = inotify::Reader::new(&events, &mut buffer);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        loop {
            match reader.next() {
                Ok(event) if event.events().contains(inotify::ReadFlags::UNMOUNT) => break,
                Ok(_) => {}
                Err(_) => {
                    assert!(std::time::Instant::now() < deadline, "{args:?}: the file system lives on");
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
            }
        }
        drop(session);
        backend.expect_success().unwrap();
    }
}

/// As in a container with a filter of system calls that does not know CLONE_FS.
#[test]
fn acls_work_where_unshare_is_forbidden() {
    use fuse_protocol::flags::InitFlags;
    // strace makes a call fail by giving it another number, which the daemon's own filter forbids.
    let args = ["--sandbox=none", "--posix-acl", "--seccomp=none"];
    let mut backend = under_strace(&["inject=unshare:error=EPERM"], &args);
    let options = common::queues(2);
    let session = backend.connect(options).unwrap();
    assert!(session.init_flags().contains(InitFlags::DONT_MASK));
    // Many at once, so that many threads have to share one umask.
    std::thread::scope(|scope| {
        for queue in [1, 2] {
            let client = session.client().on(queue);
            scope.spawn(move || {
                for round in 0..100u32 {
                    let name = format!("{queue}-{round}");
                    let umask =
                        if round % 2 == 0 { 0o027 } else { 0o070 * u32::try_from(queue).unwrap() / 10 };
                    client.mkdir(ROOT, &name, 0o777, umask).unwrap();
                }
            });
        }
    });
    for queue in [1, 2u32] {
        for round in 0..100u32 {
            let umask = if round % 2 == 0 { 0o027 } else { 0o070 * queue / 10 };
            let mode = fs::metadata(backend.path(&format!("{queue}-{round}"))).unwrap().mode();
            assert_eq!(mode & 0o777, 0o777 & !umask, "{queue}-{round}");
        }
    }
    drop(session);
    backend.expect_success().unwrap();
    let told = backend.stderr().matches("unshare(2) is forbidden").count();
    assert_eq!(told, 1, "{}", backend.stderr());
}

#[test]
fn none_leaves_the_root_as_it_is() {
    in_sandbox("none", |pid, _| {
        assert_eq!(identity(format!("/proc/{pid}/root/")), identity("/"));
    });
}
