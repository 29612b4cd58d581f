//! Wire structs of the FUSE protocol, up to version 7.45 (`linux/fuse.h`).
//!
//! Every struct is plain little-endian memory without padding, as the kernel lays it out on a
//! 64-bit machine. `tests/it/abi.rs` checks sizes, offsets and values against the kernel's own header.

#[macro_use]
mod wire;

use std::mem::offset_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub use self::wire::Layout;

/// The protocol's major version; it never changed since Linux 2.6.
pub const KERNEL_VERSION: u32 = 7;
/// The newest minor version this daemon speaks.
pub const KERNEL_MINOR_VERSION: u32 = 45;
/// The oldest guest minor version that is served (Linux 4.20).
pub const OLDEST_MINOR_VERSION: u32 = 27;
/// Node id of the share's root.
pub const ROOT_ID: u64 = 1;
/// `uid` or `gid` in a request header that has no meaning to the file system (idmapped mounts).
pub const INVALID_UIDGID: u32 = u32::MAX;
/// Extension type of [`SuppGroups`]; types up to 31 announce security contexts.
pub const EXT_GROUPS: u32 = 32;
/// Bytes of `fuse_init_in` that guests below minor 36 send.
pub const COMPAT_INIT_IN_SIZE: usize = 16;
/// Bytes of `fuse_setxattr_in` without SETXATTR_EXT.
pub const COMPAT_SETXATTR_IN_SIZE: usize = 8;
/// Records of variable length are padded to this many bytes.
pub const RECORD_ALIGN: usize = 8;

wire! {
    /// Attributes of an inode, as LOOKUP, GETATTR and others carry them.
    struct Attr("fuse_attr") {
        ino: u64,
        size: u64,
        blocks: u64,
        atime: u64,
        mtime: u64,
        ctime: u64,
        atimensec: u32,
        mtimensec: u32,
        ctimensec: u32,
        mode: u32,
        nlink: u32,
        uid: u32,
        gid: u32,
        rdev: u32,
        blksize: u32,
        flags: u32,
    }

    /// A time stamp of `Statx`.
    struct SxTime("fuse_sx_time") {
        tv_sec: i64,
        tv_nsec: u32,
        reserved: i32,
    }

    /// The body of a STATX reply.
    struct Statx("fuse_statx") {
        mask: u32,
        blksize: u32,
        attributes: u64,
        nlink: u32,
        uid: u32,
        gid: u32,
        mode: u16,
        spare0: [u16; 1],
        ino: u64,
        size: u64,
        blocks: u64,
        attributes_mask: u64,
        atime: SxTime,
        btime: SxTime,
        ctime: SxTime,
        mtime: SxTime,
        rdev_major: u32,
        rdev_minor: u32,
        dev_major: u32,
        dev_minor: u32,
        spare2: [u64; 14],
    }

    /// File system figures, the body of a STATFS reply.
    struct Kstatfs("fuse_kstatfs") {
        blocks: u64,
        bfree: u64,
        bavail: u64,
        files: u64,
        ffree: u64,
        bsize: u32,
        namelen: u32,
        frsize: u32,
        padding: u32,
        spare: [u32; 6],
    }

    /// A byte range lock; `end` is inclusive, `type` is F_RDLCK, F_WRLCK or F_UNLCK.
    struct FileLock("fuse_file_lock") {
        start: u64,
        end: u64,
        typ: u32,
        pid: u32,
    }

    /// Reply to LOOKUP and to every request that creates a name.
    struct EntryOut("fuse_entry_out") {
        nodeid: u64,
        generation: u64,
        entry_valid: u64,
        attr_valid: u64,
        entry_valid_nsec: u32,
        attr_valid_nsec: u32,
        attr: Attr,
    }

    /// Arguments of FORGET.
    struct ForgetIn("fuse_forget_in") {
        nlookup: u64,
    }

    /// One item of a BATCH_FORGET.
    struct ForgetOne("fuse_forget_one") {
        nodeid: u64,
        nlookup: u64,
    }

    /// Arguments of BATCH_FORGET.
    struct BatchForgetIn("fuse_batch_forget_in") {
        count: u32,
        dummy: u32,
    }

    /// Arguments of GETATTR.
    struct GetattrIn("fuse_getattr_in") {
        getattr_flags: u32,
        dummy: u32,
        fh: u64,
    }

    /// Reply to ATTR.
    struct AttrOut("fuse_attr_out") {
        attr_valid: u64,
        attr_valid_nsec: u32,
        dummy: u32,
        attr: Attr,
    }

    /// Arguments of STATX.
    struct StatxIn("fuse_statx_in") {
        getattr_flags: u32,
        reserved: u32,
        fh: u64,
        sx_flags: u32,
        sx_mask: u32,
    }

    /// Reply to STATX.
    struct StatxOut("fuse_statx_out") {
        attr_valid: u64,
        attr_valid_nsec: u32,
        flags: u32,
        spare: [u64; 2],
        stat: Statx,
    }

    /// Arguments of MKNOD.
    struct MknodIn("fuse_mknod_in") {
        mode: u32,
        rdev: u32,
        umask: u32,
        padding: u32,
    }

    /// Arguments of MKDIR.
    struct MkdirIn("fuse_mkdir_in") {
        mode: u32,
        umask: u32,
    }

    /// Arguments of RENAME.
    struct RenameIn("fuse_rename_in") {
        newdir: u64,
    }

    /// Arguments of RENAME2.
    struct Rename2In("fuse_rename2_in") {
        newdir: u64,
        flags: u32,
        padding: u32,
    }

    /// Arguments of LINK.
    struct LinkIn("fuse_link_in") {
        oldnodeid: u64,
    }

    /// Arguments of SETATTR.
    struct SetattrIn("fuse_setattr_in") {
        valid: u32,
        padding: u32,
        fh: u64,
        size: u64,
        lock_owner: u64,
        atime: u64,
        mtime: u64,
        ctime: u64,
        atimensec: u32,
        mtimensec: u32,
        ctimensec: u32,
        mode: u32,
        unused4: u32,
        uid: u32,
        gid: u32,
        unused5: u32,
    }

    /// Arguments of OPEN.
    struct OpenIn("fuse_open_in") {
        flags: u32,
        open_flags: u32,
    }

    /// Arguments of CREATE.
    struct CreateIn("fuse_create_in") {
        flags: u32,
        mode: u32,
        umask: u32,
        open_flags: u32,
    }

    /// Reply to OPEN.
    struct OpenOut("fuse_open_out") {
        fh: u64,
        open_flags: u32,
        backing_id: i32,
    }

    /// Arguments of RELEASE.
    struct ReleaseIn("fuse_release_in") {
        fh: u64,
        flags: u32,
        release_flags: u32,
        lock_owner: u64,
    }

    /// Arguments of FLUSH.
    struct FlushIn("fuse_flush_in") {
        fh: u64,
        unused: u32,
        padding: u32,
        lock_owner: u64,
    }

    /// Arguments of READ.
    struct ReadIn("fuse_read_in") {
        fh: u64,
        offset: u64,
        size: u32,
        read_flags: u32,
        lock_owner: u64,
        flags: u32,
        padding: u32,
    }

    /// Arguments of WRITE.
    struct WriteIn("fuse_write_in") {
        fh: u64,
        offset: u64,
        size: u32,
        write_flags: u32,
        lock_owner: u64,
        flags: u32,
        padding: u32,
    }

    /// Reply to WRITE.
    struct WriteOut("fuse_write_out") {
        size: u32,
        padding: u32,
    }

    /// Reply to STATFS.
    struct StatfsOut("fuse_statfs_out") {
        st: Kstatfs,
    }

    /// Arguments of FSYNC.
    struct FsyncIn("fuse_fsync_in") {
        fh: u64,
        fsync_flags: u32,
        padding: u32,
    }

    /// SETXATTR when SETXATTR_EXT was negotiated; else only the first 8 bytes are sent.
    struct SetxattrIn("fuse_setxattr_in") {
        size: u32,
        flags: u32,
        setxattr_flags: u32,
        padding: u32,
    }

    /// Arguments of GETXATTR.
    struct GetxattrIn("fuse_getxattr_in") {
        size: u32,
        padding: u32,
    }

    /// Reply to GETXATTR.
    struct GetxattrOut("fuse_getxattr_out") {
        size: u32,
        padding: u32,
    }

    /// Arguments of LK.
    struct LkIn("fuse_lk_in") {
        fh: u64,
        owner: u64,
        lk: FileLock,
        lk_flags: u32,
        padding: u32,
    }

    /// Reply to LK.
    struct LkOut("fuse_lk_out") {
        lk: FileLock,
    }

    /// Arguments of ACCESS.
    struct AccessIn("fuse_access_in") {
        mask: u32,
        padding: u32,
    }

    /// INIT as sent from minor 36 on; older guests send the first 16 bytes.
    struct InitIn("fuse_init_in") {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u32,
        flags2: u32,
        unused: [u32; 11],
    }

    /// Reply to INIT.
    struct InitOut("fuse_init_out") {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u32,
        max_background: u16,
        congestion_threshold: u16,
        max_write: u32,
        time_gran: u32,
        max_pages: u16,
        map_alignment: u16,
        flags2: u32,
        max_stack_depth: u32,
        request_timeout: u16,
        unused: [u16; 11],
    }

    /// Arguments of INTERRUPT.
    struct InterruptIn("fuse_interrupt_in") {
        unique: u64,
    }

    /// Arguments of IOCTL; `in_size` bytes of the caller's follow.
    struct IoctlIn("fuse_ioctl_in") {
        fh: u64,
        flags: u32,
        cmd: u32,
        arg: u64,
        in_size: u32,
        out_size: u32,
    }

    /// Reply to IOCTL; at most `out_size` bytes for the caller follow.
    struct IoctlOut("fuse_ioctl_out") {
        result: i32,
        flags: u32,
        in_iovs: u32,
        out_iovs: u32,
    }

    /// Arguments of FALLOCATE.
    struct FallocateIn("fuse_fallocate_in") {
        fh: u64,
        offset: u64,
        length: u64,
        mode: u32,
        padding: u32,
    }

    /// The header in front of every request.
    struct InHeader("fuse_in_header") {
        len: u32,
        opcode: u32,
        unique: u64,
        nodeid: u64,
        uid: u32,
        gid: u32,
        pid: u32,
        total_extlen: u16,
        padding: u16,
    }

    /// The header in front of every reply; `error` is 0 or a negated errno.
    struct OutHeader("fuse_out_header") {
        len: u32,
        error: i32,
        unique: u64,
    }

    /// One READDIR record; `namelen` bytes of name follow, padded to 8 bytes.
    struct Dirent("fuse_dirent") {
        ino: u64,
        off: u64,
        namelen: u32,
        typ: u32,
    }

    /// One READDIRPLUS record; the name follows.
    struct Direntplus("fuse_direntplus") {
        entry_out: EntryOut,
        dirent: Dirent,
    }

    /// Arguments of LSEEK.
    struct LseekIn("fuse_lseek_in") {
        fh: u64,
        offset: u64,
        whence: u32,
        padding: u32,
    }

    /// Reply to LSEEK.
    struct LseekOut("fuse_lseek_out") {
        offset: u64,
    }

    /// Arguments of COPY_FILE_RANGE.
    struct CopyFileRangeIn("fuse_copy_file_range_in") {
        fh_in: u64,
        off_in: u64,
        nodeid_out: u64,
        fh_out: u64,
        off_out: u64,
        len: u64,
        flags: u64,
    }

    /// Reply to COPY_FILE_RANGE.
    struct CopyFileRangeOut("fuse_copy_file_range_out") {
        bytes_copied: u64,
    }

    /// Arguments of SYNCFS.
    struct SyncfsIn("fuse_syncfs_in") {
        padding: u64,
    }

    /// Header of one request extension; `size` counts the header.
    struct ExtHeader("fuse_ext_header") {
        size: u32,
        typ: u32,
    }

    /// One label of a labels extension; its name and value follow.
    struct Secctx("fuse_secctx") {
        size: u32,
        padding: u32,
    }

    /// Body of a groups extension; `nr_groups` group ids follow.
    struct SuppGroups("fuse_supp_groups") {
        nr_groups: u32,
    }
}
