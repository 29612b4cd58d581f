//! vhost-user messages as bytes and descriptors, read and written without waiting.
//!
//! The supervisor relays messages as they are: a message that is typed and put together again could differ from the one
//! that was sent, and vhost's types have no code for that. It knows the length of a message, and what the few
//! messages mean that set a device up ([`super::setup`]).

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use vhost::vhost_user::message::{
    FrontendReq, MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE, VhostUserHeaderFlag as Flag,
};

use super::upgrade::handover::Words;
use crate::daemon::header::{self, HEADER, VERSION};
use crate::sys::inherited::{Identity, adopt, identity};

/// A message, whole or as far as it came.
#[derive(Clone, Debug, Default)]
pub(super) struct Message {
    bytes: Vec<u8>,
    fds: Rc<Vec<OwnedFd>>,
    /// What the descriptors were when they came.
    identities: Rc<Vec<Option<Identity>>>,
}

fn identities(fds: &[OwnedFd]) -> Rc<Vec<Option<Identity>>> {
    Rc::new(fds.iter().map(|fd| identity(fd.as_raw_fd()).ok()).collect())
}

impl Message {
    /// A message without descriptors.
    pub(super) fn new(request: FrontendReq, body: &[u8]) -> Message {
        Message { bytes: header::message(request, 0, body), ..Message::default() }
    }

    /// A reply without descriptors.
    pub(super) fn reply(request: FrontendReq, body: &[u8]) -> Message {
        Message::reply_with(request, body, Vec::new())
    }

    /// A reply with descriptors.
    pub(super) fn reply_with(request: FrontendReq, body: &[u8], fds: Vec<OwnedFd>) -> Message {
        let bytes = header::message(request, Flag::REPLY.bits(), body);
        Message { bytes, identities: identities(&fds), fds: Rc::new(fds) }
    }

    /// A message, as far as it came, that another program in this process has received. Its descriptors are open and
    /// nobody else's.
    pub(super) fn from_words(words: &Words) -> Message {
        let fds: Vec<OwnedFd> = words.fds.iter().filter_map(|fd| adopt(*fd).ok()).collect();
        Message { bytes: words.bytes.clone(), identities: identities(&fds), fds: Rc::new(fds) }
    }

    /// For another program in this process.
    pub(super) fn to_words(&self) -> Words {
        Words { bytes: self.bytes.clone(), fds: self.descriptors().collect() }
    }

    /// The request, if it is one of the protocol.
    pub(super) fn request(&self) -> Option<FrontendReq> {
        FrontendReq::try_from(self.word(0)?).ok()
    }

    /// Whether it has the code of no request, and the form that QEMU sends so ([`super::setup::acknowledges_memory`]).
    pub(super) fn is_without_code(&self) -> bool {
        self.word(0) == Some(0) && self.word(8) == Some(8)
    }

    /// What follows the header.
    pub(super) fn body(&self) -> &[u8] {
        self.bytes.get(HEADER..).unwrap_or_default()
    }

    /// One 32-bit number of the message.
    fn word(&self, offset: usize) -> Option<u32> {
        let bytes = self.bytes.get(offset..)?.first_chunk()?;
        Some(u32::from_ne_bytes(*bytes))
    }

    /// One 32-bit number of the body.
    pub(super) fn body_word(&self, offset: usize) -> Option<u32> {
        self.word(HEADER.checked_add(offset)?)
    }

    /// Whether it asks for a reply that other messages of its kind have not.
    pub(super) fn wants_reply(&self) -> bool {
        self.word(4).is_some_and(|flags| flags & Flag::NEED_REPLY.bits() != 0)
    }

    /// The same message that asks for no reply.
    pub(super) fn without_reply(&self) -> Message {
        let mut message = self.clone();
        let flags = self.word(4).unwrap_or(VERSION) & !Flag::NEED_REPLY.bits();
        if let Some(bytes) = message.bytes.get_mut(4..8) {
            bytes.copy_from_slice(&flags.to_ne_bytes());
        }
        message
    }

    /// The same message with another body of the same length.
    pub(super) fn with_body(&self, body: &[u8]) -> Message {
        let mut message = self.clone();
        message.bytes.truncate(HEADER);
        message.bytes.extend_from_slice(body);
        message
    }

    /// The same message without descriptors.
    pub(super) fn without_descriptors(self) -> Message {
        Message { bytes: self.bytes, ..Message::default() }
    }

    /// The descriptors that came with it.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = RawFd> + '_ {
        self.fds.iter().map(|fd| fd.as_raw_fd())
    }

    /// The first of its descriptors that was closed or replaced since it came.
    pub(super) fn lost(&self) -> Option<RawFd> {
        let is_lost =
            |(fd, then): &(RawFd, &Option<Identity>)| then.is_none() || Identity::is_lost(**then, *fd);
        self.descriptors().zip(self.identities.iter()).find(is_lost).map(|(fd, _)| fd)
    }

    /// How many bytes it lacks; `None` for a header that no device takes, so that no body is waited for.
    fn missing(&self) -> Option<usize> {
        let (Some(request), Some(flags), Some(size)) = (self.word(0), self.word(4), self.word(8)) else {
            return Some(HEADER.saturating_sub(self.bytes.len()));
        };
        let size = usize::try_from(size).ok().filter(|size| *size <= MAX_MSG_SIZE)?;
        let well_formed = (FrontendReq::try_from(request).is_ok() || self.is_without_code())
            && flags & Flag::VERSION.bits() == VERSION
            && flags & Flag::RESERVED_BITS.bits() == 0;
        well_formed.then(|| HEADER.saturating_add(size).saturating_sub(self.bytes.len()))
    }

    /// Sends it from byte `start` on, as far as there is room, and returns how many bytes were sent. The descriptors
    /// go with the first one.
    fn send(&self, stream: &UnixStream, start: usize) -> Result<usize, Errno> {
        let rest = self.bytes.get(start..).unwrap_or_default();
        let fds: Vec<BorrowedFd<'_>> = self.fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_ATTACHED_FD_ENTRIES))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if start == 0 && !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&fds));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        loop {
            match sendmsg(stream, &[IoSlice::new(rest)], &mut control, flags) {
                Err(Errno::INTR) => {}
                result => return result,
            }
        }
    }

    /// Sends all of it to a worker, whose stream has room: at most one message and its confirmation are under way.
    pub(super) fn send_all(&self, stream: &UnixStream) -> Result<(), Errno> {
        let mut start = 0;
        while start < self.bytes.len() {
            start = start.saturating_add(self.send(stream, start)?);
        }
        Ok(())
    }
}

/// What came from a stream.
#[derive(Debug)]
pub(super) enum Received {
    /// A message.
    Message(Message),
    /// Not all of a message, so far.
    Part,
    /// Something that is no message of the protocol; what follows it means nothing.
    Malformed(Message),
    /// The end of the stream, perhaps within a message.
    End(Message),
}

/// Reads the messages of one stream.
#[derive(Debug, Default)]
pub(super) struct Reader {
    part: Message,
}

impl Reader {
    /// A reader that has begun to read a message.
    pub(super) fn with_part(part: Message) -> Reader {
        Reader { part }
    }

    /// As far as the message that has begun came.
    pub(super) fn part(&self) -> &Message {
        &self.part
    }

    /// Whether no message has begun.
    pub(super) fn is_between_messages(&self) -> bool {
        self.part.bytes.is_empty()
    }

    /// Descriptors of the message that has begun.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = RawFd> + '_ {
        self.part.descriptors()
    }

    /// Reads what is there, up to the end of one message.
    pub(super) fn read(&mut self, stream: &UnixStream) -> Received {
        loop {
            match self.part.missing() {
                None => return Received::Malformed(std::mem::take(&mut self.part)),
                Some(0) => return Received::Message(std::mem::take(&mut self.part)),
                Some(missing) => match self.receive(stream, missing) {
                    Ok(0) => return Received::End(std::mem::take(&mut self.part)),
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => return Received::Part,
                    // The other side has gone, with something left that it had not read.
                    Err(_) => return Received::End(std::mem::take(&mut self.part)),
                },
            }
        }
    }

    /// One recvmsg(2), which never reads beyond a message: its descriptors come with the first byte.
    fn receive(&mut self, stream: &UnixStream, missing: usize) -> Result<usize, Errno> {
        let mut bytes = [0; HEADER + MAX_MSG_SIZE];
        let room = bytes.get_mut(..missing).unwrap_or_default();
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_ATTACHED_FD_ENTRIES))];
        let mut control = match self.part.bytes.is_empty() {
            true => RecvAncillaryBuffer::new(&mut space),
            false => RecvAncillaryBuffer::default(),
        };
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = recvmsg(stream, &mut [IoSliceMut::new(room)], &mut control, flags)?.bytes;
        let fds = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        let fds: Vec<OwnedFd> = fds.flatten().collect();
        if !fds.is_empty() {
            self.part.identities = identities(&fds);
            self.part.fds = Rc::new(fds);
        }
        self.part.bytes.extend(room.iter().take(received));
        Ok(received)
    }
}

/// Messages that a stream had no room for.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    messages: Vec<Message>,
    sent: usize,
}

impl Outgoing {
    /// Messages, the first of which was sent up to byte `sent`.
    pub(super) fn of(messages: Vec<Message>, sent: usize) -> Outgoing {
        Outgoing { messages, sent }
    }

    /// The messages, and how much of the first one was sent.
    pub(super) fn rest(&self) -> (&[Message], usize) {
        (&self.messages, self.sent)
    }

    pub(super) fn push(&mut self, message: Message) {
        self.messages.push(message);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// Descriptors that are to be sent.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = RawFd> + '_ {
        self.messages.iter().flat_map(Message::descriptors)
    }

    /// Sends as much as there is room for. Nothing is left if the other side has gone.
    pub(super) fn flush(&mut self, stream: &UnixStream) {
        while let Some(message) = self.messages.first() {
            match message.send(stream, self.sent) {
                Ok(sent) => self.sent = self.sent.saturating_add(sent),
                Err(Errno::AGAIN) => return,
                Err(_) => {
                    self.messages.clear();
                    self.sent = 0;
                    return;
                }
            }
            if self.sent >= message.bytes.len() {
                self.messages.remove(0);
                self.sent = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn send(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(4))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
    }

    fn message(received: Received) -> Message {
        match received {
            Received::Message(message) => message,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn messages_are_told_apart_however_they_arrive() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut reader = Reader::default();
        let one = Message::new(FrontendReq::SET_FEATURES, &7u64.to_ne_bytes());
        let two = Message::new(FrontendReq::GET_FEATURES, &[]);
        send(&theirs, &[&one.bytes[..], &two.bytes, &one.bytes[..3]].concat(), &[]);
        assert_eq!(message(reader.read(&ours)).body(), 7u64.to_ne_bytes());
        assert_eq!(message(reader.read(&ours)).request(), Some(FrontendReq::GET_FEATURES));
        assert!(reader.is_between_messages());
        for byte in &one.bytes[3..] {
            assert!(matches!(reader.read(&ours), Received::Part) && !reader.is_between_messages());
            theirs.write_all(&[*byte]).unwrap();
        }
        assert_eq!(message(reader.read(&ours)).bytes, one.bytes);
        theirs.write_all(&one.bytes[..13]).unwrap();
        drop(theirs);
        assert!(matches!(reader.read(&ours), Received::End(part) if part.bytes == one.bytes[..13]));
    }

    #[test]
    fn descriptors_stay_with_their_message() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut reader = Reader::default();
        let kick = Message::new(FrontendReq::SET_VRING_KICK, &[0; 8]);
        send(&theirs, &kick.bytes, &[theirs.as_fd()]);
        send(&theirs, &kick.bytes, &[]);
        // With the body, where none is looked for.
        send(&theirs, &kick.bytes[..HEADER], &[theirs.as_fd(), theirs.as_fd()]);
        send(&theirs, &kick.bytes[HEADER..], &[theirs.as_fd()]);
        for count in [1, 0, 2] {
            assert_eq!(message(reader.read(&ours)).fds.len(), count);
        }
        assert!(matches!(reader.read(&ours), Received::Part));
    }

    #[test]
    fn what_no_device_takes_is_not_waited_for() {
        let header =
            |request: u32, flags: u32, size: u32| [request, flags, size].map(u32::to_ne_bytes).concat();
        for header in [
            header(0, 1, 16),
            header(1, 1, 4097),
            header(1, 2, 8),
            header(1, 0x11, 8),
            header(0, 1, 0),
            header(99, 1, 0),
        ] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            send(&theirs, &header, &[]);
            let received = Reader::default().read(&ours);
            assert!(matches!(received, Received::Malformed(message) if message.bytes == header));
        }
    }

    #[test]
    fn a_reader_that_reads_nothing_blocks_nobody() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut outgoing = Outgoing::default();
        for number in 0..2000u64 {
            let mut message = Message::new(FrontendReq::GET_CONFIG, &[[0; 8]; 256].concat());
            message = message.with_body(&number.to_ne_bytes().repeat(256));
            outgoing.push(message);
            outgoing.flush(&ours);
        }
        assert!(!outgoing.is_empty());
        let mut reader = Reader::default();
        for number in 0..2000u64 {
            let got = loop {
                match reader.read(&theirs) {
                    Received::Part => outgoing.flush(&ours),
                    received => break message(received),
                }
            };
            assert_eq!(got.body()[..8], number.to_ne_bytes());
        }
        assert!(outgoing.is_empty());
        outgoing.push(Message::new(FrontendReq::GET_CONFIG, &[]));
        drop(theirs);
        outgoing.flush(&ours);
        assert!(outgoing.is_empty());
    }

    #[test]
    fn no_reply_is_asked_for_when_a_message_is_repeated() {
        let mut message = Message::new(FrontendReq::SET_VRING_NUM, &[1, 0, 0, 0, 64, 0, 0, 0]);
        message.bytes[4] |= 8;
        let quiet = message.without_reply();
        assert_eq!((quiet.bytes[4], quiet.body()), (1, message.body()));
        assert_eq!((quiet.body_word(0), quiet.body_word(4), quiet.body_word(8)), (Some(1), Some(64), None));
    }
}
