//! Requests at the wrong time, with handles and nodes of others, names that are none, on a share that
//! changes under way, and more of them than there is room for.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fuse_protocol::opcode::Opcode;
use lanefsd_frontend::client::{Change, Lock, ROOT};
use lanefsd_frontend::connection::Connection;
use lanefsd_frontend::{Backend, Client, Request, Session};

use crate::common;

fn two_queues(args: &[&str]) -> (Backend, Session) {
    common::serve_with(args, common::queues(2))
}

/// Attack: requests before INIT and after DESTROY.
/// Outcome: ENOTCONN.
#[test]
fn requests_outside_a_session_are_refused() {
    let backend = common::start(&[]);
    let session = Session::start(Connection::connect(backend.socket()).unwrap(), common::queues(2)).unwrap();
    let refused = |when: &str| {
        for queue in [1, 2] {
            let client = session.client().on(queue);
            for errno in [
                common::errno(client.getattr(ROOT)),
                common::errno(client.lookup(ROOT, "name")),
                common::errno(client.mkdir(ROOT, "name", 0o700, 0)),
                common::errno(client.opendir(ROOT)),
                common::errno(client.read(ROOT, 1, 0, 10)),
                common::errno(client.write(ROOT, 1, 0, b"x")),
                common::errno(client.destroy()),
            ] {
                assert_eq!(errno, libc::ENOTCONN, "{when} on queue {queue}");
            }
            client.forget(ROOT, 1).unwrap();
        }
    };
    refused("before INIT");
    session.init().unwrap();
    common::every_queue_answers(&session);
    session.client().destroy().unwrap();
    refused("after DESTROY");
    session.init().unwrap();
    common::every_queue_answers(&session);
    assert_eq!(fs::read_dir(backend.share()).unwrap().count(), 0);
}

/// Attack: INIT and DESTROY in the middle of other requests.
/// Outcome: an answer or an errno; nothing is left open.
#[test]
fn init_and_destroy_in_the_middle_of_everything() {
    let (backend, session) = two_queues(&[]);
    fs::write(backend.path("file"), [1; 5000]).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for queue in [1, 2] {
            let (client, stop) = (session.client().on(queue), &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    // Any of it may be refused; what is answered has to be right.
                    let Ok(entry) = client.lookup(ROOT, "file") else { continue };
                    let Ok(open) = client.open(entry.nodeid, libc::O_RDWR) else { continue };
                    let read = client.read(entry.nodeid, open.fh, 0, 5000);
                    assert!(read.is_err() || read.unwrap() == [1; 5000]);
                    let _ = client.release(entry.nodeid, open.fh);
                    let _ = client.forget(entry.nodeid, 1);
                }
            });
        }
        for round in 0..200 {
            if round % 2 == 0 {
                session.client().destroy().unwrap();
            }
            session.init_with(45, session.options().init_flags).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    common::every_queue_answers(&session);
    session.client().destroy().unwrap();
    // Nothing of the sessions is left behind.
    let open = backend.descriptors().unwrap();
    let name = backend.path("file");
    assert!(open.iter().all(|descriptor| Path::new(descriptor) != name), "{open:?}");
}

/// Attack: handles of other nodes, kinds and times.
/// Outcome: EBADF; no data changes.
#[test]
fn handles_of_another_file_kind_or_time() {
    let (backend, session) = two_queues(&["--posix-lock"]);
    let client = session.client();
    let (one, one_open) = client.create(ROOT, "one", libc::O_RDWR, 0o600, 0).unwrap();
    let (two, two_open) = client.create(ROOT, "two", libc::O_RDWR, 0o600, 0).unwrap();
    let dir = client.opendir(ROOT).unwrap();
    client.write(one.nodeid, one_open.fh, 0, b"one").unwrap();
    // The handle of another node, of a directory, and of a file that was closed.
    client.release(two.nodeid, two_open.fh).unwrap();
    for (node, fh) in
        [(two.nodeid, one_open.fh), (ROOT, one_open.fh), (one.nodeid, dir.fh), (two.nodeid, two_open.fh)]
    {
        assert_eq!(common::errno(client.read(node, fh, 0, 10)), libc::EBADF);
        assert_eq!(common::errno(client.write(node, fh, 0, b"x")), libc::EBADF);
        assert_eq!(common::errno(client.fsync(node, fh, false)), libc::EBADF);
        assert_eq!(common::errno(client.flush(node, fh, 0)), libc::EBADF);
        assert_eq!(common::errno(client.lseek(node, fh, 0, libc::SEEK_DATA)), libc::EBADF);
        assert_eq!(common::errno(client.fallocate(node, fh, 0, 0, 10)), libc::EBADF);
        assert_eq!(common::errno(client.readdir(node, fh, 0, 4096)), libc::EBADF);
        assert_eq!(common::errno(client.release(node, fh)), libc::EBADF);
        assert_eq!(common::errno(client.releasedir(node, fh)), libc::EBADF);
        assert!(common::errno(client.setlk(node, fh, Lock::posix(1, libc::F_WRLCK, 0, 1))) > 0);
        let other = (one.nodeid, one_open.fh, 0);
        assert_eq!(common::errno(client.copy_file_range((node, fh, 0), other, 3)), libc::EBADF);
        assert_eq!(common::errno(client.copy_file_range(other, (node, fh, 0), 3)), libc::EBADF);
    }
    // The right handle for the wrong operation.
    assert!(common::errno(client.read(ROOT, dir.fh, 0, 10)) > 0);
    assert!(common::errno(client.write(ROOT, dir.fh, 0, b"x")) > 0);
    assert!(common::errno(client.readdir(one.nodeid, one_open.fh, 0, 4096)) > 0);
    assert!(common::errno(client.fallocate(ROOT, dir.fh, 0, 0, 10)) > 0);
    assert!(common::errno(client.lseek(ROOT, dir.fh, 0, libc::SEEK_DATA)) > 0);
    // Open for reading only.
    let reader = client.open(one.nodeid, libc::O_RDONLY).unwrap();
    assert_eq!(common::errno(client.write(one.nodeid, reader.fh, 0, b"x")), libc::EBADF);
    // Of all that only the first write arrived.
    assert_eq!(fs::read(backend.path("one")).unwrap(), b"one");
    assert_eq!(fs::read(backend.path("two")).unwrap(), b"");
    common::every_queue_answers(&session);
}

/// Attack: nodes forgotten, twice and too often.
/// Outcome: an errno; the root stays.
#[test]
fn nodes_that_were_forgotten() {
    let (_backend, session) = two_queues(&[]);
    let client = session.client();
    let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    client.forget(entry.nodeid, u64::MAX).unwrap();
    client.forget_batch(&[(entry.nodeid, 1), (entry.nodeid, u64::MAX), (ROOT, u64::MAX), (0, 7)]).unwrap();
    // The root stays whatever is said; a stale node is refused.
    common::every_queue_answers(&session);
    assert!(common::errno(client.getattr(entry.nodeid)) > 0);
    assert!(common::errno(client.open(entry.nodeid, libc::O_RDWR)) > 0);
    assert!(common::errno(client.link(entry.nodeid, ROOT, "link")) > 0);
    assert!(common::errno(client.rename(entry.nodeid, "a", ROOT, "b")) > 0);
    let _ = client.release(entry.nodeid, open.fh);
    let again = client.lookup(ROOT, "file").unwrap();
    assert_ne!(again.nodeid, entry.nodeid, "the number of a forgotten node means another one");
    common::every_queue_answers(&session);
}

/// Sends one name in every operation that takes one.
fn everywhere(client: Client<'_>, node: u64, name: &[u8]) -> Vec<(&'static str, Result<(), i32>)> {
    fn outcome<T>(result: lanefsd_frontend::Result<T>) -> Result<(), i32> {
        result.map(drop).map_err(|error| error.errno().unwrap_or_else(|| panic!("no answer: {error}")).0)
    }
    let opened = |opcode: Opcode, args: &[u8]| {
        outcome(client.call_bytes(&Request::new(opcode, ROOT).arg(args).name(name).reply_data(200)))
    };
    let results = vec![
        ("mkdir", outcome(client.mkdir(ROOT, name, 0o700, 0))),
        ("rmdir", outcome(client.rmdir(ROOT, name))),
        ("symlink", outcome(client.symlink(ROOT, name, "target"))),
        ("unlink a symlink", outcome(client.unlink(ROOT, name))),
        ("mknod", outcome(client.mknod(ROOT, name, libc::S_IFREG | 0o600, 0, 0))),
        ("unlink a node", outcome(client.unlink(ROOT, name))),
        ("link", outcome(client.link(node, ROOT, name))),
        ("lookup", outcome(client.lookup(ROOT, name))),
        ("rename from", outcome(client.rename(ROOT, name, ROOT, "renamed"))),
        ("rename to", outcome(client.rename(ROOT, "renamed", ROOT, name))),
        ("rename2 to itself", outcome(client.rename2(ROOT, name, ROOT, name, 0))),
        ("create", opened(Opcode::Create, &[0; 16])),
        ("unlink a file", outcome(client.unlink(ROOT, name))),
    ];
    // What a rename may have left.
    let _ = client.unlink(ROOT, "renamed");
    results
}

/// Attack: invalid names in every operation.
/// Outcome: EINVAL or ENAMETOOLONG.
#[test]
fn invalid_names_in_every_operation() {
    let (backend, session) = two_queues(&[]);
    let client = session.client();
    let node = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap().0.nodeid;
    let long = vec![b'n'; 256];
    let bad: &[(&[u8], i32)] = &[
        (b"", libc::EINVAL),
        (b".", libc::EINVAL),
        (b"..", libc::EINVAL),
        (b"a/b", libc::EINVAL),
        (b"/etc/passwd", libc::EINVAL),
        (b"../outside", libc::EINVAL),
        (b"a/", libc::EINVAL),
        (&long, libc::ENAMETOOLONG),
    ];
    for (name, errno) in bad {
        let text = String::from_utf8_lossy(name);
        for (operation, result) in everywhere(client, node, name) {
            // Only LOOKUP may name these, and finds nothing but what the guest knows.
            let allowed = operation == "lookup" && (*name == b"." || *name == b"..");
            // A rename of a name that is good from one that is not there.
            let missing = operation == "rename to" && result == Err(libc::ENOENT);
            assert!(result == Err(*errno) || allowed || missing, "{operation} of {text:?}: {result:?}");
        }
    }
    // What a name may be: 255 bytes, and no text at all.
    for name in [&long[..255], b"\xff\xfe\x80", b"...", b" ", b"\\", b"\n", b"-rf", b"\xc0\xaf"] {
        for (operation, result) in everywhere(client, node, name) {
            assert_eq!(result, Ok(()), "{operation} of {:?}", String::from_utf8_lossy(name));
        }
    }
    // A name ends at its first NUL.
    client.mkdir(ROOT, b"cut\0/../../off", 0o700, 0).unwrap();
    assert!(backend.path("cut").is_dir());
    client.rmdir(ROOT, "cut").unwrap();
    let left: Vec<_> = fs::read_dir(backend.share()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["file"]);
    assert_eq!(
        fs::read_dir(backend.share().parent().unwrap()).unwrap().count(),
        3,
        "socket, its pid file and the share"
    );
    common::every_queue_answers(&session);
}

/// Attack: invalid attribute names.
/// Outcome: an errno.
#[test]
fn invalid_attribute_names() {
    let (_backend, session) = two_queues(&["--xattr"]);
    let client = session.client();
    let node = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap().0.nodeid;
    let long = [b"user.".as_slice(), &[b'n'; 260]].concat();
    for name in [b"".as_slice(), b"user.", b"nonsense", b"/etc/passwd", b"../x", &long, b"user\xff.x"] {
        let text = String::from_utf8_lossy(name);
        assert!(common::errno(client.setxattr(node, name, b"value", 0)) > 0, "{text:?}");
        assert!(common::errno(client.getxattr(node, name, 100)) > 0, "{text:?}");
        assert!(common::errno(client.removexattr(node, name)) > 0, "{text:?}");
    }
    client.setxattr(node, &long[..255], b"value", 0).unwrap();
    client.setxattr(node, b"user.\xff\xfe", b"value", 0).unwrap();
    client.removexattr(node, b"user.\xff\xfe").unwrap();
    common::every_queue_answers(&session);
}

/// Attack: device nodes, FIFOs, sockets.
/// Outcome: ENXIO; never opened on the host.
#[test]
fn special_files_are_never_opened() {
    let (backend, session) = two_queues(&[]);
    let client = session.client();
    let device = |major: u32, minor: u32| major << 8 | minor;
    let special = [
        ("fifo", libc::S_IFIFO, 0),
        ("socket", libc::S_IFSOCK, 0),
        // /dev/mem and /dev/zero, and the first loop device.
        ("mem", libc::S_IFCHR, device(1, 1)),
        ("zero", libc::S_IFCHR, device(1, 5)),
        ("loop", libc::S_IFBLK, device(7, 0)),
    ];
    for (name, kind, rdev) in special {
        let node = client.mknod(ROOT, name, kind | 0o666, rdev, 0).unwrap().nodeid;
        for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR, libc::O_RDWR | libc::O_NONBLOCK] {
            assert_eq!(common::errno(client.open(node, flags)), libc::ENXIO, "{name}");
            assert_eq!(common::errno(client.open(node, flags | libc::O_TRUNC)), libc::ENXIO, "{name}");
            // CREATE opens what is there already.
            assert!(common::errno(client.create(ROOT, name, flags, 0o600, 0)) > 0, "{name}");
        }
        assert_eq!(common::errno(client.opendir(node)), libc::ENOTDIR, "{name}");
        assert!(common::errno(client.setattr(node, Change::none().size(10))) > 0, "{name}");
        // Its attributes can be had and set without opening it.
        client.setattr(node, Change::none().mode(0o600)).unwrap();
        assert_eq!(client.getattr(node).unwrap().rdev, rdev, "{name}");
    }
    // Nobody has the FIFO open for reading.
    let mut writer = fs::OpenOptions::new();
    let writer = writer.write(true).custom_flags(libc::O_NONBLOCK).open(backend.path("fifo"));
    assert_eq!(writer.unwrap_err().raw_os_error(), Some(libc::ENXIO));
    common::every_queue_answers(&session);
}

/// Swaps two names for as long as the guest works.
fn swap_meanwhile(one: &Path, other: &Path, work: impl FnOnce()) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (here, exchange) = (rustix::fs::CWD, rustix::fs::RenameFlags::EXCHANGE);
            let mut swaps = 0u64;
            while !stop.load(Ordering::Relaxed) {
                rustix::fs::renameat_with(here, one, here, other, exchange).unwrap();
                swaps += 1;
            }
            assert!(swaps > 100, "the names were swapped {swaps} times only");
        });
        work();
        stop.store(true, Ordering::Relaxed);
    });
}

/// Attack: a directory swapped for a link to the outside.
/// Outcome: nothing outside is read or changed.
#[test]
fn a_directory_that_turns_into_a_link_to_the_outside() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("file"), "outside").unwrap();
    fs::create_dir(outside.path().join("below")).unwrap();
    let (backend, session) = two_queues(&["--cache=never"]);
    fs::create_dir(backend.path("dir")).unwrap();
    fs::write(backend.path("dir/file"), "inside").unwrap();
    fs::create_dir(backend.path("dir/below")).unwrap();
    std::os::unix::fs::symlink(outside.path(), backend.path("link")).unwrap();
    let client = session.client();
    let (mut read, mut refused) = (0, 0);
    swap_meanwhile(&backend.path("dir"), &backend.path("link"), || {
        for round in 0..3000 {
            let client = client.on(1 + round % 2);
            let dir = client.lookup(ROOT, "dir").unwrap();
            match client.lookup(dir.nodeid, "file").and_then(|file| client.read_file(file.nodeid)) {
                Ok(bytes) => {
                    assert_eq!(bytes, b"inside", "round {round}");
                    read += 1;
                }
                Err(error) => {
                    assert!(error.errno().is_some(), "{error}");
                    refused += 1;
                }
            }
            let name = format!("made{round}");
            let _ = client.create(dir.nodeid, &name, libc::O_RDWR, 0o600, 0);
            let _ = client.unlink(dir.nodeid, &name);
            let _ = client.rename(dir.nodeid, "below", ROOT, "moved");
            let _ = client.rename(ROOT, "moved", dir.nodeid, "below");
            if let Ok(up) = client.lookup(dir.nodeid, "..") {
                assert_eq!(up.nodeid, ROOT);
            }
            let _ = client.setattr(dir.nodeid, Change::none().mode(0o755));
        }
    });
    assert!(read > 50 && refused > 50, "{read} read, {refused} refused: the race was not run");
    let there: BTreeSet<_> =
        fs::read_dir(outside.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(there, BTreeSet::from(["below".into(), "file".into()]));
    assert_eq!(fs::read(outside.path().join("file")).unwrap(), b"outside");
    common::every_queue_answers(&session);
}

/// Attack: a file swapped for a link to the outside.
/// Outcome: nothing outside is read or changed.
#[test]
fn a_file_that_turns_into_a_link_to_the_outside() {
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().join("file");
    fs::write(&target, "outside").unwrap();
    let (backend, session) = two_queues(&["--cache=never"]);
    fs::write(backend.path("file"), "inside").unwrap();
    std::os::unix::fs::symlink(&target, backend.path("link")).unwrap();
    swap_meanwhile(&backend.path("file"), &backend.path("link"), || {
        for round in 0..3000 {
            let client = session.client().on(1 + round % 2);
            let Ok((entry, open)) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0) else { continue };
            assert_eq!(client.read(entry.nodeid, open.fh, 0, 6).unwrap(), b"inside", "round {round}");
            client.write(entry.nodeid, open.fh, 0, b"inside").unwrap();
            client.setattr(entry.nodeid, Change::none().mode(0o666)).unwrap();
            client.release(entry.nodeid, open.fh).unwrap();
            client.forget(entry.nodeid, 1).unwrap();
        }
    });
    assert_eq!(fs::read(&target).unwrap(), b"outside");
    common::every_queue_answers(&session);
}

/// Attack: more open files than descriptors.
/// Outcome: EMFILE; works again after RELEASE.
#[test]
fn open_files_run_out_and_come_back() {
    let (backend, session) = two_queues(&["--rlimit-nofile=300"]);
    let client = session.client();
    let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    let mut handles = vec![open.fh];
    for round in 0..3 {
        let refused = loop {
            match client.open(entry.nodeid, libc::O_RDWR) {
                Ok(open) => handles.push(open.fh),
                Err(error) => break error.errno().unwrap().0,
            }
        };
        assert_eq!(refused, libc::EMFILE, "round {round}");
        // Whatever else needs a descriptor is refused as well, and what needs none works.
        assert_eq!(common::errno(client.opendir(ROOT)), libc::EMFILE);
        assert_eq!(common::errno(client.create(ROOT, "new", libc::O_RDWR, 0o600, 0)), libc::EMFILE);
        assert_eq!(client.write(entry.nodeid, handles[0], 0, b"x").unwrap(), 1);
        common::every_queue_answers(&session);
        // The front end stops and starts queues, which takes descriptors.
        session.stop_queue(2).unwrap();
        session.start_queue(2).unwrap();
        common::every_queue_answers(&session);
        for fh in handles.drain(1..) {
            client.release(entry.nodeid, fh).unwrap();
        }
        let directory = client.opendir(ROOT).unwrap().fh;
        client.releasedir(ROOT, directory).unwrap();
    }
    assert!(!backend.path("new").exists(), "a file that was refused was made");
}

/// Attack: more lock owners than are kept.
/// Outcome: ENOLCK; works again.
#[test]
fn locks_run_out_and_come_back() {
    let (_backend, session) = two_queues(&["--posix-lock"]);
    let client = session.client();
    let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    let lock = |owner: u64, kind| client.setlk(entry.nodeid, open.fh, Lock::posix(owner, kind, owner, owner));
    let refused = (1..100_000).map(|owner| lock(owner, libc::F_WRLCK)).find(Result::is_err);
    assert_eq!(common::errno(refused.unwrap()), libc::ENOLCK);
    common::every_queue_answers(&session);
    client.flush(entry.nodeid, open.fh, 1).unwrap();
    lock(100_000, libc::F_WRLCK).unwrap();
}

/// Attack: more waits for locks than are served.
/// Outcome: ENOLCK; the others are granted.
#[test]
fn waits_for_locks_run_out_and_end() {
    let (_backend, session) = two_queues(&["--posix-lock"]);
    let client = session.client();
    let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    client.setlk(entry.nodeid, open.fh, Lock::posix(1, libc::F_WRLCK, 0, 10)).unwrap();
    let wait = Lock::posix(2, libc::F_WRLCK, 0, 10).waiting_request(entry.nodeid, open.fh);
    let waits: Vec<_> = (0..300).map(|_| client.send(wait.clone()).unwrap()).collect();
    common::every_queue_answers(&session);
    std::thread::sleep(Duration::from_millis(100));
    let (done, waiting): (Vec<_>, Vec<_>) =
        waits.into_iter().partition(|sent| session.queue(1).is_done(sent.token).unwrap());
    assert!(!done.is_empty() && !waiting.is_empty(), "{} refused, {} wait", done.len(), waiting.len());
    for sent in done {
        assert_eq!(common::errno(session.finish(sent)), libc::ENOLCK);
    }
    client.setlk(entry.nodeid, open.fh, Lock::posix(1, libc::F_UNLCK, 0, 10)).unwrap();
    for sent in waiting {
        session.finish(sent).unwrap();
    }
    common::every_queue_answers(&session);
}
