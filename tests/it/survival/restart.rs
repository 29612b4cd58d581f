//! The supervisor puts a worker in the place of one that has died, at any moment of the vhost-user protocol.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use lanefsd_frontend::backend::Starter;
use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::connection::Connection;
use lanefsd_frontend::message::{VERSION, code, protocol};
use lanefsd_frontend::{Backend, Memory, Session, SessionOptions};
use rustix::process::{Resource, Signal, getrlimit, kill_process};

use super::{IMMORTAL, SANDBOXES, kill_worker, kill_worker_by, next_worker, pid, serves, worker};
use crate::common;

fn start(args: &[&str]) -> Backend {
    started(Backend::of(common::program()).args([IMMORTAL]).args(args))
}

/// A daemon that has started: a worker that dies before ends it.
fn started(starter: Starter) -> Backend {
    let backend = starter.args(["--log-level=info"]).start().unwrap();
    common::wait_for_words(&backend, "Waiting for vhost-user socket connection");
    backend
}

/// Kills workers while so many rounds run, one each `first_pause` at first. Each death within one round doubles the pause,
/// since a worker may take longer to start than the pause lasts, and the round would never end.
fn killing(backend: &Backend, first_pause: Duration, rounds: usize, mut round: impl FnMut()) {
    let (done, ended) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut pause, mut seen) = (first_pause, 0);
            while !done.load(Ordering::Relaxed) {
                kill_worker(backend);
                std::thread::sleep(pause);
                let now = ended.load(Ordering::Relaxed);
                pause = if now == seen { pause * 2 } else { first_pause };
                seen = now;
            }
        });
        let _done = common::Done(&done);
        for number in 1..=rounds {
            round();
            ended.store(number, Ordering::Relaxed);
        }
    });
}

#[test]
fn a_worker_that_dies_before_a_front_end_comes_is_replaced() {
    for sandbox in SANDBOXES {
        let mut backend = start(&[sandbox]);
        kill_worker(&backend);
        kill_worker(&backend);
        let session = backend.connect(SessionOptions::default()).unwrap();
        session.client().getattr(ROOT).unwrap();
        drop(session);
        backend.expect_success().unwrap();
        assert!(!backend.socket().exists());
        let words = backend.stderr();
        assert_eq!(words.matches("the worker process was ended by SIGKILL").count(), 2, "{words}");
        assert_eq!(words.matches("Waiting for vhost-user").count(), 1, "{words}");
    }
}

#[test]
fn a_front_end_that_is_idle_notices_nothing() {
    for sandbox in SANDBOXES {
        let mut backend = start(&[sandbox]);
        let session = backend.connect(common::queues(3)).unwrap();
        fs::write(backend.path("file"), "data").unwrap();
        // The first process of a PID namespace gets no other signals from outside.
        let is_first = sandbox == "--sandbox=namespace";
        let others = if is_first { [Signal::KILL; 2] } else { [Signal::SYS, Signal::ABORT] };
        for signal in [Signal::KILL, Signal::KILL].into_iter().chain(others) {
            kill_worker_by(&backend, signal);
            serves(&session);
            let node = session.client().lookup(ROOT, "file").unwrap().nodeid;
            assert_eq!(session.client().read_file(node).unwrap(), b"data");
        }
        drop(session);
        backend.expect_success().unwrap();
    }
}

/// Signals that end the daemon are the supervisor's business.
#[test]
fn a_worker_does_not_end_for_a_signal_that_ends_the_daemon() {
    for sandbox in SANDBOXES {
        let mut backend = start(&[sandbox]);
        let session = backend.connect(SessionOptions::default()).unwrap();
        let before = worker(&backend).unwrap();
        for signal in [Signal::TERM, Signal::INT] {
            kill_process(pid(before), signal).unwrap();
            std::thread::sleep(Duration::from_millis(50));
            session.client().getattr(ROOT).unwrap();
        }
        assert_eq!(worker(&backend), Some(before));
        drop(session);
        backend.expect_success().unwrap();
    }
}

/// The mounts, processes and network that a worker sees are those of the one before.
#[test]
fn a_later_worker_is_in_the_sandbox_of_the_first() {
    let backend = start(&["--sandbox=namespace"]);
    let namespace = |name: &str| fs::read_link(backend.proc(&format!("ns/{name}"))).unwrap();
    let before = ["mnt", "net", "user"].map(namespace);
    let session = backend.connect(SessionOptions::default()).unwrap();
    for _ in 0..2 {
        kill_worker(&backend);
        serves(&session);
        assert_eq!(["mnt", "net", "user"].map(namespace), before);
        let own = fs::read_link("/proc/self/ns/pid").unwrap();
        assert_ne!(namespace("pid"), own);
        crate::sandbox::has_an_empty_root(worker(&backend).unwrap(), backend.share());
        let modes = fs::read_to_string(backend.proc("status")).unwrap();
        assert!(modes.contains("Seccomp:\t2") && modes.contains("NoNewPrivs:\t1"), "{modes}");
    }
}

/// A worker has the ids of the user namespace, which its parent has made once.
#[test]
fn a_later_worker_is_in_the_user_namespace_of_the_first() {
    let backend = start(&["--uid-map=:0:0:65536:", "--gid-map=:0:0:65536:"]);
    let user = || fs::read_link(backend.proc("ns/user")).unwrap();
    let before = user();
    assert_ne!(before, fs::read_link("/proc/self/ns/user").unwrap());
    let session = backend.connect(SessionOptions::default()).unwrap();
    for number in 0..3 {
        kill_worker(&backend);
        serves(&session);
        assert_eq!(user(), before);
        session.client().mkdir(ROOT, format!("{number}"), 0o755, 0).unwrap();
    }
}

/// The next front end has the sandbox of the one before, and nothing else of it.
#[test]
fn the_next_front_end_begins_anew_in_the_same_sandbox() {
    for sandbox in SANDBOXES {
        let backend = start(&[sandbox, "--keep-listening"]);
        let mut sandboxes = Vec::new();
        for number in 0..3 {
            let session = backend.connect(SessionOptions::default()).unwrap();
            assert!(common::errno(session.client().getattr(2)) > 0);
            let name = format!("{number}");
            session.client().create(ROOT, &name, libc::O_RDWR, 0o600, 0).unwrap();
            kill_worker(&backend);
            serves(&session);
            sandboxes.push(fs::read_link(backend.proc("ns/mnt")).unwrap());
            drop(session);
        }
        assert!(sandboxes.iter().all(|one| *one == sandboxes[0]), "{sandboxes:?}");
    }
}

#[test]
fn every_message_is_answered_once_while_workers_die() {
    for sandbox in SANDBOXES {
        let backend = start(&[sandbox]);
        let session = backend.connect(SessionOptions::default()).unwrap();
        let connection = session.connection();
        let features = connection.features().unwrap();
        killing(&backend, Duration::from_millis(20), 100, || {
            // So many that a death meets some of them.
            for _ in 0..10 {
                assert_eq!(connection.features().unwrap(), features);
                connection.set_features(session.features()).unwrap();
                assert_eq!(connection.queue_count().unwrap(), 64);
            }
        });
        serves(&session);
    }
}

/// Lets a worker die that has received what `work` sends and has not answered it.
fn dying_with(backend: &Backend, work: impl FnOnce() + Send) {
    let old = next_worker(backend);
    kill_process(old, Signal::STOP).unwrap();
    let is_stopped = |task: fs::DirEntry| {
        fs::read_to_string(task.path().join("status")).is_ok_and(|status| status.contains("State:\tT"))
    };
    let tasks = || fs::read_dir(backend.proc("task")).unwrap().flatten();
    common::wait_until(|| tasks().all(is_stopped), "a stop of all threads");
    std::thread::scope(|scope| {
        let working = scope.spawn(work);
        std::thread::sleep(Duration::from_millis(50));
        assert!(!working.is_finished(), "a process that is stopped has answered");
        kill_process(old, Signal::KILL).unwrap();
    });
}

#[test]
fn a_worker_dies_with_each_message() {
    for sandbox in SANDBOXES {
        let backend = start(&[sandbox]);
        let session = backend.connect(common::queues(2)).unwrap();
        let more = Memory::with_regions(&[(1 << 40, 2 << 20)]).unwrap();
        let region = &more.regions()[0];
        let connection = || session.connection();
        let messages: &[&(dyn Fn() + Sync)] = &[
            &|| assert_ne!(connection().features().unwrap(), 0),
            &|| assert_eq!(connection().queue_count().unwrap(), 64),
            &|| connection().set_features(session.features()).unwrap(),
            &|| connection().add_memory(region).unwrap(),
            &|| connection().remove_memory(region).unwrap(),
            &|| connection().set_vring_call(2, Some(session.queue(2).call_event())).unwrap(),
            &|| connection().enable_ring(2, false).unwrap(),
            &|| connection().enable_ring(2, true).unwrap(),
            &|| assert_ne!(session.stop_queue(2).unwrap(), 0),
            &|| session.start_queue(2).unwrap(),
            &|| connection().set_memory(&session.memory().regions()).unwrap(),
        ];
        for (number, message) in messages.iter().enumerate() {
            println!("{sandbox}, message {number}");
            dying_with(&backend, message);
            session.client().getattr(ROOT).unwrap();
            if ![6, 8].contains(&number) {
                session.queue(2).kick().unwrap();
                serves(&session);
            }
        }
        // The device is reset once, and begins a new session.
        dying_with(&backend, || connection().reset_device().unwrap());
        session.reboot().unwrap();
        assert_eq!(common::errno(session.client().getattr(ROOT)), libc::ENOTCONN);
        session.init().unwrap();
        serves(&session);
        // A request that is under way as well.
        dying_with(&backend, || assert!(session.client().mkdir(ROOT, "dir", 0o755, 0).is_ok()));
        assert!(backend.path("dir").exists());
    }
}

/// A front end that does without acknowledgements hears of no message whether it was taken.
#[test]
fn messages_without_a_reply_are_not_lost() {
    let backend = start(&[]);
    let options = SessionOptions { protocol_features: protocol::MQ, ..SessionOptions::default() };
    let session = backend.connect(options).unwrap();
    killing(&backend, Duration::from_millis(10), 100, || {
        session.connection().enable_ring(1, false).unwrap();
        session.connection().enable_ring(1, true).unwrap();
        session.queue(1).kick().unwrap();
        serves(&session);
    });
}

#[test]
fn a_front_end_is_set_up_while_workers_die() {
    for sandbox in SANDBOXES {
        let backend = start(&[sandbox, "--keep-listening"]);
        killing(&backend, Duration::from_millis(5), 10, || {
            let connection = Connection::connect(backend.socket()).unwrap();
            let session = Session::start(connection, common::queues(4)).unwrap();
            session.init().unwrap();
            serves(&session);
        });
        let session = backend.connect(SessionOptions::default()).unwrap();
        serves(&session);
    }
}

#[test]
fn a_queue_is_stopped_while_workers_die() {
    let backend = start(&[]);
    let session = backend.connect(common::queues(2)).unwrap();
    killing(&backend, Duration::from_millis(10), 100, || {
        session.stop_queue(2).unwrap();
        session.start_queue(2).unwrap();
        serves(&session);
    });
    serves(&session);
}

#[test]
fn a_device_is_reset_while_workers_die() {
    let backend = start(&[]);
    let session = backend.connect(common::queues(2)).unwrap();
    killing(&backend, Duration::from_millis(10), 20, || {
        session.reboot().unwrap();
        session.init().unwrap();
        serves(&session);
    });
}

#[test]
fn memory_is_plugged_while_workers_die() {
    let backend = start(&[]);
    let session = backend.connect(SessionOptions::default()).unwrap();
    let more = Memory::with_regions(&[(1 << 40, 2 << 20)]).unwrap();
    let region = &more.regions()[0];
    killing(&backend, Duration::from_millis(10), 100, || {
        session.connection().add_memory(region).unwrap();
        serves(&session);
        session.connection().remove_memory(region).unwrap();
    });
    serves(&session);
}

#[test]
fn nothing_stays_open_of_a_worker_that_has_died() {
    for sandbox in SANDBOXES {
        let backend = start(&[sandbox]);
        let session = backend.connect(common::queues(2)).unwrap();
        kill_worker(&backend);
        serves(&session);
        let before = backend.descriptors().unwrap().len();
        for _ in 0..20 {
            kill_worker(&backend);
            serves(&session);
        }
        let after = common::settled_descriptors(&backend, before);
        assert!(after <= before, "{sandbox}: {before} descriptors, and then {after}");
    }
}

#[test]
fn too_many_deaths_end_the_daemon() {
    for (args, deaths) in [(&[][..], 5), (&["--max-deaths=2"], 2), (&["--max-deaths=1"], 1)] {
        let mut backend = started(Backend::of(common::program()).args(args));
        let session = backend.connect(SessionOptions::default()).unwrap();
        for _ in 1..deaths {
            kill_worker(&backend);
        }
        let last = next_worker(&backend);
        kill_process(last, Signal::KILL).unwrap();
        assert_eq!(backend.wait(Duration::from_secs(10)).unwrap().code(), Some(1));
        let words = backend.stderr();
        assert!(words.contains(&format!("{deaths} worker processes have died within 10 seconds")), "{words}");
        assert!(!backend.socket().exists());
        drop(session);
    }
}

#[test]
fn without_survival_a_killed_server_ends_the_daemon() {
    for sandbox in SANDBOXES {
        let mut backend = Backend::of(common::program()).args([sandbox, "--no-survive"]).start().unwrap();
        let session = backend.connect(SessionOptions::default()).unwrap();
        session.client().getattr(ROOT).unwrap();
        let serving = common::serving_process(backend.pid());
        assert_eq!(serving == backend.pid(), sandbox == "--sandbox=none");
        kill_process(pid(serving), Signal::KILL).unwrap();
        let status = backend.wait(Duration::from_secs(10)).unwrap();
        assert!(
            !status.success() && status.code().is_none_or(|code| code == 128 + libc::SIGKILL),
            "{status}"
        );
    }
}

#[test]
fn a_signal_ends_both_processes_also_just_after_a_death() {
    for sandbox in SANDBOXES {
        for (connected, killed) in [(false, false), (true, false), (false, true), (true, true)] {
            let mut backend = start(&[sandbox, "--keep-listening"]);
            let session = connected.then(|| backend.connect(SessionOptions::default()).unwrap());
            let serving = next_worker(&backend);
            if killed {
                kill_process(serving, Signal::KILL).unwrap();
            }
            backend.signal(libc::SIGTERM).unwrap();
            let status = backend.wait(Duration::from_secs(10)).unwrap();
            // A worker that has died may have left requests behind.
            assert!(status.success() || connected && killed, "{sandbox} {connected} {killed}: {status}");
            common::expect_end(serving.as_raw_nonzero().get().unsigned_abs());
            assert!(!backend.socket().exists());
            drop(session);
        }
    }
}

/// As where a user has as many processes as the host allows.
#[test]
fn a_worker_that_cannot_be_started_is_waited_for() {
    let home = tempfile::tempdir().unwrap();
    let (program, run) = (home.path().join("lanefsd"), home.path().join("run"));
    common::copy_program(&program);
    fs::create_dir(&run).unwrap();
    for path in [home.path(), &run] {
        std::os::unix::fs::chown(path, Some(4322), Some(4322)).unwrap();
    }
    let socket = run.join("socket");
    let ids = ["--reuid=4322", "--regid=4322", "--clear-groups"];
    let starter = Backend::of("setpriv").bare().args(ids).args([&program]).args([IMMORTAL]);
    let starter = starter.args(["--shared-dir"]).args([&run]).args(["--socket-path"]).args([&socket]);
    let mut backend = starter.spawn().unwrap();
    common::wait_for_words(&backend, "Waiting for vhost-user socket connection");
    let session = Session::connect(&socket, SessionOptions::default()).unwrap();
    let pid = backend.pid().to_string();
    let limit = |processes: &str| {
        let prlimit = ["prlimit", "--pid", &pid, &format!("--nproc={processes}:")];
        common::run(std::process::Command::new("setpriv").args(ids).args(prlimit));
    };
    let usual = getrlimit(Resource::Nproc).current.map_or("unlimited".into(), |limit| limit.to_string());
    limit("1");
    let old = next_worker(&backend);
    kill_process(old, Signal::KILL).unwrap();
    common::wait_for_words(&backend, "cannot start a worker process");
    std::thread::sleep(Duration::from_millis(300));
    limit(&usual);
    serves(&session);
    // And in vain.
    limit("1");
    let old = next_worker(&backend);
    kill_process(old, Signal::KILL).unwrap();
    assert_eq!(backend.wait(Duration::from_secs(20)).unwrap().code(), Some(1));
    assert!(backend.stderr().contains("no worker process could be started"), "{}", backend.stderr());
}

/// What a worker refuses it has refused for good: a message that makes no sense is not sent to another one.
#[test]
fn an_error_of_the_front_end_is_no_death() {
    let mut backend = start(&[]);
    let session = backend.connect(SessionOptions::default()).unwrap();
    kill_worker(&backend);
    session.connection().send_raw(code::SET_VRING_NUM, VERSION, 8, &[9; 8], &[]).unwrap();
    assert_eq!(backend.wait(Duration::from_secs(10)).unwrap().code(), Some(1));
    let words = backend.stderr();
    assert_eq!(words.matches("the worker process was ended").count(), 1, "{words}");
    assert_eq!(words.matches("the front end was disconnected").count(), 1, "{words}");
}
