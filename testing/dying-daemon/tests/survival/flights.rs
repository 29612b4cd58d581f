//! Many requests in flight when the worker dies: each is answered once, and has had its effect once.

use std::collections::BTreeSet;
use std::fs;

use fuse_protocol::abi::{EntryOut, MkdirIn};
use fuse_protocol::flags::WriteFlags;
use fuse_protocol::opcode::Opcode;
use lanefsd_frontend::client::{ROOT, data};
use lanefsd_frontend::random::Random;
use lanefsd_frontend::request::{Reply, Request};
use lanefsd_frontend::session::Pending;

use crate::trial::{Moment, Trial, at_moments};

const DEPTH: usize = 32;
const INSIDE: [Moment; 3] = [Moment::Never, Moment::Before, Moment::After];

/// Sends all of them, and waits for all; the worker dies at the tenth.
fn all<'a>(trial: &Trial, operation: &str, requests: impl Iterator<Item = Request<'a>>) -> Vec<Pending> {
    trial.die_at(operation, 10);
    let sent: Vec<_> = requests.map(|request| trial.client().send(request).unwrap()).collect();
    assert!(sent.len() >= DEPTH);
    sent
}

fn entries(trial: &Trial, sent: Vec<Pending>) -> Vec<u64> {
    let node = |sent| {
        let completion = trial.session.wait(sent).unwrap();
        trial.saw(Reply::of(&completion).unwrap().success().unwrap().body::<EntryOut>().unwrap())
    };
    sent.into_iter().map(node).collect()
}

#[test]
fn writes() {
    at_moments(&INSIDE, &[], |trial| {
        const BLOCK: usize = 5000;
        let (node, fh) = trial.file("file", b"");
        let content = Random::new(3).bytes(BLOCK * DEPTH);
        let blocks = content.chunks(BLOCK).enumerate().map(|(number, block)| {
            let offset = (number * BLOCK) as u64;
            data::write_request(node, fh, offset, block, WriteFlags::empty(), libc::O_RDWR)
        });
        for sent in all(trial, "WRITE", blocks) {
            trial.session.finish(sent).unwrap();
        }
        assert!(fs::read(trial.path("file")).unwrap() == content);
        trial.client().release(node, fh).unwrap();
    });
}

/// Each block is there once, in whichever order.
#[test]
fn appends() {
    at_moments(&INSIDE, &[], |trial| {
        const BLOCK: usize = 1000;
        let (node, first) = trial.file("file", b"");
        let flags = libc::O_WRONLY | libc::O_APPEND;
        let fh = trial.client().open(node, flags).unwrap().fh;
        let content = Random::new(3).bytes(BLOCK * DEPTH);
        let blocks = content
            .chunks(BLOCK)
            .map(|block| data::write_request(node, fh, 0, block, WriteFlags::empty(), flags));
        for sent in all(trial, "WRITE", blocks) {
            trial.session.finish(sent).unwrap();
        }
        let found = fs::read(trial.path("file")).unwrap();
        assert_eq!(found.len(), content.len());
        let sorted = |bytes: &[u8]| bytes.chunks(BLOCK).map(<[u8]>::to_vec).collect::<BTreeSet<_>>();
        assert!(sorted(&found) == sorted(&content), "blocks are mixed, missing or there twice");
        trial.client().release(node, first).unwrap();
        trial.client().release(node, fh).unwrap();
    });
}

#[test]
fn directories_are_made() {
    at_moments(&INSIDE, &[], |trial| {
        let make = |number| {
            let arg = MkdirIn { mode: 0o755, umask: 0 };
            let request = Request::new(Opcode::Mkdir, ROOT).arg(&arg);
            request.name(format!("directory-{number}")).reply::<EntryOut>()
        };
        let sent = all(trial, "MKDIR", (0..DEPTH).map(make));
        let nodes: BTreeSet<u64> = entries(trial, sent).into_iter().collect();
        assert_eq!(nodes.len(), DEPTH);
        assert_eq!(fs::read_dir(trial.share()).unwrap().count(), DEPTH);
    });
}

fn lookup<'a>(name: String) -> Request<'a> {
    Request::new(Opcode::Lookup, ROOT).name(name).reply::<EntryOut>()
}

#[test]
fn lookups_of_many_files() {
    at_moments(&INSIDE, &[], |trial| {
        (0..DEPTH).for_each(|number| fs::write(trial.path(&format!("file-{number}")), "").unwrap());
        let sent = all(trial, "LOOKUP", (0..DEPTH).map(|number| lookup(format!("file-{number}"))));
        let nodes: BTreeSet<u64> = entries(trial, sent).into_iter().collect();
        assert_eq!(nodes.len(), DEPTH);
    });
}

/// All count at one inode. A lookup too many may stay counted, if another request changed the count in the instant of
/// the death; one too few would be an error in the guest.
#[test]
fn lookups_of_one_file() {
    at_moments(&INSIDE, &[], |trial| {
        fs::write(trial.path("file"), "").unwrap();
        let sent = all(trial, "LOOKUP", (0..DEPTH).map(|_| lookup("file".into())));
        let nodes: BTreeSet<u64> = entries(trial, sent).into_iter().collect();
        assert_eq!(nodes.len(), 1);
        let node = *nodes.first().unwrap();
        let client = trial.client();
        client.forget(node, DEPTH as u64 - 1).unwrap();
        client.getattr(node).unwrap();
        trial.forgets(node, DEPTH as u64);
        client.forget(node, 1).unwrap();
        // What may be too many.
        client.forget(node, DEPTH as u64).unwrap();
    });
}

#[test]
fn forgets() {
    at_moments(&INSIDE, &[], |trial| {
        (0..DEPTH).for_each(|number| fs::write(trial.path(&format!("file-{number}")), "").unwrap());
        let nodes: Vec<u64> = (0..DEPTH)
            .map(|number| (0..3).map(|_| trial.look(&format!("file-{number}"))).last().unwrap())
            .collect();
        trial.die_at("FORGET", 10);
        for node in &nodes {
            trial.client().forget_later(*node, 2).unwrap();
            trial.forgets(*node, 2);
        }
        trial.session.queue(0).drain().unwrap();
    });
}
