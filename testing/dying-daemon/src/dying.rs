//! The file system with fail points around each operation.

use std::sync::Arc;

use fuse_protocol::abi::{FileLock, Kstatfs};
use fuse_protocol::flags::InitFlags;
use fuse_protocol::ids::{NodeId, Unique};
use fuse_protocol::ioctl;
use fuse_protocol::name::LookupName;
use fuse_protocol::opcode::Opcode;
use fuse_protocol::reply::{Attributes, DirectoryWriter, Entry, StatxReply};
use fuse_protocol::request::{
    Access, CopyFileRange, Create, Fallocate, Flush, Fsync, Getattr, Getxattr, Ioctl, Link, Listxattr, Lock,
    Lookup, Lseek, Mkdir, Mknod, Open, Opendir, Read, Readdir, Release, Releasedir, Removexattr, Rename,
    Rmdir, Setattr, Setxattr, Statx, Symlink, Tmpfile, Unlink, Write,
};
use lanefsd::fs::transfer::{Call, Load, Progress, Transfer};
use lanefsd::fs::{Context, DeviceDescriptors, FileSystem, Opened, XattrReply};
use lanefsd::sys::guest_buffers::{GuestReader, GuestWriter};
use rustix::io::Errno;

use crate::fail_point::{CONTROL, FailPoint, Phase};

type Result<T> = std::result::Result<T, Errno>;

/// How the name begins with which a guest arms the fail point.
const ARMS: &str = "!die:";

/// The file system below, around whose operations the process dies.
pub struct Dying {
    /// Serves them.
    pub inner: Arc<dyn FileSystem>,
    /// Where the process dies.
    pub fail_point: &'static FailPoint,
}

impl Dying {
    fn around<T>(&self, opcode: Opcode, name: &[u8], serve: impl FnOnce(&dyn FileSystem) -> T) -> T {
        self.fail_point.pass(Phase::Before, opcode, name);
        let result = serve(&*self.inner);
        self.fail_point.pass(Phase::After, opcode, name);
        result
    }

    /// Whether this name arms the fail point.
    fn arms(&self, name: &[u8]) -> bool {
        let text = std::str::from_utf8(name).ok().and_then(|name| name.strip_prefix(ARMS));
        text.is_some_and(|text| {
            // A test that misspells a fail point sees that nothing dies.
            self.fail_point.arm(text).is_ok()
        })
    }
}

/// Whether this name lets the process meddle with its table of descriptors.
fn meddles(name: &[u8]) -> bool {
    let text = std::str::from_utf8(name).ok().and_then(|name| name.strip_prefix("!table:"));
    text.is_some_and(|text| crate::table::meddle(text).is_ok())
}

/// The bytes of a name that is looked up.
fn looked_up<'a>(lookup: &Lookup<'a>) -> &'a [u8] {
    match lookup.name {
        LookupName::This => b".",
        LookupName::Parent => b"..",
        LookupName::Entry(name) => name.as_c_str().to_bytes(),
    }
}

/// Operations with a fail point before and after them; those with a name can be chosen by it.
macro_rules! around {
    ($($opcode:ident $(by $named:ident)?: fn $name:ident($($argument:ident: $kind:ty),*) $(-> $result:ty)?;)*) => {
        $(fn $name(&self, $($argument: $kind),*) $(-> $result)? {
            let name: &[u8] = &[];
            $(let _ = name; let name: &[u8] = $named.name.as_c_str().to_bytes();)?
            self.around(Opcode::$opcode, name, |fs| fs.$name($($argument),*))
        })*
    };
}

/// A READ or WRITE of an engine, around which the process dies.
struct Submitted {
    inner: Box<dyn Transfer>,
    opcode: Opcode,
    fail_point: &'static FailPoint,
}

impl Transfer for Submitted {
    fn call(&self) -> Call<'_> {
        self.inner.call()
    }

    fn preparation(&self) -> u8 {
        self.inner.preparation()
    }

    fn prepare(&self) -> Result<()> {
        self.inner.prepare()
    }

    fn advance(&mut self, result: Result<usize>, left: usize) -> Progress {
        let progress = self.inner.advance(result, left);
        if matches!(progress, Progress::Over(_)) {
            self.fail_point.pass(Phase::After, self.opcode, &[]);
        }
        progress
    }
}

impl Dying {
    fn submitted(&self, opcode: Opcode, begun: Option<Box<dyn Transfer>>) -> Option<Box<dyn Transfer>> {
        let inner = begun?;
        self.fail_point.pass(Phase::Before, opcode, &[]);
        Some(Box::new(Submitted { inner, opcode, fail_point: self.fail_point }))
    }
}

impl FileSystem for Dying {
    fn may_begin(&self) -> bool {
        self.inner.may_begin()
    }

    fn begin_read(
        &self,
        ctx: &Context,
        node: NodeId,
        read: &Read,
        load: Load,
    ) -> Result<Option<Box<dyn Transfer>>> {
        Ok(self.submitted(Opcode::Read, self.inner.begin_read(ctx, node, read, load)?))
    }

    fn begin_write(
        &self,
        ctx: &Context,
        node: NodeId,
        write: &Write,
        load: Load,
    ) -> Result<Option<Box<dyn Transfer>>> {
        Ok(self.submitted(Opcode::Write, self.inner.begin_write(ctx, node, write, load)?))
    }

    fn below(&self) -> Result<&dyn FileSystem> {
        Ok(&*self.inner)
    }

    fn keep_back(&self, device: DeviceDescriptors) {
        self.fail_point.pass_with_panic(CONTROL);
        self.inner.keep_back(device);
    }

    /// INIT asks for them after the old session has ended, and before the new one begins.
    fn offered_flags(&self) -> InitFlags {
        self.fail_point.pass(Phase::Before, Opcode::Init, &[]);
        self.inner.offered_flags()
    }

    /// INIT asks for them when it has negotiated.
    fn required_flags(&self) -> InitFlags {
        let flags = self.inner.required_flags();
        self.fail_point.pass(Phase::After, Opcode::Init, &[]);
        flags
    }

    fn lookup(&self, ctx: &Context, parent: NodeId, lookup: &Lookup<'_>) -> Result<Entry> {
        let name = looked_up(lookup);
        if self.arms(name) || meddles(name) {
            return Err(Errno::NOENT);
        }
        self.around(Opcode::Lookup, name, |fs| fs.lookup(ctx, parent, lookup))
    }

    fn interrupt(&self, unique: Unique) -> Result<()> {
        self.around(Opcode::Interrupt, &[], |fs| fs.interrupt(unique))
    }

    around! {
        Destroy: fn destroy();
        Forget: fn forget(ctx: &Context, node: NodeId, count: u64);
        Getattr: fn getattr(ctx: &Context, node: NodeId, getattr: &Getattr) -> Result<Attributes>;
        Setattr: fn setattr(ctx: &Context, node: NodeId, setattr: &Setattr) -> Result<Attributes>;
        Statx: fn statx(ctx: &Context, node: NodeId, statx: &Statx) -> Result<StatxReply>;
        Readlink: fn readlink(ctx: &Context, node: NodeId) -> Result<Vec<u8>>;
        Symlink by symlink: fn symlink(ctx: &Context, parent: NodeId, symlink: &Symlink<'_>) -> Result<Entry>;
        Mknod by mknod: fn mknod(ctx: &Context, parent: NodeId, mknod: &Mknod<'_>) -> Result<Entry>;
        Mkdir by mkdir: fn mkdir(ctx: &Context, parent: NodeId, mkdir: &Mkdir<'_>) -> Result<Entry>;
        Unlink by unlink: fn unlink(ctx: &Context, parent: NodeId, unlink: &Unlink<'_>) -> Result<()>;
        Rmdir by rmdir: fn rmdir(ctx: &Context, parent: NodeId, rmdir: &Rmdir<'_>) -> Result<()>;
        Rename by rename: fn rename(ctx: &Context, parent: NodeId, rename: &Rename<'_>) -> Result<()>;
        Link by link: fn link(ctx: &Context, parent: NodeId, link: &Link<'_>) -> Result<Entry>;
        Open: fn open(ctx: &Context, node: NodeId, open: &Open) -> Result<Opened>;
        Create by create: fn create(ctx: &Context, parent: NodeId, create: &Create<'_>) -> Result<(Entry, Opened)>;
        Tmpfile: fn tmpfile(ctx: &Context, parent: NodeId, tmpfile: &Tmpfile) -> Result<(Entry, Opened)>;
        Read: fn read(ctx: &Context, node: NodeId, read: &Read, data: &mut GuestWriter<'_>) -> Result<usize>;
        Write: fn write(ctx: &Context, node: NodeId, write: &Write, data: &mut GuestReader<'_>) -> Result<usize>;
        Statfs: fn statfs(ctx: &Context, node: NodeId) -> Result<Kstatfs>;
        Release: fn release(ctx: &Context, node: NodeId, release: &Release) -> Result<()>;
        Fsync: fn fsync(ctx: &Context, node: NodeId, fsync: &Fsync) -> Result<()>;
        Flush: fn flush(ctx: &Context, node: NodeId, flush: &Flush) -> Result<()>;
        Opendir: fn opendir(ctx: &Context, node: NodeId, opendir: &Opendir) -> Result<Opened>;
        Readdir: fn readdir(
            ctx: &Context, node: NodeId, readdir: &Readdir, out: &mut DirectoryWriter<'_>
        ) -> Result<()>;
        Releasedir: fn releasedir(ctx: &Context, node: NodeId, releasedir: &Releasedir) -> Result<()>;
        Fsyncdir: fn fsyncdir(ctx: &Context, node: NodeId, fsyncdir: &Fsync) -> Result<()>;
        Access: fn access(ctx: &Context, node: NodeId, access: &Access) -> Result<()>;
        Fallocate: fn fallocate(ctx: &Context, node: NodeId, fallocate: &Fallocate) -> Result<()>;
        Lseek: fn lseek(ctx: &Context, node: NodeId, lseek: &Lseek) -> Result<u64>;
        CopyFileRange: fn copy_file_range(ctx: &Context, node: NodeId, copy: &CopyFileRange) -> Result<u64>;
        Syncfs: fn syncfs(ctx: &Context, node: NodeId) -> Result<()>;
        Setxattr: fn setxattr(ctx: &Context, node: NodeId, setxattr: &Setxattr<'_>) -> Result<()>;
        Getxattr: fn getxattr(ctx: &Context, node: NodeId, getxattr: &Getxattr<'_>) -> Result<XattrReply>;
        Listxattr: fn listxattr(ctx: &Context, node: NodeId, listxattr: &Listxattr) -> Result<XattrReply>;
        Removexattr: fn removexattr(ctx: &Context, node: NodeId, removexattr: &Removexattr<'_>) -> Result<()>;
        Getlk: fn getlk(ctx: &Context, node: NodeId, lock: &Lock) -> Result<FileLock>;
        Setlk: fn setlk(ctx: &Context, node: NodeId, lock: &Lock) -> Result<()>;
        Setlkw: fn setlkw(ctx: &Context, node: NodeId, lock: &Lock) -> Result<()>;
        Ioctl: fn ioctl(ctx: &Context, node: NodeId, ioctl: &Ioctl<'_>) -> Result<ioctl::Reply>;
    }
}
