//! Writes that overlap and are under way together end as if they had come one after the other.

use fuse_protocol::flags::WriteFlags;
use lanefsd_frontend::client::{Change, ROOT, data};
use lanefsd_frontend::random::Random;
use lanefsd_frontend::{Backend, Segmentation, Session};

use crate::common;

/// Each writer begins one step after the one before it, and covers several steps.
const STEP: usize = 512 << 10;
const STEPS_PER_WRITE: usize = 4;
const WRITERS: usize = 8;
const ROUNDS: u8 = 30;

fn session(args: &[&str]) -> (tempfile::TempDir, Backend, Session) {
    // Not on a tmpfs: O_DIRECT has to be real.
    common::serve_on(common::disk_directory(), common::starter().args(args), common::queues(4))
}

/// The byte that a writer fills its data with; different in every round.
fn mark(round: u8, writer: usize) -> u8 {
    (round % 31).wrapping_mul(WRITERS as u8).wrapping_add(writer as u8).wrapping_add(1)
}

/// Sends all writers' requests over all queues at once and waits for them.
fn write_all_at_once(session: &Session, node: u64, fh: u64, flags: i32, round: u8) {
    let cuts = [Segmentation::Linux, Segmentation::Scattered, Segmentation::Contiguous];
    let sent: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let bytes = vec![mark(round, writer); STEP * STEPS_PER_WRITE];
            let offset = (writer * STEP) as u64;
            let request = data::write_request(node, fh, offset, &bytes, WriteFlags::empty(), flags);
            session.client().on(1 + writer % 4).segmentation(cuts[writer % 3]).send(request).unwrap()
        })
        .collect();
    for sent in sent {
        session.finish(sent).unwrap();
    }
}

/// Every step has to be one writer's, and of any two writers the same one has to be on top everywhere.
fn check_order(content: &[u8], round: u8) {
    let mut above = [[false; WRITERS]; WRITERS];
    for (step, bytes) in content.chunks(STEP).enumerate() {
        let covering = step.saturating_sub(STEPS_PER_WRITE - 1)..=step.min(WRITERS - 1);
        let top = covering.clone().find(|&writer| mark(round, writer) == bytes[0]);
        let top = top.unwrap_or_else(|| panic!("round {round}: step {step} is nobody's"));
        let mixed = bytes.iter().position(|&byte| byte != bytes[0]);
        assert_eq!(mixed, None, "round {round}: step {step} begins with writer {top} and is mixed");
        for other in covering.filter(|&other| other != top) {
            assert!(!above[other][top], "round {round}: writers {top} and {other} are mixed");
            above[top][other] = true;
        }
    }
}

/// With `shrinks` some rounds extend the file; without, all blocks are there and writes only replace them.
fn torture(args: &[&str], flags: i32, shrinks: bool) {
    let (directory, _backend, session) = session(args);
    let client = session.client();
    let (entry, open) = client.create(ROOT, "file", flags, 0o600, 0).unwrap();
    let size = STEP * (WRITERS + STEPS_PER_WRITE - 1);
    let mut random = Random::new(11);
    for round in 0..ROUNDS {
        if shrinks && random.below(2) == 0 {
            let end = random.below(size) & !4095;
            client.setattr(entry.nodeid, Change::none().size(end as u64).handle(open.fh)).unwrap();
        }
        write_all_at_once(&session, entry.nodeid, open.fh, flags, round);
        let content = std::fs::read(directory.path().join("file")).unwrap();
        assert_eq!(content.len(), size);
        check_order(&content, round);
    }
}

#[test]
fn through_the_hosts_page_cache() {
    for engine in ["--io-engine=auto", "--io-engine=io-uring"] {
        torture(&["--cache=never", engine], libc::O_RDWR, true);
    }
}

#[test]
fn through_mappings() {
    for shrinks in [false, true] {
        torture(&["--cache=never", "--mapped-writes=always"], libc::O_RDWR, shrinks);
    }
}

#[test]
fn past_the_hosts_page_cache() {
    for engine in ["--io-engine=threads", "--io-engine=auto", "--io-engine=io-uring"] {
        for shrinks in [false, true] {
            let args = ["--cache=never", "--allow-direct-io", engine];
            torture(&args, libc::O_RDWR | libc::O_DIRECT, shrinks);
        }
    }
}

#[test]
fn disjoint_stripes_of_many_writers() {
    let (directory, _backend, session) = session(&["--cache=never"]);
    let (entry, open) = session.client().create(ROOT, "file", libc::O_RDWR, 0o600, 0).unwrap();
    let (stripe, stripes) = (4096usize, 64usize);
    std::thread::scope(|scope| {
        for writer in 0..8usize {
            let (session, entry, open) = (&session, &entry, &open);
            scope.spawn(move || {
                let client = session.client().on(1 + writer % 4);
                for i in 0..stripes {
                    let offset = ((i * 8 + writer) * stripe) as u64;
                    let bytes = vec![writer as u8 + 1; stripe];
                    assert_eq!(client.write(entry.nodeid, open.fh, offset, &bytes).unwrap(), stripe);
                }
            });
        }
    });
    let content = std::fs::read(directory.path().join("file")).unwrap();
    assert_eq!(content.len(), 8 * stripes * stripe);
    for (i, bytes) in content.chunks(stripe).enumerate() {
        assert!(bytes.iter().all(|&byte| usize::from(byte) == i % 8 + 1), "stripe {i}");
    }
}
