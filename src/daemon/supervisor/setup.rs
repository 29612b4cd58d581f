//! The set-up of a device, as a front end's messages: what a new worker is sent in place of the front end.
//!
//! A message is kept once a worker has taken it. Later messages replace earlier ones about the same thing, so that the
//! set-up does not grow. Positions of rings are not part of it: they are in guest memory and in the state file.

use std::collections::BTreeMap;
use std::os::fd::RawFd;

use vhost::vhost_user::message::FrontendReq;

use super::message::Message;

/// Features that a reset takes back: `VIRTIO_RING_F_EVENT_IDX` and `VHOST_F_LOG_ALL`.
const UNTIL_RESET: u64 = 1 << 29 | 1 << 26;
/// In the body of SET_VRING_KICK and CALL: the number of the queue. The next bit says that no descriptor comes.
const QUEUE: u32 = 0xff;

/// What a front end has negotiated, in the order in which a worker is sent it.
const NEGOTIATION: [FrontendReq; 5] = [
    FrontendReq::GET_FEATURES,
    FrontendReq::GET_PROTOCOL_FEATURES,
    FrontendReq::SET_PROTOCOL_FEATURES,
    FrontendReq::SET_OWNER,
    FrontendReq::SET_FEATURES,
];

/// What it has set up of a queue, in this order: the kick starts the queue, and needs the rest. The descriptor for
/// errors (SET_VRING_ERR) is not among it, since the device has no use for that.
const QUEUE_SETUP: [FrontendReq; 6] = [
    FrontendReq::SET_VRING_NUM,
    FrontendReq::SET_VRING_BASE,
    FrontendReq::SET_VRING_ADDR,
    FrontendReq::SET_VRING_CALL,
    FrontendReq::SET_VRING_KICK,
    FrontendReq::SET_VRING_ENABLE,
];

/// Messages by their place in one of the lists above.
type Messages = BTreeMap<usize, Message>;

/// All that a front end has set up.
#[derive(Debug, Default)]
pub(super) struct Setup {
    negotiation: Messages,
    /// Of post-copy: that it may come, and that it has begun. Nothing, once it is over.
    postcopy: Vec<Message>,
    /// The dirty log of a migration.
    log: Option<Message>,
    memory: Vec<Message>,
    queues: BTreeMap<u32, Messages>,
}

impl Setup {
    /// Notes a message that a worker has taken, and its reply, if it has one.
    pub(super) fn note(&mut self, message: &Message, reply: Option<&Message>) {
        let Some(request) = message.request() else { return };
        if self.is_in_postcopy() && acknowledges_memory(message) {
            return;
        }
        match request {
            // A reply without a descriptor refuses it.
            FrontendReq::POSTCOPY_ADVISE
                if reply.is_some_and(|reply| reply.descriptors().next().is_none()) => {}
            FrontendReq::POSTCOPY_ADVISE | FrontendReq::POSTCOPY_LISTEN => {
                self.postcopy.push(message.without_reply());
            }
            FrontendReq::POSTCOPY_END => self.postcopy.clear(),
            // A reply says which ring position the queue has now.
            FrontendReq::GET_VRING_BASE => self.stop_queue(message, reply),
            FrontendReq::RESET_DEVICE | FrontendReq::RESET_OWNER => self.reset(),
            FrontendReq::SET_LOG_BASE => self.log = Some(message.without_reply()),
            FrontendReq::SET_MEM_TABLE => self.memory = vec![message.without_reply()],
            FrontendReq::ADD_MEM_REG => self.memory.push(message.without_reply()),
            FrontendReq::REM_MEM_REG => self.remove_memory(message),
            _ => {
                let place = |list: &[FrontendReq]| list.iter().position(|one| *one == request);
                if let Some(place) = place(&NEGOTIATION) {
                    self.negotiation.insert(place, message.without_reply());
                } else if let (Some(place), Some(queue)) = (place(&QUEUE_SETUP), queue_of(request, message)) {
                    self.queues.entry(queue).or_default().insert(place, message.without_reply());
                }
            }
        }
    }

    /// What a new worker is sent.
    pub(super) fn messages(&self) -> Vec<Message> {
        let queues = self.queues.values().flat_map(BTreeMap::values);
        let mut messages: Vec<_> = self.negotiation.values().chain(&self.postcopy).cloned().collect();
        // The log comes before the queues, which record what the worker before has written.
        messages.extend(self.log.iter().chain(&self.memory).cloned());
        if self.is_in_postcopy() {
            messages.push(Message::new(FrontendReq::SET_MEM_TABLE, &0u64.to_ne_bytes()));
        }
        messages.extend(queues.cloned());
        messages
    }

    /// Whether the front end has the descriptor of a worker's page faults.
    pub(super) fn is_advised(&self) -> bool {
        !self.postcopy.is_empty()
    }

    /// Whether memory of the guest may be missing.
    pub(super) fn is_in_postcopy(&self) -> bool {
        self.postcopy.iter().any(|message| message.request() == Some(FrontendReq::POSTCOPY_LISTEN))
    }

    /// Descriptors that belong to it.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = RawFd> + '_ {
        let queues = self.queues.values().flat_map(BTreeMap::values);
        self.log.iter().chain(&self.memory).chain(queues).flat_map(Message::descriptors)
    }

    /// Whether a queue has started and was not stopped.
    pub(super) fn runs(&self) -> bool {
        let kick = QUEUE_SETUP.iter().position(|one| *one == FrontendReq::SET_VRING_KICK);
        kick.is_some_and(|kick| self.queues.values().any(|queue| queue.contains_key(&kick)))
    }

    /// The first of them that was closed or replaced.
    pub(super) fn lost(&self) -> Option<RawFd> {
        let queues = self.queues.values().flat_map(BTreeMap::values);
        self.log.iter().chain(&self.memory).chain(queues).find_map(Message::lost)
    }

    /// The queue has stopped. It starts with a new kick, from the position in the reply.
    fn stop_queue(&mut self, message: &Message, reply: Option<&Message>) {
        let (Some(index), Some(reply)) = (message.body_word(0), reply) else { return };
        let queue = self.queues.entry(index).or_default();
        let place = |request| QUEUE_SETUP.iter().position(|one| *one == request);
        for request in [FrontendReq::SET_VRING_KICK, FrontendReq::SET_VRING_CALL] {
            place(request).map(|place| queue.remove(&place));
        }
        // A reply has the same form as the message that sets the position.
        let base = Message::new(FrontendReq::SET_VRING_BASE, reply.body());
        place(FrontendReq::SET_VRING_BASE).map(|place| queue.insert(place, base));
    }

    /// The device has forgotten its queues, and uses neither EVENT_IDX nor the log until the next SET_FEATURES.
    fn reset(&mut self) {
        self.queues.clear();
        if let Some(message) = self.negotiation.values_mut().last()
            && message.request() == Some(FrontendReq::SET_FEATURES)
            && let Some(features) = message.body().first_chunk().copied().map(u64::from_ne_bytes)
        {
            *message = message.with_body(&(features & !UNTIL_RESET).to_ne_bytes());
        }
    }

    /// Forgets the message that has added the region, or keeps that it is gone from the table.
    fn remove_memory(&mut self, message: &Message) {
        // Padding, then guest address and size, by which a device finds it.
        let region = |message: &Message| message.body().get(8..24).map(<[u8]>::to_vec);
        let added = self.memory.iter().position(|one| {
            one.request() == Some(FrontendReq::ADD_MEM_REG) && region(one) == region(message)
        });
        match added {
            Some(place) => drop(self.memory.remove(place)),
            None => self.memory.push(message.without_reply()),
        }
    }
}

/// Whether a message says that the front end answers page faults in the memory that it has shared last. It has the code of
/// the message before, of which QEMU leaves out that which changes nothing, so that it has none at all then.
pub(super) fn acknowledges_memory(message: &Message) -> bool {
    use FrontendReq::{ADD_MEM_REG, REM_MEM_REG, SET_MEM_TABLE};
    let has_code = match message.request() {
        Some(request) => matches!(request, SET_MEM_TABLE | ADD_MEM_REG | REM_MEM_REG),
        None => message.is_without_code(),
    };
    has_code && message.body().len() == size_of::<u64>() && message.descriptors().next().is_none()
}

/// The queue that a message is about.
fn queue_of(request: FrontendReq, message: &Message) -> Option<u32> {
    let index = message.body_word(0)?;
    match request {
        FrontendReq::SET_VRING_KICK | FrontendReq::SET_VRING_CALL => Some(index & QUEUE),
        _ => Some(index),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_queue(request: FrontendReq, queue: u32, value: u32) -> Message {
        Message::new(request, &[queue, value].map(u32::to_ne_bytes).concat())
    }

    fn requests(setup: &Setup) -> Vec<FrontendReq> {
        setup.messages().iter().map(|message| message.request().unwrap()).collect()
    }

    fn region(request: FrontendReq, guest: u64) -> Message {
        Message::new(request, &[0, guest, 4096, guest + 7, 0].map(u64::to_ne_bytes).concat())
    }

    /// A device with memory and a queue that runs.
    fn running() -> Setup {
        let mut setup = Setup::default();
        let u64_body = |request, value: u64| Message::new(request, &value.to_ne_bytes());
        for message in [
            Message::new(FrontendReq::GET_FEATURES, &[]),
            Message::new(FrontendReq::SET_OWNER, &[]),
            Message::new(FrontendReq::GET_PROTOCOL_FEATURES, &[]),
            u64_body(FrontendReq::SET_PROTOCOL_FEATURES, 9),
            Message::new(FrontendReq::GET_QUEUE_NUM, &[]),
            u64_body(FrontendReq::SET_FEATURES, 1 << 32 | UNTIL_RESET),
            region(FrontendReq::ADD_MEM_REG, 0),
        ] {
            setup.note(&message, None);
        }
        for request in QUEUE_SETUP.iter().rev() {
            setup.note(&of_queue(*request, 1, 1), None);
        }
        setup
    }

    #[test]
    fn a_set_up_is_repeated_in_the_order_that_a_device_needs() {
        let setup = running();
        let order = [&NEGOTIATION[..], &[FrontendReq::ADD_MEM_REG], &QUEUE_SETUP].concat();
        assert_eq!(requests(&setup), order);
    }

    #[test]
    fn later_messages_replace_earlier_ones() {
        let mut setup = running();
        let before = setup.messages().len();
        for number in 0..100 {
            setup.note(&of_queue(FrontendReq::SET_VRING_NUM, 1, number), None);
            setup.note(&of_queue(FrontendReq::SET_VRING_CALL, 1 | 0x100, 0), None);
            setup.note(&region(FrontendReq::ADD_MEM_REG, 1 << 30), None);
            setup.note(&region(FrontendReq::REM_MEM_REG, 1 << 30), None);
        }
        assert_eq!(setup.messages().len(), before);
        let number =
            setup.messages().into_iter().find(|one| one.request() == Some(FrontendReq::SET_VRING_NUM));
        assert_eq!(number.unwrap().body_word(4), Some(99));
        setup.note(&Message::new(FrontendReq::SET_MEM_TABLE, &[0; 8]), None);
        assert_eq!(setup.messages().len(), before);
        // A region of the table.
        setup.note(&region(FrontendReq::REM_MEM_REG, 0), None);
        assert_eq!(setup.messages().len(), before + 1);
    }

    #[test]
    fn the_last_log_comes_before_the_queues_and_outlives_a_reset() {
        let mut setup = running();
        for size in [8u64, 16] {
            let body = [size, 0].map(u64::to_ne_bytes).concat();
            setup.note(&Message::new(FrontendReq::SET_LOG_BASE, &body), None);
        }
        let log = [FrontendReq::SET_LOG_BASE, FrontendReq::ADD_MEM_REG];
        assert_eq!(requests(&setup), [&NEGOTIATION[..], &log, &QUEUE_SETUP].concat());
        assert_eq!(setup.messages()[5].body_word(0), Some(16));
        setup.note(&Message::new(FrontendReq::RESET_DEVICE, &[]), None);
        assert_eq!(requests(&setup), [&NEGOTIATION[..], &log].concat());
    }

    #[test]
    fn post_copy_is_repeated_until_it_is_over() {
        let mut setup = Setup::default();
        let of_memory = |request| Message::new(request, &0u64.to_ne_bytes());
        let (advise, listen, table) =
            (FrontendReq::POSTCOPY_ADVISE, FrontendReq::POSTCOPY_LISTEN, FrontendReq::SET_MEM_TABLE);
        // Without a descriptor it was refused.
        setup.note(&Message::new(advise, &[]), Some(&Message::reply(advise, &[])));
        assert!(!setup.is_advised());
        let fd = std::os::fd::OwnedFd::from(tempfile::tempfile().unwrap());
        setup.note(&Message::new(advise, &[]), Some(&Message::reply_with(advise, &[], vec![fd])));
        assert!(setup.is_advised() && !setup.is_in_postcopy());
        setup.note(&Message::new(listen, &[]), None);
        setup.note(&region(FrontendReq::ADD_MEM_REG, 0), None);
        for request in [FrontendReq::ADD_MEM_REG, FrontendReq::REM_MEM_REG, table] {
            setup.note(&of_memory(request), None);
        }
        setup.note(&of_queue(FrontendReq::SET_VRING_NUM, 1, 64), None);
        let all = [advise, listen, FrontendReq::ADD_MEM_REG, table, FrontendReq::SET_VRING_NUM];
        assert_eq!(requests(&setup), all);
        assert!(acknowledges_memory(&setup.messages()[3]) && setup.is_in_postcopy());
        setup.note(&Message::new(FrontendReq::POSTCOPY_END, &[]), None);
        assert_eq!(requests(&setup), [FrontendReq::ADD_MEM_REG, FrontendReq::SET_VRING_NUM]);
        assert!(!setup.is_advised() && !setup.is_in_postcopy());
    }

    #[test]
    fn a_queue_that_was_stopped_goes_on_from_the_position_in_the_reply() {
        let mut setup = running();
        let get = of_queue(FrontendReq::GET_VRING_BASE, 1, 0);
        setup.note(&get, Some(&of_queue(FrontendReq::GET_VRING_BASE, 1, 77)));
        let left = requests(&setup);
        assert!(!left.contains(&FrontendReq::SET_VRING_KICK) && !left.contains(&FrontendReq::SET_VRING_CALL));
        let base =
            setup.messages().into_iter().find(|one| one.request() == Some(FrontendReq::SET_VRING_BASE));
        assert_eq!(base.unwrap().body_word(4), Some(77));
    }

    #[test]
    fn a_reset_forgets_the_queues_event_idx_and_logging() {
        for reset in [FrontendReq::RESET_DEVICE, FrontendReq::RESET_OWNER] {
            let mut setup = running();
            setup.note(&Message::new(reset, &[]), None);
            assert_eq!(requests(&setup), [&NEGOTIATION[..], &[FrontendReq::ADD_MEM_REG]].concat());
            let features = setup.messages()[4].body().first_chunk().copied().map(u64::from_ne_bytes);
            assert_eq!(features, Some(1 << 32));
        }
    }
}
