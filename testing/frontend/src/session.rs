//! A front end with all its queues, from the first message to INIT and on to its end.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use fuse_protocol::abi::{InitIn, InitOut, KERNEL_VERSION};
use fuse_protocol::flags::InitFlags;
use fuse_protocol::opcode::Opcode;
use zerocopy::{FromBytes, IntoBytes};

use crate::chain::Segmentation;
use crate::client::Client;
use crate::connection::Connection;
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::message::{Inflight, feature, protocol};
use crate::queue::{Completion, Queue, Token};
use crate::request::{Reply, Request};
use crate::ring::RingOptions;

/// What the front end asks for. The default is a recent Linux guest under QEMU with one request queue.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// Request queues; the high-priority queue comes on top.
    pub queues: usize,
    /// How many of all queues are started at once; the others with [`Session::start_queue`].
    pub started: usize,
    /// Descriptors of every ring.
    pub ring_size: u16,
    /// Virtio features to use if the back end offers them.
    pub features: u64,
    /// Protocol features to use if the back end offers them.
    pub protocol_features: u64,
    /// Guest memory: guest address and size of each region.
    pub memory: Vec<(u64, usize)>,
    /// How long to wait for the device.
    pub timeout: Duration,
    /// FUSE minor version of the guest.
    pub minor: u32,
    /// INIT flags of the guest.
    pub init_flags: InitFlags,
    /// Parts of the rings can be hidden from the device ([`crate::ring::Ring::hide`]), until a reset renews them.
    pub hideable_rings: bool,
}

impl Default for SessionOptions {
    fn default() -> Self {
        SessionOptions {
            queues: 1,
            started: usize::MAX,
            ring_size: 1024,
            features: feature::VERSION_1
                | feature::PROTOCOL_FEATURES
                | feature::EVENT_IDX
                | feature::INDIRECT_DESC,
            protocol_features: protocol::MQ
                | protocol::REPLY_ACK
                | protocol::CONFIG
                | protocol::LOG_SHMFD
                | protocol::RESET_DEVICE
                | protocol::CONFIGURE_MEM_SLOTS
                | protocol::DEVICE_STATE,
            memory: vec![(0x10_0000, 256 << 20)],
            timeout: Duration::from_secs(20),
            minor: 45,
            init_flags: linux_init_flags(),
            hideable_rings: false,
        }
    }
}

/// The INIT flags of a recent Linux guest over virtio-fs.
pub fn linux_init_flags() -> InitFlags {
    InitFlags::all()
        - (InitFlags::FILE_OPS
            | InitFlags::SPLICE_WRITE
            | InitFlags::SPLICE_MOVE
            | InitFlags::SPLICE_READ
            | InitFlags::MAP_ALIGNMENT
            | InitFlags::SECURITY_CTX
            | InitFlags::HAS_INODE_DAX
            | InitFlags::OVER_IO_URING
            | InitFlags::REQUEST_TIMEOUT)
}

/// A request that has been sent and not been answered yet.
#[derive(Clone, Copy, Debug)]
pub struct Pending {
    /// Queue that it went to.
    pub queue: usize,
    /// Its name on that queue.
    pub token: Token,
    /// Its number in the FUSE protocol, for INTERRUPT.
    pub unique: u64,
}

/// A front end in session with a back end.
#[derive(Debug)]
pub struct Session {
    connection: Mutex<Connection>,
    memory: Arc<Memory>,
    queues: Vec<Queue>,
    options: SessionOptions,
    features: u64,
    protocol_features: u64,
    unique: AtomicU64,
    init: OnceLock<InitOut>,
    /// With INFLIGHT_SHMFD, what the back end has given.
    inflight: Mutex<Option<(Inflight, File)>>,
    after_send: AfterSend,
    /// Writes of the device are recorded.
    pub(crate) logs: AtomicBool,
}

/// What is to be done once, between the next request and the wait for its reply.
#[derive(Default)]
struct AfterSend(Mutex<Option<Act>>);

type Act = Box<dyn FnOnce(&Session) + Send>;

impl std::fmt::Debug for AfterSend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AfterSend")
    }
}

impl Session {
    /// Connects, sets everything up and sends INIT.
    pub fn connect(socket: &Path, options: SessionOptions) -> Result<Session> {
        let session = Session::start(Connection::connect(socket)?, options)?;
        session.init()?;
        Ok(session)
    }

    /// Sets memory and queues up over an open connection; INIT is left to the caller.
    pub fn start(mut connection: Connection, options: SessionOptions) -> Result<Session> {
        let features = connection.features()? & options.features;
        let mut protocol_features = 0;
        if features & feature::PROTOCOL_FEATURES != 0 {
            protocol_features = connection.protocol_features()? & options.protocol_features;
            connection.set_protocol_features(protocol_features)?;
        }
        connection.set_owner()?;
        connection.set_features(features)?;
        let memory = Memory::with_regions(&options.memory)?;
        let ring = RingOptions {
            size: options.ring_size,
            indirect: features & feature::INDIRECT_DESC != 0,
            event_idx: features & feature::EVENT_IDX != 0,
        };
        let queues = (0..=options.queues)
            .map(|index| match options.hideable_rings {
                true => Queue::hideable(&memory, index, ring, options.timeout),
                false => Queue::new(&memory, index, ring, options.timeout),
            })
            .collect::<Result<Vec<_>>>()?;
        let session = Session {
            connection: Mutex::new(connection),
            memory,
            queues,
            options,
            features,
            protocol_features,
            unique: AtomicU64::new(2),
            init: OnceLock::new(),
            inflight: Mutex::new(None),
            after_send: AfterSend::default(),
            logs: AtomicBool::new(false),
        };
        session.share_memory()?;
        session.track_inflight()?;
        for queue in 0..session.queues.len().min(session.options.started) {
            session.start_queue(queue)?;
        }
        Ok(session)
    }

    /// Gets a region to track requests in flight, unless there is one, and gives it to the back end.
    fn track_inflight(&self) -> Result<()> {
        if self.protocol_features & protocol::INFLIGHT_SHMFD == 0 {
            return Ok(());
        }
        let connection = self.connection();
        let mut region = self.inflight();
        if region.is_none() {
            *region = Some(connection.inflight_region(self.queues.len() as u16, self.options.ring_size)?);
        }
        region.iter().try_for_each(|(region, file)| connection.set_inflight_region(region, file))
    }

    /// The region to track requests in flight.
    pub fn inflight(&self) -> MutexGuard<'_, Option<(Inflight, File)>> {
        self.inflight.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes the connection, with all that is in flight.
    pub fn disconnect(&self) {
        self.connection().shut_down();
    }

    /// Goes on over a new connection, in the order of cloud-hypervisor's messages: it asks for no protocol features, and
    /// says of each ring where its available index is.
    pub fn reconnect(&self, mut connection: Connection) -> Result<()> {
        connection.set_owner()?;
        connection.features()?;
        connection.set_protocol_features(self.protocol_features)?;
        connection.set_features(self.features)?;
        *self.connection() = connection;
        self.share_memory()?;
        self.track_inflight()?;
        let connection = self.connection();
        for (index, queue) in self.queues.iter().enumerate() {
            queue.with_ring(|ring| {
                let base = ring.published_index();
                connection.set_up_ring_at(index, ring, base, queue.kick_event(), queue.call_event())
            })?;
        }
        for (index, queue) in self.queues.iter().enumerate() {
            connection.enable_ring(index, true)?;
            queue.kick()?;
        }
        Ok(())
    }

    fn share_memory(&self) -> Result<()> {
        let connection = self.connection();
        let regions = self.memory.regions();
        if self.protocol_features & protocol::CONFIGURE_MEM_SLOTS == 0 {
            return connection.set_memory(&regions);
        }
        regions.iter().try_for_each(|region| connection.add_memory(region))
    }

    /// Sets one queue up and enables it, from where the device left its ring.
    pub fn start_queue(&self, index: usize) -> Result<()> {
        let connection = self.connection();
        let queue = self.queue(index);
        let (kick, call) = (queue.kick_event(), queue.call_event());
        queue.with_ring(|ring| {
            let log = self.logs.load(Ordering::SeqCst).then(|| ring.used_address());
            connection.set_up_logged_ring(index, ring, kick, call, log)
        })?;
        connection.enable_ring(index, true)?;
        // What was published while the queue was down has nobody told of it.
        queue.kick()
    }

    /// Stops one queue as QEMU does (GET_VRING_BASE) and returns the index it would go on from.
    pub fn stop_queue(&self, index: usize) -> Result<u16> {
        self.connection().stop_ring(index)
    }

    /// Stops all queues as QEMU does when the VM stops, and returns the indices they would go on from.
    pub fn stop_queues(&self) -> Result<Vec<u16>> {
        (0..self.queues.len()).map(|queue| self.stop_queue(queue)).collect()
    }

    /// Starts all queues, from these indices on.
    pub fn start_queues_at(&self, bases: &[u16]) -> Result<()> {
        for (index, base) in bases.iter().enumerate() {
            let connection = self.connection();
            let (queue, base) = (self.queue(index), *base);
            let (kick, call) = (queue.kick_event(), queue.call_event());
            queue.with_ring(|ring| connection.set_up_ring_at(index, ring, base, kick, call))?;
            connection.enable_ring(index, true)?;
            queue.kick()?;
        }
        Ok(())
    }

    /// The device's state. All queues are stopped.
    pub fn save_device_state(&self) -> Result<Vec<u8>> {
        self.connection().save_device_state()
    }

    /// The guest goes on with another back end, which gets `state` and queues that begin at `bases`. After an error the
    /// session is with the back end that it was with, whose queues are stopped. The connection with that is returned.
    pub fn move_to(&self, mut other: Connection, state: &[u8], bases: &[u16]) -> Result<Connection> {
        let features = other.features()? & self.features;
        other.protocol_features()?;
        other.set_protocol_features(self.protocol_features)?;
        other.set_owner()?;
        other.load_device_state(state)?;
        other.set_features(features)?;
        let former = std::mem::replace(&mut *self.connection(), other);
        self.share_memory()?;
        self.start_queues_at(bases)?;
        Ok(former)
    }

    /// Resets the device as a guest's reboot does: stops all queues, and sets them up with fresh rings.
    /// Without RESET_DEVICE only the queues are stopped. INIT is left to the caller.
    pub fn reboot(&self) -> Result<()> {
        for queue in 0..self.queues.len() {
            self.stop_queue(queue)?;
        }
        if self.protocol_features & protocol::RESET_DEVICE != 0 {
            let connection = self.connection();
            connection.reset_device()?;
            // The reset took the features along.
            connection.set_features(self.features_now())?;
        }
        for (index, queue) in self.queues.iter().enumerate() {
            queue.abandon();
            queue.renew()?;
            self.start_queue(index)?;
        }
        Ok(())
    }

    /// Sends INIT on the first request queue.
    pub fn init(&self) -> Result<InitOut> {
        let reply = self.init_with(self.options.minor, self.options.init_flags)?;
        // A second INIT of the same session leaves the first answer in place.
        let _ = self.init.set(reply);
        Ok(reply)
    }

    /// Sends an INIT of any minor version with any flags; guests below minor 36 send a shorter one.
    pub fn init_with(&self, minor: u32, flags: InitFlags) -> Result<InitOut> {
        // A guest that sends the short form knows nothing of the upper half.
        let flags = if minor >= 36 { flags } else { flags - InitFlags::INIT_EXT };
        let [low, high]: [u32; 2] = zerocopy::transmute!(flags.bits());
        let init = InitIn {
            major: KERNEL_VERSION,
            minor,
            max_readahead: 128 << 10,
            flags: low,
            flags2: if minor >= 36 { high } else { 0 },
            unused: [0; 11],
        };
        let len = if minor >= 36 { size_of::<InitIn>() } else { 16 };
        let request = Request::new(Opcode::Init, 0).arg(&init.as_bytes()[..len]).reply::<InitOut>();
        let mut bytes = self.client().call_bytes(&request)?;
        // Old protocol versions have a shorter answer.
        bytes.resize(size_of::<InitOut>(), 0);
        InitOut::read_from_bytes(&bytes)
            .map_err(|_| Error::BadReply { operation: "FUSE_INIT", problem: "it is too long".into() })
    }

    /// The answer to INIT; all zero before it.
    pub fn init_reply(&self) -> InitOut {
        self.init.get().copied().unwrap_or_default()
    }

    /// The flags that both sides agreed on in INIT.
    pub fn init_flags(&self) -> InitFlags {
        let reply = self.init_reply();
        InitFlags::from_bits_retain(u64::from(reply.flags) | u64::from(reply.flags2) << 32)
    }

    /// Bytes that one WRITE may carry on these rings: what INIT says, and what a chain can hold.
    pub fn max_write(&self) -> usize {
        let pages = usize::from(self.options.ring_size).saturating_sub(4).max(1);
        (self.init_reply().max_write as usize).min(pages * crate::memory::PAGE).max(crate::memory::PAGE)
    }

    /// A client that works on the first request queue as root.
    pub fn client(&self) -> Client<'_> {
        Client::new(self)
    }

    /// Puts a request onto a queue and does not wait.
    pub fn send(&self, queue: usize, request: &Request<'_>, segmentation: Segmentation) -> Result<Pending> {
        // Linux gives requests even numbers.
        let unique = self.unique.fetch_add(2, Ordering::Relaxed);
        let limit = usize::from(self.options.ring_size);
        let chain = request.to_chain(&self.memory, unique, segmentation, limit)?;
        let token = self.queue(queue).submit(chain)?;
        let act = self.after_send.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(act) = act {
            act(self);
        }
        Ok(Pending { queue, token, unique })
    }

    /// Runs `act` once, between the next [`Session::send`] and the wait for its reply.
    pub fn after_next_send(&self, act: impl FnOnce(&Session) + Send + 'static) {
        *self.after_send.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(act));
    }

    /// Puts a request onto a queue that nobody will wait for.
    pub fn send_detached(
        &self,
        queue: usize,
        request: &Request<'_>,
        segmentation: Segmentation,
    ) -> Result<()> {
        let unique = self.unique.fetch_add(2, Ordering::Relaxed);
        let limit = usize::from(self.options.ring_size);
        self.queue(queue).submit_detached(request.to_chain(&self.memory, unique, segmentation, limit)?)
    }

    /// Waits for a request.
    pub fn wait(&self, sent: Pending) -> Result<Completion> {
        self.queue(sent.queue).wait(sent.token)
    }

    /// Waits for a request and returns what follows the reply's header.
    pub fn finish(&self, sent: Pending) -> Result<Vec<u8>> {
        Ok(Reply::of(&self.wait(sent)?)?.success()?.bytes())
    }

    /// One of the queues; 0 is the high-priority queue. Panics if there is none of this number.
    pub fn queue(&self, index: usize) -> &Queue {
        &self.queues[index]
    }

    /// All queues, the high-priority queue first.
    pub fn queues(&self) -> &[Queue] {
        &self.queues
    }

    /// Guest memory.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// The options that the session was started with.
    pub fn options(&self) -> &SessionOptions {
        &self.options
    }

    /// The virtio features in use, without those that come and go.
    pub fn features(&self) -> u64 {
        self.features
    }

    pub(crate) fn features_now(&self) -> u64 {
        let logs = self.logs.load(Ordering::SeqCst);
        self.features | if logs { feature::LOG_ALL } else { 0 }
    }

    /// The protocol features in use.
    pub fn protocol_features(&self) -> u64 {
        self.protocol_features
    }

    /// The vhost-user socket, for messages in mid-session.
    pub fn connection(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
