//! One request from the bytes in a chain to the bytes of its reply.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use log::{debug, trace};
use rustix::io::Errno;
use zerocopy::{FromZeros, Immutable, IntoBytes};

use crate::fs::{Context, DeviceDescriptors, FileSystem, Opened, PUT_BACK, XattrReply};
use crate::logging::{info_limited, warn_limited};
use crate::session_lock::{SessionLock, SharedGuard, Slot};
use crate::sys::guest_buffers::{GuestReader, GuestWriter, Reserved};
use crate::sys::memory;
use fuse_protocol::abi;
use fuse_protocol::decode::{DecodeError, argument_bytes};
use fuse_protocol::flags::SetxattrFlags;
use fuse_protocol::ids::{NodeId, Unique};
use fuse_protocol::init::{self, Layout, negotiate};
use fuse_protocol::ioctl::Command;
use fuse_protocol::opcode::Opcode;
use fuse_protocol::reply::{DirectoryWriter, OUT_HEADER_SIZE};
use fuse_protocol::request::{CopyFileRange, Init, Ioctl, Operation, Read, Request, Write};

/// No INIT was answered yet, or DESTROY was: everything but INIT is refused.
const NO_SESSION: u8 = 0;
/// Requests are served.
const SESSION: u8 = 1;
/// Beside it: SETXATTR has its long form.
const LONG_SETXATTR: u8 = 2;
/// Beside it: labels follow the arguments.
const TRAILING_LABELS: u8 = 4;
/// Beside it: the header announces extensions of creating requests.
const EXTENSIONS: u8 = 8;
/// Beside it: opening requests say how to open.
const OPEN_FLAGS: u8 = 16;

/// Bytes of the longest reply to READDIR: a worker keeps that much. What is longer comes in parts.
const MAX_LISTING: usize = 1 << 20;

/// What a worker keeps from request to request.
#[derive(Debug, Default)]
pub struct Scratch {
    slot: Option<Slot>,
    buffers: Buffers,
}

impl Scratch {
    /// Takes the session's lock shared by the calling thread's slot.
    fn slot<'a>(slot: &'a mut Option<Slot>, session_lock: &Arc<SessionLock>) -> SharedGuard<'a> {
        if slot.as_ref().is_none_or(|slot| !slot.is_of(session_lock)) {
            *slot = None;
        }
        slot.get_or_insert_with(|| Slot::of(session_lock)).lock_shared()
    }
}

#[derive(Debug, Default)]
struct Buffers {
    arguments: Vec<u8>,
    listing: Vec<u8>,
}

/// On which thread a request is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// On the worker's that popped it.
    Inline,
    /// On one of its own: it may wait for another request of the same guest.
    Blocking,
}

/// Serves requests out of a file system.
pub struct Service {
    fs: Arc<dyn FileSystem>,
    session: AtomicU8,
    /// What begins or ends a session excludes all other requests: none of these is left behind in the
    /// tables of the next session.
    session_lock: Arc<SessionLock>,
}

type Result<T> = std::result::Result<T, Errno>;

impl Service {
    /// A service without a session; it begins with INIT.
    pub fn new(fs: Arc<dyn FileSystem>) -> Service {
        Service { fs, session: AtomicU8::new(NO_SESSION), session_lock: Arc::default() }
    }

    /// The header of the request in `input`, where it stays, or `None` if `input` is shorter than that.
    pub fn read_header(input: &GuestReader<'_>) -> Option<abi::InHeader> {
        let mut header = abi::InHeader::new_zeroed();
        let bytes = header.as_mut_bytes();
        (input.peek(bytes) == bytes.len()).then_some(header)
    }

    /// The device has more descriptors than before, or fewer.
    pub fn keep_back(&self, device: DeviceDescriptors) {
        self.fs.keep_back(device);
    }

    /// On which thread the request is served.
    pub fn class(header: &abi::InHeader) -> Class {
        if Opcode::from_number(header.opcode) == Some(Opcode::Setlkw) {
            Class::Blocking
        } else {
            Class::Inline
        }
    }

    /// Ends the wait of request `unique`, if it waits: [`Service::serve_and_wait`] returns `None`.
    pub fn put_back(&self, unique: u64) {
        self.fs.put_back(Unique(unique));
    }

    /// Drops what the session holds, whatever the guest has said so far. It has to begin a new one
    /// with INIT. The caller serves no request.
    pub fn end_session(&self) {
        self.session_lock.exclusive(|| self.fs.interrupt_all(), || self.destroy());
    }

    /// Only while no other request is served.
    fn destroy(&self) {
        if self.session.swap(NO_SESSION, Ordering::SeqCst) != NO_SESSION {
            self.fs.destroy();
        }
    }

    /// Serves the request with `header`, which stands before `input`, and returns how many bytes of
    /// `output` are valid.
    pub fn serve(
        &self,
        header: &abi::InHeader,
        input: GuestReader<'_>,
        output: GuestWriter<'_>,
        scratch: &mut Scratch,
    ) -> u32 {
        self.serve_and_wait(header, input, output, scratch).unwrap_or(0)
    }

    /// The same for a request that may wait for others; `None` if it did, and was put back: then
    /// nothing has been written, and it is to be served once more.
    pub fn serve_and_wait(
        &self,
        header: &abi::InHeader,
        input: GuestReader<'_>,
        mut output: GuestWriter<'_>,
        scratch: &mut Scratch,
    ) -> Option<u32> {
        let opcode = Opcode::from_number(header.opcode);
        let no_reply = opcode.is_some_and(Opcode::has_no_reply);
        let reply = output.reserve::<OUT_HEADER_SIZE>();
        // A guest that interrupts a request may leave no room for the answer, which is of no use to it.
        if reply.is_none() && !no_reply && opcode != Some(Opcode::Interrupt) {
            warn_limited!("request {} has no room for a reply; dropped", header.unique);
            return Some(0);
        }
        let mut body = Body { room: output, written: 0 };
        let result = catch_unwind(AssertUnwindSafe(|| self.pass(header, input, &mut body, scratch)));
        let result = result.unwrap_or_else(|_| {
            warn_limited!("request {} of kind {} failed inside the daemon", header.unique, header.opcode);
            Err(Errno::IO)
        });
        if result == Err(PUT_BACK) {
            return None;
        }
        if no_reply {
            return Some(0);
        }
        Some(reply.map_or(0, |reply| fill_header(reply, header.unique, result.map(|()| body.written))))
    }

    /// Lets a request in among others, or alone if it begins or ends a session.
    fn pass(
        &self,
        header: &abi::InHeader,
        input: GuestReader<'_>,
        body: &mut Body<'_>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let Scratch { slot, buffers } = scratch;
        if let Some(Opcode::Init | Opcode::Destroy) = Opcode::from_number(header.opcode) {
            let answer = || self.answer(header, input, body, buffers);
            return self.session_lock.exclusive(|| self.fs.interrupt_all(), answer);
        }
        let _inside = Scratch::slot(slot, &self.session_lock);
        self.answer(header, input, body, buffers)
    }

    /// Refuses the request with `header` for want of a thread or a worker.
    pub fn refuse(header: &abi::InHeader, mut output: GuestWriter<'_>, errno: Errno) -> u32 {
        output.reserve().map_or(0, |reply| fill_header(reply, header.unique, Err(errno)))
    }

    fn answer(
        &self,
        header: &abi::InHeader,
        mut input: GuestReader<'_>,
        body: &mut Body<'_>,
        buffers: &mut Buffers,
    ) -> Result<()> {
        let readable = input.len() + size_of::<abi::InHeader>();
        let arguments = argument_bytes(header, readable).map_err(refused)?;
        memory::resize(&mut buffers.arguments, arguments)?;
        input.read(&mut buffers.arguments);
        let session = self.session.load(Ordering::SeqCst);
        let layout = Layout {
            long_setxattr: session & LONG_SETXATTR != 0,
            trailing_labels: session & TRAILING_LABELS != 0,
            extensions: session & EXTENSIONS != 0,
            open_flags: session & OPEN_FLAGS != 0,
        };
        let request = Request::decode(header, &buffers.arguments, layout).map_err(refused)?;
        trace!("{request:?}");
        let ctx = Context::from(&request);
        if session == NO_SESSION && !matches!(request.operation, Operation::Init(_)) {
            return Err(Errno::NOTCONN);
        }
        match request.operation {
            Operation::Read(read) => self.read(&ctx, &request, &read, body),
            Operation::Write(write) => self.write(&ctx, &request, &write, input, body),
            Operation::Readdir { .. } => self.readdir(&ctx, &request, body, &mut buffers.listing),
            Operation::Init(init) => self.init(&init, body),
            _ => self.inode_operation(&ctx, &request, body),
        }
    }

    fn init(&self, init: &Init, body: &mut Body<'_>) -> Result<()> {
        body.has_room_for::<abi::InitOut>()?;
        // A guest that begins anew has lost what it had, also if it is refused now.
        self.destroy();
        let offered = self.fs.offered_flags();
        let negotiated = match negotiate(init, offered) {
            Ok(Some(negotiated)) => negotiated,
            Ok(None) => return body.put(&init::major_mismatch()),
            Err(error) => {
                warn_limited!("a guest was refused: {error}");
                return Err(Errno::PROTO);
            }
        };
        let missing = self.fs.required_flags() - negotiated.flags;
        if !missing.is_empty() {
            warn_limited!(
                "a guest was refused, whom --posix-acl=auto or --security-label=auto would serve: it lacks \
                 {missing:?}, which that option demands without a mode or with always"
            );
            return Err(Errno::PROTO);
        }
        self.fs.init(&negotiated);
        info_limited!("session begins: FUSE 7.{}, {:?}", negotiated.minor, negotiated.flags);
        let layout = negotiated.layout();
        let long = if layout.long_setxattr { LONG_SETXATTR } else { 0 };
        let trailing = if layout.trailing_labels { TRAILING_LABELS } else { 0 };
        let extensions = if layout.extensions { EXTENSIONS } else { 0 };
        let open_flags = if layout.open_flags { OPEN_FLAGS } else { 0 };
        self.session.store(SESSION | long | trailing | extensions | open_flags, Ordering::SeqCst);
        body.put(&negotiated.to_wire())
    }

    fn read(&self, ctx: &Context, request: &Request<'_>, read: &Read, body: &mut Body<'_>) -> Result<()> {
        let size = usize::try_from(read.size).map_err(|_| Errno::INVAL)?;
        if body.room.len() < size {
            return Err(Errno::INVAL);
        }
        body.room.truncate(size);
        body.written = self.fs.read(ctx, request.header.node, read, &mut body.room)?;
        Ok(())
    }

    fn write(
        &self,
        ctx: &Context,
        request: &Request<'_>,
        write: &Write,
        mut data: GuestReader<'_>,
        body: &mut Body<'_>,
    ) -> Result<()> {
        body.has_room_for::<abi::WriteOut>()?;
        let size = usize::try_from(write.size).map_err(|_| Errno::INVAL)?;
        data.truncate(size);
        if data.len() != size {
            return Err(Errno::INVAL);
        }
        let written = self.fs.write(ctx, request.header.node, write, &mut data)?;
        body.put(&abi::WriteOut { size: u32::try_from(written).unwrap_or(write.size), padding: 0 })
    }

    fn readdir(
        &self,
        ctx: &Context,
        request: &Request<'_>,
        body: &mut Body<'_>,
        listing: &mut Vec<u8>,
    ) -> Result<()> {
        let Operation::Readdir { handle, offset, size, plus } = request.operation else {
            return Err(Errno::NOSYS);
        };
        let limit = usize::try_from(size).unwrap_or(usize::MAX).min(body.room.len());
        let limit = limit.min(MAX_LISTING);
        listing.try_reserve(limit).map_err(|_| Errno::NOMEM)?;
        let mut writer = DirectoryWriter::new(listing, limit, plus);
        self.fs.readdir(ctx, request.header.node, handle, offset, &mut writer)?;
        body.put_bytes(listing)
    }

    /// Operations on inodes and names.
    fn inode_operation(&self, ctx: &Context, request: &Request<'_>, body: &mut Body<'_>) -> Result<()> {
        let node = request.header.node;
        let fs = &self.fs;
        match &request.operation {
            Operation::Destroy => {
                self.destroy();
                Ok(())
            }
            Operation::Forget { nlookup } => {
                fs.forget(node, *nlookup);
                Ok(())
            }
            Operation::BatchForget { items } => {
                items.iter().for_each(|(node, count)| fs.forget(node, count));
                Ok(())
            }
            Operation::Interrupt { unique } => fs.interrupt(*unique),
            Operation::Getattr { handle } => body.put(&fs.getattr(ctx, node, *handle)?.to_wire()),
            Operation::Setattr(set) => {
                body.has_room_for::<abi::AttrOut>()?;
                body.put(&fs.setattr(ctx, node, set)?.to_wire())
            }
            Operation::Statx(statx) => body.put(&fs.statx(ctx, node, statx)?.to_wire()),
            Operation::Readlink => body.put_bytes(&fs.readlink(ctx, node)?),
            Operation::Statfs => body.put(&abi::StatfsOut { st: fs.statfs(ctx, node)? }),
            Operation::Access { mask } => fs.access(ctx, node, *mask),
            Operation::Syncfs => fs.syncfs(ctx, node),
            Operation::Unlink { name } => fs.unlink(ctx, node, *name),
            Operation::Rmdir { name } => fs.rmdir(ctx, node, *name),
            Operation::Rename(rename) => fs.rename(ctx, node, rename),
            Operation::Lookup { .. }
            | Operation::Symlink { .. }
            | Operation::Mknod { .. }
            | Operation::Mkdir { .. }
            | Operation::Link { .. } => self.entry_operation(ctx, request, body),
            Operation::Setxattr { .. }
            | Operation::Getxattr { .. }
            | Operation::Listxattr { .. }
            | Operation::Removexattr { .. } => self.xattr_operation(ctx, request, body),
            _ => self.handle_operation(ctx, request, body),
        }
    }

    /// Operations that answer with an inode.
    fn entry_operation(&self, ctx: &Context, request: &Request<'_>, body: &mut Body<'_>) -> Result<()> {
        body.has_room_for::<abi::EntryOut>()?;
        let node = request.header.node;
        let entry = match request.operation {
            Operation::Lookup { name } => self.fs.lookup(ctx, node, name),
            Operation::Symlink { name, target } => self.fs.symlink(ctx, node, name, target),
            Operation::Mknod { name, mode, rdev, umask } => self.fs.mknod(ctx, node, name, mode, rdev, umask),
            Operation::Mkdir { name, mode, umask } => self.fs.mkdir(ctx, node, name, mode, umask),
            Operation::Link { from, name } => self.fs.link(ctx, from, node, name),
            _ => Err(Errno::NOSYS),
        }?;
        body.put(&entry.to_wire())
    }

    fn xattr_operation(&self, ctx: &Context, request: &Request<'_>, body: &mut Body<'_>) -> Result<()> {
        let node = request.header.node;
        let reply = match request.operation {
            Operation::Setxattr { name, value, flags, setxattr_flags } => {
                let kill_sgid = setxattr_flags.contains(SetxattrFlags::ACL_KILL_SGID);
                return self.fs.setxattr(ctx, node, name, value, flags, kill_sgid);
            }
            Operation::Removexattr { name } => return self.fs.removexattr(ctx, node, name),
            Operation::Getxattr { name, size } => self.fs.getxattr(ctx, node, name, size),
            Operation::Listxattr { size } => self.fs.listxattr(ctx, node, size),
            _ => Err(Errno::NOSYS),
        }?;
        match reply {
            XattrReply::Size(size) => body.put(&abi::GetxattrOut { size, padding: 0 }),
            XattrReply::Data(data) => body.put_bytes(&data),
        }
    }

    /// Operations that open, use or close a handle.
    fn handle_operation(&self, ctx: &Context, request: &Request<'_>, body: &mut Body<'_>) -> Result<()> {
        let node = request.header.node;
        let fs = &self.fs;
        match &request.operation {
            Operation::Open { flags, open_flags } => {
                body.has_room_for::<abi::OpenOut>()?;
                body.put(&open_out(fs.open(ctx, node, *flags, *open_flags)?))
            }
            Operation::Opendir { flags } => {
                body.has_room_for::<abi::OpenOut>()?;
                body.put(&open_out(fs.opendir(ctx, node, *flags)?))
            }
            Operation::Create(_) | Operation::Tmpfile(_) => self.create_operation(ctx, request, body),
            Operation::Release { handle, flags, lock_owner } => {
                fs.release(ctx, node, *handle, *flags, *lock_owner)
            }
            Operation::Releasedir { handle } => fs.releasedir(ctx, node, *handle),
            Operation::Flush { handle, lock_owner } => fs.flush(ctx, node, *handle, *lock_owner),
            Operation::Fsync { handle, flags } => fs.fsync(ctx, node, *handle, *flags),
            Operation::Fsyncdir { handle, flags } => fs.fsyncdir(ctx, node, *handle, *flags),
            Operation::Fallocate { handle, offset, length, mode } => {
                fs.fallocate(ctx, node, *handle, *mode, *offset, *length)
            }
            Operation::Lseek { handle, offset, whence } => {
                body.put(&abi::LseekOut { offset: fs.lseek(ctx, node, *handle, *offset, *whence)? })
            }
            Operation::CopyFileRange(copy) => self.copy_file_range(ctx, request, copy, body),
            Operation::Getlk(lock) => body.put(&abi::LkOut { lk: fs.getlk(ctx, node, lock)? }),
            Operation::Setlk(lock) => fs.setlk(ctx, node, lock),
            Operation::Setlkw(lock) => fs.setlkw(ctx, node, lock),
            Operation::Ioctl(ioctl) => self.ioctl(ctx, node, ioctl, body),
            _ => Err(Errno::NOSYS),
        }
    }

    /// What is not served is no typewriter: some kernels pass ENOSYS on to programs, which know ENOTTY only.
    fn ioctl(&self, ctx: &Context, node: NodeId, ioctl: &Ioctl<'_>, body: &mut Body<'_>) -> Result<()> {
        let command = Command::decode(ioctl)?;
        body.has_room_for::<abi::IoctlOut>()?;
        let reply = match self.fs.ioctl(ctx, node, ioctl.handle, command) {
            Err(Errno::NOSYS) => Err(Errno::NOTTY),
            reply => reply,
        }?;
        body.put(&abi::IoctlOut::default())?;
        body.put_bytes(reply.bytes())
    }

    fn create_operation(&self, ctx: &Context, request: &Request<'_>, body: &mut Body<'_>) -> Result<()> {
        if body.room.len() < size_of::<abi::EntryOut>() + size_of::<abi::OpenOut>() {
            return Err(Errno::INVAL);
        }
        let node = request.header.node;
        let (entry, opened) = match &request.operation {
            Operation::Create(create) => self.fs.create(ctx, node, create),
            Operation::Tmpfile(tmpfile) => self.fs.tmpfile(ctx, node, tmpfile),
            _ => Err(Errno::NOSYS),
        }?;
        body.put(&entry.to_wire())?;
        body.put(&open_out(opened))
    }

    fn copy_file_range(
        &self,
        ctx: &Context,
        request: &Request<'_>,
        copy: &CopyFileRange,
        body: &mut Body<'_>,
    ) -> Result<()> {
        body.has_room_for::<abi::WriteOut>()?;
        let mut copy = *copy;
        if !copy.wide_reply {
            copy.length = copy.length.min(u64::from(u32::MAX) & !4095);
        }
        let bytes_copied = self.fs.copy_file_range(ctx, request.header.node, &copy)?;
        if copy.wide_reply {
            return body.put(&abi::CopyFileRangeOut { bytes_copied });
        }
        body.put(&abi::WriteOut { size: u32::try_from(bytes_copied).unwrap_or(u32::MAX), padding: 0 })
    }
}

/// What follows the header of a reply.
struct Body<'a> {
    room: GuestWriter<'a>,
    written: usize,
}

impl Body<'_> {
    /// EINVAL if a reply of this kind does not fit. Asked before anything is changed.
    fn has_room_for<T>(&self) -> Result<()> {
        if self.room.len() < size_of::<T>() { Err(Errno::INVAL) } else { Ok(()) }
    }

    fn put<T: IntoBytes + Immutable>(&mut self, value: &T) -> Result<()> {
        self.put_bytes(value.as_bytes())
    }

    fn put_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        if self.room.len() < bytes.len() {
            return Err(Errno::INVAL);
        }
        self.written += self.room.write(bytes);
        Ok(())
    }
}

/// Fills in the reply's header and returns the length of the whole reply.
fn fill_header(reply: Reserved<'_, OUT_HEADER_SIZE>, unique: u64, result: Result<usize>) -> u32 {
    let (error, body) = match result {
        Ok(body) => (0, body),
        Err(errno) => (-errno.raw_os_error(), 0),
    };
    let len = u32::try_from(OUT_HEADER_SIZE + body).unwrap_or(u32::MAX);
    reply.fill(&zerocopy::transmute!(abi::OutHeader { len, error, unique }));
    len
}

fn open_out(opened: Opened) -> abi::OpenOut {
    abi::OpenOut { fh: opened.handle.0, open_flags: opened.flags.bits(), backing_id: 0 }
}

fn refused(error: DecodeError) -> Errno {
    debug!("a malformed request: {error}");
    error.errno()
}
