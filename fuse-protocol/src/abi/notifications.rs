//! Notifications, which a server sends by itself. virtio-fs has no queue for them so far.

use core::mem::offset_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::wire::Layout;

wire! {
    /// NOTIFY_POLL.
    struct NotifyPollWakeupOut("fuse_notify_poll_wakeup_out") {
        kh: u64,
    }

    /// NOTIFY_INVAL_INODE.
    struct NotifyInvalInodeOut("fuse_notify_inval_inode_out") {
        ino: u64,
        off: i64,
        len: i64,
    }

    /// NOTIFY_INVAL_ENTRY; the name follows.
    struct NotifyInvalEntryOut("fuse_notify_inval_entry_out") {
        parent: u64,
        namelen: u32,
        flags: u32,
    }

    /// NOTIFY_DELETE; the name follows.
    struct NotifyDeleteOut("fuse_notify_delete_out") {
        parent: u64,
        child: u64,
        namelen: u32,
        padding: u32,
    }

    /// NOTIFY_STORE; the data follows.
    struct NotifyStoreOut("fuse_notify_store_out") {
        nodeid: u64,
        offset: u64,
        size: u32,
        padding: u32,
    }

    /// NOTIFY_RETRIEVE.
    struct NotifyRetrieveOut("fuse_notify_retrieve_out") {
        notify_unique: u64,
        nodeid: u64,
        offset: u64,
        size: u32,
        padding: u32,
    }

    /// Arguments of NOTIFY_REPLY, which answers NOTIFY_RETRIEVE; the data follows.
    struct NotifyRetrieveIn("fuse_notify_retrieve_in") {
        dummy1: u64,
        offset: u64,
        size: u32,
        dummy2: u32,
        dummy3: u64,
        dummy4: u64,
    }

    /// NOTIFY_PRUNE; `count` node ids follow.
    struct NotifyPruneOut("fuse_notify_prune_out") {
        count: u32,
        padding: u32,
        spare: u64,
    }
}
