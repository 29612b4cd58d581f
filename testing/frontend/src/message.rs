//! The vhost-user wire format, as in QEMU's `docs/interop/vhost-user.rst`.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Feature bits of `GET_FEATURES` and `SET_FEATURES`.
pub mod feature {
    /// Writes to guest memory are recorded (VHOST_F_LOG_ALL).
    pub const LOG_ALL: u64 = 1 << 26;
    /// Indirect descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// `used_event` and `avail_event`.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Protocol features can be negotiated.
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// Virtio 1.0.
    pub const VERSION_1: u64 = 1 << 32;
}

/// Protocol feature bits.
pub mod protocol {
    /// More than one queue.
    pub const MQ: u64 = 1 << 0;
    /// Migration log in shared memory.
    pub const LOG_SHMFD: u64 = 1 << 1;
    /// Acknowledgements.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// Page faults of the device are answered, for post-copy.
    pub const PAGEFAULT: u64 = 1 << 8;
    /// The device's config space is read through the socket.
    pub const CONFIG: u64 = 1 << 9;
    /// In-flight tracking in shared memory.
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    /// RESET_DEVICE.
    pub const RESET_DEVICE: u64 = 1 << 13;
    /// ADD_MEM_REG and REM_MEM_REG.
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    /// SET_STATUS and GET_STATUS.
    pub const STATUS: u64 = 1 << 16;
    /// Device state on migration.
    pub const DEVICE_STATE: u64 = 1 << 19;
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $value:literal,)*) => {
        /// Request codes.
        pub mod code {
            $($(#[$doc])* pub const $name: u32 = $value;)*
        }

        /// The specification's name of a request code.
        pub fn name(code: u32) -> &'static str {
            match code {
                $($value => stringify!($name),)*
                _ => "an unknown message",
            }
        }
    };
}

codes! {
    /// Asks for the virtio features.
    GET_FEATURES = 1,
    /// Sets the virtio features.
    SET_FEATURES = 2,
    /// Starts a session.
    SET_OWNER = 3,
    /// Obsolete reset.
    RESET_OWNER = 4,
    /// Tells all of guest memory.
    SET_MEM_TABLE = 5,
    /// Tells the migration log.
    SET_LOG_BASE = 6,
    /// The eventfd that announces marks in the migration log.
    SET_LOG_FD = 7,
    /// Size of a queue.
    SET_VRING_NUM = 8,
    /// Where a queue's rings are.
    SET_VRING_ADDR = 9,
    /// First available index to serve.
    SET_VRING_BASE = 10,
    /// Stops a queue; the answer is the next available index.
    GET_VRING_BASE = 11,
    /// The eventfd that announces available buffers.
    SET_VRING_KICK = 12,
    /// The eventfd that announces used buffers.
    SET_VRING_CALL = 13,
    /// The eventfd that announces ring errors.
    SET_VRING_ERR = 14,
    /// Asks for the protocol features.
    GET_PROTOCOL_FEATURES = 15,
    /// Sets the protocol features.
    SET_PROTOCOL_FEATURES = 16,
    /// Asks for the number of queues.
    GET_QUEUE_NUM = 17,
    /// Starts or pauses a queue.
    SET_VRING_ENABLE = 18,
    /// Reads the config space.
    GET_CONFIG = 24,
    /// Writes the config space.
    SET_CONFIG = 25,
    /// Asks for the device's userfaultfd.
    POSTCOPY_ADVISE = 28,
    /// Memory may be missing from now on.
    POSTCOPY_LISTEN = 29,
    /// All memory is there.
    POSTCOPY_END = 30,
    /// Asks for a region to track requests in flight.
    GET_INFLIGHT_FD = 31,
    /// Gives such a region.
    SET_INFLIGHT_FD = 32,
    /// Resets the device.
    RESET_DEVICE = 34,
    /// Asks for the number of memory slots.
    GET_MAX_MEM_SLOTS = 36,
    /// Adds one memory region.
    ADD_MEM_REG = 37,
    /// Removes one memory region.
    REM_MEM_REG = 38,
    /// Gives the device a pipe for its state.
    SET_DEVICE_STATE_FD = 42,
    /// Asks how the transfer of the device's state ended.
    CHECK_DEVICE_STATE = 43,
}

/// `flags` of a header: protocol version 1.
pub const VERSION: u32 = 1;
/// `flags` of a header: this is an answer.
pub const REPLY: u32 = 1 << 2;
/// `flags` of a header: an acknowledgement is wanted.
pub const NEED_REPLY: u32 = 1 << 3;
/// In the payload of SET_VRING_KICK, CALL and ERR: no descriptor comes along.
pub const NO_FD: u64 = 1 << 8;

/// Header of every message.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// One of [`code`].
    pub request: u32,
    /// [`VERSION`], [`REPLY`], [`NEED_REPLY`].
    pub flags: u32,
    /// Bytes that follow.
    pub size: u32,
}

/// Payload of the messages about one value of one queue.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VringState {
    /// Queue number.
    pub index: u32,
    /// The value.
    pub value: u32,
}

/// Payload of SET_DEVICE_STATE_FD.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TransferState {
    /// [`SAVE`] or [`LOAD`].
    pub direction: u32,
    /// 0: all queues are stopped.
    pub phase: u32,
}

/// From the device to the front end.
pub const SAVE: u32 = 0;
/// From the front end to the device.
pub const LOAD: u32 = 1;

/// Payload of SET_VRING_ADDR; addresses are those of the front end's process.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VringAddress {
    /// Queue number.
    pub index: u32,
    /// 1 to log writes to the used ring.
    pub flags: u32,
    /// Descriptor table.
    pub descriptors: u64,
    /// Used ring.
    pub used: u64,
    /// Available ring.
    pub available: u64,
    /// Guest address for logging.
    pub log: u64,
}

/// Payload of SET_LOG_BASE and of its answer.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct LogArea {
    /// Size in bytes.
    pub size: u64,
    /// Offset in the file that comes along.
    pub offset: u64,
}

/// One region in SET_MEM_TABLE, ADD_MEM_REG and REM_MEM_REG.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MemoryRegion {
    /// Guest-physical address.
    pub guest: u64,
    /// Size in bytes.
    pub size: u64,
    /// Address in the front end's process.
    pub user: u64,
    /// Offset of the region in the file that comes along.
    pub offset: u64,
}

/// Payload of GET_INFLIGHT_FD and SET_INFLIGHT_FD.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Inflight {
    /// Bytes of the region.
    pub size: u64,
    /// Where it begins in its file.
    pub offset: u64,
    /// Queues.
    pub queues: u16,
    /// Descriptors of each.
    pub queue_size: u16,
    /// Up to a multiple of 8.
    pub padding: u32,
}

/// Start of GET_CONFIG's and SET_CONFIG's payload; the bytes follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ConfigHeader {
    /// Offset in the config space.
    pub offset: u32,
    /// Bytes that follow.
    pub size: u32,
    /// 0 for a write by the driver.
    pub flags: u32,
}
