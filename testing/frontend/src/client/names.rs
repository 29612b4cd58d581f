//! Operations on names: lookup, creation, removal, rename, and forgetting.

use fuse_protocol::abi::{
    BatchForgetIn, CreateIn, EntryOut, ForgetIn, ForgetOne, LinkIn, MkdirIn, MknodIn, OpenOut, Rename2In,
    RenameIn,
};
use fuse_protocol::flags::InitFlags;
use fuse_protocol::opcode::Opcode;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Client;
use crate::error::Result;
use crate::request::Request;

/// The reply to CREATE and TMPFILE.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct CreateOut {
    entry: EntryOut,
    open: OpenOut,
}

impl Client<'_> {
    /// The mode as Linux sends it: without DONT_MASK the guest has applied the umask already.
    fn masked(&self, mode: u32, umask: u32) -> u32 {
        if self.session.init_flags().contains(InitFlags::DONT_MASK) { mode } else { mode & !umask }
    }

    /// LOOKUP.
    pub fn lookup(&self, parent: u64, name: impl AsRef<[u8]>) -> Result<EntryOut> {
        self.call(Request::new(Opcode::Lookup, parent).name(name).reply::<EntryOut>())
    }

    /// LOOKUP of each component of a path below `from`. Only the last one keeps its lookup count.
    pub fn walk(&self, from: u64, path: &str) -> Result<EntryOut> {
        let mut at: Option<EntryOut> = None;
        for name in path.split('/') {
            let next = self.lookup(at.map_or(from, |entry| entry.nodeid), name)?;
            if let Some(before) = at {
                self.forget(before.nodeid, 1)?;
            }
            at = Some(next);
        }
        Ok(at.unwrap_or_default())
    }

    /// FORGET, on the high-priority queue; returns once the device has taken it.
    pub fn forget(&self, node: u64, lookups: u64) -> Result<()> {
        let request = Request::new(Opcode::Forget, node).arg(&ForgetIn { nlookup: lookups }).no_reply();
        let sent = self.on(0).send(request)?;
        self.session.wait(sent).map(drop)
    }

    /// FORGET that is not waited for, as Linux sends it.
    pub fn forget_later(&self, node: u64, lookups: u64) -> Result<()> {
        let request = Request::new(Opcode::Forget, node).arg(&ForgetIn { nlookup: lookups }).no_reply();
        self.session.send_detached(0, &request, self.segmentation)
    }

    /// BATCH_FORGET of `(node, lookups)`, on the high-priority queue.
    pub fn forget_batch(&self, nodes: &[(u64, u64)]) -> Result<()> {
        let items: Vec<ForgetOne> =
            nodes.iter().map(|&(nodeid, nlookup)| ForgetOne { nodeid, nlookup }).collect();
        let header = BatchForgetIn { count: items.len() as u32, dummy: 0 };
        let request = Request::new(Opcode::BatchForget, 0).arg(&header).arg(items.as_slice()).no_reply();
        let sent = self.on(0).send(request)?;
        self.session.wait(sent).map(drop)
    }

    /// MKNOD.
    pub fn mknod(
        &self,
        parent: u64,
        name: impl AsRef<[u8]>,
        mode: u32,
        rdev: u32,
        umask: u32,
    ) -> Result<EntryOut> {
        let arg = MknodIn { mode: self.masked(mode, umask), rdev, umask, padding: 0 };
        self.call(Request::new(Opcode::Mknod, parent).arg(&arg).name(name).reply::<EntryOut>())
    }

    /// MKDIR.
    pub fn mkdir(&self, parent: u64, name: impl AsRef<[u8]>, mode: u32, umask: u32) -> Result<EntryOut> {
        let arg = MkdirIn { mode: self.masked(mode, umask), umask };
        self.call(Request::new(Opcode::Mkdir, parent).arg(&arg).name(name).reply::<EntryOut>())
    }

    /// SYMLINK: `name` will point to `target`.
    pub fn symlink(&self, parent: u64, name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Result<EntryOut> {
        self.call(Request::new(Opcode::Symlink, parent).name(name).name(target).reply::<EntryOut>())
    }

    /// READLINK.
    pub fn readlink(&self, node: u64) -> Result<Vec<u8>> {
        self.call_bytes(&Request::new(Opcode::Readlink, node).reply_data(4096))
    }

    /// LINK: `name` in `parent` becomes another name of `node`.
    pub fn link(&self, node: u64, parent: u64, name: impl AsRef<[u8]>) -> Result<EntryOut> {
        let arg = LinkIn { oldnodeid: node };
        self.call(Request::new(Opcode::Link, parent).arg(&arg).name(name).reply::<EntryOut>())
    }

    /// UNLINK.
    pub fn unlink(&self, parent: u64, name: impl AsRef<[u8]>) -> Result<()> {
        self.call_empty(Request::new(Opcode::Unlink, parent).name(name))
    }

    /// RMDIR.
    pub fn rmdir(&self, parent: u64, name: impl AsRef<[u8]>) -> Result<()> {
        self.call_empty(Request::new(Opcode::Rmdir, parent).name(name))
    }

    /// RENAME.
    pub fn rename(
        &self,
        parent: u64,
        name: impl AsRef<[u8]>,
        newdir: u64,
        new_name: impl AsRef<[u8]>,
    ) -> Result<()> {
        self.call_empty(
            Request::new(Opcode::Rename, parent).arg(&RenameIn { newdir }).name(name).name(new_name),
        )
    }

    /// RENAME2 with `RENAME_*` flags of renameat2(2).
    pub fn rename2(
        &self,
        parent: u64,
        name: impl AsRef<[u8]>,
        newdir: u64,
        new_name: impl AsRef<[u8]>,
        flags: u32,
    ) -> Result<()> {
        let arg = Rename2In { newdir, flags, padding: 0 };
        self.call_empty(Request::new(Opcode::Rename2, parent).arg(&arg).name(name).name(new_name))
    }

    /// CREATE: makes and opens a file with `O_*` flags.
    pub fn create(
        &self,
        parent: u64,
        name: impl AsRef<[u8]>,
        flags: i32,
        mode: u32,
        umask: u32,
    ) -> Result<(EntryOut, OpenOut)> {
        self.create_with(parent, name, flags, (mode, umask), 0)
    }

    /// The same with flags of the protocol.
    pub fn create_with(
        &self,
        parent: u64,
        name: impl AsRef<[u8]>,
        flags: i32,
        (mode, umask): (u32, u32),
        open_flags: u32,
    ) -> Result<(EntryOut, OpenOut)> {
        let arg = CreateIn {
            flags: flags.cast_unsigned(),
            mode: libc::S_IFREG | self.masked(mode, umask),
            umask,
            open_flags,
        };
        let request = Request::new(Opcode::Create, parent).arg(&arg).name(name).reply::<CreateOut>();
        self.call::<CreateOut>(request).map(|out| (out.entry, out.open))
    }

    /// TMPFILE: a file without a name in directory `parent`.
    pub fn tmpfile(&self, parent: u64, flags: i32, mode: u32) -> Result<(EntryOut, OpenOut)> {
        self.tmpfile_with(parent, flags, mode, 0)
    }

    /// TMPFILE with a umask.
    pub fn tmpfile_with(
        &self,
        parent: u64,
        flags: i32,
        mode: u32,
        umask: u32,
    ) -> Result<(EntryOut, OpenOut)> {
        let mode = libc::S_IFREG | self.masked(mode, umask);
        let arg = CreateIn { flags: flags.cast_unsigned(), mode, umask, open_flags: 0 };
        // Linux sends a slash for the name that is not there.
        let request = Request::new(Opcode::Tmpfile, parent).arg(&arg).name("/").reply::<CreateOut>();
        self.call::<CreateOut>(request).map(|out| (out.entry, out.open))
    }
}
