//! The vhost-user protocol: what the front end says about memory and queues.
//!
//! A queue runs while it is enabled, has a kick and knows its addresses. Everything else here
//! stores what was said until that is the case, or stops the queue and stores where it stood.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use log::debug;
use rustix::fs::OFlags;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use vm_memory::GuestAddressSpace;

use super::config_space::{self, config_space};
use super::memory::MemoryTable;
use super::queue::{Queue, QueueError};
use super::ring::{Layout, MAX_SIZE, Ring};
use super::watch::Watch;
use super::worker::Crew;
use crate::config::DeviceConfig;
use crate::fs::DeviceDescriptors;
use crate::logging::info_limited;
use crate::service::Service;
use crate::sys::descriptors;

/// Most queues that a device has: the high-priority queue and 63 request queues.
pub const MAX_QUEUES: usize = 64;
/// Descriptors of a queue that runs.
const QUEUE_DESCRIPTORS: usize = 7;
/// Regions of guest memory that a front end may share (KVM's limit less its own).
const MAX_MEMORY_SLOTS: u64 = 509;
/// `VIRTIO_RING_F_INDIRECT_DESC`.
const INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_RING_F_EVENT_IDX`.
const EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`.
const VERSION_1: u64 = 1 << 32;

/// What the front end said about one queue, and the crew that serves it while it runs.
#[derive(Default)]
struct Vring {
    layout: Layout,
    base: u16,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    enabled: bool,
    /// The guest has not heard of all that was given back.
    owes_notification: bool,
    put_back: PutBack,
    crew: Option<Arc<Crew>>,
}

/// Chains that were taken from a ring and are served when it goes on: requests that waited for locks
/// when it was stopped, while later ones were done. To answer them would be to make programs fail that
/// have done nothing wrong.
#[derive(Default)]
struct PutBack {
    heads: Vec<u16>,
    layout: Layout,
    /// Where the ring stood.
    available: u16,
    used: u16,
}

impl PutBack {
    /// The chains, if `ring` is the one that they were taken from, and not one that was made anew. The
    /// front end lets it go on where it stood, or else behind the last used entry; it goes on where it
    /// stood.
    fn of(&self, ring: &mut Ring) -> &[u16] {
        let stood = ring.layout() == self.layout && ring.next_used() == self.used;
        // A new ring begins with 0.
        let behind = ring.next_available() == self.used && self.used != 0;
        if self.heads.is_empty() || !stood || !(behind || ring.next_available() == self.available) {
            return &[];
        }
        ring.set_next_available(self.available);
        &self.heads
    }
}

/// The device, between one front end and the service.
pub struct Backend {
    service: Arc<Service>,
    watch: Arc<Watch>,
    workers: usize,
    poll_time: Duration,
    config_space: Option<[u8; config_space::SIZE]>,
    features: u64,
    memory: MemoryTable,
    vrings: Vec<Vring>,
    /// What the file system knows of the device's descriptors.
    told: DeviceDescriptors,
}

impl Backend {
    /// A device that no front end has spoken to.
    pub fn new(config: &DeviceConfig, service: Arc<Service>) -> io::Result<Backend> {
        let queues = config.request_queues.clamp(1, MAX_QUEUES - 1);
        let count = u32::try_from(queues).unwrap_or(1);
        Ok(Backend {
            service,
            watch: Watch::start()?,
            workers: config.thread_pool_size,
            poll_time: config.poll_time,
            config_space: config.tag.as_deref().map(|tag| config_space(tag, count)),
            features: 0,
            memory: MemoryTable::new(),
            vrings: (0..=queues).map(|_| Vring::default()).collect(),
            told: DeviceDescriptors::default(),
        })
    }

    /// Stops all queues after what is in flight, and ends the session.
    pub fn shut_down(&mut self) {
        self.stop_all();
        self.service.end_session();
    }

    fn stop_all(&mut self) {
        self.vrings.iter_mut().for_each(Vring::stop);
    }

    fn vring(&mut self, index: impl TryInto<usize>) -> Result<&mut Vring> {
        let count = self.vrings.len();
        let vring = index.try_into().ok().and_then(|index| self.vrings.get_mut(index));
        vring.ok_or_else(|| {
            refuse(format!("the front end wants more queues than the {} that the device has", count))
        })
    }

    /// Lets the file system know what the device needs, which the guest is not to have.
    pub fn keep_descriptors_back(&mut self) {
        let queues = self.vrings.iter().map(Vring::descriptors).fold(0, usize::saturating_add);
        let device = DeviceDescriptors {
            queues: queues.max(self.told.queues),
            all_queues: self.vrings.len().saturating_mul(QUEUE_DESCRIPTORS),
            memory: self.memory.regions(),
        };
        if std::mem::replace(&mut self.told, device) != device {
            self.service.keep_back(device);
        }
    }

    /// Starts the queue if it has all it needs, and stops it if not.
    fn update(&mut self, index: usize) -> Result<()> {
        let memory = self.memory.shared().clone();
        let event_idx = self.features & EVENT_IDX != 0;
        let (service, watch) = (Arc::clone(&self.service), Arc::clone(&self.watch));
        let (workers, poll_time) = (self.workers, self.poll_time);
        let vring = self.vring(index)?;
        let ready = vring.enabled && vring.layout.size > 0 && vring.layout.descriptors != 0;
        let Some(kick) = vring.kick.as_ref().filter(|_| ready) else {
            vring.stop();
            return Ok(());
        };
        if vring.crew.is_some() {
            return Ok(());
        }
        let ring = Ring::new(&memory.memory(), vring.layout, vring.base, event_idx);
        let mut ring = ring.map_err(|e| refuse(describe(&QueueError::Ring { index, source: e })))?;
        let kick = copy(kick)?;
        let call = vring.call.as_ref().map(copy).transpose()?;
        let put_back = std::mem::take(&mut vring.put_back);
        let heads = put_back.of(&mut ring);
        let crew = Queue::new(index, memory, ring, kick, call)
            .and_then(|queue| Crew::start(queue.polled_for(poll_time), service, &watch, workers, heads));
        let crew = crew.map_err(|error| refuse(describe(&error)))?;
        if std::mem::take(&mut vring.owes_notification) {
            crew.queue().announce();
        }
        vring.crew = Some(crew);
        debug!("queue {index} runs with {} descriptors", vring.layout.size);
        Ok(())
    }

    /// Forgets what was said about queues, as at the start.
    fn reset_queues(&mut self) {
        self.stop_all();
        self.vrings.iter_mut().for_each(|vring| *vring = Vring::default());
        self.features = 0;
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.shut_down();
        self.watch.end();
        self.service.keep_back(DeviceDescriptors::default());
    }
}

impl Vring {
    /// How many descriptors it has. A crew has copies of kick and call, and three of its own.
    fn descriptors(&self) -> usize {
        let crew = if self.crew.is_some() { 4 + usize::from(self.call.is_some()) } else { 0 };
        crew + usize::from(self.kick.is_some()) + usize::from(self.call.is_some())
    }

    /// Stops after what is in flight, and remembers where the ring stood.
    fn stop(&mut self) {
        if let Some(crew) = self.crew.take() {
            let heads = crew.stop();
            let (available, used) = crew.queue().position();
            self.base = available;
            self.owes_notification = crew.queue().owes_notification();
            self.put_back = PutBack { heads, layout: self.layout, available, used };
        }
    }
}

/// Refuses a message; the reason ends the connection and is printed with it.
fn refuse(why: impl Into<String>) -> Error {
    Error::ReqHandlerError(io::Error::other(why.into()))
}

fn copy(descriptor: &OwnedFd) -> Result<OwnedFd> {
    descriptor.try_clone().map_err(|error| refuse(describe(&error)))
}

/// Makes notifications that find no room get lost: one is on its way then. A worker that waited for
/// room could be stopped by nobody but a front end that reads what it was sent.
fn never_wait(call: &OwnedFd) -> rustix::io::Result<()> {
    rustix::fs::fcntl_setfl(call, OFlags::NONBLOCK)
}

fn unsupported<T>(what: &'static str) -> Result<T> {
    Err(Error::InvalidOperation(what))
}

impl VhostUserBackendReqHandlerMut for Backend {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset_queues();
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        info_limited!("the front end resets the device");
        self.reset_queues();
        self.service.end_session();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(VERSION_1 | INDIRECT_DESC | EVENT_IDX | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let offered = self.get_features()?;
        if features & !offered != 0 {
            return Err(refuse(format!(
                "the front end wants features {:#x} that were not offered",
                features & !offered
            )));
        }
        self.features = features;
        // Without protocol features there is no SET_VRING_ENABLE, and queues begin enabled.
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            for index in 0..self.vrings.len() {
                self.vring(index)?.enabled = true;
                self.update(index)?;
            }
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        self.memory.set(regions, files).map_err(|error| refuse(describe(&error)))?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).ok().filter(|size| size.is_power_of_two() && *size <= MAX_SIZE);
        let size = size.ok_or_else(|| refuse(format!("queue {index} cannot have {num} descriptors")))?;
        let vring = self.vring(index)?;
        if vring.crew.is_some() {
            return Err(refuse(format!("queue {index} runs; its size cannot change")));
        }
        vring.layout.size = size;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let translate = |user| self.memory.guest_address(user).map_err(|error| refuse(describe(&error)));
        let (descriptors, available, used) =
            (translate(descriptor)?, translate(available)?, translate(used)?);
        let vring = self.vring(index)?;
        let layout = Layout { descriptors, available, used, size: vring.layout.size };
        if vring.crew.is_some() && layout != vring.layout {
            return Err(refuse(format!("queue {index} runs; its addresses cannot change")));
        }
        vring.layout = layout;
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        let vring = self.vring(index)?;
        if vring.crew.is_none() {
            vring.base = base;
        }
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let vring = self.vring(index)?;
        vring.stop();
        // The queue starts again with the next SET_VRING_KICK.
        vring.kick = None;
        vring.call = None;
        Ok(VhostUserVringState::new(index, u32::from(vring.base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let vring = self.vring(index)?;
        let Some(fd) = fd else {
            return Err(refuse(format!("queue {index} has no kick; polled queues are not supported")));
        };
        vring.stop();
        vring.kick = Some(fd.into());
        self.update(usize::from(index))
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let vring = self.vring(index)?;
        vring.call = fd.map(OwnedFd::from);
        if let Some(call) = &vring.call {
            never_wait(call).map_err(|errno| Error::ReqHandlerError(errno.into()))?;
        }
        if let Some(crew) = &vring.crew {
            crew.queue().set_call(vring.call.as_ref().map(copy).transpose()?);
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, _fd: Option<File>) -> Result<()> {
        self.vring(index).map(drop)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        let mut features = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE;
        if self.config_space.is_some() {
            features |= VhostUserProtocolFeatures::CONFIG;
        }
        Ok(features)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let extra = features & !self.get_protocol_features()?.bits();
        if extra != 0 {
            return Err(refuse(format!(
                "the front end wants protocol features {extra:#x} that were not offered"
            )));
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.vrings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.vring(index)?.enabled = enable;
        self.update(usize::try_from(index).map_err(|_| Error::InvalidParam)?)
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let space = self.config_space.as_ref().ok_or(Error::InvalidOperation("there is no tag"))?;
        Ok(config_space::read(space, offset, size))
    }

    fn set_config(&mut self, _offset: u32, _buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        unsupported("the configuration space is read-only")
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        unsupported("there is no GPU")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        unsupported("there are no shared objects")
    }

    fn get_inflight_fd(&mut self, _inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        unsupported("in-flight tracking was not offered")
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        unsupported("in-flight tracking was not offered")
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_MEMORY_SLOTS)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        self.memory.add(region, file).map_err(|error| refuse(describe(&error)))?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.memory.remove(region).map_err(|error| refuse(describe(&error)))
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        unsupported("device state was not offered")
    }

    fn check_device_state(&mut self) -> Result<()> {
        unsupported("device state was not offered")
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unsupported("shared memory regions were not offered")
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        unsupported("dirty logging was not offered")
    }
}

/// An error and its causes in one sentence.
fn describe(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    let mut lacks = descriptors::is_lack(error);
    while let Some(cause) = source {
        lacks |= descriptors::is_lack(cause);
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    if lacks { format!("{text}; {}", descriptors::TOO_FEW) } else { text }
}
