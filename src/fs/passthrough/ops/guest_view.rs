//! How the guest sees inodes: their numbers, owners, attributes, and for how long it may cache these.

use std::time::Duration;

use rustix::fs::{FileType, Statx};

use crate::fs::passthrough::caller::identity::{Identity, Owner};
use crate::fs::passthrough::caller::set_id::has_set_id_bits;
use crate::fs::passthrough::config::FsConfig;
use crate::fs::passthrough::host::{self, kind};
use crate::fs::passthrough::inode::Inode;
use crate::fs::passthrough::session::Session;
use crate::fs::passthrough::state::PassthroughFs;
use crate::fs::{Agreement, Context};
use crate::state_file::Effects;
use fuse_protocol::abi;
use fuse_protocol::flags::AttrFlags;
use fuse_protocol::reply::{Attributes, Entry};

/// The view of one request.
#[derive(Clone, Copy, Debug)]
pub struct GuestView<'a> {
    identity: &'a Identity,
    /// What a [`Session`] is made of: most requests need nothing of it.
    config: &'a FsConfig,
    agreement: &'a Agreement,
    timeout: Duration,
    /// The device of the share's root.
    root_device: (u32, u32),
    /// Lookups that the request counts are noted here.
    pub effects: Effects<'a>,
}

impl PassthroughFs {
    /// The view of the guest, for one request.
    pub(in crate::fs::passthrough) fn view<'a>(&'a self, ctx: &Context<'a>) -> GuestView<'a> {
        GuestView {
            identity: &self.identity,
            config: &self.config,
            agreement: &self.agreement,
            timeout: self.config.cache.timeout(),
            root_device: self.inodes.root().key().device,
            effects: ctx.effects,
        }
    }
}

impl GuestView<'_> {
    fn session(&self) -> Session {
        Session::new(self.config, self.agreement)
    }

    /// The owners of an inode.
    pub fn owner(&self, stat: &Statx) -> Owner {
        self.identity.owner(stat)
    }

    /// The attributes of an inode.
    pub fn attributes(&self, inode: &Inode, stat: &Statx) -> Attributes {
        if inode.was_mapped() {
            return self.attributes_again(inode, stat);
        }
        self.settled_attributes(inode, stat)
    }

    /// The same of an inode whose times may have been set since they were read, by this thread or by another one.
    #[cold]
    fn attributes_again(&self, inode: &Inode, before: &Statx) -> Attributes {
        inode.settle();
        let now = inode.path().and_then(host::stat);
        self.settled_attributes(inode, now.as_ref().unwrap_or(before))
    }

    /// The attributes of an inode, of which `stat` was read after [`Inode::settle`].
    pub fn settled_attributes(&self, inode: &Inode, stat: &Statx) -> Attributes {
        let owner = self.owner(stat);
        let attr = abi::Attr {
            ino: self.number(inode, stat.stx_ino),
            size: stat.stx_size,
            blocks: self.blocks(stat),
            // Seconds before 1970 are negative on both sides.
            atime: stat.stx_atime.tv_sec.cast_unsigned(),
            mtime: stat.stx_mtime.tv_sec.cast_unsigned(),
            ctime: stat.stx_ctime.tv_sec.cast_unsigned(),
            atimensec: stat.stx_atime.tv_nsec,
            mtimensec: stat.stx_mtime.tv_nsec,
            ctimensec: stat.stx_ctime.tv_nsec,
            mode: u32::from(stat.stx_mode),
            nlink: stat.stx_nlink,
            uid: owner.uid.0,
            gid: owner.gid.0,
            rdev: encode_device(stat.stx_rdev_major, stat.stx_rdev_minor),
            blksize: stat.stx_blksize,
            flags: 0,
        };
        Attributes { attr, valid: self.valid(inode, stat) }
    }

    /// The entry of an inode, which was found in `parent` if that is known.
    pub fn entry(&self, inode: &Inode, stat: &Statx, parent: Option<&Inode>) -> Entry {
        let mut attributes = self.attributes(inode, stat);
        // A subvolume (btrfs) has a device for itself on its parent's mount.
        let place = |inode: &Inode| (inode.key().mount, inode.key().device);
        let is_submount = inode.is_directory() && parent.is_some_and(|parent| place(parent) != place(inode));
        if is_submount && self.session().submounts {
            attributes.attr.flags |= AttrFlags::SUBMOUNT.bits();
        }
        Entry { node: inode.node(), generation: 0, entry_valid: self.timeout, attributes }
    }

    /// How long the guest may cache attributes: not at all if they have set-id bits, since no reply says that a write
    /// has cleared these.
    pub fn valid(&self, inode: &Inode, stat: &Statx) -> Duration {
        if has_set_id_bits(inode, stat) { Duration::ZERO } else { self.timeout }
    }

    /// The number of an inode, which is `number` on the host.
    ///
    /// Where the guest does not know that an inode is on another device than the share's root, it would take equal
    /// numbers of both for one inode: the difference of the devices goes to the upper bits.
    pub fn number(&self, inode: &Inode, number: u64) -> u64 {
        let (root, device) = (self.root_device, inode.key().device);
        if device == root || (self.session().submounts && !inode.mount().is_of_a_file()) {
            return number;
        }
        let bits = |(major, minor): (u32, u32)| u64::from((major & 0xf) << 12 | minor & 0xfff);
        number ^ (bits(device) ^ bits(root)) << 48
    }

    /// Sectors of a file. Of one without any, a guest that writes back its cache may have data that it has not sent yet;
    /// tar(1) and others take a file with none for one hole, and do not read it.
    pub fn blocks(&self, stat: &Statx) -> u64 {
        let unsent =
            stat.stx_blocks == 0 && self.session().policy.writeback && kind(stat) == FileType::RegularFile;
        if unsent { 1 } else { stat.stx_blocks }
    }
}

/// A device number as the protocol packs it: `new_encode_dev()` of Linux.
fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}
