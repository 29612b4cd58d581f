//! A request that makes each worker die with it: it is refused, and it alone.

use std::fs;
use std::time::{Duration, Instant};

use fuse_protocol::abi::AttrOut;
use fuse_protocol::opcode::Opcode;
use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::request::{Reply, Request};

use crate::trial::{Moment, Trial, errno};

/// A daemon that dies at each call of this operation with the name `poison`.
fn poisoned(phase: &str, operation: &str) -> Trial {
    let trial = Trial::start(Moment::Never, &[], &[]);
    fs::write(trial.path("file"), "content").unwrap();
    trial.die_whenever(&format!("{phase}:{operation}:name=poison"));
    trial
}

#[test]
fn a_request_that_kills_each_worker_is_refused() {
    for phase in ["before", "after"] {
        let trial = poisoned(phase, "LOOKUP");
        fs::write(trial.path("poison"), "").unwrap();
        let begin = Instant::now();
        assert_eq!(errno(trial.client().lookup(ROOT, "poison")), libc::EIO);
        assert!(begin.elapsed() < Duration::from_secs(5), "it took {:?}", begin.elapsed());
        trial.look("file");
        let deadline = begin + Duration::from_secs(10);
        while !trial.backend.stderr().contains("LOOKUP") {
            assert!(Instant::now() < deadline, "the log does not name it: {}", trial.backend.stderr());
            std::thread::sleep(Duration::from_millis(1));
        }
        trial.end();
    }
}

#[test]
fn a_request_that_makes_a_name_and_kills_each_worker_is_refused() {
    let trial = poisoned("before", "MKDIR");
    assert_eq!(errno(trial.client().mkdir(ROOT, "poison", 0o755, 0)), libc::EIO);
    assert!(!trial.path("poison").exists());
    let entry = trial.client().mkdir(ROOT, "other", 0o755, 0).unwrap();
    trial.saw(entry);
    trial.end();
}

/// Requests that are in flight with it die with it twice, too, and are innocent.
#[test]
fn requests_beside_it_are_answered() {
    let trial = poisoned("before", "LOOKUP");
    let client = trial.client();
    let node = trial.look("file");
    let getattr = || {
        let arg = fuse_protocol::abi::GetattrIn::default();
        client.send(Request::new(Opcode::Getattr, node).arg(&arg).reply::<AttrOut>()).unwrap()
    };
    let before: Vec<_> = (0..16).map(|_| getattr()).collect();
    let poison = Request::new(Opcode::Lookup, ROOT).name("poison").reply::<fuse_protocol::abi::EntryOut>();
    let poison = client.send(poison).unwrap();
    let after: Vec<_> = (0..16).map(|_| getattr()).collect();
    for sent in before.into_iter().chain(after) {
        let completion = trial.session.wait(sent).unwrap();
        let reply = Reply::of(&completion).unwrap().success().unwrap();
        assert_eq!(reply.body::<AttrOut>().unwrap().attr.size, 7);
    }
    assert_eq!(errno(trial.session.finish(poison)), libc::EIO);
    trial.end();
}
