//! The vhost-user protocol: what the front end says about the device, its memory and its queues.
//!
//! vhost-user-backend does the same, but takes no connection that is there already (docs/upstream.md). Its words are
//! used: a [`Vring`] is a queue as the front end sets it up.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use log::error;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use super::config::DeviceConfig;
use super::config_space::{self, config_space};
use super::dirty_log::DirtyLog;
use super::engine::Stations;
use super::memory::MemoryTable;
use super::postcopy::{Postcopy, PostcopyError};
use super::quarantine::{Death, Quarantine};
use super::transfer::Transfers;
use super::vring::{self, Serving, Vring};
use super::watchdog::Watchdog;
use crate::fs::DeviceDescriptors;
use crate::limits::PaceHandle;
use crate::logging::info_limited;
use crate::metrics::Metrics;
use crate::server::Server;
use crate::state_file::StateFile;
use crate::sys::descriptors;
use crate::sys::userfault::Userfault;

/// Most queues that a device has: the high-priority queue and 63 request queues.
pub const MAX_QUEUES: usize = 64;
/// Regions of guest memory that a front end may share (KVM's limit less its own).
const MAX_MEMORY_SLOTS: u64 = 509;
/// `VIRTIO_RING_F_INDIRECT_DESC`.
const INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_RING_F_EVENT_IDX`.
const EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`.
const VERSION_1: u64 = 1 << 32;

/// The device, between one front end and the server.
pub struct Backend {
    serving: Serving,
    config_space: Option<[u8; config_space::SIZE]>,
    memory: MemoryTable,
    postcopy: Postcopy,
    /// Whether the front end wants writes to be recorded (VHOST_F_LOG_ALL).
    logs: bool,
    /// Where it wants them to be recorded, the last time that it said so.
    log: Option<Arc<DirtyLog>>,
    state: Arc<StateFile>,
    metrics: Arc<Metrics>,
    quarantine: Arc<Quarantine>,
    vrings: Vec<Vring>,
    /// Whether another process has copies of the descriptors that the front end sends.
    copied: bool,
    /// The device's descriptors, as the file system was told of them last.
    declared: DeviceDescriptors,
    /// The device's state on its way to or from the front end.
    transfers: Transfers,
}

impl Backend {
    /// A device that no front end has spoken to. What becomes of the guest's requests stands in `state`. If a process
    /// has died with the state, `death` says how: requests that it had in flight are served again. With `stations` there
    /// are engines.
    pub fn new(
        config: &DeviceConfig,
        server: Arc<Server>,
        state: Arc<StateFile>,
        metrics: Arc<Metrics>,
        death: Option<Death>,
        stations: Stations,
    ) -> io::Result<Backend> {
        let queues = config.request_queues.clamp(1, MAX_QUEUES - 1);
        let count = u32::try_from(queues).unwrap_or(1);
        let memory = MemoryTable::new();
        let serving = Serving {
            memory: memory.shared().clone(),
            event_idx: false,
            log: None,
            server,
            watchdog: Watchdog::start()?,
            stations,
            workers: config.thread_pool_size,
            poll_time: config.poll_time,
            pace: PaceHandle::default(),
            group: config.group.clone(),
        };
        let quarantine = Quarantine::after(death, &state)?;
        let transfers = Transfers::new(&serving.server, &state, config.migration.clone());
        Ok(Backend {
            serving,
            config_space: config.tag.as_deref().map(|tag| config_space(tag, count)),
            memory,
            postcopy: Postcopy::default(),
            logs: false,
            log: None,
            vrings: (0..=queues).map(|index| Vring::new(index, &state, &metrics, &quarantine)).collect(),
            state,
            metrics,
            quarantine,
            copied: config.descriptors_are_copied,
            declared: DeviceDescriptors::default(),
            transfers,
        })
    }

    /// Offers post-copy by this descriptor. `is_orphaned` if the front end has got the descriptor of a process that has died.
    pub fn offering_postcopy(mut self, faults: Option<Userfault>, is_orphaned: bool) -> Backend {
        self.postcopy = Postcopy::new(faults, is_orphaned);
        self
    }

    /// Limits request queues by this pace. No queue runs yet.
    pub fn paced_by(mut self, pace: PaceHandle) -> Backend {
        self.serving.pace = pace;
        self
    }

    /// Whether memory of the guest may be missing: to wait for a request is to wait for the front end.
    pub fn lacks_memory(&self) -> &Arc<AtomicBool> {
        self.postcopy.is_under_way()
    }

    /// Stops all queues after what is in flight, and ends the session.
    pub fn shut_down(&mut self) {
        self.transfers.stop();
        self.forget_all();
        self.quarantine.end();
        self.serving.server.end_session();
    }

    /// Stops all queues after what is in flight, so that another process can go on with the state: the session goes on, and
    /// requests that wait stay in the journal. Nothing may be dropped after it.
    pub fn drain(&mut self) {
        self.transfers.stop();
        // All at once: what one of them pops meanwhile would have to be waited for.
        self.vrings.iter().for_each(Vring::begin_drain);
        self.vrings.iter_mut().for_each(Vring::drain);
    }

    fn forget_all(&mut self) {
        self.vrings.iter_mut().for_each(Vring::forget);
    }

    /// The queue that a message is about, and what it is served with.
    fn vring(&mut self, index: impl TryInto<usize>) -> Result<(&mut Vring, &Serving)> {
        let count = self.vrings.len();
        let vring = index.try_into().ok().and_then(|index| self.vrings.get_mut(index));
        let vring = vring.ok_or_else(|| {
            refuse(format!("the front end wants more queues than the {count} that the device has"))
        })?;
        Ok((vring, &self.serving))
    }

    /// Lets the file system know what the device needs, which the guest is not to have.
    pub fn keep_descriptors_back(&mut self) {
        let copies = usize::from(self.copied);
        let of_queue =
            |vring: &Vring| vring.descriptors().saturating_add(copies.saturating_mul(vring.received()));
        let queues = self.vrings.iter().map(of_queue).fold(0, usize::saturating_add);
        let device = DeviceDescriptors {
            queues: queues.max(self.declared.queues),
            all_queues: self
                .vrings
                .len()
                .saturating_mul(vring::DESCRIPTORS.saturating_add(copies.saturating_mul(vring::RECEIVED))),
            memory: self
                .memory
                .regions()
                .saturating_add(usize::from(self.log.is_some()))
                .saturating_mul(copies.saturating_add(1)),
        };
        if std::mem::replace(&mut self.declared, device) != device {
            self.serving.server.keep_back(device);
        }
    }

    /// Forgets what was said about queues, as at the start.
    fn reset_queues(&mut self) {
        self.transfers.stop();
        self.forget_all();
        let (state, metrics, quarantine) = (&self.state, &self.metrics, &self.quarantine);
        let vrings = self.vrings.iter_mut().enumerate();
        vrings.for_each(|(index, vring)| *vring = Vring::new(index, state, metrics, quarantine));
        self.serving.event_idx = false;
        self.set_logging(false);
    }

    /// Begins to record writes to guest memory, or ends it. Queues that run go on. After the return, what was written
    /// before is recorded in the log before.
    fn set_logging(&mut self, logs: bool) {
        if std::mem::replace(&mut self.logs, logs) != logs {
            // A guest whose writes are recorded is about to be saved.
            let server = &self.serving.server;
            if logs { server.prepare_save() } else { server.cancel_save() }
        }
        self.serving.log = self.log.clone().filter(|_| logs);
        self.vrings.iter().for_each(|vring| vring.update_log(&self.serving));
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.shut_down();
        self.serving.watchdog.shutdown();
        self.serving.server.keep_back(DeviceDescriptors::default());
    }
}

/// Refuses a message; the reason ends the connection and is printed with it.
fn refuse(why: impl Into<String>) -> Error {
    Error::ReqHandlerError(io::Error::other(why.into()))
}

/// The same with the reason of an error.
fn refused(error: impl std::error::Error + 'static) -> Error {
    refuse(describe(&error))
}

/// The same for a message whose reply tells no reason: it is logged, and the connection goes on.
fn reported(error: impl std::error::Error + 'static) -> Error {
    error!("{}", describe(&error));
    refused(error)
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
        self.serving.server.end_session();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        let vhost_user = VhostUserVirtioFeatures::PROTOCOL_FEATURES | VhostUserVirtioFeatures::LOG_ALL;
        Ok(VERSION_1 | INDIRECT_DESC | EVENT_IDX | vhost_user.bits())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let offered = self.get_features()?;
        if features & !offered != 0 {
            return Err(refuse(format!(
                "the front end wants features {:#x} that were not offered",
                features & !offered
            )));
        }
        self.serving.event_idx = features & EVENT_IDX != 0;
        self.set_logging(features & VhostUserVirtioFeatures::LOG_ALL.bits() != 0);
        // Without protocol features there is no SET_VRING_ENABLE, and queues begin enabled.
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            self.transfers.end_before_start();
            for vring in &mut self.vrings {
                vring.set_enabled(true, &self.serving).map_err(refused)?;
            }
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        in_postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let new = self.memory.stage(regions, files).map_err(refused)?;
        if in_postcopy == Some(true) {
            let registered = new.iter().map(|region| self.postcopy.register(region));
            return registered.collect::<std::result::Result<_, PostcopyError>>().map(Some).map_err(refused);
        }
        self.memory.commit();
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.vring(index)?.0.set_size(num).map_err(refused)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let translate = |user| self.memory.guest_address(user).map_err(refused);
        let (descriptors, available, used) =
            (translate(descriptor)?, translate(available)?, translate(used)?);
        let (vring, serving) = self.vring(index)?;
        vring.set_addresses(descriptors, available, used).map_err(refused)?;
        let is_logged = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG);
        vring.set_log_address(is_logged.then_some(log), serving);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.vring(index)?.0.set_base(base);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let base = self.vring(index)?.0.take_base();
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.transfers.end_before_start();
        let (vring, serving) = self.vring(index)?;
        vring.set_kick(fd, serving).map_err(refused)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.vring(index)?.0.set_call(fd).map_err(refused)
    }

    fn set_vring_err(&mut self, index: u8, _fd: Option<File>) -> Result<()> {
        self.vring(index).map(drop)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        let mut features = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::DEVICE_STATE;
        if self.config_space.is_some() {
            features |= VhostUserProtocolFeatures::CONFIG;
        }
        if self.postcopy.is_offered() {
            features |= VhostUserProtocolFeatures::PAGEFAULT;
        }
        Ok(features)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        // A process before this one may have offered post-copy: then it is refused when it is to begin.
        let offered = self.get_protocol_features()? | VhostUserProtocolFeatures::PAGEFAULT;
        let extra = features & !offered.bits();
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
        if enable {
            self.transfers.end_before_start();
        }
        let (vring, serving) = self.vring(index)?;
        vring.set_enabled(enable, serving).map_err(refused)
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
        in_postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        let new = self.memory.stage_more(region, file).map_err(refused)?;
        let registered = (in_postcopy == Some(true)).then(|| self.postcopy.register(&new));
        let base = registered.transpose().map_err(refused)?;
        // The guest may use it as soon as the front end has the reply.
        self.memory.commit();
        Ok(base)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.memory.remove(region).map_err(refused)
    }

    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        file: File,
    ) -> Result<Option<File>> {
        let running = self.vrings.iter().position(Vring::is_running);
        self.transfers.begin(direction, file, running).map_err(reported)?;
        Ok(None)
    }

    fn check_device_state(&mut self) -> Result<()> {
        self.transfers.check().map_err(reported)
    }

    fn postcopy_advice(&mut self) -> Result<File> {
        self.postcopy.advise().map(File::from).map_err(reported)
    }

    fn postcopy_listen(&mut self) -> Result<()> {
        self.postcopy.listen(self.memory.regions()).map_err(refused)
    }

    fn postcopy_ack_mem_regions(&mut self) -> Result<()> {
        self.memory.commit();
        Ok(())
    }

    fn postcopy_end(&mut self) -> Result<()> {
        self.memory.commit();
        self.postcopy.end();
        Ok(())
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unsupported("shared memory regions were not offered")
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let log = DirtyLog::map(file, log.mmap_offset, log.mmap_size).map_err(refused)?;
        self.log = Some(Arc::new(log));
        self.set_logging(self.logs);
        Ok(())
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
