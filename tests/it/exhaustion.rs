//! A guest that takes all there is of something: it is refused, the daemon and others go on, and after it
//! has let go everything works.

use std::fs;
use std::time::{Duration, Instant};

use fuse_protocol::opcode::Opcode;
use lanefsd_frontend::chain::{Chain, Segments};
use lanefsd_frontend::client::{Lock, ROOT};
use lanefsd_frontend::malicious::run_away;
use lanefsd_frontend::ring::Placement;
use lanefsd_frontend::session::Pending;
use lanefsd_frontend::{Backend, Client, Request, Segmentation, Session, SessionOptions};
use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::common;

/// Another daemon with a guest of its own, which has to notice nothing.
struct Neighbour {
    _backend: Backend,
    session: Session,
    turn: u32,
}

impl Neighbour {
    fn new() -> Neighbour {
        let (backend, session) = common::serve_with(&[], common::queues(2));
        Neighbour { _backend: backend, session, turn: 0 }
    }

    fn works(&mut self) {
        self.turn += 1;
        let (client, name) = (self.session.client(), format!("file{}", self.turn));
        let (entry, open) = client.create(ROOT, &name, libc::O_RDWR, 0o600, 0).unwrap();
        client.write(entry.nodeid, open.fh, 0, b"text").unwrap();
        assert_eq!(client.read(entry.nodeid, open.fh, 0, 10).unwrap(), b"text");
        client.release(entry.nodeid, open.fh).unwrap();
    }
}

/// Opens a node until that is refused; the handles, and the errno.
fn open_all(client: &Client<'_>, node: u64) -> (Vec<u64>, i32) {
    let mut handles = Vec::new();
    loop {
        match client.open(node, libc::O_RDWR) {
            Ok(open) => handles.push(open.fh),
            Err(error) => return (handles, error.errno().unwrap().0),
        }
    }
}

/// Attack: a guest that takes all descriptors before memory is plugged in, queues are set up and front ends
/// change.
/// Outcome: EMFILE for the guest; the device works, and all of it works after the guest has released them.
#[test]
fn the_device_has_descriptors_when_the_guest_has_taken_all() {
    let backend = common::start(&["--rlimit-nofile=300", "--keep-listening"]);
    let mut neighbour = Neighbour::new();
    let before = common::steady_descriptors(&backend);
    for round in 0..3 {
        // From the second round on, this front end comes after one whose guest held all that there is.
        let session = backend.connect(common::queues(2)).unwrap();
        let client = session.client();
        let name = format!("file{round}");
        let (entry, open) = client.create(ROOT, &name, libc::O_RDWR, 0o600, 0).unwrap();
        // What the device does not need just now is not for the guest either.
        session.stop_queue(2).unwrap();
        let (handles, errno) = open_all(&client, entry.nodeid);
        assert_eq!(errno, libc::EMFILE);
        assert!(handles.len() > 100, "{} handles", handles.len());
        let guest = (8 + round) << 30;
        let regions: Vec<_> = (0..8)
            .map(|number| {
                let region = session.memory().add_region(guest + (number << 24), 1 << 20).unwrap();
                session.connection().add_memory(&region).unwrap();
                region
            })
            .collect();
        session.start_queue(2).unwrap();
        for queue in [1, 2] {
            session.stop_queue(queue).unwrap();
            session.start_queue(queue).unwrap();
        }
        let call = session.queue(1).call_event();
        session.connection().set_vring_call(1, Some(call)).unwrap();
        common::every_queue_answers(&session);
        neighbour.works();
        // The guest is refused still, and what needs no descriptor works.
        assert_eq!(common::errno(client.open(entry.nodeid, libc::O_RDWR)), libc::EMFILE);
        assert_eq!(common::errno(client.mkdir(ROOT, "dir", 0o700, 0)), libc::EMFILE);
        assert_eq!(common::errno(client.symlink(ROOT, "link", "x")), libc::EMFILE);
        assert_eq!(common::errno(client.mknod(ROOT, "node", libc::S_IFREG | 0o600, 0, 0)), libc::EMFILE);
        assert_eq!(common::errno(client.create(ROOT, "new", libc::O_RDWR, 0o600, 0)), libc::EMFILE);
        assert_eq!(client.write(entry.nodeid, open.fh, 0, b"x").unwrap(), 1);
        for region in &regions {
            session.connection().remove_memory(region).unwrap();
        }
        if round == 1 {
            for handle in handles {
                client.release(entry.nodeid, handle).unwrap();
            }
            client.mkdir(ROOT, "dir", 0o700, 0).unwrap();
            client.rmdir(ROOT, "dir").unwrap();
            client.open(entry.nodeid, libc::O_RDWR).unwrap();
        }
    }
    let left: Vec<_> =
        fs::read_dir(backend.share()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 3, "what was refused was made: {left:?}");
    assert!(common::settled_descriptors(&backend, before) <= before);
}

/// Attack: lock owners that take all descriptors.
/// Outcome: ENOLCK; memory can still be plugged in.
#[test]
fn lock_owners_leave_descriptors_to_the_device() {
    let (_backend, session) = common::serve_with(&["--posix-lock", "--rlimit-nofile=300"], common::queues(2));
    let client = session.client();
    let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    let lock = |owner| client.setlk(entry.nodeid, open.fh, Lock::posix(owner, libc::F_WRLCK, owner, owner));
    let refused = (1..1000).map(lock).find(Result::is_err);
    assert_eq!(common::errno(refused.unwrap()), libc::ENOLCK);
    session.stop_queue(2).unwrap();
    session.start_queue(2).unwrap();
    let region = session.memory().add_region(1 << 40, 1 << 20).unwrap();
    session.connection().add_memory(&region).unwrap();
    common::every_queue_answers(&session);
    client.flush(entry.nodeid, open.fh, 1).unwrap();
    lock(2000).unwrap();
}

/// Attack: more byte ranges locked than the host's kernel should remember.
/// Outcome: ENOLCK; works again after an unlock.
#[test]
fn locked_ranges_run_out_and_come_back() {
    let (_backend, session) = common::serve_with(&["--posix-lock"], common::queues(2));
    let mut neighbour = Neighbour::new();
    let client = session.client();
    // Of several files, as the host's kernel walks all locks of one for each new lock.
    let files: Vec<(u64, u64)> = (0..16)
        .map(|number| client.create(ROOT, format!("file{number}"), libc::O_RDWR, 0o600, 0).unwrap())
        .map(|(entry, open)| (entry.nodeid, open.fh))
        .collect();
    let lock = |file: usize, owner, kind, (start, end)| {
        let (node, fh) = files[file];
        client.setlk(node, fh, Lock::posix(owner, kind, start, end))
    };
    // Single bytes with gaps between them.
    let byte = |number: usize| (2 * number as u64, 2 * number as u64);
    let refused = (0..200_000).map(|n| lock(n % 16, 1, libc::F_WRLCK, byte(n))).find(Result::is_err);
    assert_eq!(common::errno(refused.unwrap()), libc::ENOLCK);
    let far = 1 << 40;
    assert_eq!(common::errno(lock(0, 2, libc::F_RDLCK, (far, far))), libc::ENOLCK);
    let (node, fh) = files[0];
    let wait = Lock::posix(3, libc::F_WRLCK, 2 * far, 2 * far);
    assert_eq!(common::errno(client.setlkw(node, fh, wait)), libc::ENOLCK);
    common::every_queue_answers(&session);
    neighbour.works();
    lock(0, 1, libc::F_UNLCK, (0, i64::MAX as u64)).unwrap();
    lock(0, 2, libc::F_RDLCK, (far, far)).unwrap();
    client.setlkw(node, fh, wait).unwrap();
    // Of the other files all are locked still.
    assert_eq!(common::errno(lock(1, 2, libc::F_WRLCK, byte(1))), libc::EAGAIN);
    client.flush(files[1].0, files[1].1, 1).unwrap();
    lock(1, 2, libc::F_WRLCK, byte(1)).unwrap();
}

/// Attack: waits for locks on many queues, which take a thread each.
/// Outcome: ENOLCK beyond a thousand; the others are granted.
#[test]
fn threads_that_wait_have_an_end() {
    const QUEUES: usize = 8;
    let (backend, session) =
        common::serve_with(&["--posix-lock"], SessionOptions { queues: QUEUES, ..SessionOptions::default() });
    let mut neighbour = Neighbour::new();
    let client = session.client();
    let (entry, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    client.setlk(entry.nodeid, open.fh, Lock::posix(1, libc::F_WRLCK, 0, 10)).unwrap();
    let wait = Lock::posix(2, libc::F_WRLCK, 0, 10).waiting_request(entry.nodeid, open.fh);
    let waits: Vec<_> =
        (0..200 * QUEUES).map(|n| client.on(1 + n % QUEUES).send(wait.clone()).unwrap()).collect();
    common::every_queue_answers(&session);
    // Those that are refused come back, and their threads are gone.
    let is_done = |sent: &Pending| session.queue(sent.queue).is_done(sent.token).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while waits.iter().filter(|sent| is_done(sent)).count() < 200 * QUEUES - 1024 {
        assert!(Instant::now() < deadline, "too many wait");
        std::thread::sleep(Duration::from_millis(10));
    }
    neighbour.works();
    assert!(backend.threads().unwrap() < 1024 + 17 * (QUEUES + 1) + 50);
    let (done, waiting): (Vec<_>, Vec<_>) = waits.into_iter().partition(is_done);
    assert_eq!((done.len(), waiting.len()), (200 * QUEUES - 1024, 1024));
    for sent in done {
        assert_eq!(common::errno(session.finish(sent)), libc::ENOLCK);
    }
    client.setlk(entry.nodeid, open.fh, Lock::posix(1, libc::F_UNLCK, 0, 10)).unwrap();
    for sent in waiting {
        session.finish(sent).unwrap();
    }
    client.setlkw(entry.nodeid, open.fh, Lock::posix(2, libc::F_WRLCK, 20, 30)).unwrap();
    common::every_queue_answers(&session);
}

/// Attack: more inodes than descriptors, without file handles.
/// Outcome: EMFILE; works again after FORGET.
#[test]
fn inodes_run_out_and_come_back() {
    let args = ["--rlimit-nofile=300", "--inode-file-handles=never"];
    let (backend, session) = common::serve_with(&args, common::queues(2));
    let mut neighbour = Neighbour::new();
    for number in 0..300 {
        fs::create_dir(backend.path(&format!("dir{number}"))).unwrap();
    }
    let client = session.client();
    for _ in 0..3 {
        let mut nodes = Vec::new();
        let refused = (0..300)
            .map(|number| client.lookup(ROOT, format!("dir{number}")).map(|entry| nodes.push(entry.nodeid)))
            .find(Result::is_err);
        assert_eq!(common::errno(refused.unwrap()), libc::EMFILE);
        common::every_queue_answers(&session);
        neighbour.works();
        // A listing with lookups goes on without them.
        let region = session.memory().add_region(1 << 40, 1 << 20).unwrap();
        session.connection().add_memory(&region).unwrap();
        session.connection().remove_memory(&region).unwrap();
        session.memory().remove_region(1 << 40).unwrap();
        client.forget_batch(&nodes.iter().map(|node| (*node, 1)).collect::<Vec<_>>()).unwrap();
        let fh = client.opendir(ROOT).unwrap().fh;
        client.releasedir(ROOT, fh).unwrap();
    }
}

/// Lets the process have `more` bytes of memory of its own beyond what it has, or all it wants.
fn limit_memory(backend: &Backend, more: Option<u64>) {
    let status = fs::read_to_string(backend.proc("status")).unwrap();
    let data = status.lines().find_map(|line| line.strip_prefix("VmData:")).unwrap();
    let kib: u64 = data.split_whitespace().next().unwrap().parse().unwrap();
    let limit = Rlimit { current: more.map(|more| kib * 1024 + more), maximum: None };
    let pid = Pid::from_raw(common::serving_process(backend.pid()).cast_signed());
    prlimit(pid, Resource::Data, limit).unwrap();
}

/// Attack: inodes, handles, locks and attributes until the daemon gets no memory.
/// Outcome: ENOMEM; works again after the guest has released them.
#[test]
fn memory_runs_out_and_comes_back() {
    let (mut backend, session) = common::serve_with(&["--xattr", "--posix-lock"], common::queues(2));
    let mut neighbour = Neighbour::new();
    let client = session.client();
    let (file, open) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    client.setxattr(file.nodeid, "user.name", &[7; 3000], 0).unwrap();
    for round in 0..2 {
        limit_memory(&backend, Some(1 << 20));
        // Inodes until there is no memory for one more.
        let mut nodes = Vec::new();
        let errno = loop {
            let name = format!("{round}-{}", nodes.len());
            match client.mknod(ROOT, &name, libc::S_IFREG | 0o600, 0, 0) {
                Ok(entry) => nodes.push(entry.nodeid),
                Err(error) => break error.errno().unwrap().0,
            }
        };
        assert_eq!(errno, libc::ENOMEM, "after {} inodes", nodes.len());
        let (handles, errno) = open_all(&client, file.nodeid);
        assert_eq!(errno, libc::ENOMEM);
        let locks = (1..2000)
            .map(|owner| client.setlk(file.nodeid, open.fh, Lock::posix(owner, libc::F_WRLCK, owner, owner)))
            .find(Result::is_err);
        assert!([libc::ENOMEM, libc::ENOLCK].contains(&common::errno(locks.unwrap())));
        // Whatever else it asks for is done, or refused; the daemon lives.
        for _ in 0..50 {
            let _ = client.getxattr(file.nodeid, "user.name", 65536);
            let _ = client.listxattr(file.nodeid, 65536);
            let _ = client.setxattr(file.nodeid, "user.other", &[8; 3000], 0);
            let _ = client.opendir(ROOT).map(|open| {
                let _ = client.readdirplus(ROOT, open.fh, 0, 100_000);
                client.releasedir(ROOT, open.fh)
            });
            let _ = client.statfs(ROOT);
        }
        assert_eq!(client.write(file.nodeid, open.fh, 0, &[1; 100_000]).unwrap(), 100_000);
        common::every_queue_answers(&session);
        neighbour.works();
        assert!(backend.try_wait().unwrap().is_none(), "{}", backend.stderr());
        // It lets go of all that, and there is room again under the same limit.
        for handle in handles {
            client.release(file.nodeid, handle).unwrap();
        }
        client.forget_batch(&nodes.iter().map(|node| (*node, 1)).collect::<Vec<_>>()).unwrap();
        client.flush(file.nodeid, open.fh, 1).unwrap();
        for number in 0..500 {
            client.lookup(ROOT, format!("{round}-{number}")).unwrap();
        }
        limit_memory(&backend, None);
    }
    assert_eq!(client.getxattr(file.nodeid, "user.name", 65536).unwrap(), [7; 3000]);
    drop(session);
    backend.expect_success().unwrap();
}

/// Attack: ten thousand requests that cause a warning, a thousand sessions, resets and broken rings.
/// Outcome: a few dozen lines in the log.
#[test]
fn a_guest_cannot_flood_the_log() {
    let (backend, session) = common::serve_with(&[], common::queues(2));
    for _ in 0..5_000 {
        // Reasons for warnings: no room for a reply, and no header.
        let request = Request::new(Opcode::Getattr, ROOT).no_reply();
        session.wait(session.send(1, &request, Segmentation::Linux).unwrap()).unwrap();
        let chain = || Chain {
            readable: Segments::none(),
            writable: Segments::new(session.memory(), &[16], 0, Segmentation::One, 1).unwrap(),
            placement: Placement::Direct,
            keep: None,
        };
        let token = session.queue(2).submit(chain()).unwrap();
        assert_eq!(session.queue(2).wait(token).unwrap().used, 0);
    }
    for _ in 0..1_000 {
        // What is told of in any case: sessions, queues and resets.
        session.init_with(45, session.options().init_flags).unwrap();
    }
    for _ in 0..50 {
        session.reboot().unwrap();
        run_away(session.queue(2), 20_000).unwrap();
    }
    session.reboot().unwrap();
    session.init().unwrap();
    common::every_queue_answers(&session);
    let lines = backend.stderr().lines().count();
    assert!(lines > 0, "nothing was said");
    assert!(lines < 200, "{lines} lines in the log");
}

/// Attack: a guest that takes all descriptors while as many queues run as there can be, with few descriptors.
/// Outcome: EMFILE for the guest; memory is plugged in and queues are restarted.
#[test]
fn many_queues_have_descriptors_when_the_guest_has_taken_all() {
    for (limit, queues) in [(1024, 63), (1024, 40), (1024, 1), (256, 12), (600, 30), (2048, 63), (128, 6)] {
        for handles in ["prefer", "never"] {
            let args = [format!("--rlimit-nofile={limit}"), format!("--inode-file-handles={handles}")];
            let backend = Backend::of(common::program()).args(&args).start().unwrap();
            let options = SessionOptions { queues, ring_size: 16, ..SessionOptions::default() };
            let session = backend.connect(options).unwrap();
            let client = session.client();
            let (entry, _) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
            let (handles, errno) = open_all(&client, entry.nodeid);
            assert_eq!(errno, libc::EMFILE);
            assert!(handles.len() >= limit / 8 - 4, "{} handles of {limit}, {queues} queues", handles.len());
            // All regions at once, and one more, as front ends without memory slots do it.
            session.memory().add_region(1 << 40, 1 << 20).unwrap();
            session.connection().set_memory(&session.memory().regions()).unwrap();
            for number in 1..4 {
                let region = session.memory().add_region((1 << 40) + (number << 24), 1 << 20).unwrap();
                session.connection().add_memory(&region).unwrap();
            }
            // What a queue lets go of for a moment is not for the guest.
            (2..=queues).map(|queue| session.stop_queue(queue)).for_each(|stopped| assert!(stopped.is_ok()));
            assert_eq!(common::errno(client.open(entry.nodeid, libc::O_RDWR)), libc::EMFILE);
            session.stop_queue(1).unwrap();
            (1..=queues).for_each(|queue| session.start_queue(queue).unwrap());
            common::every_queue_answers(&session);
            assert_eq!(common::errno(client.mkdir(ROOT, "dir", 0o700, 0)), libc::EMFILE);
            for handle in handles {
                client.release(entry.nodeid, handle).unwrap();
            }
            client.mkdir(ROOT, "dir", 0o700, 0).unwrap();
        }
    }
}

/// Attack: a guest with one queue that takes all descriptors and starts its other queues then.
/// Outcome: they start, with a thousand descriptors and more.
#[test]
fn queues_that_start_late_have_their_descriptors() {
    let backend = common::start(&["--rlimit-nofile=1024"]);
    let options = SessionOptions { queues: 63, started: 2, ring_size: 16, ..SessionOptions::default() };
    let session = backend.connect(options).unwrap();
    let client = session.client();
    let (entry, _) = client.create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    let (handles, errno) = open_all(&client, entry.nodeid);
    assert_eq!(errno, libc::EMFILE);
    assert!(handles.len() > 400, "{} handles", handles.len());
    for queue in 2..=63 {
        session.start_queue(queue).unwrap();
    }
    let region = session.memory().add_region(1 << 40, 1 << 20).unwrap();
    session.connection().add_memory(&region).unwrap();
    common::every_queue_answers(&session);
}

/// Inodes that can do without descriptors give theirs to queues.
#[test]
fn inodes_make_room_for_queues() {
    let share = common::disk_directory();
    for number in 0..500 {
        fs::write(share.path().join(number.to_string()), "").unwrap();
    }
    let backend = common::starter().args(["--rlimit-nofile=400"]).share(share.path()).start().unwrap();
    let options = SessionOptions { queues: 30, started: 2, ring_size: 16, ..SessionOptions::default() };
    let session = backend.connect(options).unwrap();
    let client = session.client();
    let nodes: Vec<u64> =
        (0..500).map(|number| client.lookup(ROOT, number.to_string()).unwrap().nodeid).collect();
    for queue in 2..=30 {
        session.start_queue(queue).unwrap();
    }
    common::every_queue_answers(&session);
    let handles: Vec<u64> =
        nodes.iter().take(50).map(|node| client.open(*node, libc::O_RDWR).unwrap().fh).collect();
    for (node, handle) in nodes.iter().zip(handles) {
        client.write(*node, handle, 0, b"text").unwrap();
    }
    for node in nodes {
        client.getattr(node).unwrap();
    }
}

/// Too few descriptors for the queues end the connection in words that say so.
#[test]
fn what_is_short_of_descriptors_names_the_option() {
    for (limit, queues, regions) in [(128, 63, 1), (64, 20, 1), (64, 1, 32), (64, 4, 16)] {
        let args = [format!("--rlimit-nofile={limit}")];
        let backend = Backend::of(common::program()).args(&args).start().unwrap();
        let memory = (0..regions).map(|number| (0x10_0000 + (number << 30), 16 << 20)).collect();
        let options = SessionOptions { queues, ring_size: 16, memory, ..SessionOptions::default() };
        let session = backend.connect(options);
        let failed = session.and_then(|session| {
            session.connection().set_memory(&session.memory().regions())?;
            session.client().getattr(ROOT)
        });
        let failed = failed.map(drop).unwrap_err();
        println!("{limit} descriptors, {queues} queues, {regions} regions: {failed}");
        common::wait_for_words(&backend, "--rlimit-nofile");
        let said = backend.stderr();
        assert!(!said.contains("share=on") && said.matches("--rlimit-nofile").count() == 1, "{said}");
    }
}
