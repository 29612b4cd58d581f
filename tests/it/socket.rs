//! The socket, who connects to it, and the pid file beside it. The daemon has its default sandbox here
//! unless a test says otherwise, since what serves is another process then than what was started.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::connection::Connection;
use lanefsd_frontend::{Backend, Session, SessionOptions};
use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::common;
use crate::survival::IMMORTAL;

const SANDBOXES: &[&[&str]] = &[&[], &["--sandbox=chroot"], &["--sandbox=none"]];

fn start(args: &[&str]) -> Backend {
    let backend = Backend::of(common::program()).args(args).start().unwrap();
    // Between bind(2) and listen(2) the socket is there and refuses.
    common::wait_until(|| UnixStream::connect(backend.socket()).is_ok(), "a socket that listens");
    backend
}

/// Starts another daemon at this path, which has to end with one sentence.
fn refused_at(path: &Path) -> String {
    let share = path.parent().unwrap().to_str().unwrap();
    let args = ["--shared-dir", share, "--socket-path", path.to_str().unwrap(), "--log-level=error"];
    let (status, stderr) = Backend::of(common::program()).bare().args(args).refuse().unwrap();
    assert_eq!((status.code(), stderr.trim_end().lines().count()), (Some(1), 1), "{stderr}");
    stderr
}

fn serves(backend: &Backend) -> Session {
    let session = backend.connect(SessionOptions::default()).unwrap();
    session.client().getattr(ROOT).unwrap();
    session
}

fn pid_file(backend: &Backend) -> PathBuf {
    let mut path = backend.socket().as_os_str().to_owned();
    path.push(".pid");
    path.into()
}

/// What is in the socket's directory, but for the share.
fn left_behind(backend: &Backend) -> Vec<String> {
    let entries = fs::read_dir(backend.socket().parent().unwrap()).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name != "share").collect()
}

#[test]
fn a_second_start_leaves_the_first_daemon_waiting() {
    for sandbox in SANDBOXES {
        let mut first = start(sandbox);
        for _ in 0..2 {
            let stderr = refused_at(first.socket());
            assert!(stderr.contains("in use"), "{stderr}");
            assert!(stderr.contains(&format!("process {}", first.pid())), "{stderr}");
        }
        assert!(first.try_wait().unwrap().is_none(), "{}", first.stderr());
        let session = serves(&first);
        // It makes no difference whether a front end is there.
        refused_at(first.socket());
        session.client().getattr(ROOT).unwrap();
        drop(session);
        first.expect_success().unwrap();
        assert_eq!(left_behind(&first), [""; 0]);
    }
}

#[test]
fn a_second_start_leaves_a_daemon_without_a_pid_file_waiting() {
    let mut first = start(&[]);
    fs::remove_file(pid_file(&first)).unwrap();
    assert!(refused_at(first.socket()).contains("in use"));
    assert!(first.try_wait().unwrap().is_none(), "{}", first.stderr());
    drop(serves(&first));
    first.expect_success().unwrap();
    assert_eq!(left_behind(&first), [""; 0]);
}

#[test]
fn who_says_nothing_that_makes_sense_is_no_front_end() {
    for sandbox in SANDBOXES {
        let mut backend = start(sandbox);
        let words: [&[u8]; 5] =
            [b"", b"x\n", b"GET / HTTP/1.0\r\n\r\n", &[1, 0, 0, 0, 1, 0, 0], &[0xff; 4096]];
        for word in words.iter().cycle().take(20) {
            let mut stream = UnixStream::connect(backend.socket()).unwrap();
            let _ = stream.write_all(word);
        }
        std::thread::sleep(Duration::from_millis(200));
        assert!(backend.try_wait().unwrap().is_none(), "{}", backend.stderr());
        drop(serves(&backend));
        backend.expect_success().unwrap();
    }
}

#[test]
fn a_silent_connection_keeps_no_front_end_out() {
    let mut backend = start(&[]);
    let silent: Vec<_> = (0..30).map(|_| UnixStream::connect(backend.socket()).unwrap()).collect();
    drop(serves(&backend));
    backend.expect_success().unwrap();
    drop(silent);
    // Nor a signal.
    let mut backend = start(&[]);
    let _silent = UnixStream::connect(backend.socket()).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    backend.signal(libc::SIGTERM).unwrap();
    backend.expect_success().unwrap();
}

#[test]
fn part_of_a_message_keeps_no_front_end_out() {
    for sandbox in SANDBOXES {
        let mut backend = start(sandbox);
        // SET_FEATURES, whose body has eight bytes.
        let message = [2, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let unfinished: Vec<_> = [1, 11, 12, 19]
            .into_iter()
            .cycle()
            .take(30)
            .map(|length| {
                let mut stream = UnixStream::connect(backend.socket()).unwrap();
                stream.write_all(&message[..length]).unwrap();
                stream
            })
            .collect();
        let session = serves(&backend);
        // Nor is the daemon kept busy by them.
        let before = backend.cpu_time().unwrap();
        std::thread::sleep(Duration::from_millis(500));
        assert!(backend.cpu_time().unwrap() - before < Duration::from_millis(200));
        drop(session);
        backend.expect_success().unwrap();
        drop(unfinished);
    }
}

#[test]
fn a_front_end_whose_message_comes_in_pieces_is_served() {
    let backend = start(&["--keep-listening"]);
    let mut slow = UnixStream::connect(backend.socket()).unwrap();
    // GET_FEATURES, without a body.
    for byte in [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0] {
        slow.write_all(&[byte]).unwrap();
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut answer = [0; 20];
    slow.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    std::io::Read::read_exact(&mut slow, &mut answer).unwrap();
    assert_eq!((answer[0], answer[8]), (1, 8));
    drop(slow);
    drop(serves(&backend));
}

#[test]
fn a_front_end_that_was_silent_for_long_is_served() {
    let backend = start(&["--keep-listening"]);
    let early = Connection::connect(backend.socket()).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    drop(serves(&backend));
    let session = Session::start(early, SessionOptions::default()).unwrap();
    session.init().unwrap();
    session.client().getattr(ROOT).unwrap();
}

#[test]
fn a_second_front_end_waits_and_the_log_says_so() {
    let backend = start(&["--keep-listening"]);
    let first = serves(&backend);
    // A look at the socket is not worth a line.
    drop(UnixStream::connect(backend.socket()).unwrap());
    let path = backend.socket().to_owned();
    let second = std::thread::spawn(move || {
        let session = Session::connect(&path, SessionOptions::default()).unwrap();
        session.client().getattr(ROOT).unwrap();
    });
    common::wait_for_words(&backend, "another front end is waiting");
    assert_eq!(backend.stderr().matches("another front end is waiting").count(), 1);
    first.client().getattr(ROOT).unwrap();
    drop(first);
    second.join().unwrap();
}

/// Lets the processes of the daemon, which share their descriptors, have this many.
fn limit_descriptors(backend: &Backend, limit: u64) {
    let limit = || Rlimit { current: Some(limit), maximum: Some(10_000) };
    let limited = |pid: u32| prlimit(Pid::from_raw(pid.cast_signed()), Resource::Nofile, limit());
    // What is started from now on as well, and then all that are there: beside the process that serves there may be the
    // one before it, whose status nobody has taken.
    limited(backend.pid()).unwrap();
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", backend.pid())).unwrap();
    for child in children.split_whitespace() {
        // It may end meanwhile.
        let _ = limited(child.parse().unwrap());
    }
}

/// How often these words are in the log.
fn times(backend: &Backend, words: &str) -> usize {
    backend.stderr().matches(words).count()
}

/// Waits until one of these is in the log more often than `before`, and returns which.
fn wait_for_one(backend: &Backend, words: &[&str], before: &[usize]) -> usize {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let text = backend.stderr();
        let mut pairs = words.iter().zip(before);
        if let Some(one) = pairs.position(|(words, before)| text.matches(words).count() > *before) {
            return one;
        }
        assert!(Instant::now() < deadline, "none of {words:?} in 30 s: {text}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

const READY: &str = "Waiting for vhost-user socket connection";

#[test]
fn a_front_end_that_cannot_be_accepted_ends_nothing() {
    const PAUSED: &str = "no connections are accepted";
    for sandbox in SANDBOXES {
        let mut backend = start(&[*sandbox, &["--keep-listening", "--rlimit-nofile=10000"]].concat());
        wait_for_one(&backend, &[READY], &[0]);
        // Fewer than are open.
        limit_descriptors(&backend, 5);
        let connection = Connection::connect(backend.socket()).unwrap();
        let asked = std::thread::spawn(move || connection.features().unwrap());
        wait_for_one(&backend, &[PAUSED], &[0]);
        assert!(backend.try_wait().unwrap().is_none(), "{}", backend.stderr());
        limit_descriptors(&backend, 10_000);
        asked.join().unwrap();
        serves(&backend);
    }
}

#[test]
fn a_front_end_that_nobody_can_serve_ends_nothing() {
    for sandbox in SANDBOXES {
        let mut backend =
            start(&[*sandbox, &["--keep-listening", "--rlimit-nofile=10000", IMMORTAL]].concat());
        wait_for_one(&backend, &[READY], &[0]);
        lack_descriptors_to_serve(&mut backend);
        serves(&backend);
    }
}

/// Lets the process that serves have too few descriptors to get ready, for a moment. How many that is differs with sandbox
/// and with what the daemon inherits: one more if the process is not even started, one fewer if it gets ready.
fn lack_descriptors_to_serve(backend: &mut Backend) {
    const UNSTARTED: &str = "cannot start a worker process";
    const REFUSED: &str = "cannot serve a front end";
    const ALL: [&str; 3] = [UNSTARTED, REFUSED, READY];
    let mut limit = 20;
    for _ in 0..60 {
        let session = serves(backend);
        let before = ALL.map(|words| times(backend, words));
        limit_descriptors(backend, limit);
        drop(session);
        let what = wait_for_one(backend, &ALL, &before);
        assert!(backend.try_wait().unwrap().is_none(), "{}", backend.stderr());
        limit_descriptors(backend, 10_000);
        wait_for_one(backend, &[READY], &before[2..]);
        match ALL[what] {
            UNSTARTED => limit += 1,
            READY => limit -= 1,
            _ => return,
        }
    }
    panic!("{REFUSED:?} was never said: {}", backend.stderr());
}

#[test]
fn the_pid_file_names_the_process_to_signal() {
    for sandbox in SANDBOXES {
        let mut backend = start(sandbox);
        let text = fs::read_to_string(pid_file(&backend)).unwrap();
        assert_eq!(text, format!("{}\n", backend.pid()));
        assert_eq!(fs::metadata(pid_file(&backend)).unwrap().mode() & 0o777, 0o600);
        let locked = fs::File::open(pid_file(&backend)).unwrap();
        let lock = rustix::fs::flock(&locked, rustix::fs::FlockOperation::NonBlockingLockExclusive);
        assert_eq!(lock, Err(rustix::io::Errno::WOULDBLOCK));
        let session = serves(&backend);
        backend.signal(libc::SIGTERM).unwrap();
        backend.expect_success().unwrap();
        assert_eq!(left_behind(&backend), [""; 0]);
        drop(session);
    }
}

#[test]
fn the_process_that_serves_keeps_nothing_open_beside_the_socket() {
    for sandbox in &SANDBOXES[..2] {
        let backend = start(sandbox);
        drop(backend.connect(SessionOptions::default()).unwrap());
        let backend = start(sandbox);
        let session = serves(&backend);
        let directory = backend.socket().parent().unwrap().to_str().unwrap();
        let share = backend.share().to_str().unwrap();
        let open = backend.descriptors().unwrap();
        let beside: Vec<_> =
            open.iter().filter(|path| path.starts_with(directory) && !path.starts_with(share)).collect();
        assert!(beside.is_empty(), "{beside:?}");
        drop(session);
    }
}

#[test]
fn there_is_no_pid_file_where_the_socket_was_passed_in() {
    let mut backend = Backend::of(common::program()).by_fd().start().unwrap();
    drop(serves(&backend));
    backend.expect_success().unwrap();
    // Who made the socket removes it.
    assert_eq!(left_behind(&backend), ["socket"]);
}

#[test]
fn what_a_killed_daemon_has_left_is_no_obstacle() {
    let mut dead = start(&[]);
    common::wait_for_words(&dead, "Waiting for vhost-user socket connection");
    dead.signal(libc::SIGKILL).unwrap();
    dead.wait(Duration::from_secs(10)).unwrap();
    let (socket, pid) = (dead.socket().to_owned(), pid_file(&dead));
    assert!(socket.exists() && pid.exists());
    // The process that served hears of its end by a signal.
    common::wait_until(|| UnixStream::connect(&socket).is_err(), "the end of the server");
    let args = ["--shared-dir", dead.share().to_str().unwrap(), "--socket-path", socket.to_str().unwrap()];
    let mut next = Backend::of(common::program()).bare().args(args).spawn().unwrap();
    common::wait_until(|| UnixStream::connect(&socket).is_ok(), "the next daemon");
    assert_eq!(fs::read_to_string(&pid).unwrap(), format!("{}\n", next.pid()));
    drop(Session::connect(&socket, SessionOptions::default()).unwrap());
    next.expect_success().unwrap();
    assert!(!socket.exists() && !pid.exists());
}

#[test]
fn nothing_is_done_through_a_link_beside_the_socket() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    fs::write(at("precious"), "data").unwrap();
    for (link, target) in [("socket.pid", "precious"), ("socket.pid", "new"), ("socket", "precious")] {
        symlink(at(target), at(link)).unwrap();
        let stderr = refused_at(&at("socket"));
        assert!(stderr.contains(link) && stderr.contains("remove it"), "{stderr}");
        assert_eq!(fs::read(at("precious")).unwrap(), b"data");
        assert!(!at("new").exists());
        fs::remove_file(at(link)).unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}

#[test]
fn a_directory_that_was_moved_is_cleaned_up_and_the_one_in_its_place_is_not() {
    let top = tempfile::tempdir().unwrap();
    let at = |name: &str| top.path().join(name);
    fs::create_dir(at("run")).unwrap();
    fs::create_dir(at("share")).unwrap();
    let socket = at("run/socket");
    let args = ["--shared-dir", at("share").to_str().unwrap(), "--socket-path", socket.to_str().unwrap()]
        .map(str::to_owned);
    let mut backend = Backend::of(common::program()).bare().args(args).spawn().unwrap();
    common::wait_until(|| socket.exists(), "the socket");
    fs::rename(at("run"), at("moved")).unwrap();
    fs::create_dir(at("run")).unwrap();
    fs::write(&socket, "data").unwrap();
    fs::write(at("run/socket.pid"), "data").unwrap();
    backend.signal(libc::SIGTERM).unwrap();
    backend.expect_success().unwrap();
    assert_eq!(fs::read_dir(at("moved")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(at("run")).unwrap().count(), 2);
}

#[test]
fn the_socket_group_gets_the_socket_and_nothing_else() {
    let backend = start(&["--socket-group=4000001"]);
    common::wait_for_words(&backend, "Waiting for vhost-user socket connection");
    let metadata = fs::symlink_metadata(backend.socket()).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!((metadata.mode() & 0o777, metadata.gid()), (0o660, 4_000_001));
    let beside = fs::metadata(pid_file(&backend)).unwrap();
    assert_eq!((beside.mode() & 0o777, beside.gid()), (0o600, 0));
    drop(serves(&backend));
}

/// The owner of the socket's directory swaps names all the time while root starts daemons in it.
#[test]
fn whoever_swaps_the_socket_gains_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let share = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let victim = share.path().join("victim");
    fs::write(&victim, "secret").unwrap();
    fs::set_permissions(&victim, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                for name in ["socket", "socket.pid"] {
                    let _ = symlink(&victim, at("link"));
                    if at(name).exists() {
                        let _ = fs::rename(at("link"), at(name));
                    }
                    let _ = fs::remove_file(at(name));
                }
            }
        });
        for _ in 0..40 {
            let args = ["--shared-dir", share.path().to_str().unwrap(), "--socket-group=4000001"];
            let socket = at("socket");
            let mut backend = Backend::of(common::program())
                .bare()
                .args(args)
                .args(["--socket-path", socket.to_str().unwrap()])
                .spawn()
                .unwrap();
            std::thread::sleep(Duration::from_millis(20));
            backend.signal(libc::SIGTERM).unwrap();
            backend.wait(Duration::from_secs(10)).unwrap();
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let metadata = fs::metadata(&victim).unwrap();
    assert_eq!((metadata.mode() & 0o777, metadata.gid()), (0o600, 0));
    assert_eq!(fs::read(&victim).unwrap(), b"secret");
}
