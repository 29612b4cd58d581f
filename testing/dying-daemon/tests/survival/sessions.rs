//! INIT and DESTROY.

use std::fs;

use lanefsd_frontend::Memory;
use lanefsd_frontend::client::ROOT;

use crate::trial::{Moment, Trial, at_each_moment};

#[test]
fn the_first_init() {
    for phase in ["before", "after"] {
        let variables = [("LANEFSD_DIE", format!("{phase}:INIT:1"))];
        let variables: Vec<_> = variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let trial = Trial::start(Moment::Never, &[], &variables);
        assert!(trial.session.init_reply().max_write > 0, "{phase}");
        let (node, fh) = trial.file("file", b"content");
        assert_eq!(trial.client().read(node, fh, 0, 100).unwrap(), b"content");
        trial.client().release(node, fh).unwrap();
        trial.end();
    }
}

/// INIT ends the session before it: nodes and handles are gone.
#[test]
fn a_second_init() {
    at_each_moment(&[], |trial| {
        let (node, fh) = trial.file("file", b"content");
        let first = trial.session.init_reply();
        trial.die("INIT");
        let options = trial.session.options();
        let second = trial.session.init_with(options.minor, options.init_flags).unwrap();
        assert_eq!((second.minor, second.flags, second.flags2), (first.minor, first.flags, first.flags2));
        trial.forgets_all();
        assert!(trial.client().getattr(node).is_err());
        assert!(trial.client().read(node, fh, 0, 1).is_err());
        assert_eq!(fs::read(trial.path("file")).unwrap(), b"content");
        trial.look("file");
    });
}

/// A panic outside of a request ends the process, and nothing of the session with it.
#[test]
fn a_panic_of_the_main_thread_or_the_control_thread() {
    let more = Memory::with_regions(&[(1 << 44, 2 << 20)]).unwrap();
    let region = &more.regions()[0];
    for place in ["START", "CONTROL"] {
        let trial = Trial::start(Moment::Never, &[], &[]);
        let (node, fh) = trial.file("file", b"content");
        trial.die_whenever(&format!("before:{place}:1"));
        let worker = trial.worker();
        if place == "START" {
            trial.kill_worker();
        } else {
            // More regions of memory take more descriptors.
            trial.session.connection().add_memory(region).unwrap();
        }
        assert_eq!(trial.client().read(node, fh, 0, 100).unwrap(), b"content", "{place}");
        while trial.worker() == worker {
            assert_eq!(trial.client().getattr(node).unwrap().size, 7, "{place}");
        }
        if place == "CONTROL" {
            trial.session.connection().remove_memory(region).unwrap();
        }
        trial.client().release(node, fh).unwrap();
        trial.end();
    }
}

#[test]
fn destroy() {
    at_each_moment(&[], |trial| {
        trial.file("file", b"content");
        trial.die("DESTROY");
        trial.client().destroy().unwrap();
        trial.forgets_all();
        assert!(trial.client().getattr(ROOT).is_err(), "there is no session");
        let options = trial.session.options();
        trial.session.init_with(options.minor, options.init_flags).unwrap();
        trial.look("file");
    });
}
