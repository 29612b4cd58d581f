//! The relay of one front end's messages to a worker, and again to the worker that takes its place.
//!
//! One message at a time is with the worker. After each one the worker is asked for its features, which changes nothing;
//! the reply confirms that it has taken the message, and comes after the message's own reply, if there is one. So the
//! relay need not know which messages have replies. A worker that dies leaves at most one message that is not confirmed.
//! The next one gets the set-up, and then that message, unless the front end has its reply already.

use std::collections::VecDeque;
use std::net::Shutdown;
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::net::UnixStream;

use log::error;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vhost::vhost_user::message::FrontendReq;

use super::link::Link;
use super::message::{Message, Outgoing, Reader, Received};
use super::reconnect::{Intercepted, Reconnect};
use super::setup::{Setup, acknowledges_memory};
use super::upgrade::handover::{FrontEnd, Words};
use crate::daemon::frontend::room;
use crate::sys::inherited::{Identity, identity};

/// The reply to SET_DEVICE_STATE_FD that says that no state is transferred. It is an error by bits 0 to 7, and bit 8 says
/// that no descriptor comes.
fn no_transfer() -> Message {
    Message::reply(FrontendReq::SET_DEVICE_STATE_FD, &0x101u64.to_ne_bytes())
}

/// A message for the worker.
#[derive(Debug)]
struct Task {
    message: Message,
    /// It belongs to the set-up and is sent to one more worker; the front end has its reply.
    repeated: bool,
}

/// The message that is with the worker.
#[derive(Debug)]
struct Exchange {
    task: Task,
    /// Replies to GET_FEATURES that are still to come; the last one is the confirmation.
    features: u8,
    /// Its own reply, which the front end has.
    reply: Option<Message>,
}

/// The connection with one front end.
#[derive(Debug)]
pub(super) struct Relay {
    front_end: UnixStream,
    /// What `front_end` was at the beginning.
    identity: Option<Identity>,
    reader: Reader,
    to_front_end: Outgoing,
    setup: Setup,
    reconnect: Reconnect,
    tasks: VecDeque<Task>,
    exchange: Option<Exchange>,
    /// No other message follows.
    ended: bool,
    left: bool,
    /// The worker was ended since it may wait for the front end, which has gone.
    is_cut: bool,
    /// Post-copy has begun, and may be over.
    was_in_postcopy: bool,
    /// A message of the front end has descriptors for which there is no room.
    lacks_descriptors: bool,
}

impl Relay {
    /// A front end that nothing was received from.
    pub(super) fn new(front_end: UnixStream, reconnect: Reconnect) -> Relay {
        Relay {
            identity: identity(front_end.as_raw_fd()).ok(),
            front_end,
            reader: Reader::default(),
            to_front_end: Outgoing::default(),
            setup: Setup::default(),
            reconnect,
            tasks: VecDeque::new(),
            exchange: None,
            ended: false,
            left: false,
            is_cut: false,
            was_in_postcopy: false,
            lacks_descriptors: false,
        }
    }

    /// The front end of a supervisor that was another program in this process. What it has set up is sent to the next worker.
    pub(super) fn go_on(front_end: UnixStream, parts: &FrontEnd, offered: bool) -> Relay {
        let all = |words: &[Words]| words.iter().map(Message::from_words).collect::<Vec<_>>();
        let mut relay = Relay::new(front_end, Reconnect::from_kept(offered, &parts.kept));
        relay.reader = Reader::with_part(Message::from_words(&parts.part));
        relay.to_front_end = Outgoing::of(all(&parts.replies), parts.sent);
        all(&parts.setup).iter().for_each(|message| relay.setup.note(message, None));
        let new = all(&parts.messages).into_iter().map(|message| Task { message, repeated: false });
        relay.tasks.extend(new);
        relay.was_in_postcopy = parts.was_in_postcopy;
        relay.repeat_setup();
        relay
    }

    /// For another program in this process. No message is with a worker.
    pub(super) fn parts(&self, death: &str) -> FrontEnd {
        let (replies, sent) = self.to_front_end.rest();
        let new = self.tasks.iter().filter(|task| !task.repeated);
        FrontEnd {
            connection: self.front_end.as_raw_fd(),
            part: self.reader.part().to_words(),
            replies: replies.iter().map(Message::to_words).collect(),
            sent,
            setup: self.setup.messages().iter().map(Message::to_words).collect(),
            messages: new.map(|task| task.message.to_words()).collect(),
            death: death.into(),
            kept: self.reconnect.to_kept(),
            was_in_postcopy: self.was_in_postcopy,
        }
    }

    /// Whether the front end has disconnected, or has sent something that ends the connection.
    pub(super) fn has_ended(&self) -> bool {
        self.ended
    }

    /// Its part in sessions that outlive connections.
    pub(super) fn reconnect(&mut self) -> &mut Reconnect {
        &mut self.reconnect
    }

    /// Whether the session in the state file may be that of an earlier front end.
    pub(super) fn is_undecided(&self) -> bool {
        self.reconnect.is_undecided()
    }

    /// Whether the front end has disconnected and the session is kept, which its worker does not know.
    pub(super) fn has_left(&self) -> bool {
        self.left
    }

    /// Whether the worker has all that it is to get by now.
    pub(super) fn is_settled(&self) -> bool {
        self.exchange.is_none() && self.tasks.is_empty()
    }

    /// Whether the front end was disconnected since its descriptors could not be received.
    pub(super) fn lacks_descriptors(&self) -> bool {
        self.lacks_descriptors
    }

    /// Whether the front end has got the descriptor of a worker's page faults, so that another worker's is unknown to it.
    pub(super) fn is_advised(&self) -> bool {
        self.setup.is_advised()
    }

    /// Whether memory of the guest may be missing (post-copy): a worker may wait for the front end in the middle of anything.
    pub(super) fn lacks_memory(&self) -> bool {
        self.setup.is_in_postcopy()
    }

    /// Whether the worker may be asked to make room: not one whose front end has gone, which is left alone, and not in
    /// post-copy, which ends soon.
    pub(super) fn may_be_upgraded(&self) -> bool {
        !self.ended && !self.lacks_memory()
    }

    /// Whether the worker was ended for that.
    pub(super) fn is_cut(&self) -> bool {
        self.is_cut
    }

    /// To wait for the end of the front end, while the worker may wait for it.
    pub(super) fn hangup(&self) -> Option<PollFd<'_>> {
        let end = Some(FrontendReq::POSTCOPY_END);
        let waits = self.exchange.as_ref().is_some_and(|exchange| exchange.task.message.request() != end);
        (waits && self.lacks_memory() && !self.ended).then(|| PollFd::new(&self.front_end, PollFlags::RDHUP))
    }

    /// What to wait for before the next [`Relay::advance`], besides the end of the worker.
    pub(super) fn watched<'a>(&'a self, worker: &'a Link) -> PollFd<'a> {
        if !self.to_front_end.is_empty() {
            PollFd::new(&self.front_end, PollFlags::OUT)
        } else if self.exchange.is_some() || self.ended {
            PollFd::new(worker.stream(), PollFlags::IN)
        } else {
            PollFd::new(&self.front_end, PollFlags::IN)
        }
    }

    /// Moves messages on, as far as possible without waiting.
    pub(super) fn advance(&mut self, worker: &mut Link) {
        loop {
            self.to_front_end.flush(&self.front_end);
            self.take_replies(worker);
            if self.hangup().is_some_and(has_hung_up) {
                return self.cut(worker);
            }
            let waits = self.exchange.is_some() || !self.to_front_end.is_empty();
            if waits || self.ended || self.reconnect.wants_anew() {
                return;
            }
            match self.tasks.pop_front() {
                Some(task) => self.hand_over(task, worker),
                None => match self.receive(worker) {
                    // Of regions that were taken away alone, or after the end of post-copy, which QEMU sends from another
                    // thread: nothing waits for it.
                    Some(message) if acknowledges_memory(&message) && self.is_void(&message) => {}
                    Some(message) => {
                        let Intercepted { pass, reply } = self.reconnect.intercept(message);
                        self.tasks.extend(pass.map(|message| Task { message, repeated: false }));
                        reply.into_iter().for_each(|reply| self.to_front_end.push(reply));
                    }
                    None => return,
                },
            }
        }
    }

    /// Whether nothing waits for an acknowledgement of memory.
    fn is_void(&self, message: &Message) -> bool {
        self.was_in_postcopy && (message.is_without_code() || !self.lacks_memory())
    }

    /// Ends a worker that may wait for ever.
    fn cut(&mut self, worker: &Link) {
        (self.ended, self.is_cut) = (true, true);
        worker.kill();
    }

    /// Takes what a worker has sent before it died, and prepares what the next one is to get.
    pub(super) fn begin_again(&mut self, dead: &mut Link) {
        self.take_replies(dead);
        let unanswered = self.exchange.take().and_then(|exchange| match exchange.reply {
            Some(reply) if !exchange.task.repeated => {
                self.setup.note(&exchange.task.message, Some(&reply));
                None
            }
            // Part of the stream may be gone. The front end can try again.
            _ if exchange.task.message.request() == Some(FrontendReq::SET_DEVICE_STATE_FD) => {
                self.to_front_end.push(no_transfer());
                None
            }
            _ => Some(exchange.task),
        });
        unanswered.into_iter().for_each(|task| self.tasks.push_front(task));
        self.repeat_setup();
    }

    /// Puts the set-up before the messages that no worker has taken.
    fn repeat_setup(&mut self) {
        let new: Vec<Task> = self.tasks.drain(..).filter(|task| !task.repeated).collect();
        let repeat = |message| Task { message, repeated: true };
        self.tasks.extend(self.setup.messages().into_iter().map(repeat));
        self.tasks.extend(new);
    }

    /// Descriptors that belong to the connection.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = RawFd> + '_ {
        let exchange = self.exchange.iter().flat_map(|exchange| {
            exchange.task.message.descriptors().chain(exchange.reply.iter().flat_map(Message::descriptors))
        });
        std::iter::once(self.front_end.as_raw_fd())
            .chain(self.reader.descriptors())
            .chain(self.to_front_end.descriptors())
            .chain(self.setup.descriptors())
            .chain(self.reconnect.descriptors())
            .chain(self.tasks.iter().flat_map(|task| task.message.descriptors()))
            .chain(exchange)
    }

    /// What a worker has closed or replaced of all that: the descriptor, and what it was.
    pub(super) fn lost(&self) -> Option<(RawFd, &'static str)> {
        let front_end = self.front_end.as_raw_fd();
        if self.identity.is_none() || Identity::is_lost(self.identity, front_end) {
            return Some((front_end, "the connection with the front end"));
        }
        let exchange = self.exchange.iter().map(|exchange| &exchange.task.message);
        let mut messages = self.tasks.iter().map(|task| &task.message).chain(exchange);
        let lost = self.setup.lost().or_else(|| messages.find_map(Message::lost));
        lost.map(|fd| (fd, "memory or an event of the guest"))
    }

    /// The next message of the front end, if all of it is there.
    fn receive(&mut self, worker: &Link) -> Option<Message> {
        if self.reader.is_between_messages() && !room::is_there_for_relay(&self.front_end) {
            self.lacks_descriptors = true;
            self.end(worker);
            return None;
        }
        match self.reader.read(&self.front_end) {
            Received::Message(message) => return Some(message),
            Received::Part => {}
            Received::End(_) if self.lacks_memory() => self.cut(worker),
            Received::End(_) if !self.is_undecided() && self.parks() => {
                (self.ended, self.left) = (true, true)
            }
            // The worker says what is wrong with it.
            Received::Malformed(message) | Received::End(message) => {
                let _ = message.send_all(worker.stream());
                self.end(worker);
            }
        }
        None
    }

    /// Keeps the session of a front end that has disconnected, if it can come back.
    fn parks(&mut self) -> bool {
        self.reconnect.park(self.setup.runs());
        self.is_undecided()
    }

    /// Sends a worker one message and the request for its confirmation.
    fn hand_over(&mut self, task: Task, worker: &Link) {
        let features = if task.message.request() == Some(FrontendReq::GET_FEATURES) { 2 } else { 1 };
        let confirm = Message::new(FrontendReq::GET_FEATURES, &[]);
        let sent = task.message.send_all(worker.stream()).and_then(|()| confirm.send_all(worker.stream()));
        match sent {
            // It has finished, or is about to end, which is waited for.
            Ok(()) | Err(Errno::PIPE | Errno::CONNRESET) => {}
            // It would wait for the message, and the front end for the reply.
            Err(errno) => {
                error!("a message of the front end cannot be passed on to the worker process: {errno}");
                worker.kill();
            }
        }
        self.exchange = Some(Exchange { task, features, reply: None });
    }

    /// Takes the replies of a worker that are there.
    fn take_replies(&mut self, worker: &mut Link) {
        while let Some(exchange) = self.exchange.take() {
            match worker.receive() {
                Some(reply) => self.take_reply(exchange, reply),
                None => {
                    self.exchange = Some(exchange);
                    return;
                }
            }
        }
    }

    fn take_reply(&mut self, mut exchange: Exchange, reply: Message) {
        if reply.request() == Some(FrontendReq::GET_FEATURES) {
            exchange.features = exchange.features.saturating_sub(1);
        }
        if exchange.features == 0 {
            if !exchange.task.repeated {
                self.was_in_postcopy |= exchange.task.message.request() == Some(FrontendReq::POSTCOPY_LISTEN);
                self.setup.note(&exchange.task.message, exchange.reply.as_ref());
            }
            return;
        }
        // The front end has what it was sent; a descriptor of this one is nobody's.
        exchange.reply = Some(match exchange.task.repeated {
            true => reply.without_descriptors(),
            false => {
                self.to_front_end.push(self.reconnect.amend(&reply));
                reply
            }
        });
        self.exchange = Some(exchange);
    }

    /// Lets the worker finish: no other message follows.
    fn end(&mut self, worker: &Link) {
        self.ended = true;
        worker.shut_down(Shutdown::Write);
    }
}

/// Whether the other side of a connection sends nothing more.
fn has_hung_up(fd: PollFd<'_>) -> bool {
    poll(&mut [fd], Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}
