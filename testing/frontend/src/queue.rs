//! One virtqueue in use by any number of threads: submit chains, wait for them, count notifications.
//!
//! Nobody polls in a loop: a thread that waits sleeps on the call eventfd, so a notification that the
//! device forgets shows as a timeout.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::chain::Chain;
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::ring::{Ring, RingOptions, Segment};

/// Guest-physical address of the regions of rings that can be hidden.
const HIDEABLE: u64 = 1 << 40;

/// Names one submitted chain of one queue. Tokens grow in the order of submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(u64);

/// A chain that the device has given back.
#[derive(Debug)]
pub struct Completion {
    /// Which one.
    pub token: Token,
    /// Bytes that the device says it wrote.
    pub used: usize,
    /// The chain; its buffers may be used again.
    pub chain: Chain,
}

/// What a queue remembers about a chain in flight.
#[derive(Debug)]
pub struct Pending {
    token: Token,
    chain: Chain,
    /// Nobody will ask for it.
    detached: bool,
}

#[derive(Debug)]
struct State {
    ring: Ring<Pending>,
    done: BTreeMap<Token, Completion>,
    next_token: u64,
    segments: Vec<Segment>,
    /// Somebody sleeps on the call eventfd and will wake the others.
    sleeper: bool,
}

/// One virtqueue and its eventfds.
#[derive(Debug)]
pub struct Queue {
    index: usize,
    memory: Arc<Memory>,
    state: Mutex<State>,
    turn: Condvar,
    kick: EventFd,
    call: EventFd,
    timeout: Duration,
    kicks: AtomicU64,
    calls: AtomicU64,
}

impl Queue {
    /// A queue with a fresh ring in `memory`. Waiting ends with an error after `timeout`.
    pub fn new(memory: &Arc<Memory>, index: usize, options: RingOptions, timeout: Duration) -> Result<Queue> {
        Queue::of(memory, index, Ring::new(memory, index, options)?, timeout)
    }

    /// The same with a ring whose parts can be hidden ([`Ring::hideable`]).
    pub fn hideable(
        memory: &Arc<Memory>,
        index: usize,
        options: RingOptions,
        timeout: Duration,
    ) -> Result<Queue> {
        let guest = HIDEABLE + ((index as u64) << 32);
        Queue::of(memory, index, Ring::hideable(memory, index, options, guest)?, timeout)
    }

    fn of(memory: &Arc<Memory>, index: usize, ring: Ring<Pending>, timeout: Duration) -> Result<Queue> {
        let event =
            || EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::system("create an eventfd"));
        Ok(Queue {
            index,
            memory: memory.clone(),
            state: Mutex::new(State {
                ring,
                done: BTreeMap::new(),
                next_token: 0,
                segments: Vec::new(),
                sleeper: false,
            }),
            turn: Condvar::new(),
            kick: event()?,
            call: event()?,
            timeout,
            kicks: AtomicU64::new(0),
            calls: AtomicU64::new(0),
        })
    }

    /// Queue number; 0 is the high-priority queue.
    pub fn index(&self) -> usize {
        self.index
    }

    /// The eventfd that announces chains to the device.
    pub fn kick_event(&self) -> &EventFd {
        &self.kick
    }

    /// The eventfd that the device announces used chains with.
    pub fn call_event(&self) -> &EventFd {
        &self.call
    }

    /// Kicks sent so far.
    pub fn kicks(&self) -> u64 {
        self.kicks.load(Ordering::Relaxed)
    }

    /// Notifications seen so far. A notification that nobody waited for is counted when somebody waits.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// Most descriptors a chain of this queue may have.
    pub fn size(&self) -> usize {
        self.lock().ring.size()
    }

    /// Chains that the device owns.
    pub fn in_flight(&self) -> usize {
        self.lock().ring.in_flight()
    }

    /// Submits a chain and tells the device if it wants to know. Waits while the ring is full.
    pub fn submit(&self, chain: Chain) -> Result<Token> {
        let (mut state, token) = self.add(self.lock(), chain, false)?;
        self.tell(&mut state)?;
        Ok(token)
    }

    /// Submits a chain that nobody will wait for: it is dropped once the device gives it back.
    pub fn submit_detached(&self, chain: Chain) -> Result<()> {
        let (mut state, _) = self.add(self.lock(), chain, true)?;
        self.tell(&mut state)
    }

    /// Waits until the device owns no chain.
    pub fn drain(&self) -> Result<()> {
        let deadline = Instant::now() + self.timeout;
        let mut state = self.lock();
        while state.ring.in_flight() > 0 {
            state = self.reap(state, deadline)?;
        }
        Ok(())
    }

    /// Submits several chains and tells the device once.
    pub fn submit_batch(&self, chains: impl IntoIterator<Item = Chain>) -> Result<Vec<Token>> {
        let mut tokens = Vec::new();
        let mut state = self.lock();
        for chain in chains {
            let token;
            (state, token) = self.add(state, chain, false)?;
            tokens.push(token);
        }
        self.tell(&mut state)?;
        Ok(tokens)
    }

    fn add<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        chain: Chain,
        detached: bool,
    ) -> Result<(MutexGuard<'a, State>, Token)> {
        let token = Token(state.next_token);
        state.next_token += 1;
        let mut pending = Pending { token, chain, detached };
        let deadline = Instant::now() + self.timeout;
        loop {
            let State { ring, segments, .. } = &mut *state;
            pending.chain.segments(segments);
            let placement = pending.chain.placement;
            match ring.add(segments, placement, pending) {
                Ok(_) => return Ok((state, token)),
                Err((Error::RingFull { .. }, back)) if ring.in_flight() > 0 => pending = back,
                Err((error, _)) => return Err(error),
            }
            // What waits unpublished would never make room.
            self.tell(&mut state)?;
            state = self.reap(state, deadline)?;
        }
    }

    /// Submits a chain whose descriptors `lay` writes by hand; it returns those it used, the head first.
    /// The device is always kicked.
    pub fn submit_by_hand(
        &self,
        chain: Chain,
        lay: impl FnOnce(&mut Ring<Pending>, &[Segment]) -> Result<Vec<u16>>,
    ) -> Result<Token> {
        let mut guard = self.lock();
        let state = &mut *guard;
        let token = Token(state.next_token);
        state.next_token += 1;
        chain.segments(&mut state.segments);
        let descriptors = lay(&mut state.ring, &state.segments)?;
        let writable = chain.writable.len() as u64;
        state.ring.offer_by_hand(descriptors, writable, Pending { token, chain, detached: false })?;
        state.ring.publish();
        self.kick()?;
        Ok(token)
    }

    /// Gives raw access to the ring while nobody else uses it.
    pub fn with_ring<R>(&self, act: impl FnOnce(&mut Ring<Pending>) -> R) -> R {
        act(&mut self.lock().ring)
    }

    /// Kicks the device, wanted or not.
    pub fn kick(&self) -> Result<()> {
        self.kicks.fetch_add(1, Ordering::Relaxed);
        self.kick.write(1).map_err(Error::system("kick the device"))
    }

    fn tell(&self, state: &mut State) -> Result<()> {
        state.ring.publish();
        if state.ring.needs_kick() { self.kick() } else { Ok(()) }
    }

    /// Waits for one chain.
    pub fn wait(&self, token: Token) -> Result<Completion> {
        self.wait_for(token, self.timeout)
    }

    /// Waits for one chain, at most `timeout`.
    pub fn wait_for(&self, token: Token, timeout: Duration) -> Result<Completion> {
        let deadline = Instant::now() + timeout;
        let mut state = self.lock();
        loop {
            if let Some(done) = state.done.remove(&token) {
                return Ok(done);
            }
            state = self.reap(state, deadline)?;
        }
    }

    /// Waits for any chain; `None` if none is in flight.
    pub fn complete(&self) -> Result<Option<Completion>> {
        let deadline = Instant::now() + self.timeout;
        let mut state = self.lock();
        loop {
            if let Some((_, done)) = state.done.pop_first() {
                return Ok(Some(done));
            }
            if state.ring.in_flight() == 0 {
                return Ok(None);
            }
            state = self.reap(state, deadline)?;
        }
    }

    /// Any chain that is done, without waiting.
    pub fn try_complete(&self) -> Result<Option<Completion>> {
        let mut state = self.lock();
        self.collect(&mut state)?;
        Ok(state.done.pop_first().map(|(_, done)| done))
    }

    /// Whether a chain is done, without waiting and without taking it.
    pub fn is_done(&self, token: Token) -> Result<bool> {
        let mut state = self.lock();
        self.collect(&mut state)?;
        Ok(state.done.contains_key(&token))
    }

    /// Chains that the device owns, taken back: only once the device is stopped for good.
    pub fn abandon(&self) -> Vec<Chain> {
        self.lock().ring.abandon().into_iter().map(|pending| pending.chain).collect()
    }

    /// Starts over with a fresh ring, as a driver does after a reset. Chains in flight are dropped.
    pub fn renew(&self) -> Result<()> {
        let mut state = self.lock();
        state.ring = Ring::new(&self.memory, self.index, state.ring.options())?;
        Ok(())
    }

    fn collect(&self, state: &mut State) -> Result<bool> {
        let mut any = false;
        while let Some((Pending { token, chain, detached }, used)) = state.ring.take_used()? {
            if !detached {
                state.done.insert(token, Completion { token, used: used as usize, chain });
            }
            any = true;
        }
        if any {
            self.turn.notify_all();
        }
        Ok(any)
    }

    /// Collects what the device has used; sleeps first if there is nothing.
    fn reap<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        deadline: Instant,
    ) -> Result<MutexGuard<'a, State>> {
        if self.collect(&mut state)? {
            return Ok(state);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let in_flight = state.ring.in_flight();
            return Err(Error::Timeout { queue: self.index, waited: self.timeout, in_flight });
        }
        if state.sleeper {
            return Ok(self.turn.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0);
        }
        if state.ring.ask_for_call() {
            self.collect(&mut state)?;
            return Ok(state);
        }
        state.sleeper = true;
        drop(state);
        let called = self.sleep(left);
        state = self.lock();
        state.sleeper = false;
        self.turn.notify_all();
        if !called? && state.ring.used_index() != state.ring.next_used() {
            let problem = "used entries were published, but the notification asked for never came".into();
            return Err(Error::BrokenRing { queue: self.index, problem });
        }
        Ok(state)
    }

    fn sleep(&self, at_most: Duration) -> Result<bool> {
        let mut poll = libc::pollfd { fd: self.call.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let millis = i32::try_from(at_most.as_millis()).unwrap_or(i32::MAX).saturating_add(1);
        // SAFETY: one pollfd, and its descriptor lives as long as self.
        match unsafe { libc::poll(&raw mut poll, 1, millis) } {
            0 => return Ok(false),
            // Interrupted: look again.
            -1 => return Ok(true),
            _ => {}
        }
        match self.call.read() {
            Ok(count) => {
                self.calls.fetch_add(count, Ordering::Relaxed);
                Ok(true)
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => Ok(true),
            Err(source) => Err(Error::System { what: "read the call eventfd".into(), source }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
