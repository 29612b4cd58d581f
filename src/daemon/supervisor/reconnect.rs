//! A front end that comes back: its session goes on.
//!
//! Front ends that reconnect (cloud-hypervisor) ask for a region to track requests in flight (GET_INFLIGHT_FD), keep its
//! descriptor, and give it to the back end with which they go on (SET_INFLIGHT_FD). Here requests in flight stand in the
//! state file, which no front end can write. The region is empty and names a session: the supervisor keeps its
//! descriptor, and compares what the front end gives. Nothing is ever read of it, so that it does not matter what the
//! front end does with it; and no two memory files are the same as long as one of them is open.
//!
//! When such a front end disconnects while queues run, its worker drains as for an upgrade, and the next worker begins with
//! the same state. The next front end may negotiate, and set up memory and rings, as ever. If it gives the region, the
//! queues go on when they start. If it asks for a region of its own, starts a queue or resets the device, the session ends
//! and this front end gets a worker with an empty state. Until then a worker leaves the state as it is, however
//! the connection ends.
//!
//! The worker knows nothing of the feature. It is offered where the session can be kept: with `--keep-listening`.

use std::os::fd::RawFd;
use std::sync::Arc;

use log::{error, info, warn};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;
use vhost::vhost_user::message::FrontendReq;

use super::deaths::status;
use super::link::Link;
use super::message::Message;
use super::relay::Relay;
use super::upgrade::handover::{Kept, Words};
use super::upgrade::{Drained, drain};
use super::{Ending, NoWorker, RunError, Supervisor};
use crate::device::quarantine::Death;
use crate::fs::FileSystem;
use crate::sandbox::WorkerEnd;
use crate::sys::inherited::identity;

/// `VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD`.
const FEATURE: u64 = 1 << 12;
/// Bytes of the description of a region: its size, its offset, and number and size of the queues.
const DESCRIPTION: usize = 20;
/// Bytes of a region for each queue, and for each descriptor of it.
const PER_QUEUE: u64 = 64;
const PER_DESCRIPTOR: u64 = 16;

/// The region of a session: the reply in which the front end has got it.
#[derive(Clone, Debug)]
pub(super) struct Region(Message);

impl Region {
    /// A new one, as a front end asks for it.
    fn create(asked: &Message) -> Result<Region, Errno> {
        let number = |offset: usize| {
            let bytes = asked.body().get(offset..).and_then(<[u8]>::first_chunk);
            bytes.map_or(0, |bytes| u16::from_ne_bytes(*bytes))
        };
        let (queues, size) = (number(16), number(18));
        let per_queue = PER_QUEUE.saturating_add(PER_DESCRIPTOR.saturating_mul(size.into()));
        let size_of_all = per_queue.saturating_mul(queues.into()).next_multiple_of(4096).max(4096);
        let file = memfd_create(c"lanefsd-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&file, size_of_all)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let mut body = [size_of_all, 0].map(u64::to_ne_bytes).concat();
        body.extend([queues, size].map(u16::to_ne_bytes).concat());
        // As long as the front end has it.
        body.resize(asked.body().len().max(DESCRIPTION), 0);
        Ok(Region(Message::reply_with(FrontendReq::GET_INFLIGHT_FD, &body, vec![file])))
    }

    /// Whether a front end gives this region, as it was.
    fn is(&self, given: &Message) -> bool {
        let description = |message: &Message| message.body().get(..DESCRIPTION).map(<[u8]>::to_vec);
        let file = |message: &Message| {
            let mut fds = message.descriptors();
            let file = fds.next().and_then(|fd| identity(fd).ok());
            file.filter(|_| fds.next().is_none())
        };
        self.0.lost().is_none()
            && description(given).is_some_and(|given| Some(given) == description(&self.0))
            && file(given).is_some_and(|given| Some(given) == file(&self.0))
    }

    fn descriptors(&self) -> impl Iterator<Item = RawFd> + '_ {
        self.0.descriptors()
    }
}

/// A session without a front end.
#[derive(Clone, Debug)]
pub(super) struct Parked {
    region: Region,
    /// How the last worker has ended that served it.
    death: Death,
}

impl Parked {
    /// How the last worker has ended, for the next one. Those that follow serve nothing until a front end is there.
    pub(super) fn take_death(&mut self) -> Death {
        std::mem::replace(&mut self.death, Death::Upgrade)
    }

    /// Its descriptors.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = RawFd> + '_ {
        self.region.descriptors()
    }

    /// For another program in this process.
    pub(super) fn to_words(&self) -> Words {
        self.region.0.to_words()
    }

    /// That of an earlier program in this process.
    pub(super) fn from_words(words: &Words) -> Parked {
        Parked { region: Region(Message::from_words(words)), death: Death::Upgrade }
    }
}

/// What a connection has to do with sessions that outlive it.
#[derive(Debug, Default)]
pub(super) struct Reconnect {
    offered: bool,
    negotiated: bool,
    /// That of the session of this front end.
    region: Option<Region>,
    /// The session in the state file is that of an earlier front end, which this one may be.
    parked: Option<Parked>,
    /// This front end begins anew.
    anew: bool,
    /// It goes on with its session, and has not begun to use it.
    came_back: bool,
}

/// What becomes of a message of the front end.
#[derive(Debug, Default)]
pub(super) struct Intercepted {
    /// For the worker.
    pub pass: Option<Message>,
    /// For the front end.
    pub reply: Option<Message>,
}

impl Reconnect {
    /// A connection after that of `parked`; `offered` if the session may outlive it.
    pub(super) fn new(offered: bool, parked: Option<Parked>) -> Reconnect {
        Reconnect { offered, parked, ..Reconnect::default() }
    }

    /// For another program in this process.
    pub(super) fn to_kept(&self) -> Kept {
        Kept {
            negotiated: self.negotiated,
            region: self.region.as_ref().map(|region| region.0.to_words()),
            parked: self.parked.as_ref().map(Parked::to_words),
            came_back: self.came_back,
        }
    }

    /// That of an earlier program in this process.
    pub(super) fn from_kept(offered: bool, kept: &Kept) -> Reconnect {
        Reconnect {
            offered,
            negotiated: kept.negotiated,
            region: kept.region.as_ref().map(|words| Region(Message::from_words(words))),
            parked: kept.parked.as_ref().map(Parked::from_words),
            anew: false,
            came_back: kept.came_back,
        }
    }

    /// Whether it is not known yet whose session it is.
    pub(super) fn is_undecided(&self) -> bool {
        self.parked.is_some()
    }

    /// Whether the state has to be dropped first.
    pub(super) fn wants_anew(&self) -> bool {
        self.anew
    }

    /// The session of an earlier front end ends.
    pub(super) fn drop_parked(&mut self) {
        info!("the front end begins anew; the session that was kept has ended");
        (self.parked, self.anew) = (None, false);
    }

    /// The session that goes on without this front end, whose queues run or not.
    pub(super) fn park(&mut self, runs: bool) {
        let stays = self.negotiated && (runs || self.came_back) && self.parked.is_none();
        if let Some(region) = self.region.take().filter(|_| stays) {
            info!("front end disconnected; its session is kept until one connects");
            self.parked = Some(Parked { region, death: Death::Upgrade });
        }
    }

    /// What is kept after the connection has ended.
    pub(super) fn take_parked(&mut self, death: Option<Death>) -> Option<Parked> {
        let mut parked = self.parked.take()?;
        parked.death = death.unwrap_or(parked.death);
        Some(parked)
    }

    /// Descriptors that belong to it.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = RawFd> + '_ {
        let parked = self.parked.iter().flat_map(Parked::descriptors);
        self.region.iter().flat_map(Region::descriptors).chain(parked)
    }

    /// The reply of a worker as the front end gets it.
    pub(super) fn amend(&self, reply: &Message) -> Message {
        match (reply.request(), features(reply)) {
            (Some(FrontendReq::GET_PROTOCOL_FEATURES), Some(features)) if self.offered => {
                reply.with_body(&(features | FEATURE).to_ne_bytes())
            }
            _ => reply.clone(),
        }
    }

    /// Takes a message of the front end.
    pub(super) fn intercept(&mut self, message: Message) -> Intercepted {
        let request = message.request();
        match request {
            Some(FrontendReq::SET_PROTOCOL_FEATURES) if self.offered => {
                let Some(features) = features(&message) else { return pass(message) };
                self.negotiated = features & FEATURE != 0;
                pass(message.with_body(&(features & !FEATURE).to_ne_bytes()))
            }
            Some(FrontendReq::GET_INFLIGHT_FD) if self.negotiated => self.give(message),
            Some(FrontendReq::SET_INFLIGHT_FD) if self.negotiated => self.take(&message),
            _ => {
                let sets_up = request.is_some_and(|request| HARMLESS.contains(&request));
                self.anew |= self.parked.is_some() && !sets_up;
                self.came_back &= sets_up;
                pass(message)
            }
        }
    }

    /// The front end asks for a region.
    fn give(&mut self, asked: Message) -> Intercepted {
        self.anew |= self.parked.is_some();
        match Region::create(&asked) {
            Ok(region) => {
                let reply = region.0.clone();
                (self.region, self.came_back) = (Some(region), false);
                Intercepted { pass: None, reply: Some(reply) }
            }
            Err(errno) => {
                error!("no memory file for the front end, which would reconnect with it: {errno}");
                // The worker refuses it.
                pass(asked)
            }
        }
    }

    /// The front end gives a region.
    fn take(&mut self, given: &Message) -> Intercepted {
        if let Some(parked) = self.parked.take_if(|parked| parked.region.is(given)) {
            info!("the front end goes on with its session");
            (self.region, self.came_back) = (Some(parked.region), true);
        } else if !self.region.as_ref().is_some_and(|region| region.is(given)) {
            warn!(
                "the front end wants to go on with a session that is not here; requests of its guest fail until it mounts the share again"
            );
            self.anew |= self.parked.is_some();
            (self.region, self.came_back) = (None, false);
        }
        let reply = given.wants_reply();
        let reply = reply.then(|| Message::reply(FrontendReq::SET_INFLIGHT_FD, &0u64.to_ne_bytes()));
        Intercepted { pass: None, reply }
    }
}

impl<W> Supervisor<'_, W>
where
    W: FnOnce(Arc<dyn FileSystem>) -> Arc<dyn FileSystem>,
{
    /// Keeps the session of a front end that has disconnected, and ends its worker.
    pub(super) fn park(&mut self, mut relay: Relay, worker: Link) -> Result<Ending, RunError> {
        let drained = drain(&worker)?;
        let end = worker.reap()?;
        Ok(match drained {
            Drained::For(death) => {
                self.parked = relay.reconnect().take_parked(Some(death));
                match death != Death::Upgrade && self.count_death(end) {
                    true => Ending::Daemon(1),
                    false => Ending::Worker(WorkerEnd::Exited(status::DISCONNECTED)),
                }
            }
            Drained::Ended(end) => Ending::Worker(end),
        })
    }

    /// Drops the session that was kept, and starts a worker with an empty state for the front end.
    pub(super) fn begin_anew(
        &mut self,
        relay: &mut Relay,
        mut worker: Link,
    ) -> Result<Result<Link, NoWorker>, RunError> {
        worker.kill();
        worker.reap()?;
        relay.begin_again(&mut worker);
        drop(worker);
        relay.reconnect().drop_parked();
        self.next_worker(None, Some(relay))
    }
}

/// Messages that change nothing of a session.
const HARMLESS: [FrontendReq; 18] = [
    FrontendReq::GET_FEATURES,
    FrontendReq::SET_FEATURES,
    FrontendReq::GET_PROTOCOL_FEATURES,
    FrontendReq::SET_PROTOCOL_FEATURES,
    FrontendReq::SET_OWNER,
    FrontendReq::GET_QUEUE_NUM,
    FrontendReq::GET_CONFIG,
    FrontendReq::GET_MAX_MEM_SLOTS,
    FrontendReq::SET_MEM_TABLE,
    FrontendReq::ADD_MEM_REG,
    FrontendReq::REM_MEM_REG,
    FrontendReq::SET_VRING_NUM,
    FrontendReq::SET_VRING_ADDR,
    FrontendReq::SET_VRING_BASE,
    FrontendReq::SET_VRING_CALL,
    FrontendReq::SET_VRING_ERR,
    FrontendReq::SET_LOG_BASE,
    FrontendReq::SET_LOG_FD,
];

fn pass(message: Message) -> Intercepted {
    Intercepted { pass: Some(message), reply: None }
}

fn features(message: &Message) -> Option<u64> {
    message.body().first_chunk().copied().map(u64::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u64_message(request: FrontendReq, value: u64) -> Message {
        Message::new(request, &value.to_ne_bytes())
    }

    fn asked() -> Message {
        let mut body = vec![0; 16];
        body.extend([2u16, 256].map(u16::to_ne_bytes).concat());
        Message::new(FrontendReq::GET_INFLIGHT_FD, &body)
    }

    /// What a front end sends with the region that it has got.
    fn given(reply: &Message) -> Message {
        let fds = reply.descriptors().map(|fd| crate::sys::inherited::copy(fd).unwrap()).collect();
        Message::reply_with(FrontendReq::SET_INFLIGHT_FD, reply.body(), fds)
    }

    fn negotiated(parked: Option<Parked>) -> Reconnect {
        let mut reconnect = Reconnect::new(true, parked);
        let features = u64_message(FrontendReq::SET_PROTOCOL_FEATURES, FEATURE | 9);
        let passed = reconnect.intercept(features).pass.unwrap();
        assert_eq!(passed.body(), 9u64.to_ne_bytes(), "the worker knows nothing of it");
        reconnect
    }

    /// A session that was left, and the region of it.
    fn parked() -> (Parked, Message) {
        let mut reconnect = negotiated(None);
        let reply = reconnect.intercept(asked()).reply.unwrap();
        assert!(reconnect.intercept(given(&reply)).pass.is_none());
        reconnect.park(true);
        (reconnect.take_parked(Some(Death::Kill)).unwrap(), reply)
    }

    #[test]
    fn the_feature_is_offered_with_those_of_the_worker() {
        let reply = u64_message(FrontendReq::GET_PROTOCOL_FEATURES, 9);
        assert_eq!(Reconnect::new(true, None).amend(&reply).body(), (FEATURE | 9).to_ne_bytes());
        assert_eq!(Reconnect::new(false, None).amend(&reply).body(), 9u64.to_ne_bytes());
        let mut without = Reconnect::new(false, None);
        assert!(
            without.intercept(asked()).pass.is_some() && without.intercept(given(&asked())).pass.is_some()
        );
    }

    #[test]
    fn a_front_end_with_the_region_goes_on() {
        let (mut session, region) = parked();
        assert_eq!((session.take_death(), session.take_death()), (Death::Kill, Death::Upgrade));
        let mut reconnect = negotiated(Some(session));
        for request in HARMLESS.into_iter().filter(|one| *one != FrontendReq::SET_PROTOCOL_FEATURES) {
            assert!(reconnect.intercept(Message::new(request, &[])).pass.is_some());
        }
        assert!(reconnect.is_undecided() && !reconnect.wants_anew());
        reconnect.intercept(given(&region));
        assert!(!reconnect.is_undecided() && !reconnect.wants_anew());
        // It leaves before a queue runs, and comes back again.
        reconnect.park(false);
        let session = reconnect.take_parked(None).unwrap();
        assert!(session.region.is(&given(&region)));
        let mut reconnect = negotiated(Some(session));
        reconnect.intercept(given(&region));
        // It begins, and stops.
        reconnect.intercept(Message::new(FrontendReq::SET_VRING_KICK, &[0; 8]));
        reconnect.park(false);
        assert!(reconnect.take_parked(None).is_none());
    }

    #[test]
    fn an_upgrade_before_the_first_queue_forgets_no_session() {
        let (session, region) = parked();
        let mut reconnect = negotiated(Some(session));
        reconnect.intercept(given(&region));
        let kept = serde_json::to_vec(&reconnect.to_kept()).unwrap();
        // Its descriptors stay open, for the next program.
        std::mem::forget(reconnect);
        let mut reconnect = Reconnect::from_kept(true, &serde_json::from_slice(&kept).unwrap());
        reconnect.park(false);
        assert!(reconnect.take_parked(None).is_some());
    }

    #[test]
    fn other_front_ends_begin_anew() {
        let (_, foreign) = parked();
        for message in [
            asked(),
            given(&foreign),
            Message::new(FrontendReq::SET_INFLIGHT_FD, foreign.body()),
            Message::new(FrontendReq::SET_VRING_KICK, &[0; 8]),
            Message::new(FrontendReq::GET_VRING_BASE, &[0; 8]),
            Message::new(FrontendReq::RESET_DEVICE, &[]),
        ] {
            let mut reconnect = negotiated(Some(parked().0));
            reconnect.intercept(message);
            assert!(reconnect.wants_anew());
            reconnect.drop_parked();
            assert!(!reconnect.is_undecided() && !reconnect.wants_anew());
        }
        let (session, region) = parked();
        let mut other_size = given(&region);
        other_size = other_size.with_body(&[&[1], &region.body()[1..]].concat());
        let mut reconnect = negotiated(Some(session));
        reconnect.intercept(other_size);
        assert!(reconnect.wants_anew());
    }

    #[test]
    fn only_queues_that_run_are_left() {
        for (runs, kept) in [(true, true), (false, false)] {
            let mut reconnect = negotiated(None);
            reconnect.intercept(asked());
            reconnect.park(runs);
            assert_eq!(reconnect.take_parked(None).is_some(), kept);
        }
        let mut without_region = negotiated(None);
        without_region.park(true);
        assert!(without_region.take_parked(None).is_none());
    }
}
