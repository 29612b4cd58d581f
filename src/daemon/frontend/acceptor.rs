//! Accepts connections and picks the next front end: the first one that sends a message.
//!
//! Health checks and port scanners connect to the socket and send nothing, or less than a message. Such a connection
//! is not a front end: closing it has no effect, and it does not block others while it is open.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use log::{debug, warn};
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvFlags, ReturnFlags, recvmsg};

use super::FrontendError;
use crate::daemon::header::HEADER;
use crate::logging::info_limited;

/// Pending connections at most. Further ones replace an idle one, or stay in the listen backlog.
const MAX_PENDING: usize = 8;
/// Maximum number of bytes after the header. A front end that announces more is disconnected when it is served.
const MAX_BODY: usize = 4096;
/// How long to accept no connection after the host ran out of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::daemon) enum Event {
    /// A signal requests the end.
    Signal,
    /// A descriptor that the caller watches is ready.
    Watched,
    /// A connection has sent its first message.
    Pending,
    /// A signal has come that requests nothing, or the wait has lasted long enough.
    Interrupted,
}

/// What poll(2) found readable.
#[derive(Default)]
struct Ready {
    interrupted: bool,
    signal: bool,
    watched: bool,
    listener: bool,
}

/// A connection that is not served yet.
#[derive(Debug)]
struct Pending {
    stream: UnixStream,
    has_message: bool,
}

/// The listening socket and its pending connections.
#[derive(Debug)]
pub(in crate::daemon) struct Acceptor<'a> {
    listener: &'a UnixListener,
    pending: Vec<Pending>,
    /// An edge-triggered epoll of the pending connections. Their data stays in the socket until they are served, so
    /// poll(2) on them would return at once as long as part of a message is there, and SO_RCVLOWAT has no effect on
    /// Unix sockets.
    readiness: OwnedFd,
    paused_until: Option<Instant>,
    /// How long a wait lasts at most while a front end is served.
    longest: Option<Duration>,
    /// When the caller has something else to do.
    alarm: Option<Instant>,
}

impl<'a> Acceptor<'a> {
    pub(in crate::daemon) fn new(listener: &'a UnixListener) -> Result<Acceptor<'a>, Errno> {
        let readiness = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Acceptor {
            listener,
            pending: Vec::new(),
            readiness,
            paused_until: None,
            longest: None,
            alarm: None,
        })
    }

    /// The same with an [`Event::Interrupted`] after so long a wait while a front end is served.
    pub(in crate::daemon) fn with_longest(mut self, longest: Duration) -> Acceptor<'a> {
        self.longest = Some(longest);
        self
    }

    /// The same with connections that another program in this process has accepted, the oldest first.
    pub(in crate::daemon) fn with_pending(mut self, streams: Vec<UnixStream>) -> Acceptor<'a> {
        streams.into_iter().for_each(|stream| self.add(stream));
        self.process_pending(false);
        self
    }

    /// Waits end with an [`Event::Interrupted`] then.
    pub(in crate::daemon) fn set_alarm(&mut self, alarm: Option<Instant>) {
        self.alarm = alarm;
    }

    /// Its own descriptors: the listening socket, and what it waits with.
    pub(in crate::daemon) fn own_descriptors(&self) -> [RawFd; 2] {
        [self.listener.as_raw_fd(), self.readiness.as_raw_fd()]
    }

    /// The oldest connection that has sent a message.
    pub(in crate::daemon) fn next(&mut self) -> Option<UnixStream> {
        let at = self.pending.iter().position(|connection| connection.has_message)?;
        let stream = self.pending.remove(at).stream;
        // The connection stays open, and is not polled here any more.
        let _ = epoll::delete(&self.readiness, &stream);
        Some(stream)
    }

    /// Descriptors of the connections that are not served yet.
    pub(in crate::daemon) fn descriptors(&self) -> impl Iterator<Item = RawFd> + '_ {
        self.pending.iter().map(|connection| connection.stream.as_raw_fd())
    }

    /// Waits for an event. `watched` are additional descriptors; `busy` says that a front end is being served.
    pub(in crate::daemon) fn wait(
        &mut self,
        signals: BorrowedFd<'_>,
        watched: &[PollFd<'_>],
        busy: bool,
    ) -> Result<Event, FrontendError> {
        loop {
            let ready = self.poll(signals, watched, busy)?;
            if ready.interrupted {
                return Ok(Event::Interrupted);
            }
            if ready.signal {
                return Ok(Event::Signal);
            }
            if ready.watched {
                return Ok(Event::Watched);
            }
            if ready.listener {
                self.accept()?;
            }
            self.drain_readiness()?;
            if self.process_pending(busy) {
                return Ok(Event::Pending);
            }
        }
    }

    /// One poll(2).
    fn poll(
        &mut self,
        signals: BorrowedFd<'_>,
        watched: &[PollFd<'_>],
        busy: bool,
    ) -> Result<Ready, FrontendError> {
        let entry = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        self.paused_until = self.paused_until.filter(|until| *until > Instant::now());
        let rest = self.paused_until.map(|until| until.saturating_duration_since(Instant::now()));
        let mut fds = vec![entry(signals)];
        fds.extend_from_slice(watched);
        fds.push(entry(self.readiness.as_fd()));
        let listens = rest.is_none() && self.has_room();
        if listens {
            fds.push(entry(self.listener.as_fd()));
        }
        let alarm = self.alarm.map(|alarm| alarm.saturating_duration_since(Instant::now()));
        let longest = self.longest.filter(|_| busy).into_iter().chain(alarm).min();
        let timeout = rest.map(|rest| rest.max(Duration::from_nanos(1))).into_iter().chain(longest).min();
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) if longest.is_some() => return Ok(Ready { interrupted: true, ..Ready::default() }),
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Ready { interrupted: true, ..Ready::default() }),
            Err(errno) => return Err(FrontendError::SetUp(errno.into())),
        }
        let ready = |fd: Option<&PollFd<'_>>| fd.is_some_and(|fd| !fd.revents().is_empty());
        Ok(Ready {
            interrupted: false,
            signal: ready(fds.first()),
            watched: fds.iter().skip(1).take(watched.len()).any(|fd| ready(Some(fd))),
            listener: listens && ready(fds.last()),
        })
    }

    /// Consumes the edges. All pending connections are peeked at next, so it does not matter whose they are.
    fn drain_readiness(&self) -> Result<(), FrontendError> {
        let mut events = [const { MaybeUninit::uninit() }; MAX_PENDING];
        match epoll::wait(&self.readiness, &mut events[..], Some(&Timespec::default())) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(FrontendError::SetUp(errno.into())),
        }
    }

    /// Whether another connection can be accepted, if necessary in place of an idle one.
    fn has_room(&self) -> bool {
        self.pending.len() < MAX_PENDING || self.pending.iter().any(|connection| !connection.has_message)
    }

    /// Drops closed connections, and returns whether one has sent its first message.
    fn process_pending(&mut self, busy: bool) -> bool {
        let mut got_message = false;
        self.pending.retain_mut(|connection| {
            if connection.has_message {
                return true;
            }
            match peek(&connection.stream) {
                Ok(Peeked::Message) => {
                    connection.has_message = true;
                    got_message = true;
                    if busy {
                        info_limited!(
                            "another front end is waiting: a share serves one VM at a time; start another daemon for the other VM"
                        );
                    }
                    true
                }
                Ok(Peeked::Part) if !is_closed(&connection.stream) => true,
                Ok(_) => {
                    debug!("a connection was closed before its first message");
                    false
                }
                Err(Errno::AGAIN | Errno::INTR) => true,
                Err(errno) => {
                    debug!("a pending connection failed: {errno}");
                    false
                }
            }
        });
        got_message
    }

    /// Accepts one connection.
    fn accept(&mut self) -> Result<(), FrontendError> {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => return self.accept_failed(error),
        };
        if self.pending.len() >= MAX_PENDING
            && let Some(idle) = self.pending.iter().position(|connection| !connection.has_message)
        {
            info_limited!("too many idle connections; closed the oldest one");
            self.pending.remove(idle);
        }
        self.add(stream);
        Ok(())
    }

    fn add(&mut self, stream: UnixStream) {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        match epoll::add(&self.readiness, &stream, epoll::EventData::new_u64(0), flags) {
            Ok(()) => self.pending.push(Pending { stream, has_message: false }),
            Err(errno) => warn!("closed a connection that cannot be polled: {errno}"),
        }
    }

    /// Only permanent errors end the daemon.
    fn accept_failed(&mut self, error: io::Error) -> Result<(), FrontendError> {
        match Errno::from_io_error(&error) {
            Some(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(()),
            Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                warn!("no connections are accepted for a second: {error}");
                self.paused_until = Some(Instant::now() + ACCEPT_PAUSE);
                Ok(())
            }
            _ => Err(FrontendError::Listen(error)),
        }
    }
}

/// What can be read from a connection.
enum Peeked {
    End,
    Part,
    Message,
}

/// Peeks at the data without consuming it.
fn peek(stream: &UnixStream) -> Result<Peeked, Errno> {
    let mut buffer = [0; HEADER + MAX_BODY];
    // Without a control buffer no descriptors are received, and the flags say whether there are any.
    let mut none = RecvAncillaryBuffer::default();
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    let peeked = recvmsg(stream, &mut [IoSliceMut::new(&mut buffer)], &mut none, flags)?;
    // Data behind descriptors is not visible before these are received.
    let all = !peeked.flags.contains(ReturnFlags::CTRUNC);
    Ok(match buffer.get(..peeked.bytes) {
        Some([]) | None => Peeked::End,
        Some(bytes) if is_partial(bytes, all) => Peeked::Part,
        Some(_) => Peeked::Message,
    })
}

/// Whether the first message is incomplete. `all`: `bytes` is all that has been received.
fn is_partial(bytes: &[u8], all: bool) -> bool {
    let Some((header, body)) = bytes.split_first_chunk::<HEADER>() else { return true };
    let [.., a, b, c, d] = *header;
    let announced = usize::try_from(u32::from_ne_bytes([a, b, c, d])).unwrap_or(usize::MAX);
    all && announced <= MAX_BODY && body.len() < announced
}

/// Whether the other side will send nothing more.
fn is_closed(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Write};

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

    use super::*;

    struct Place {
        directory: tempfile::TempDir,
        listener: UnixListener,
        signals: UnixStream,
        _other: UnixStream,
    }

    impl Place {
        fn new() -> Place {
            let directory = tempfile::tempdir().unwrap();
            let listener = UnixListener::bind(directory.path().join("socket")).unwrap();
            listener.set_nonblocking(true).unwrap();
            let (signals, other) = UnixStream::pair().unwrap();
            Place { directory, listener, signals, _other: other }
        }

        fn connect(&self) -> UnixStream {
            UnixStream::connect(self.directory.path().join("socket")).unwrap()
        }

        fn connect_and_send(&self, word: u8) -> UnixStream {
            let mut stream = self.connect();
            stream.write_all(&[word; HEADER]).unwrap();
            stream
        }
    }

    fn word(stream: Option<UnixStream>) -> u8 {
        let mut byte = [0];
        io::Read::read_exact(&mut stream.unwrap(), &mut byte).unwrap();
        byte[0]
    }

    #[test]
    fn idle_connections_block_nobody() {
        let place = Place::new();
        let mut acceptor = Acceptor::new(&place.listener).unwrap();
        let _idle: Vec<_> = (0..3 * MAX_PENDING).map(|_| place.connect()).collect();
        let _first = place.connect_and_send(1);
        let _second = place.connect_and_send(2);
        drop(place.connect());
        while acceptor.pending.iter().filter(|connection| connection.has_message).count() < 2 {
            assert_eq!(acceptor.wait(place.signals.as_fd(), &[], false).unwrap(), Event::Pending);
        }
        assert!(acceptor.pending.len() <= MAX_PENDING);
        assert_eq!((word(acceptor.next()), word(acceptor.next())), (1, 2));
        assert!(acceptor.next().is_none());
    }

    #[test]
    fn a_message_counts_when_it_is_whole() {
        let message = |size: u32, body: usize| {
            let mut bytes = vec![1, 0, 0, 0, 1, 0, 0, 0];
            bytes.extend(size.to_ne_bytes());
            bytes.resize(HEADER + body, 0);
            bytes
        };
        for length in 1..HEADER {
            assert!(
                is_partial(&message(0, 0)[..length], true) && is_partial(&[0xff; HEADER][..length], false)
            );
        }
        for (size, body, lacks) in [(0, 0, false), (0, 9, false), (8, 0, true), (8, 7, true), (8, 8, false)] {
            assert_eq!(is_partial(&message(size, body), true), lacks, "{body} of {size}");
            assert!(!is_partial(&message(size, body), false));
        }
        assert!(is_partial(&message(4096, 4095), true) && !is_partial(&message(4096, 4096), true));
        assert!(!is_partial(&message(4097, 0), true) && !is_partial(&message(u32::MAX, 0), true));
    }

    #[test]
    fn what_follows_descriptors_is_not_waited_for() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let header = [5, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = [theirs.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
        sendmsg(&theirs, &[IoSlice::new(&header)], &mut control, SendFlags::empty()).unwrap();
        assert!(matches!(peek(&ours), Ok(Peeked::Message)));
        (&theirs).write_all(&[0; 8]).unwrap();
        assert!(matches!(peek(&ours), Ok(Peeked::Message)));
    }

    #[test]
    fn part_of_a_header_makes_no_front_end() {
        let place = Place::new();
        let mut acceptor = Acceptor::new(&place.listener).unwrap();
        let mut slow = place.connect();
        slow.write_all(&[1; HEADER - 1]).unwrap();
        let mut gone = place.connect();
        gone.write_all(&[2; HEADER - 1]).unwrap();
        drop(gone);
        let _whole = place.connect_and_send(3);
        while acceptor.pending.len() != 2 || !acceptor.pending.iter().any(|one| one.has_message) {
            assert_eq!(acceptor.wait(place.signals.as_fd(), &[], false).unwrap(), Event::Pending);
        }
        assert_eq!(word(acceptor.next()), 3);
        assert!(acceptor.next().is_none());
        // Nobody is woken for what was there before.
        let mut readiness = [PollFd::new(&acceptor.readiness, PollFlags::IN)];
        assert_eq!(poll(&mut readiness, Some(&Timespec::default())), Ok(0));
        slow.write_all(&[1]).unwrap();
        assert_eq!(acceptor.wait(place.signals.as_fd(), &[], false).unwrap(), Event::Pending);
        assert_eq!(word(acceptor.next()), 1);
    }

    #[test]
    fn what_comes_while_a_front_end_leaves_is_not_missed() {
        let place = Place::new();
        let mut acceptor = Acceptor::new(&place.listener).unwrap();
        let mut next = place.connect();
        let (watched, other) = UnixStream::pair().unwrap();
        let (signals, signal) = UnixStream::pair().unwrap();
        while acceptor.pending.is_empty() {
            acceptor.accept().unwrap();
        }
        next.write_all(&[5; HEADER]).unwrap();
        drop((other, signal));
        assert_eq!(acceptor.wait(signals.as_fd(), &[], false).unwrap(), Event::Signal);
        assert_eq!(
            acceptor.wait(place.signals.as_fd(), &[PollFd::new(&watched, PollFlags::IN)], true).unwrap(),
            Event::Watched
        );
        assert_eq!(acceptor.wait(place.signals.as_fd(), &[], false).unwrap(), Event::Pending);
        assert_eq!(word(acceptor.next()), 5);
    }

    #[test]
    fn pending_connections_keep_their_order() {
        let place = Place::new();
        let mut acceptor = Acceptor::new(&place.listener).unwrap();
        let mut waiting = vec![];
        for turn in 0..MAX_PENDING {
            waiting.push(place.connect_and_send(u8::try_from(turn).unwrap()));
            assert_eq!(acceptor.wait(place.signals.as_fd(), &[], false).unwrap(), Event::Pending);
        }
        let _more = place.connect_and_send(100);
        let (done, other) = UnixStream::pair().unwrap();
        drop(other);
        assert_eq!(
            acceptor.wait(place.signals.as_fd(), &[PollFd::new(&done, PollFlags::IN)], true).unwrap(),
            Event::Watched
        );
        for turn in 0..MAX_PENDING {
            assert_eq!(usize::from(word(acceptor.next())), turn);
        }
        assert_eq!(acceptor.wait(place.signals.as_fd(), &[], false).unwrap(), Event::Pending);
        assert_eq!(word(acceptor.next()), 100);
    }

    #[test]
    fn running_out_of_descriptors_pauses_accepting() {
        let place = Place::new();
        let mut acceptor = Acceptor::new(&place.listener).unwrap();
        acceptor.accept_failed(Errno::MFILE.into()).unwrap();
        assert!(acceptor.paused_until.is_some());
        let _caller = place.connect_and_send(7);
        assert_eq!(acceptor.wait(place.signals.as_fd(), &[], false).unwrap(), Event::Pending);
        assert!(acceptor.paused_until.is_none());
        assert_eq!(word(acceptor.next()), 7);
        assert!(acceptor.accept_failed(Errno::BADF.into()).is_err());
    }
}
