use std::fs::File;
use std::sync::atomic::{AtomicUsize, Ordering};

use fuse_protocol::ids::{NodeId, Unique};
use fuse_protocol::request::{Lock, Read};
use rustix::event::{EventfdFlags, eventfd};

use super::*;
use crate::device::engine::Stations;
use crate::device::inflight::Scratch;
use crate::device::queue::Queue;
use crate::device::test_guest::{Guest, REPLY};
use crate::device::vring::{Serving, Vring};
use crate::device::watchdog::Watchdog;
use crate::fs::{Context, FileSystem, PUT_BACK, Result as FsResult};
use crate::limits::PaceHandle;
use crate::metrics::Metrics;
use crate::server::Server;
use crate::sys::guest_buffers::GuestWriter;

/// Records what is served, and how much at once.
#[derive(Default)]
struct Share {
    served: Mutex<Vec<u64>>,
    now: AtomicUsize,
    most: AtomicUsize,
    put_back: Mutex<bool>,
    changed: Condvar,
}

impl Share {
    fn enter(&self, ctx: &Context) {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        thread::sleep(Duration::from_millis(2));
        self.served.lock().unwrap().push(ctx.unique.0);
    }
}

impl FileSystem for Share {
    fn read(&self, ctx: &Context, _: NodeId, read: &Read, data: &mut GuestWriter<'_>) -> FsResult<usize> {
        self.enter(ctx);
        self.now.fetch_sub(1, Ordering::SeqCst);
        Ok(data.write_zeros(usize::try_from(read.size).unwrap()))
    }

    /// Waits until the queue stops.
    fn setlkw(&self, ctx: &Context, _: NodeId, _: &Lock) -> FsResult<()> {
        self.enter(ctx);
        self.now.fetch_sub(1, Ordering::SeqCst);
        let ended = self.put_back.lock().unwrap();
        drop(self.changed.wait_while(ended, |ended| !*ended).unwrap());
        Err(PUT_BACK)
    }

    fn put_back(&self, _: Unique) {
        *self.put_back.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

/// A share that has a guest with two queues, and the processes that die with it.
struct Machine {
    state: Arc<StateFile>,
    share: Arc<Share>,
    server: Arc<Server>,
    guests: [Guest; 2],
}

impl Machine {
    fn new() -> Machine {
        let state = StateFile::create().unwrap();
        let share = Arc::new(Share::default());
        let server = Arc::new(Server::new(Arc::clone(&share) as Arc<dyn FileSystem>));
        let mut guests = [1, 2].map(|index| {
            let mut guest = Guest::new(8, 65_530);
            guest.index = index;
            guest
        });
        let queue = guests[0].start(&state, 65_530).0;
        guests[0].begin_session(&queue, &server);
        queue.journal().stop(65_531, 65_531);
        Machine { state, share, server, guests }
    }

    /// A process pops what is available and decodes all but `undecoded`; `alone` is marked. Then it dies.
    fn die(&self, number: usize, undecoded: &[u16], alone: Option<u16>) {
        let queue = self.start(number);
        while let Ok((popped, _)) = Scratch::new(&queue).pop() {
            if undecoded.contains(&popped.head()) {
                popped.abandon();
            } else {
                popped.decode().ok().unwrap().abandon();
            }
        }
        if let Some(head) = alone {
            queue.journal().mark_alone(head, true);
        }
        self.state.recover();
    }

    fn start(&self, number: usize) -> Arc<Queue> {
        let base = if number == 0 { 65_531 } else { 65_530 };
        self.guests[number].start(&self.state, base).0
    }

    fn quarantine(&self, death: Death) -> Arc<Quarantine> {
        Quarantine::after(Some(death), &self.state).unwrap()
    }

    /// Starts a queue with all its threads.
    fn vring(&self, number: usize, quarantine: &Arc<Quarantine>) -> (Vring, Serving) {
        let guest = &self.guests[number];
        let serving = Serving {
            stations: Stations::default(),
            memory: guest.memory.clone(),
            event_idx: true,
            log: None,
            server: Arc::clone(&self.server),
            watchdog: Watchdog::disabled(),
            workers: 4,
            poll_time: Duration::ZERO,
            pace: PaceHandle::default(),
            group: None,
        };
        let mut vring = Vring::new(guest.index, &self.state, &Metrics::create().unwrap(), quarantine);
        vring.set_size(8).unwrap();
        let layout = guest.layout;
        vring.set_addresses(layout.descriptors, layout.available, layout.used).unwrap();
        vring.set_base(if number == 0 { 65_531 } else { 65_530 });
        vring.set_enabled(true, &serving).unwrap();
        start(&mut vring, &serving);
        (vring, serving)
    }

    /// Waits until so many chains have used entries.
    fn receive(&mut self, number: usize, count: usize) -> Vec<(u16, u32)> {
        let mut used = Vec::new();
        until(|| {
            used.extend(self.guests[number].used());
            used.len() >= count
        });
        used
    }

    fn served(&self) -> Vec<u64> {
        self.share.served.lock().unwrap().clone()
    }

    fn most(&self) -> usize {
        self.share.most.load(Ordering::SeqCst)
    }
}

fn start(vring: &mut Vring, serving: &Serving) {
    let kick: File = eventfd(0, EventfdFlags::NONBLOCK).unwrap().into();
    vring.set_kick(Some(kick), serving).unwrap();
}

#[test]
fn after_a_fault_requests_are_served_alone_and_before_all_others() {
    let mut machine = Machine::new();
    let mut suspects: Vec<_> = (0..3).map(|head| machine.guests[0].offer_read(head)).collect();
    suspects.extend((0..2).map(|head| machine.guests[1].offer_read(head)));
    machine.die(1, &[], None);
    // The first queue has its first death with the second's chains still in flight.
    machine.die(0, &[1], None);
    let new: Vec<_> = (4..7).map(|head| machine.guests[0].offer_read(head)).collect();
    let quarantine = machine.quarantine(Death::Fault);
    assert!(quarantine.holds());
    let (_first, _) = machine.vring(0, &quarantine);
    assert_eq!(machine.receive(0, 3).len(), 3);
    thread::sleep(Duration::from_millis(30));
    assert_eq!(machine.guests[0].used(), [], "new ones wait for the other queue's");
    let (_second, _) = machine.vring(1, &quarantine);
    assert_eq!(machine.receive(1, 2).len(), 2);
    assert_eq!(machine.receive(0, 3).len(), 3);
    let served = machine.served();
    assert_eq!(served[..5], suspects);
    assert_eq!(served.len(), 8);
    assert!(new.iter().all(|unique| served[5..].contains(unique)));
    assert_eq!(machine.state.poisoned().load(Ordering::Relaxed), 0);
}

#[test]
fn a_request_that_makes_two_processes_fail_is_refused_and_no_other_one() {
    // Decoded or not, and the process that refused it fails, too.
    for (undecoded, deaths) in [(&[][..], 2), (&[1][..], 2), (&[][..], 3)] {
        let mut machine = Machine::new();
        (0..3).for_each(|head| {
            machine.guests[0].offer_read(head);
        });
        for death in 1..=deaths {
            machine.die(0, undecoded, (death > 1).then_some(1));
            if !undecoded.is_empty() && death == 1 {
                // It is not decoded by any later process either.
                assert_eq!(machine.state.unfinished(), [(1, 1)]);
            }
        }
        let quarantine = machine.quarantine(Death::Fault);
        let (_vring, _) = machine.vring(0, &quarantine);
        let mut used = machine.receive(0, 3);
        used.sort_unstable();
        let refused = if undecoded.is_empty() && deaths == 2 { REPLY } else { 0 };
        assert_eq!(used[1], (1, refused));
        if refused > 0 {
            assert_eq!(machine.guests[0].error(1), -libc::EIO);
        }
        for index in [0, 2] {
            let (head, len) = used[index];
            assert_eq!(machine.guests[0].expected.get(&head), Some(&len));
        }
        assert_eq!(machine.served().len(), 2);
        assert_eq!(machine.state.poisoned().load(Ordering::Relaxed), 1);
    }
}

#[test]
fn a_process_that_was_killed_has_no_request_to_blame() {
    let mut machine = Machine::new();
    (0..3).for_each(|head| {
        machine.guests[0].offer_read(head);
    });
    machine.die(0, &[], None);
    assert!(!machine.quarantine(Death::Kill).holds(), "once is no reason to be slow");
    machine.die(0, &[], Some(1));
    let quarantine = machine.quarantine(Death::Kill);
    assert!(quarantine.holds());
    let (_vring, _) = machine.vring(0, &quarantine);
    assert_eq!(machine.receive(0, 3).len(), 3);
    assert_eq!((machine.served().len(), machine.most()), (3, 1));
    assert_eq!(machine.state.poisoned().load(Ordering::Relaxed), 0);
}

/// The process was marked to serve one, which was done, and failed with the next.
#[test]
fn a_mark_counts_for_one_process() {
    let mut machine = Machine::new();
    (0..2).for_each(|head| {
        machine.guests[0].offer_read(head);
    });
    machine.die(0, &[], None);
    machine.die(0, &[], Some(0));
    // Another process begins with the queue, and fails before it comes to that chain.
    machine.die(0, &[], None);
    let quarantine = machine.quarantine(Death::Fault);
    let (_vring, _) = machine.vring(0, &quarantine);
    assert_eq!(machine.receive(0, 2).len(), 2);
    assert_eq!((machine.served().len(), machine.state.poisoned().load(Ordering::Relaxed)), (2, 0));
}

#[test]
fn after_a_kill_requests_are_served_side_by_side() {
    let mut machine = Machine::new();
    (0..6).for_each(|head| {
        machine.guests[0].offer_read(head);
    });
    machine.die(0, &[], None);
    let quarantine = machine.quarantine(Death::Kill);
    let (_vring, _) = machine.vring(0, &quarantine);
    assert_eq!(machine.receive(0, 6).len(), 6);
    assert!(machine.most() > 1, "one after the other");
}

/// Waits for what another thread does.
fn until(mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < end, "not within a minute");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A wait for a lock that another request may release holds up nothing, and stays put back over deaths.
#[test]
fn a_wait_for_a_lock_is_not_alone_for_long() {
    let mut machine = Machine::new();
    let wait = machine.guests[0].offer_wait(0);
    let read = machine.guests[0].offer_read(1);
    machine.die(0, &[], None);
    machine.guests[0].offer_read(2);
    let quarantine = machine.quarantine(Death::Fault);
    let (mut vring, serving) = machine.vring(0, &quarantine);
    assert_eq!(machine.receive(0, 2).len(), 2);
    // The wait has a thread of its own, which may come after the new request: nobody waits long for it.
    until(|| machine.served().len() == 3);
    assert_eq!(machine.served()[0], read, "the wait comes last of the suspects");
    assert!(!quarantine.holds());
    vring.stop();
    let count = || machine.served().iter().filter(|unique| **unique == wait).count();
    assert_eq!(count(), 1);
    *machine.share.put_back.lock().unwrap() = false;
    start(&mut vring, &serving);
    until(|| count() == 2);
    vring.stop();
}

#[test]
fn a_queue_that_never_starts_holds_the_others_for_a_while_only() {
    let mut machine = Machine::new();
    machine.guests[0].offer_read(0);
    machine.guests[1].offer_read(0);
    machine.die(0, &[], None);
    machine.die(1, &[], None);
    machine.guests[0].offer_read(1);
    let quarantine = machine.quarantine(Death::Fault);
    let (_vring, _) = machine.vring(0, &quarantine);
    assert_eq!(machine.receive(0, 2).len(), 2);
    assert!(!quarantine.holds());
}

#[test]
fn a_queue_may_stop_while_it_is_held() {
    let mut machine = Machine::new();
    machine.guests[0].offer_read(0);
    machine.guests[1].offer_read(0);
    machine.die(0, &[], None);
    machine.die(1, &[], None);
    let quarantine = machine.quarantine(Death::Fault);
    let (mut vring, serving) = machine.vring(0, &quarantine);
    vring.stop();
    start(&mut vring, &serving);
    vring.stop();
    start(&mut vring, &serving);
    assert_eq!(machine.receive(0, 1).len(), 1);
    quarantine.end();
    vring.stop();
    assert_eq!(machine.served().len(), 1);
}

#[test]
fn a_fault_is_told_from_a_kill() {
    for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGABRT, libc::SIGSYS, libc::SIGILL, libc::SIGFPE] {
        assert_eq!(Death::by_signal(signal), Death::Fault);
    }
    for signal in [libc::SIGKILL, libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        assert_eq!(Death::by_signal(signal), Death::Kill);
    }
}
