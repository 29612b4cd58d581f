//! A process that dies between any two steps of a request, and the one after it.
//!
//! A death is simulated: requests in flight are abandoned, which adds no used entry, and a new queue is made of the
//! state file and guest memory. The guest migrates all the time, so that each write has to be in the dirty log.

use std::collections::{HashMap, HashSet};
use std::mem;
use std::sync::Arc;

use proptest::prelude::*;

use super::inflight::{Completion, InFlight, Popped, Scratch};
use super::queue::Queue;
use super::test_guest::{Guest, REPLY, Recorder, Served};
use crate::server::Server;
use crate::state_file::{Resumed, StateFile};

/// A request in flight.
enum Flight {
    Popped(Popped),
    Decoded(InFlight),
    Done(Completion),
}

impl Flight {
    fn abandon(self) {
        match self {
            Flight::Popped(popped) => popped.abandon(),
            Flight::Decoded(request) => request.abandon(),
            Flight::Done(completion) => completion.abandon(),
        }
    }
}

/// Where in a step the process dies.
#[derive(Clone, Copy, Debug)]
enum Cut {
    Between,
    /// A chain was taken and is not counted.
    Uncounted,
    /// The used entry of a request was begun.
    EntryBegun,
    /// It was added, and the journal does not say so.
    EntryAdded,
}

const CUTS: [Cut; 4] = [Cut::Between, Cut::Uncounted, Cut::EntryBegun, Cut::EntryAdded];

struct Machine {
    guest: Guest,
    state: Arc<StateFile>,
    server: Server,
    served: Served,
    queue: Arc<Queue>,
    /// In flight, with the head of each.
    flights: Vec<(u16, Flight)>,
    uniques: HashMap<u16, u64>,
    /// What the front end says that the next available chain is.
    base: u16,
    /// Requests that a process has died with, at all and after they were decoded.
    touched: HashSet<u64>,
    replayed: HashSet<u64>,
}

impl Machine {
    fn new(size: u16, start: u16) -> Machine {
        let mut guest = Guest::new(size, start);
        let state = StateFile::create().unwrap();
        let served = Served::default();
        let server = Server::new(Arc::new(Recorder(Arc::clone(&served))));
        let (queue, _, after_crash) = guest.start(&state, start);
        assert!(!after_crash);
        guest.begin_session(&queue, &server);
        Machine {
            guest,
            state,
            server,
            served,
            queue,
            flights: Vec::new(),
            uniques: HashMap::new(),
            base: start,
            touched: HashSet::new(),
            replayed: HashSet::new(),
        }
    }

    /// Offers a READ in a chain that is not in flight, if there is one.
    fn offer(&mut self, choice: u16) {
        let size = self.guest.layout.size;
        let heads = (0..size).map(|distance| choice.wrapping_add(distance) % size);
        if let Some(head) = heads.into_iter().find(|head| !self.guest.expected.contains_key(head)) {
            let unique = self.guest.offer_read(head);
            self.uniques.insert(head, unique);
        }
    }

    fn pop(&mut self) -> bool {
        let Ok((popped, _)) = Scratch::new(&self.queue).pop() else { return false };
        self.flights.push((popped.head(), Flight::Popped(popped)));
        true
    }

    /// Takes the next step of the request with this number, and returns whether it was the last one.
    fn step(&mut self, choice: usize) {
        if self.flights.is_empty() {
            return;
        }
        let (head, flight) = self.flights.swap_remove(choice % self.flights.len());
        let next = match flight {
            Flight::Popped(popped) => Flight::Decoded(popped.decode().ok().unwrap()),
            Flight::Decoded(request) => Flight::Done(request.serve(&self.server)),
            Flight::Done(completion) => {
                completion.add_used();
                return self.guest.receive();
            }
        };
        self.flights.push((head, next));
    }

    fn die(&mut self, cut: Cut) {
        match cut {
            Cut::Between => {}
            Cut::Uncounted => {
                let resumes = self.queue.resumed_len() > 0;
                if self.pop() && !resumes {
                    self.queue.journal().uncount();
                }
            }
            Cut::EntryBegun | Cut::EntryAdded => {
                let is_done = |(_, flight): &&(u16, Flight)| matches!(flight, Flight::Done(_));
                if let Some((head, _)) = self.flights.iter().find(is_done) {
                    self.queue.mark_chain(*head);
                    let _ = self.queue.journal().begin_used_entry(*head, self.guest.used_index());
                    if matches!(cut, Cut::EntryAdded) {
                        self.guest.write_used(*head, self.guest.expected[head]);
                    }
                }
            }
        }
        for (head, flight) in mem::take(&mut self.flights) {
            self.touched.insert(self.uniques[&head]);
            if matches!(flight, Flight::Decoded(_)) {
                self.guest.begin_reply(head);
                self.replayed.insert(self.uniques[&head]);
            }
            flight.abandon();
        }
    }

    /// The process dies, and another one begins.
    fn crash(&mut self, cut: Cut) {
        self.die(cut);
        self.state.recover();
        let (resumed, after_crash) = self.restart();
        assert!(after_crash);
        // Also those that it had not popped again.
        let touched = resumed.iter().filter(|chain| chain.deaths > 0);
        self.touched.extend(touched.map(|chain| self.uniques[&chain.head]));
    }

    fn restart(&mut self) -> (Vec<Resumed>, bool) {
        let (queue, resumed, after_crash) = self.guest.start(&self.state, self.base);
        self.queue = queue;
        self.guest.check_log();
        self.guest.receive();
        (resumed, after_crash)
    }

    /// The queue stops: what was done is completed, and what was decoded is put back, as if it waited. The
    /// process may die before or after the front end has been told.
    fn stop(&mut self, dies: bool, is_told: bool) {
        let mut heads = Vec::new();
        for (head, flight) in mem::take(&mut self.flights) {
            match flight {
                Flight::Popped(popped) => drop(popped.decode().ok().unwrap().serve(&self.server).add_used()),
                Flight::Done(completion) => drop(completion.add_used()),
                Flight::Decoded(request) => {
                    // In the ring it is a new one.
                    self.replayed.remove(&self.uniques[&head]);
                    heads.push(request.put_back().into_head());
                    assert_eq!(heads.last(), Some(&head));
                }
            }
        }
        self.queue.put_back(&heads);
        let (available, used) = self.queue.position();
        self.queue.journal().stop(available, used);
        self.guest.receive();
        // With a used index of 0 the ring may be a new one.
        if is_told || !dies || used == 0 {
            self.base = available;
        }
        if dies {
            self.state.recover();
        }
        assert!(!self.restart().1);
    }

    /// Serves all that is left.
    fn finish(&mut self) {
        while !self.flights.is_empty() || self.pop() {
            self.step(0);
        }
        self.guest.check_log();
        assert!(self.guest.expected.is_empty(), "chains without a used entry: {:?}", self.guest.expected);
        for (unique, is_replay) in self.served.lock().unwrap().iter() {
            assert!(!is_replay || self.touched.contains(unique), "{unique} was no replay");
        }
    }

    fn replays(&self) -> HashSet<u64> {
        let served = self.served.lock().unwrap();
        served.iter().filter(|(_, is_replay)| *is_replay).map(|(unique, _)| *unique).collect()
    }
}

#[derive(Clone, Debug)]
enum Action {
    Offer(u16),
    Pop,
    Step(usize),
    Crash(usize),
    Stop(bool, bool),
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        6 => any::<u16>().prop_map(Action::Offer),
        6 => Just(Action::Pop),
        12 => any::<usize>().prop_map(Action::Step),
        3 => (0..CUTS.len()).prop_map(Action::Crash),
        1 => any::<(bool, bool)>().prop_map(|(dies, is_told)| Action::Stop(dies, is_told)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    /// Whatever the order of steps and deaths, each chain gets one used entry with the length of its reply.
    #[test]
    fn each_chain_gets_one_used_entry(
        size in 0u32..4,
        start in prop_oneof![Just(0u16), Just(7), 65_520u16..=65_535],
        actions in proptest::collection::vec(action(), 1..120),
    ) {
        let mut machine = Machine::new(1 << size, start);
        for action in actions {
            match action {
                Action::Offer(choice) => machine.offer(choice),
                Action::Pop => drop(machine.pop()),
                Action::Step(choice) => machine.step(choice),
                Action::Crash(cut) => machine.crash(CUTS[cut]),
                Action::Stop(dies, is_told) => machine.stop(dies, is_told),
            }
        }
        machine.crash(Cut::Between);
        machine.finish();
        let replays = machine.replays();
        // What was done before it was served again has no replay.
        let served: HashSet<u64> =
            machine.served.lock().unwrap().iter().map(|(unique, _)| *unique).collect();
        prop_assert!(machine.replayed.is_subset(&replays), "{:?} {:?} {served:?}", machine.replayed, replays);
    }
}

/// Each place in which a process can die with one request, at the wrap of the indices and in the smallest ring.
#[test]
fn a_death_at_every_step_of_a_request() {
    for (size, start) in [(1, 0), (1, 65_534), (8, 65_533), (8, 65_534), (2, 300)] {
        for steps in 0..4 {
            for cut in CUTS {
                let mut machine = Machine::new(size, start);
                machine.offer(0);
                if steps > 0 {
                    machine.pop();
                }
                (1..steps).for_each(|_| machine.step(0));
                machine.crash(cut);
                machine.finish();
                // The next ones, past the wrap.
                for _ in 0..4 {
                    machine.offer(0);
                    machine.finish();
                }
            }
        }
    }
}

#[test]
fn requests_that_were_completed_out_of_order() {
    let mut machine = Machine::new(8, 65_531);
    (0..8).for_each(|head| machine.offer(head));
    (0..8).for_each(|_| assert!(machine.pop()));
    // Two used entries out of order, a reply without one, and the rest is decoded.
    let at = |machine: &Machine, head| machine.flights.iter().position(|(other, _)| *other == head).unwrap();
    for (head, steps) in [(6, 3), (3, 3), (5, 2), (0, 1), (1, 1), (2, 1), (4, 1)] {
        (0..steps).for_each(|_| machine.step(at(&machine, head)));
    }
    machine.die(Cut::Between);
    machine.state.recover();
    let (resumed, after_crash) = machine.restart();
    assert!(after_crash);
    assert_eq!(resumed.iter().map(|chain| chain.head).collect::<Vec<_>>(), [0, 1, 2, 4, 5, 7]);
    let done: Vec<_> =
        resumed.iter().filter(|chain| chain.written.is_some()).map(|chain| chain.head).collect();
    assert_eq!(done, [5]);
    assert!(resumed.iter().all(|chain| chain.deaths == u32::from(chain.head != 5) && !chain.is_poison));
    let untouched = machine.uniques[&7];
    machine.finish();
    let replays = machine.replays();
    assert_eq!(replays.len(), 4);
    assert!(!replays.contains(&untouched));
}

/// A chain that waited for a lock was put back, and later ones were completed: it is in the journal alone.
#[test]
fn a_chain_that_was_put_back_survives_the_process() {
    for (dies, is_told) in [(false, true), (true, true), (true, false)] {
        let mut machine = Machine::new(8, 40);
        (0..3).for_each(|head| machine.offer(head));
        (0..3).for_each(|_| assert!(machine.pop()));
        let head = machine.flights[0].0;
        machine.step(0);
        // What is not decoded is served; the decoded one is at the end now.
        machine.stop(dies, is_told);
        assert_eq!(machine.guest.expected.keys().copied().collect::<Vec<_>>(), [head]);
        machine.offer(5);
        machine.finish();
        assert!(machine.replays().is_empty(), "nobody has died with it");
    }
}

/// A stopped queue that is set up for another ring, or anew, has no old chains.
#[test]
fn another_ring_gets_none_of_the_chains() {
    for change in 0..3 {
        let mut machine = Machine::new(8, 40);
        machine.offer(2);
        assert!(machine.pop());
        machine.step(0);
        machine.die(Cut::Between);
        machine.state.recover();
        match change {
            0 => machine.guest.layout.used = 0x3800,
            1 => machine.guest.layout.size = 4,
            _ => machine.guest.layout.descriptors = 0x1100,
        }
        let (_, resumed, after_crash) = machine.guest.start(&machine.state, 40);
        assert_eq!((resumed, after_crash), (Vec::new(), false));
    }
    let mut machine = Machine::new(8, 40);
    machine.offer(2);
    assert!(machine.pop());
    machine.queue.journal().stop(41, machine.guest.used_index());
    machine.guest.set_index(machine.guest.layout.used, 0);
    let (_, resumed, _) = machine.guest.start(&machine.state, 0);
    assert_eq!(resumed, []);
    machine.flights.drain(..).for_each(|(_, flight)| flight.abandon());
}

/// A guest that changes its request meanwhile gets an error, and nothing is served.
#[test]
fn a_request_that_has_changed_is_refused() {
    let mut machine = Machine::new(8, 9);
    machine.offer(3);
    assert!(machine.pop());
    machine.step(0);
    machine.die(Cut::Between);
    machine.state.recover();
    // The same chain with another request.
    let layout = machine.guest.layout;
    machine.guest.layout.available = 0x2800;
    machine.guest.offer_read(3);
    machine.guest.layout = layout;
    machine.guest.expected.insert(3, REPLY);
    machine.restart();
    let popped = Scratch::new(&machine.queue).pop().ok().unwrap().0;
    let (_, completion) = popped.decode().err().unwrap();
    completion.add_used();
    machine.guest.receive();
    machine.finish();
    assert_eq!(machine.guest.error(3), -libc::EIO);
    assert!(machine.served.lock().unwrap().is_empty());
}

/// A guest that makes a chain available twice, and one that moves its used index, harm themselves.
#[test]
fn a_hostile_ring_ends_in_no_other_process() {
    for moved in [0, 1, 3, 0x8000] {
        for cut in CUTS {
            let mut machine = Machine::new(4, 65_534);
            machine.offer(1);
            machine.offer(2);
            machine.guest.make_available(1);
            // The second time is refused.
            assert!(machine.pop() && machine.pop() && !machine.pop());
            (0..4).for_each(|choice| machine.step(choice));
            machine.die(cut);
            machine.state.recover();
            let index = machine.guest.used_index().wrapping_add(moved);
            machine.guest.set_index(machine.guest.layout.used, index);
            let (queue, ..) = machine.guest.start(&machine.state, machine.base);
            let mut served = 0;
            while let Ok((popped, _)) = Scratch::new(&queue).pop() {
                popped.decode().ok().unwrap().serve(&machine.server).add_used();
                served += 1;
            }
            assert!(served <= 3);
            assert!(machine.state.unfinished().is_empty());
        }
    }
}
