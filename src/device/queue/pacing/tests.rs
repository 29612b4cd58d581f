use std::sync::Arc;
use std::time::Instant;

use fuse_protocol::abi::{InHeader, ReadIn, WriteIn};
use fuse_protocol::opcode::Opcode;
use rustix::event::Timespec;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use zerocopy::{FromZeros, IntoBytes};

use super::*;
use crate::device::inflight::{Popped, Scratch};
use crate::device::queue::Wakeup;
use crate::device::test_guest::{Guest, REPLY, Recorder, Served};
use crate::limits::Limit;
use crate::server::Server;
use crate::state_file::StateFile;

/// A guest whose queue has limits, and who has begun a session.
struct Machine {
    guest: Guest,
    queue: Arc<Queue>,
    pace: PaceHandle,
    server: Server,
    served: Served,
    state: Arc<StateFile>,
}

impl Machine {
    fn new() -> Machine {
        Machine::with_queue(1)
    }

    fn with_queue(index: usize) -> Machine {
        let mut guest = Guest::new(8, 0);
        guest.index = index;
        let (state, served) = (StateFile::create().unwrap(), Served::default());
        let pace = PaceHandle::default();
        pace.set_burst(Duration::ZERO);
        let queue = paced(guest.start(&state, 0).0, &pace);
        let server = Server::new(Arc::new(Recorder(Arc::clone(&served))));
        guest.begin_session(&queue, &server);
        Machine { guest, queue, pace, server, served, state }
    }

    fn pop(&self) -> Option<Popped> {
        Scratch::new(&self.queue).pop().ok().map(|(popped, _)| popped)
    }

    /// Serves one chain, if there is one that may be popped.
    fn serve(&self) -> bool {
        let Some(popped) = self.pop() else { return false };
        popped.decode().ok().unwrap().serve(&self.server).add_used();
        true
    }

    /// Writes another request into a chain that is popped.
    fn rewrite(&self, head: u16, opcode: Opcode, arguments: &[u8]) {
        let len = u32::try_from(size_of::<InHeader>() + arguments.len()).unwrap();
        let header = InHeader { len, opcode: opcode as u32, unique: 4, ..InHeader::new_zeroed() };
        let (memory, at) = (self.guest.memory.memory(), 0x4000 + 0x800 * u64::from(head));
        memory.write_slice(&[header.as_bytes(), arguments].concat(), GuestAddress(at)).unwrap();
    }

    fn timeout(&self, time: Duration) -> Wakeup {
        self.queue.wait(Some(Timespec { tv_sec: 0, tv_nsec: time.subsec_nanos().into() }))
    }
}

fn paced(queue: Arc<Queue>, pace: &PaceHandle) -> Arc<Queue> {
    Arc::new(Arc::into_inner(queue).unwrap().paced_by(pace, None))
}

fn read(size: u32) -> ReadIn {
    ReadIn { size, ..ReadIn::default() }
}

#[test]
fn a_chain_that_is_not_admitted_stays_in_the_ring() {
    let mut machine = Machine::new();
    machine.pace.set_rate(Limit::ReadBytes, 1);
    machine.guest.offer(0, Opcode::Read, read(500).as_bytes());
    machine.guest.offer(1, Opcode::Read, read(0).as_bytes());
    assert!(machine.serve());
    let position = machine.queue.position();
    assert!(!machine.serve() && !machine.serve());
    assert_eq!(machine.queue.position(), position, "nothing was popped");
    assert!(!machine.queue.has_backlog(), "no worker can do anything");
}

#[test]
fn a_worker_sleeps_until_a_chain_may_be_popped() {
    const DEBT: Duration = Duration::from_millis(30);
    // Where another program has the CPU for as long as the debt, there is nothing to wait for: once more.
    let (mut machine, begin) = loop {
        let mut machine = Machine::new();
        machine.pace.set_rate(Limit::ReadBytes, 1000);
        machine.guest.offer(0, Opcode::Read, read(30).as_bytes());
        machine.guest.offer(1, Opcode::Read, read(0).as_bytes());
        let begin = Instant::now();
        assert!(machine.serve());
        if !machine.serve() {
            break (machine, begin);
        }
    };
    assert_eq!(machine.timeout(Duration::ZERO), Wakeup::Work);
    assert!(begin.elapsed() >= DEBT);
    assert!(machine.queue.has_backlog(), "the chain waits for a worker again");
    assert!(machine.serve() && !machine.queue.pacing.is_held());
    assert_eq!(machine.guest.used(), [(0, REPLY + 30), (1, REPLY)]);
    let throttled = machine.pace.throttled(Limit::ReadBytes);
    assert!(throttled > Duration::ZERO && throttled <= DEBT, "{throttled:?}");
}

#[test]
fn one_worker_wakes_up_by_itself() {
    let mut machine = Machine::new();
    machine.pace.set_rate(Limit::MetaOps, 1);
    for head in 0..2 {
        machine.guest.offer(head, Opcode::Statfs, &[]);
    }
    assert!(machine.serve() && !machine.serve());
    let timer = machine.queue.begin_hold().unwrap();
    assert!(timer.timeout <= Duration::from_nanos(POLL));
    assert!(machine.queue.begin_hold().is_none());
    assert_eq!(machine.timeout(Duration::from_millis(1)), Wakeup::Idle, "the others sleep as usual");
    assert!(machine.queue.wait_held(timer).is_ok());
    assert!(machine.queue.begin_hold().is_some(), "the next one has its place");
}

#[test]
fn a_hold_ends_soon_after_the_limit_is_lifted() {
    let mut machine = Machine::new();
    for lift in [true, false] {
        machine.pace.set_rate(Limit::MetaOps, 1);
        for head in 0..2 {
            machine.guest.offer(head, Opcode::Statfs, &[]);
        }
        if lift {
            assert!(machine.serve());
        } else {
            machine.pace.pause();
        }
        assert!(!machine.serve());
        machine.pace.set_rate(Limit::MetaOps, 0);
        machine.pace.resume();
        while !machine.serve() {
            assert_eq!(machine.timeout(Duration::ZERO), Wakeup::Work);
        }
        // What is left of the hold costs one wake-up, and then workers sleep.
        while machine.serve() {}
        while machine.timeout(Duration::from_millis(1)) == Wakeup::Work {
            machine.serve();
        }
        machine.guest.used();
    }
}

#[test]
fn nothing_is_popped_while_the_queue_is_paused() {
    let mut machine = Machine::new();
    machine.guest.offer(0, Opcode::Forget, &[0; 8]);
    machine.pace.pause();
    assert!(!machine.serve() && !machine.queue.has_backlog());
    assert_eq!(machine.timeout(Duration::ZERO), Wakeup::Work, "a paused queue is looked after");
    assert!(!machine.serve());
    machine.pace.resume();
    assert!(machine.queue.has_backlog() && machine.serve());
}

#[test]
fn the_shares_of_a_group_have_one_budget() {
    let group = PaceHandle::default();
    group.set_burst(Duration::ZERO);
    group.set_rate(Limit::ReadOps, 1);
    let mut machines = [Machine::new(), Machine::new()];
    for machine in &mut machines {
        let queue = Arc::into_inner(machine.guest.start(&machine.state, 1).0).unwrap();
        machine.queue = Arc::new(queue.paced_by(&machine.pace, Some(&group)));
        machine.pace.set_rate(Limit::ReadBytes, 1);
        machine.guest.offer(0, Opcode::Read, read(100).as_bytes());
    }
    assert!(machines[0].serve());
    assert!(!machines[1].serve() && !machines[1].serve());
    group.set_rate(Limit::ReadOps, 0);
    assert!(machines[1].serve(), "its own limit was not charged in vain");
    machines[1].guest.offer(0, Opcode::Read, read(1).as_bytes());
    assert!(!machines[1].serve(), "and is in force");
}

#[test]
fn what_gives_back_is_served_in_debt() {
    let mut machine = Machine::new();
    Limit::ALL.into_iter().for_each(|limit| machine.pace.set_rate(limit, 1));
    machine.guest.offer(0, Opcode::Read, read(500).as_bytes());
    assert!(machine.serve());
    for opcode in
        [Opcode::Forget, Opcode::BatchForget, Opcode::Interrupt, Opcode::Release, Opcode::Releasedir]
    {
        machine.guest.offer(1, opcode, &[0; 24]);
        assert!(machine.serve(), "{opcode:?}");
    }
    machine.guest.offer(1, Opcode::Read, read(0).as_bytes());
    assert!(!machine.serve());
}

#[test]
fn the_high_priority_queue_has_no_limits() {
    let mut machine = Machine::with_queue(HIGH_PRIORITY);
    machine.pace.set_rate(Limit::MetaOps, 1);
    machine.pace.pause();
    for _ in 0..5 {
        machine.guest.offer(0, Opcode::Statfs, &[]);
        assert!(machine.serve());
    }
}

#[test]
fn chains_of_an_earlier_process_are_not_charged_again() {
    let mut machine = Machine::new();
    machine.pace.set_rate(Limit::ReadOps, 1);
    machine.guest.offer(0, Opcode::Read, read(1).as_bytes());
    machine.pop().unwrap().abandon();
    let _ = machine.state.recover();
    machine.queue = paced(machine.guest.start(&machine.state, 0).0, &machine.pace);
    assert!(machine.serve(), "the chain was popped before");
    machine.guest.offer(0, Opcode::Read, read(1).as_bytes());
    assert!(!machine.serve());
}

/// A guest that changes the request of a chain between the charge and the decoding, to pass for less than it is.
#[test]
fn a_request_that_changes_after_its_charge_is_refused() {
    let write = WriteIn { size: 8, ..WriteIn::new_zeroed() };
    let write = [write.as_bytes(), &[7; 8]].concat();
    let (small, large) = (read(10), read(400));
    for (charged, became) in [
        ((Opcode::Read, small.as_bytes()), (Opcode::Read, large.as_bytes())),
        ((Opcode::Forget, &write), (Opcode::Write, &write)),
        ((Opcode::Read, large.as_bytes()), (Opcode::Lookup, large.as_bytes())),
    ] {
        let mut machine = Machine::new();
        machine.pace.set_rate(Limit::ReadBytes, 1 << 30);
        machine.guest.offer(0, charged.0, charged.1);
        let popped = machine.pop().unwrap();
        machine.rewrite(0, became.0, became.1);
        let (error, completion) = popped.decode().err().unwrap();
        assert!(error.to_string().contains("charged to the rate limits"), "{error}");
        completion.add_used();
        assert_eq!((machine.guest.used(), machine.guest.error(0)), (vec![(0, REPLY)], -libc::EIO));
        assert!(machine.served.lock().unwrap().is_empty());
    }
}

/// The same between the decoding and the second look at the arguments.
#[test]
fn a_request_that_grows_after_it_was_decoded_gets_no_more_than_was_charged() {
    let mut machine = Machine::new();
    machine.pace.set_rate(Limit::ReadBytes, 1 << 30);
    machine.guest.offer(0, Opcode::Read, read(10).as_bytes());
    let request = machine.pop().unwrap().decode().ok().unwrap();
    machine.rewrite(0, Opcode::Read, read(400).as_bytes());
    request.serve(&machine.server).add_used();
    assert_eq!((machine.guest.used(), machine.guest.error(0)), (vec![(0, REPLY)], -libc::EINVAL));
    // A WRITE whose header and size say less than what follows.
    let write = |size| WriteIn { size, ..WriteIn::new_zeroed() };
    let bytes = |size| [write(size).as_bytes(), &[7; 200]].concat();
    machine.guest.offer(0, Opcode::Write, &bytes(1));
    let at = 0x4000;
    machine.guest.memory.memory().write_obj(81u32, GuestAddress(at)).unwrap();
    let request = machine.pop().unwrap().decode().ok().unwrap();
    machine.rewrite(0, Opcode::Write, &bytes(200));
    request.serve(&machine.server).add_used();
    assert_eq!((machine.guest.used(), machine.guest.error(0)), (vec![(0, REPLY)], -libc::EINVAL));
    assert!(machine.served.lock().unwrap().is_empty());
}

#[test]
fn a_chain_that_is_no_request_is_refused_as_without_limits() {
    let mut machine = Machine::new();
    machine.pace.set_rate(Limit::MetaOps, 1);
    machine.guest.write_request(0, &[0; size_of::<InHeader>() - 1]);
    machine.guest.make_available(0);
    let (error, completion) = machine.pop().unwrap().decode().err().unwrap();
    assert_eq!(error.to_string(), "a request without a header");
    completion.add_used();
    assert_eq!(machine.guest.used(), [(0, 0)]);
    // One that becomes a request after the pop was not charged.
    machine.guest.write_request(1, &[0; size_of::<InHeader>() - 1]);
    machine.guest.make_available(1);
    let popped = machine.pop().unwrap();
    machine.guest.write_request(1, &[0; size_of::<InHeader>()]);
    machine.rewrite(1, Opcode::Statfs, &[]);
    let (_, completion) = popped.decode().err().unwrap();
    completion.add_used();
    assert_eq!((machine.guest.used(), machine.guest.error(1)), (vec![(1, REPLY)], -libc::EIO));
}
