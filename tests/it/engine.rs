//! The asynchronous engine: many requests of a file are under way at once on a host that lets one thread at a time write,
//! and each ends once, whatever ends meanwhile.

mod growing;

use std::time::Duration;

use faultfs::{Call, FILE};
use fuse_protocol::flags::WriteFlags;
use lanefsd_frontend::client::{Change, ROOT, data};
use lanefsd_frontend::session::Pending;
use lanefsd_frontend::{Backend, Segmentation};

use crate::common;
use crate::common::store::Host;
use crate::survival::{IMMORTAL, SANDBOXES, kill_worker};

const BLOCK: usize = 4096;
/// What must not happen has this long to happen.
const MOMENT: Duration = Duration::from_millis(100);

/// With the file open in parallel mode.
fn serve(args: &[&str]) -> Host {
    Host::serve(&[&["--cache=never"], args].concat())
}

impl Host {
    /// Sends a write of a block, the one with this number, and does not wait for it.
    fn send_block(&self, number: u64, byte: u8) -> Pending {
        let (offset, bytes) = (number * BLOCK as u64, [byte; BLOCK]);
        let write =
            data::write_request(self.node, self.fh, offset, &bytes, WriteFlags::empty(), libc::O_RDWR);
        self.session.client().on(1 + number as usize % 2).send(write).unwrap()
    }

    /// Waits until so many writes are under way in the store.
    fn wait_for_writes(&self, count: u64) {
        let is_there = || self.store.under_way(Call::Write) == count;
        common::wait_until(is_there, "the writes that were sent are under way");
    }

    /// Holds a write of a block of queue 2, and lets it go when something has waited for it for a moment.
    fn meet_a_write<T: Send>(&self, byte: u8, act: impl FnOnce() -> T + Send) -> (Pending, T) {
        let gate = self.store.hold(Call::Write);
        let sent = self.send_block(1, byte);
        self.wait_for_writes(1);
        let result = std::thread::scope(|scope| {
            let act = scope.spawn(act);
            std::thread::sleep(MOMENT);
            assert!(!act.is_finished(), "it has not waited for the write");
            drop(gate);
            act.join().unwrap()
        });
        assert_eq!(self.store.under_way(Call::Write), 0);
        (sent, result)
    }

    /// Waits until the file is longer than this and a write is under way: the size is set ahead, and the block comes.
    fn wait_for_a_block_past(&self, length: usize) {
        let is_there = || self.store.contents().len() > length && self.store.under_way(Call::Write) == 1;
        common::wait_until(is_there, "the size is set ahead");
    }

    fn block(&self, number: usize) -> Vec<u8> {
        self.store.contents()[number * BLOCK..(number + 1) * BLOCK].to_vec()
    }
}

fn byte(number: u64) -> u8 {
    number as u8 + 1
}

#[test]
fn writes_of_one_file_are_under_way_at_once_on_a_host_that_lets_one_thread_write() {
    for args in [&[][..], &["--io-engine=io-uring"], &["--sandbox=none"], &["--no-survive"]] {
        let host = serve(args);
        let gate = host.store.hold(Call::Write);
        let sent: Vec<_> = (0..16).map(|number| host.send_block(number, byte(number))).collect();
        host.wait_for_writes(16);
        drop(gate);
        for sent in sent {
            host.session.finish(sent).unwrap();
        }
        assert_eq!(host.store.most_under_way(Call::Write), 16, "{args:?}");
        for number in 0..16 {
            assert_eq!(host.block(number), [byte(number as u64); BLOCK]);
        }
    }
}

#[test]
fn threads_write_where_they_are_asked_for() {
    let host = serve(&["--io-engine=threads"]);
    host.store.delay(Duration::from_millis(20));
    let sent: Vec<_> = (0..8).map(|number| host.send_block(number, byte(number))).collect();
    for sent in sent {
        host.session.finish(sent).unwrap();
    }
    // What the host's kernel does with threads, and the reason for the engine.
    assert_eq!(host.store.most_under_way(Call::Write), 1);
}

#[test]
fn requests_of_overlapping_bytes_come_one_after_the_other() {
    let host = serve(&[]);
    host.store.delay(Duration::from_millis(30));
    let writes: Vec<_> = (0..8).map(|number| host.send_block(0, byte(number))).collect();
    let read = data::read_request(host.node, host.fh, 0, BLOCK);
    let read = host.session.client().on(1).send(read).unwrap();
    for sent in writes {
        host.session.finish(sent).unwrap();
    }
    assert_eq!(host.store.most_under_way(Call::Write), 1);
    let seen = host.session.finish(read).unwrap();
    assert!(seen.iter().all(|byte| *byte == seen[0]), "a read has met a part of a write");
    // A truncation waits as well.
    host.store.delay(Duration::ZERO);
    let truncation = Change::none().size(BLOCK as u64).handle(host.fh);
    let truncate = || host.session.client().setattr(host.node, truncation).unwrap();
    let (write, _) = host.meet_a_write(77, truncate);
    host.session.finish(write).unwrap();
}

/// Attack: a worker that is killed with requests that its kernel has taken.
/// Outcome: nothing of it changes the file after the next worker has begun.
#[test]
fn a_write_of_a_dead_worker_never_lands_after_its_replay() {
    for sandbox in SANDBOXES {
        let host = serve(&[sandbox, IMMORTAL]);
        for round in 0..3 {
            let gate = host.store.hold(Call::Write);
            let sent: Vec<_> = (0..32).map(|number| host.send_block(number, byte(number + round))).collect();
            host.wait_for_writes(32);
            kill_worker(&host.backend);
            // Did the next worker not wait, its writes would meet those of the dead one.
            std::thread::sleep(MOMENT);
            drop(gate);
            for sent in sent {
                host.session.finish(sent).unwrap();
            }
            assert_eq!(host.store.most_under_way(Call::Write), 32, "{sandbox}, round {round}");
            assert_eq!(host.store.under_way(Call::Write), 0);
            for number in 0..32 {
                assert_eq!(host.block(number), [byte(number as u64 + round); BLOCK], "{sandbox}");
            }
        }
    }
}

#[test]
fn a_worker_may_die_again_while_the_next_one_waits() {
    let host = serve(&[IMMORTAL]);
    let gate = host.store.hold(Call::Write);
    let sent: Vec<_> = (0..8).map(|number| host.send_block(number, byte(number))).collect();
    host.wait_for_writes(8);
    for _ in 0..3 {
        // Each of these waits for the first one.
        kill_worker(&host.backend);
        std::thread::sleep(MOMENT);
    }
    drop(gate);
    for sent in sent {
        host.session.finish(sent).unwrap();
    }
    assert_eq!(host.store.most_under_way(Call::Write), 8);
}

#[test]
fn the_end_of_a_queue_or_a_session_waits_for_what_is_in_flight() {
    let host = serve(&["--keep-listening"]);
    let session = &host.session;
    // A queue stops.
    let (sent, ()) = host.meet_a_write(1, || session.stop_queue(2).map(drop).unwrap());
    session.start_queue(2).unwrap();
    session.finish(sent).unwrap();
    // It serves on, by the same ring.
    session.finish(host.send_block(1, 2)).unwrap();
    assert_eq!(host.block(1), [2; BLOCK]);
    // A session ends, on another queue.
    let (sent, ()) = host.meet_a_write(3, || session.client().on(1).destroy().unwrap());
    session.finish(sent).unwrap();
    // A front end leaves.
    session.init().unwrap();
    let node = session.client().lookup(ROOT, FILE).unwrap().nodeid;
    let fh = session.client().open(node, libc::O_RDWR).unwrap().fh;
    let host = Host { node, fh, ..host };
    let gate = host.store.hold(Call::Write);
    let _sent = host.send_block(1, 4);
    host.wait_for_writes(1);
    drop(host.session);
    let session = std::thread::scope(|scope| {
        let next = scope.spawn(|| host.backend.connect(common::queues(2)).unwrap());
        std::thread::sleep(MOMENT);
        assert!(!next.is_finished(), "another front end was served too early");
        drop(gate);
        next.join().unwrap()
    });
    assert_eq!(host.store.under_way(Call::Write), 0);
    session.client().lookup(ROOT, FILE).unwrap();
}

#[test]
fn a_worker_that_makes_room_for_another_program_leaves_nothing_behind() {
    let host = serve(&[]);
    // For longer than a worker has for what it serves: the rest is cut off.
    let gate = host.store.hold(Call::Write);
    let sent: Vec<_> = (0..16).map(|number| host.send_block(number, byte(number))).collect();
    host.wait_for_writes(16);
    host.backend.upgrade().unwrap();
    std::thread::sleep(MOMENT);
    drop(gate);
    for sent in sent {
        host.session.finish(sent).unwrap();
    }
    assert_eq!((host.store.most_under_way(Call::Write), host.store.calls(Call::Write)), (16, 32));
    host.session.finish(host.send_block(0, 99)).unwrap();
}

#[test]
fn errors_and_short_reads_reach_the_guest_as_by_threads() {
    let host = serve(&["--io-engine=io-uring"]);
    host.store.delay(Duration::from_millis(20));
    for errno in [libc::EIO, libc::ENOSPC, libc::EDQUOT] {
        host.store.fail(Call::Write, errno);
        let sent: Vec<_> = (0..8).map(|number| host.send_block(number, 1)).collect();
        for sent in sent {
            assert_eq!(common::errno(host.session.finish(sent)), errno);
        }
    }
    host.store.fail(Call::Write, 0);
    host.store.shorten_reads(1000);
    let client = host.session.client();
    assert_eq!(client.read(host.node, host.fh, 10, 8192).unwrap().len(), 8192);
    assert_eq!(client.read(host.node, host.fh, faultfs::LENGTH as u64 - 2500, 8192).unwrap().len(), 2500);
    assert_eq!(client.read(host.node, host.fh, faultfs::LENGTH as u64, 10).unwrap().len(), 0);
}

/// A handle with O_DIRECT on a disk, many writes at once.
#[test]
fn a_local_disk_is_written_by_the_engine_where_many_write() {
    for args in [&["--io-engine=auto"][..], &["--io-engine=io-uring"], &["--sandbox=none"]] {
        let args = [&["--allow-direct-io", IMMORTAL], args].concat();
        let (directory, backend, session) =
            common::serve_on(common::disk_directory(), common::starter().args(args), common::queues(1));
        let flags = libc::O_RDWR | libc::O_DIRECT;
        let (entry, open) = session.client().create(ROOT, "file", flags, 0o600, 0).unwrap();
        let cuts = [Segmentation::Linux, Segmentation::Contiguous];
        let mut used = false;
        for round in 0..50u64 {
            let sent: Vec<_> = (0..32u64)
                .map(|number| {
                    let bytes = [byte(number ^ round); BLOCK];
                    let offset = number * BLOCK as u64;
                    let write = data::write_request(
                        entry.nodeid,
                        open.fh,
                        offset,
                        &bytes,
                        WriteFlags::empty(),
                        flags,
                    );
                    session.client().segmentation(cuts[number as usize % 2]).send(write).unwrap()
                })
                .collect();
            if round % 10 == 9 {
                kill_worker(&backend);
            }
            for sent in sent {
                session.finish(sent).unwrap();
            }
            used |= has_engine(&backend);
            let content = std::fs::read(directory.path().join("file")).unwrap();
            for (number, block) in content.chunks(BLOCK).enumerate() {
                assert!(block.iter().all(|found| *found == byte(number as u64 ^ round)), "block {number}");
            }
        }
        assert!(used, "no engine has served");
    }
}

/// Whether a thread of an engine runs.
fn has_engine(backend: &Backend) -> bool {
    let Some(worker) = backend.worker() else { return false };
    let Ok(threads) = std::fs::read_dir(format!("/proc/{worker}/task")) else { return false };
    let name = |thread: std::fs::DirEntry| std::fs::read_to_string(thread.path().join("comm"));
    threads.flatten().filter_map(|thread| name(thread).ok()).any(|name| name.starts_with("lanefsd-ring"))
}

/// Attack: memory of a direct write that is not aligned.
/// Outcome: the host's answer.
#[test]
fn what_the_hosts_disk_does_not_take_is_refused_as_by_threads() {
    let (_directory, _backend, session) = common::on_disk(&["--allow-direct-io", "--io-engine=io-uring"]);
    let (client, flags) = (session.client(), libc::O_RDWR | libc::O_DIRECT);
    let (entry, open) = client.create(ROOT, "file", flags, 0o600, 0).unwrap();
    let write = |offset, bytes: &[u8], flags| {
        client.write_with(entry.nodeid, open.fh, offset, bytes, WriteFlags::empty(), flags)
    };
    assert_eq!(write(0, &[1; BLOCK], flags).unwrap(), BLOCK);
    assert_eq!(common::errno(write(7, &[2; 9], flags)), libc::EINVAL);
    assert_eq!(write(7, &[2; 9], libc::O_RDWR).unwrap(), 9);
    let wanted = [&[1; 7][..], &[2; 9], &[1; 16]].concat();
    assert_eq!(client.read_with(entry.nodeid, open.fh, 0, 32, libc::O_RDWR).unwrap(), wanted);
}

/// A kernel without io_uring, as many containers have it.
#[test]
fn without_io_uring_threads_read_and_write() {
    for (errno, engine) in [(libc::ENOSYS, "auto"), (libc::EPERM, "io-uring")] {
        let engine = format!("--io-engine={engine}");
        let args = [&engine, "--allow-direct-io"];
        let share = common::disk_directory();
        let backend = without_io_uring(errno, || common::starter().args(args).share(share.path()).start());
        let backend = backend.unwrap();
        common::wait_for_words(&backend, "threads read and write data: no io_uring here");
        let session = backend.connect(common::queues(1)).unwrap();
        let (node, fh) = common::create_file(&session);
        assert_eq!(session.client().write(node, fh, 0, b"data").unwrap(), 4);
        assert_eq!(session.client().read(node, fh, 0, 10).unwrap(), b"data");
        kill_worker(&backend);
        assert_eq!(session.client().read(node, fh, 0, 10).unwrap(), b"data");
        assert_eq!(backend.stderr().matches("no io_uring here").count(), 1, "{}", backend.stderr());
    }
}

/// Runs something on a thread for which the kernel has no io_uring, nor for what it starts.
fn without_io_uring<T: Send>(errno: i32, run: impl FnOnce() -> T + Send) -> T {
    use seccompiler::{SeccompAction, SeccompFilter, apply_filter};
    let rules = [(libc::SYS_io_uring_setup, Vec::new())].into_iter().collect();
    let refuse = SeccompAction::Errno(errno.unsigned_abs());
    let architecture = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, architecture).unwrap();
    let filter: seccompiler::BpfProgram = filter.try_into().unwrap();
    std::thread::scope(|scope| {
        let run = || {
            apply_filter(&filter).unwrap();
            run()
        };
        scope.spawn(run).join().unwrap()
    })
}
