//! A file of a FUSE server grows under many writers: its size is set ahead, and nothing of other hosts is lost.

use std::time::Duration;

use faultfs::Call;
use fuse_protocol::flags::WriteFlags;
use lanefsd_frontend::client::data;

use super::{BLOCK, MOMENT, byte, serve};
use crate::common;
use crate::common::store::Host;
use crate::monitor::waiting_requests;
use crate::survival::{IMMORTAL, kill_worker};

/// The first block past the end of the store's file.
const END: u64 = (faultfs::LENGTH / BLOCK) as u64;

#[test]
fn a_file_grows_under_many_writers_at_once() {
    for args in [&[][..], &["--io-engine=io-uring"]] {
        let folder = tempfile::tempdir().unwrap();
        let control = folder.path().join("ctl");
        let socket = format!("--control-socket={}", control.display());
        let host = serve(&[&[socket.as_str()], args].concat());
        host.store.let_grow();
        // The first write sets the size ahead, and the others come meanwhile.
        let zero = host.store.hold(Call::Write);
        let sent: Vec<_> = (0..16).map(|number| host.send_block(END + number, byte(number))).collect();
        let all_wait = || waiting_requests(&control) == 16;
        common::wait_until(all_wait, "all writes wait for the size that is set ahead");
        let blocks = host.store.hold_data(Call::Write, 2);
        drop(zero);
        host.wait_for_writes(16);
        drop(blocks);
        for sent in sent {
            host.session.finish(sent).unwrap();
        }
        assert_eq!(host.store.most_under_way(Call::Write), 16, "{args:?}");
        // 16 blocks, a zero for the first one, and one for all that came meanwhile.
        let calls = host.store.calls(Call::Write);
        assert!(calls <= 18, "{args:?}: {calls} calls");
        assert_eq!(host.store.contents().len(), faultfs::LENGTH + 16 * BLOCK);
        for number in 0..16 {
            assert_eq!(host.block(END as usize + number), [byte(number as u64); BLOCK], "{args:?}");
        }
        let attr = host.session.client().getattr(host.node).unwrap();
        assert_eq!(attr.size, (faultfs::LENGTH + 16 * BLOCK) as u64);
    }
}

/// Whether the host's kernel has the file in its page cache, where the server leaves that to it.
fn with_and_without_cache(check: impl Fn(Host)) {
    for is_cached in [false, true] {
        let host = serve(&[]);
        host.store.let_grow();
        if is_cached {
            host.store.let_cache();
        }
        let fh = host.session.client().open(host.node, libc::O_RDWR).unwrap().fh;
        check(Host { fh, ..host });
    }
}

#[test]
fn a_write_past_the_end_that_fails_leaves_zeros_at_most() {
    with_and_without_cache(|host| {
        let (store, length) = (&host.store, || host.store.contents().len());
        // At once.
        store.fail(Call::Write, libc::ENOSPC);
        assert_eq!(common::errno(host.session.finish(host.send_block(END + 3, 1))), libc::ENOSPC);
        assert_eq!(length(), faultfs::LENGTH);
        store.fail(Call::Write, 0);
        // After the size was set ahead.
        let block = store.hold_data(Call::Write, 2);
        let sent = host.send_block(END + 3, 1);
        host.wait_for_a_block_past(faultfs::LENGTH);
        store.fail(Call::Write, libc::EIO);
        drop(block);
        assert_eq!(common::errno(host.session.finish(sent)), libc::EIO);
        store.fail(Call::Write, 0);
        assert_eq!(length(), faultfs::LENGTH + 4 * BLOCK);
        assert!(store.contents()[faultfs::LENGTH..].iter().all(|byte| *byte == 0));
        host.session.finish(host.send_block(END + 1, 7)).unwrap();
        assert_eq!(host.block(END as usize + 1), [7; BLOCK]);
    });
}

/// A kernel truncates a file to the size that it knows when a write with O_DIRECT past its end fails.
#[test]
fn what_another_host_has_written_past_the_end_stays_when_a_write_fails() {
    with_and_without_cache(|host| {
        let theirs = || host.block(END as usize + 1);
        host.store.write_elsewhere(faultfs::LENGTH + BLOCK, &[9; BLOCK]);
        for errno in [libc::ENOSPC, libc::EIO] {
            host.store.fail(Call::Write, errno);
            assert_eq!(common::errno(host.session.finish(host.send_block(END + 3, 1))), errno);
            assert_eq!(theirs(), [9; BLOCK], "the zero has failed");
        }
        host.store.fail(Call::Write, 0);
        let block = host.store.hold_data(Call::Write, 2);
        let sent = host.send_block(END + 3, 1);
        host.wait_for_a_block_past(faultfs::LENGTH + 2 * BLOCK);
        host.store.fail(Call::Write, libc::EIO);
        drop(block);
        assert_eq!(common::errno(host.session.finish(sent)), libc::EIO);
        assert_eq!(theirs(), [9; BLOCK], "the block has failed");
    });
}

/// GlusterFS does that with `performance.strict-o-direct`.
#[test]
fn a_file_grows_on_a_server_that_takes_whole_blocks() {
    with_and_without_cache(|host| {
        host.store.insist_on_blocks();
        host.store.write_elsewhere(faultfs::LENGTH + BLOCK, &[9; BLOCK]);
        host.session.finish(host.send_block(END + 3, 1)).unwrap();
        assert_eq!(host.block(END as usize + 1), [9; BLOCK]);
        assert_eq!(host.block(END as usize + 3), [1; BLOCK]);
        // Past the end, and of an odd length.
        let end = host.store.contents().len() as u64;
        assert_eq!(host.session.client().write(host.node, host.fh, end + 10, &[5; 100]).unwrap(), 100);
        assert_eq!(host.store.contents()[end as usize + 10..], [5; 100]);
        // Within the file, many at once: all that come later find that it was refused.
        host.store.delay(Duration::from_millis(5));
        let mut sent = Vec::new();
        for number in 0..8 {
            let bytes = [byte(number); 100];
            let (offset, none) = (100 * number, WriteFlags::empty());
            let write = data::write_request(host.node, host.fh, offset, &bytes, none, libc::O_RDWR);
            sent.push(host.session.client().on(1).send(write).unwrap());
        }
        for sent in sent {
            host.session.finish(sent).unwrap();
        }
        for number in 0..8 {
            assert_eq!(host.store.contents()[100 * number..][..100], [byte(number as u64); 100]);
        }
        assert_eq!(host.block(END as usize + 1), [9; BLOCK]);
    });
}

#[test]
fn a_size_that_is_set_ahead_never_ends_in_a_write_that_is_under_way() {
    let folder = tempfile::tempdir().unwrap();
    let control = folder.path().join("ctl");
    let host = serve(&[&format!("--control-socket={}", control.display())]);
    host.store.let_grow();
    let zero = host.store.hold(Call::Write);
    let first = host.send_block(END, 1);
    host.wait_for_writes(1);
    zero.admit();
    let second = host.send_block(END + 1, 2);
    let both_wait = || waiting_requests(&control) == 2;
    common::wait_until(both_wait, "both writes wait for the size");
    // Another host makes the file longer, and a third write finds it long enough.
    host.store.write_elsewhere(faultfs::LENGTH + 10 * BLOCK, &[9; BLOCK]);
    host.session.client().getattr(host.node).unwrap();
    let third = host.send_block(END + 4, 3);
    drop(zero);
    for sent in [first, second, third] {
        host.session.finish(sent).unwrap();
    }
    for (number, byte) in [(0, 1), (1, 2), (4, 3), (10, 9)] {
        assert_eq!(host.block(END as usize + number), [byte; BLOCK], "block {number}");
    }
}

#[test]
fn a_file_that_grows_survives_a_death() {
    let host = serve(&[IMMORTAL]);
    host.store.let_grow();
    for round in 0..4u64 {
        let begin = END + round * 16;
        // The worker dies while it sets the size ahead, with all blocks under way, and when some of them are written.
        let gate = host.store.hold_data(Call::Write, if round == 0 { 0 } else { 2 });
        let sent: Vec<_> = (0..16).map(|number| host.send_block(begin + number, byte(number))).collect();
        host.wait_for_writes(if round == 0 { 1 } else { 16 });
        let gate = (round < 2).then_some(gate);
        std::thread::scope(|scope| {
            // A thread in a system call dies when that has ended.
            scope.spawn(|| kill_worker(&host.backend));
            std::thread::sleep(MOMENT);
            drop(gate);
        });
        for sent in sent {
            host.session.finish(sent).unwrap();
        }
        assert_eq!(host.store.contents().len(), faultfs::LENGTH + (round as usize + 1) * 16 * BLOCK);
        for number in 0..16 {
            assert_eq!(host.block((begin + number) as usize), [byte(number); BLOCK], "round {round}");
        }
    }
}
