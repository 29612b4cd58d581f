//! One request queue and the thread that keeps it full.
//!
//! As a Linux guest does it: the thread sleeps until it is notified, takes all that is done, sends
//! what follows, and tells the back end once, if EVENT_IDX says that it wants to be told.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use std::time::Instant;

use lanefsd_frontend::chain::Segmentation;
use lanefsd_frontend::client::data::read_request;
use lanefsd_frontend::queue::{Pending, Queue};
use lanefsd_frontend::request::Caller;
use lanefsd_frontend::ring::Ring;
use lanefsd_frontend::session::Session;

use crate::cycles::{Cycle, Repeated, Workload, requests, segmentation, written};
use crate::error::{LoadError, Result};
use crate::exchange::Exchange;
use crate::forgets::Forgets;
use crate::options::Op;
use crate::tally::{Coordinator, Phase, Tally};

/// An operation on its way.
struct Slot {
    cycle: Box<dyn Cycle>,
    exchanges: Vec<Exchange>,
    step: usize,
    began: Instant,
    counted: bool,
}

/// A queue with all its requests.
pub struct Lane<'s> {
    queue: &'s Queue,
    forgets: &'s Forgets<'s>,
    coordinator: &'s Coordinator,
    op: Op,
    /// A slot's number is its descriptor in the ring.
    slots: Vec<Slot>,
    in_flight: usize,
    phase: Phase,
    tally: Tally,
    /// What `tally` was when the measured phase ended.
    measured: Tally,
}

impl<'s> Lane<'s> {
    /// Lays out the requests of request queue `index`, counted from 0.
    pub fn new(
        session: &'s Session,
        index: usize,
        workload: &Arc<Workload>,
        forgets: &'s Forgets<'s>,
        coordinator: &'s Coordinator,
    ) -> Result<Lane<'s>> {
        let work = &workload.work;
        let depth = usize::from(work.depth);
        let block = vec![0xa5; written(work)];
        let mut slots = Vec::with_capacity(depth);
        for number in index * depth..(index + 1) * depth {
            let (cycle, mut requests) = requests(workload, number, &block);
            for request in &mut requests {
                request.caller = Caller { uid: work.user, gid: work.user, ..request.caller };
            }
            let unique = |step: usize| 1_000_000 + 2 * (number * 16 + step) as u64;
            let lay = |(step, request)| {
                Exchange::new(session.memory(), request, unique(step), segmentation(work.segments))
            };
            let exchanges = requests.iter().enumerate().map(lay).collect::<Result<Vec<_>>>()?;
            slots.push(Slot { cycle, exchanges, step: 0, began: Instant::now(), counted: true });
        }
        let queue = session.queue(index + 1);
        block_on_reads(queue)?;
        Ok(Lane {
            queue,
            forgets,
            coordinator,
            op: work.op,
            slots,
            in_flight: 0,
            phase: Phase::Warmup,
            tally: Tally::default(),
            measured: Tally::default(),
        })
    }

    /// Adds a READ of a file, of a node and a handle, that is sent again and again and not counted.
    pub fn add_blocked_read(&mut self, session: &Session, (node, fh): (u64, u64)) -> Result<()> {
        let request = read_request(node, fh, 0, 4096);
        let exchange = Exchange::new(session.memory(), &request, 999_999, Segmentation::Contiguous)?;
        let cycle = Box::new(Repeated);
        self.slots.push(Slot {
            cycle,
            exchanges: vec![exchange],
            step: 0,
            began: Instant::now(),
            counted: false,
        });
        Ok(())
    }

    /// Keeps the queue full until the coordinator stops it, and empties it then.
    pub fn run(mut self) -> Result<Tally> {
        let queue = self.queue;
        queue.with_ring(|ring| self.drive(ring))?;
        Ok(self.measured)
    }

    fn drive(&mut self, ring: &mut Ring<Pending>) -> Result<()> {
        let now = Instant::now();
        for slot in 0..self.slots.len() {
            self.start(slot, now, ring);
        }
        self.tell(ring)?;
        while self.in_flight > 0 {
            if self.harvest(ring)? {
                self.tell(ring)?;
            } else if !ring.ask_for_call() {
                self.sleep()?;
            }
        }
        Ok(())
    }

    /// Begins an operation in a free slot.
    fn start(&mut self, number: usize, now: Instant, ring: &mut Ring<Pending>) {
        let slot = &mut self.slots[number];
        slot.began = now;
        slot.step = slot.cycle.begin(&slot.exchanges);
        self.send(number, ring);
    }

    fn send(&mut self, number: usize, ring: &mut Ring<Pending>) {
        let slot = &self.slots[number];
        ring.write_descriptor(number as u16, slot.exchanges[slot.step].descriptor());
        ring.offer(number as u16);
        self.in_flight += 1;
    }

    fn tell(&mut self, ring: &mut Ring<Pending>) -> Result<()> {
        ring.publish();
        if ring.needs_kick() {
            self.tally.kicks += 1;
            self.queue.kick()?;
        }
        Ok(())
    }

    /// Takes the answers that are there now; returns whether there were any.
    fn harvest(&mut self, ring: &mut Ring<Pending>) -> Result<bool> {
        let there = ring.used_index().wrapping_sub(ring.next_used());
        if there == 0 {
            return Ok(false);
        }
        let now = Instant::now();
        self.follow(self.coordinator.phase());
        let mut finished = 0;
        for _ in 0..there {
            let Some((head, used)) = ring.take_used_entry() else { break };
            let number = head as usize;
            self.in_flight -= 1;
            if !self.answered(number, used)? {
                self.send(number, ring);
                continue;
            }
            if self.slots[number].counted {
                finished += 1;
                self.tally.finished(now - self.slots[number].began);
            }
            if self.phase != Phase::Stop {
                self.start(number, now, ring);
            }
        }
        self.coordinator.finished(finished);
        Ok(true)
    }

    /// Enters the coordinator's phase: what is counted begins at zero, or is put by.
    fn follow(&mut self, phase: Phase) {
        if phase == self.phase {
            return;
        }
        if self.phase == Phase::Measure {
            std::mem::swap(&mut self.tally, &mut self.measured);
        }
        if phase == Phase::Measure {
            self.tally.reset();
        }
        self.phase = phase;
    }

    /// Checks an answer; returns whether the operation is finished.
    fn answered(&mut self, number: usize, used: u32) -> Result<bool> {
        self.tally.requests += 1;
        let queue = self.queue.index();
        let broken = || lanefsd_frontend::Error::BrokenRing {
            queue,
            problem: format!("chain {number} was never made available"),
        };
        let slot = self.slots.get_mut(number).ok_or_else(broken)?;
        let (operation, step) = (self.op.name(), slot.step);
        let next = slot.exchanges[step]
            .succeeded(used)
            .and_then(|len| slot.cycle.next(step, len, &slot.exchanges, self.forgets))
            .map_err(|problem| LoadError::Answer { operation, step, problem })?;
        slot.step = next.unwrap_or(0);
        Ok(next.is_none())
    }

    /// Sleeps until the back end notifies.
    fn sleep(&mut self) -> Result<()> {
        let mut count = [0; 8];
        // SAFETY: the queue owns the descriptor and outlives this use; ManuallyDrop leaves it open.
        let mut call = ManuallyDrop::new(unsafe { File::from_raw_fd(self.queue.call_event().as_raw_fd()) });
        while let Err(error) = call.read_exact(&mut count) {
            if error.kind() != ErrorKind::WouldBlock {
                return Err(LoadError::system("wait for a notification")(error));
            }
            // A worker that takes the place of another one has set O_NONBLOCK again.
            block_on_reads(self.queue)?;
        }
        self.tally.notifications += u64::from_ne_bytes(count);
        Ok(())
    }
}

/// Makes reads of the call eventfd wait: one system call per sleep instead of two.
fn block_on_reads(queue: &Queue) -> Result<()> {
    // SAFETY: plain system call on a descriptor that the queue keeps open.
    let result = unsafe { libc::fcntl(queue.call_event().as_raw_fd(), libc::F_SETFL, libc::O_RDWR) };
    if result < 0 {
        return Err(LoadError::system("make an eventfd blocking")(std::io::Error::last_os_error()));
    }
    Ok(())
}
