//! Which method of the file system serves which operation.

use rustix::io::Errno;

use super::Server;
use super::reply::BodyWriter;
use super::submitted::Begun;
use crate::fs::{Context, FileSystem, Result};
use crate::state_file::Effects;
use crate::sys::guest_buffers::GuestReader;
use crate::sys::uring::Data;
use fuse_protocol::ids::NodeId;
use fuse_protocol::opcode::Opcode;
use fuse_protocol::reply::{Copied, DirectoryWriter, Offset, ReplyBody, Written};
use fuse_protocol::request::{BatchForget, CopyFileRange, Forget, Operation, Read, Readdir, Request, Write};

/// Bytes of the longest reply to READDIR: a worker keeps that much. Longer ones come in parts.
const MAX_LISTING: usize = 1 << 20;

impl Server {
    /// Serves one request: one line an operation. `data` is what a WRITE carries, `listing` is scratch
    /// memory for READDIR, and `effects` notes what must not be done twice.
    pub(super) fn dispatch<'a>(
        &self,
        request: &Request<'_>,
        data: GuestReader<'a>,
        body: &mut BodyWriter<'a>,
        listing: &mut Vec<u8>,
        effects: &Effects<'_>,
    ) -> Result<()> {
        let ctx = &Context::of(request, *effects);
        let (fs, node) = (&*self.fs, request.header.node);
        match &request.operation {
            Operation::Init(op) => body.respond(|| self.session.init(fs, op)),
            Operation::Destroy => body.respond(|| self.destroy()),
            Operation::Lookup(op) => body.respond(|| fs.lookup(ctx, node, op)),
            Operation::Forget(op) => forget(fs, ctx, node, op),
            Operation::BatchForget(op) => forget_batch(fs, ctx, op),
            Operation::Getattr(op) => body.respond(|| fs.getattr(ctx, node, op)),
            Operation::Setattr(op) => body.respond(|| fs.setattr(ctx, node, op)),
            Operation::Statx(op) => body.respond(|| fs.statx(ctx, node, op)),
            Operation::Readlink => body.respond(|| fs.readlink(ctx, node)),
            Operation::Symlink(op) => body.respond(|| fs.symlink(ctx, node, op)),
            Operation::Mknod(op) => body.respond(|| fs.mknod(ctx, node, op)),
            Operation::Mkdir(op) => body.respond(|| fs.mkdir(ctx, node, op)),
            Operation::Unlink(op) => body.respond(|| fs.unlink(ctx, node, op)),
            Operation::Rmdir(op) => body.respond(|| fs.rmdir(ctx, node, op)),
            Operation::Rename(op) => body.respond(|| fs.rename(ctx, node, op)),
            Operation::Link(op) => body.respond(|| fs.link(ctx, node, op)),
            Operation::Open(op) => body.respond(|| fs.open(ctx, node, op)),
            Operation::Create(op) => body.respond(|| fs.create(ctx, node, op)),
            Operation::Tmpfile(op) => body.respond(|| fs.tmpfile(ctx, node, op)),
            Operation::Read(op) => read(fs, ctx, node, op, body),
            Operation::Write(op) => write(fs, ctx, node, op, data, body),
            Operation::Statfs => body.respond(|| fs.statfs(ctx, node)),
            Operation::Release(op) => body.respond(|| fs.release(ctx, node, op)),
            Operation::Fsync(op) => body.respond(|| fs.fsync(ctx, node, op)),
            Operation::Flush(op) => body.respond(|| fs.flush(ctx, node, op)),
            Operation::Opendir(op) => body.respond(|| fs.opendir(ctx, node, op)),
            Operation::Readdir(op) => readdir(fs, ctx, node, op, body, listing),
            Operation::Releasedir(op) => body.respond(|| fs.releasedir(ctx, node, op)),
            Operation::Fsyncdir(op) => body.respond(|| fs.fsyncdir(ctx, node, op)),
            Operation::Access(op) => body.respond(|| fs.access(ctx, node, op)),
            Operation::Interrupt(op) => body.respond(|| fs.interrupt(op.unique)),
            Operation::Fallocate(op) => body.respond(|| fs.fallocate(ctx, node, op)),
            Operation::Lseek(op) => body.respond(|| fs.lseek(ctx, node, op).map(Offset)),
            Operation::CopyFileRange(op) => body.respond(|| copy_file_range(fs, ctx, node, op)),
            Operation::Syncfs => body.respond(|| fs.syncfs(ctx, node)),
            Operation::Setxattr(op) => body.respond(|| fs.setxattr(ctx, node, op)),
            Operation::Getxattr(op) => body.respond(|| fs.getxattr(ctx, node, op)),
            Operation::Listxattr(op) => body.respond(|| fs.listxattr(ctx, node, op)),
            Operation::Removexattr(op) => body.respond(|| fs.removexattr(ctx, node, op)),
            Operation::Getlk(op) => body.respond(|| fs.getlk(ctx, node, op)),
            Operation::Setlk(op) => body.respond(|| fs.setlk(ctx, node, op)),
            Operation::Setlkw(op) => body.respond(|| fs.setlkw(ctx, node, op)),
            Operation::Ioctl(op) => body.respond(|| fs.ioctl(ctx, node, op).map_err(ioctl_error)),
            // Of /dev/fuse and DAX windows, which this device has not.
            Operation::Bmap(_) | Operation::Poll(_) | Operation::NotifyReply(_) => Err(Errno::NOSYS),
            Operation::SetupMapping(_) | Operation::RemoveMapping(_) => Err(Errno::NOSYS),
        }
    }

    /// DESTROY.
    fn destroy(&self) -> Result<()> {
        self.session.destroy(&*self.fs);
        Ok(())
    }
}

fn forget(fs: &dyn FileSystem, ctx: &Context, node: NodeId, forget: &Forget) -> Result<()> {
    fs.forget(ctx, node, forget.nlookup);
    Ok(())
}

fn forget_batch(fs: &dyn FileSystem, ctx: &Context, batch: &BatchForget<'_>) -> Result<()> {
    // Served again, it goes on where it stood.
    let effects = ctx.effects;
    let done = usize::try_from(effects.progress()).unwrap_or(usize::MAX);
    for (number, (node, count)) in (0..).zip(batch.iter()).skip(done) {
        effects.set_progress(number);
        fs.forget(ctx, node, count);
    }
    Ok(())
}

/// The data goes straight to its place in guest memory.
fn read(
    fs: &dyn FileSystem,
    ctx: &Context,
    node: NodeId,
    read: &Read,
    body: &mut BodyWriter<'_>,
) -> Result<()> {
    let size = usize::try_from(read.size).map_err(|_| Errno::INVAL)?;
    if body.room.len() < size {
        return Err(Errno::INVAL);
    }
    body.room.truncate(size);
    if let Some(load) = body.load.filter(|_| body.room.fits_one_call())
        && let Some(transfer) = fs.begin_read(ctx, node, read, load)?
    {
        body.begun = Some(Begun { transfer, data: Data::Read(body.room.take()), written: None });
        return Ok(());
    }
    body.written = fs.read(ctx, node, read, &mut body.room)?;
    Ok(())
}

fn write<'a>(
    fs: &dyn FileSystem,
    ctx: &Context,
    node: NodeId,
    write: &Write,
    mut data: GuestReader<'a>,
    body: &mut BodyWriter<'a>,
) -> Result<()> {
    body.check_room::<Written>()?;
    let size = usize::try_from(write.size).map_err(|_| Errno::INVAL)?;
    data.truncate(size);
    if data.len() != size {
        return Err(Errno::INVAL);
    }
    if let Some(load) = body.load.filter(|_| data.fits_one_call())
        && let Some(transfer) = fs.begin_write(ctx, node, write, load)?
    {
        let written = body.room.reserve();
        body.begun = Some(Begun { transfer, data: Data::Write(data), written });
        return Ok(());
    }
    let written = fs.write(ctx, node, write, &mut data)?;
    Written(u32::try_from(written).unwrap_or(write.size)).with_bytes(|pieces| body.put(pieces))
}

fn readdir(
    fs: &dyn FileSystem,
    ctx: &Context,
    node: NodeId,
    readdir: &Readdir,
    body: &mut BodyWriter<'_>,
    listing: &mut Vec<u8>,
) -> Result<()> {
    let limit = usize::try_from(readdir.size).unwrap_or(usize::MAX).min(body.room.len());
    let limit = limit.min(MAX_LISTING);
    listing.try_reserve(limit).map_err(|_| Errno::NOMEM)?;
    let mut writer = DirectoryWriter::new(listing, limit, readdir.plus);
    fs.readdir(ctx, node, readdir, &mut writer)?;
    listing.with_bytes(|pieces| body.put(pieces))
}

/// COPY_FILE_RANGE, whose reply has 32 bits for the length, copies no more than these can say.
fn copy_file_range(fs: &dyn FileSystem, ctx: &Context, node: NodeId, copy: &CopyFileRange) -> Result<Copied> {
    let mut copy = *copy;
    if !copy.wide_reply {
        copy.length = copy.length.min(u64::from(u32::MAX) & !4095);
    }
    let copied = fs.copy_file_range(ctx, node, &copy)?;
    match copy.wide_reply {
        true => Ok(Copied::Wide(copied)),
        false => Ok(Copied::Narrow(u32::try_from(copied).unwrap_or(u32::MAX))),
    }
}

/// Whether requests of this kind are not served: those of the arms of [`Server::dispatch`] that are ENOSYS.
pub(super) fn is_unsupported(opcode: Opcode) -> bool {
    use Opcode::{Bmap, NotifyReply, Poll, RemoveMapping, SetupMapping};
    matches!(opcode, Bmap | Poll | NotifyReply | SetupMapping | RemoveMapping)
}

/// ENOTTY from a file system without IOCTL: some kernels pass ENOSYS on to programs, which know ENOTTY only.
fn ioctl_error(errno: Errno) -> Errno {
    if errno == Errno::NOSYS { Errno::NOTTY } else { errno }
}
