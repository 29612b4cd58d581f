//! Data in files, and their attributes.

use std::time::{SystemTime, UNIX_EPOCH};

use fuse_protocol::ids::{HandleId, NodeId};
use fuse_protocol::request::{CopyFileRange, Read, SetTime, Setattr, Write};
use lanefsd::fs::{Result, XattrReply};
use lanefsd::sys::guest_buffers::{GuestReader, GuestWriter};
use rustix::io::Errno;

use crate::node::{Content, Node};
use crate::state::State;

/// Most bytes of extended attributes of one node.
const MAX_XATTRS: usize = 1 << 16;

fn place(offset: u64) -> Result<usize> {
    usize::try_from(offset).map_err(|_| Errno::FBIG)
}

impl State {
    fn data(&self, id: NodeId) -> Result<&Vec<u8>> {
        match &self.nodes.get(&id).ok_or(Errno::STALE)?.content {
            Content::File(data) => Ok(data),
            Content::Directory { .. } => Err(Errno::ISDIR),
            _ => Err(Errno::INVAL),
        }
    }

    /// The data of a file, made `len` bytes long, or at least that long.
    fn resize(&mut self, id: NodeId, len: usize, shrink: bool) -> Result<&mut Vec<u8>> {
        let now = self.data(id)?.len();
        let len = if shrink { len } else { len.max(now) };
        let used = self.used - now;
        if len > now && len > self.capacity - used {
            return Err(Errno::NOSPC);
        }
        self.used = used + len;
        match self.nodes.get_mut(&id).map(|node| &mut node.content) {
            Some(Content::File(data)) => {
                data.resize(len, 0);
                Ok(data)
            }
            _ => Err(Errno::STALE),
        }
    }

    /// Cuts or lengthens a file.
    pub fn set_size(&mut self, id: NodeId, size: u64) -> Result<()> {
        self.resize(id, place(size)?, true).map(drop)
    }

    /// READ.
    pub fn read(&self, id: NodeId, read: &Read, out: &mut GuestWriter<'_>) -> Result<usize> {
        if !self.handle(id, read.handle, false)?.readable {
            return Err(Errno::BADF);
        }
        let data = self.data(id)?;
        let rest = usize::try_from(read.offset).ok().and_then(|at| data.get(at..)).unwrap_or_default();
        let size = usize::try_from(read.size).unwrap_or(usize::MAX).min(rest.len());
        Ok(out.write(&rest[..size]))
    }

    /// WRITE.
    pub fn write(&mut self, id: NodeId, write: &Write, input: &mut GuestReader<'_>) -> Result<usize> {
        let handle = self.handle(id, write.handle, false)?;
        if !handle.writable {
            return Err(Errno::BADF);
        }
        let start = if handle.append { self.data(id)?.len() } else { place(write.offset)? };
        let size = input.len();
        if size == 0 {
            return Ok(0);
        }
        let end = start.checked_add(size).ok_or(Errno::FBIG)?;
        let data = self.resize(id, end, false)?;
        Ok(input.read(&mut data[start..end]))
    }

    /// FALLOCATE: plain, and a hole.
    pub fn fallocate(&mut self, id: NodeId, handle: HandleId, mode: u32, range: (u64, u64)) -> Result<()> {
        if !self.handle(id, handle, false)?.writable {
            return Err(Errno::BADF);
        }
        let start = place(range.0)?;
        let end = start.checked_add(place(range.1)?).ok_or(Errno::FBIG)?;
        const KEEP_SIZE: u32 = libc::FALLOC_FL_KEEP_SIZE as u32;
        const HOLE: u32 = KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE as u32;
        match mode {
            _ if range.1 == 0 => Err(Errno::INVAL),
            0 => self.resize(id, end, false).map(drop),
            KEEP_SIZE => self.data(id).map(drop),
            HOLE => {
                let data = self.resize(id, 0, false)?;
                let end = end.min(data.len());
                if let Some(hole) = data.get_mut(start..end) {
                    hole.fill(0);
                }
                Ok(())
            }
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    /// LSEEK: all of a file is data.
    pub fn lseek(&self, id: NodeId, handle: HandleId, offset: u64, whence: u32) -> Result<u64> {
        self.handle(id, handle, false)?;
        let len = self.data(id)?.len() as u64;
        match i32::try_from(whence) {
            _ if offset >= len => Err(Errno::NXIO),
            Ok(libc::SEEK_DATA) => Ok(offset),
            Ok(libc::SEEK_HOLE) => Ok(len),
            _ => Err(Errno::INVAL),
        }
    }

    /// COPY_FILE_RANGE.
    pub fn copy(&mut self, id: NodeId, copy: &CopyFileRange) -> Result<u64> {
        let (from, to) =
            (self.handle(id, copy.handle_in, false)?, self.handle(copy.node_out, copy.handle_out, false)?);
        if !from.readable || !to.writable || to.append {
            return Err(Errno::BADF);
        }
        if copy.flags != 0 {
            return Err(Errno::INVAL);
        }
        let source = self.data(id)?;
        let start = place(copy.offset_in)?;
        let rest = source.get(start..).unwrap_or_default();
        let count = usize::try_from(copy.length).unwrap_or(usize::MAX).min(rest.len());
        let target = place(copy.offset_out)?;
        let end = target.checked_add(count).ok_or(Errno::FBIG)?;
        if id == copy.node_out && start < end && target < start + count {
            return Err(Errno::INVAL);
        }
        let bytes = rest[..count].to_vec();
        if count > 0 {
            self.resize(copy.node_out, end, false)?[target..end].copy_from_slice(&bytes);
        }
        Ok(count as u64)
    }

    /// SETATTR.
    pub fn setattr(&mut self, id: NodeId, set: &Setattr) -> Result<()> {
        self.node(id)?;
        if let Some(handle) = set.handle {
            self.handle(id, handle, false)?;
        }
        if let Some(size) = set.size {
            self.set_size(id, size)?;
        }
        let node = self.node_mut(id)?;
        if let Some(mode) = set.mode {
            node.mode = (node.mode & libc::S_IFMT) | (mode & 0o7777);
        }
        node.uid = set.uid.map_or(node.uid, |uid| uid.0);
        node.gid = set.gid.map_or(node.gid, |gid| gid.0);
        if set.kill_suidgid {
            node.mode &= !0o6000;
        }
        for (time, set) in node.times.iter_mut().zip([set.atime, set.mtime]) {
            *time = match set {
                None => *time,
                Some(SetTime::Now) => now(),
                Some(SetTime::At { nanoseconds, .. }) if nanoseconds >= 1_000_000_000 => {
                    return Err(Errno::INVAL);
                }
                Some(SetTime::At { seconds, nanoseconds }) => (seconds, nanoseconds),
            };
        }
        Ok(())
    }

    /// SETXATTR.
    pub fn setxattr(&mut self, id: NodeId, name: &[u8], value: &[u8], flags: u32) -> Result<()> {
        const CREATE: u32 = libc::XATTR_CREATE as u32;
        const REPLACE: u32 = libc::XATTR_REPLACE as u32;
        if name.is_empty() || name.len() > 255 {
            return Err(Errno::RANGE);
        }
        let node = self.node_mut(id)?;
        match (flags, node.xattrs.contains_key(name)) {
            (CREATE, true) => return Err(Errno::EXIST),
            (REPLACE, false) => return Err(Errno::NODATA),
            (0 | CREATE | REPLACE, _) => {}
            _ => return Err(Errno::INVAL),
        }
        let others = node.xattrs.iter().filter(|(other, _)| other.as_slice() != name);
        let used: usize = others.map(|(name, value)| name.len() + 1 + value.len()).sum();
        if used + name.len() + 1 + value.len() > MAX_XATTRS {
            return Err(Errno::NOSPC);
        }
        node.xattrs.insert(name.to_vec(), value.to_vec());
        Ok(())
    }

    /// GETXATTR.
    pub fn getxattr(&self, id: NodeId, name: &[u8], size: u32) -> Result<XattrReply> {
        answer(self.node(id)?.xattrs.get(name).ok_or(Errno::NODATA)?.clone(), size)
    }

    /// LISTXATTR.
    pub fn listxattr(&self, id: NodeId, size: u32) -> Result<XattrReply> {
        let names = self.node(id)?.xattrs.keys();
        answer(names.flat_map(|name| name.iter().copied().chain([0])).collect(), size)
    }

    /// REMOVEXATTR.
    pub fn removexattr(&mut self, id: NodeId, name: &[u8]) -> Result<()> {
        self.node_mut(id)?.xattrs.remove(name).map(drop).ok_or(Errno::NODATA)
    }
}

fn answer(bytes: Vec<u8>, size: u32) -> Result<XattrReply> {
    let len = u32::try_from(bytes.len()).map_err(|_| Errno::TOOBIG)?;
    match size {
        0 => Ok(XattrReply::Size(len)),
        _ if len > size => Err(Errno::RANGE),
        _ => Ok(XattrReply::Data(bytes)),
    }
}

fn now() -> (i64, u32) {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (i64::try_from(since.as_secs()).unwrap_or(i64::MAX), since.subsec_nanos())
}

/// What `node` is as a target for OPEN.
pub fn may_open(node: &Node) -> Result<()> {
    match node.content {
        Content::File(_) => Ok(()),
        Content::Directory { .. } => Err(Errno::ISDIR),
        Content::Link(_) => Err(Errno::LOOP),
        Content::Special => Err(Errno::NXIO),
    }
}
