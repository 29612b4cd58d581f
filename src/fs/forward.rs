//! Operations that a wrapper hands on unchanged to the file system inside it.

/// Implements the named methods of [`super::FileSystem`] by calling those of `self.inner`.
///
/// A method that is neither named nor written out answers ENOSYS, as everywhere.
macro_rules! forward {
    (@ offered_flags) => {
        fn offered_flags(&self) -> $crate::fuse::flags::InitFlags {
            self.inner.offered_flags()
        }
    };
    (@ init) => {
        fn init(&self, negotiated: &$crate::fuse::init::Negotiated) {
            self.inner.init(negotiated);
        }
    };
    (@ destroy) => {
        fn destroy(&self) {
            self.inner.destroy();
        }
    };
    (@ forget) => {
        fn forget(&self, node: NodeId, count: u64) {
            self.inner.forget(node, count);
        }
    };
    (@ interrupt) => {
        fn interrupt(&self, unique: $crate::fuse::ids::Unique) {
            self.inner.interrupt(unique);
        }
    };
    (@ interrupt_all) => {
        fn interrupt_all(&self) {
            self.inner.interrupt_all();
        }
    };
    (@ lookup) => { forward!(@ fn lookup(parent: NodeId, name: $crate::fuse::name::LookupName<'_>) -> Entry); };
    (@ getattr) => { forward!(@ fn getattr(node: NodeId, handle: Option<HandleId>) -> Attributes); };
    (@ setattr) => { forward!(@ fn setattr(node: NodeId, set: &Setattr) -> Attributes); };
    (@ statx) => {
        forward!(@ fn statx(node: NodeId, statx: &$crate::fuse::request::Statx)
            -> $crate::fuse::reply::StatxReply);
    };
    (@ readlink) => { forward!(@ fn readlink(node: NodeId) -> Vec<u8>); };
    (@ symlink) => { forward!(@ fn symlink(parent: NodeId, name: Name<'_>, target: &CStr) -> Entry); };
    (@ mknod) => {
        forward!(@ fn mknod(parent: NodeId, name: Name<'_>, mode: u32, rdev: u32, umask: u32) -> Entry);
    };
    (@ mkdir) => { forward!(@ fn mkdir(parent: NodeId, name: Name<'_>, mode: u32, umask: u32) -> Entry); };
    (@ unlink) => { forward!(@ fn unlink(parent: NodeId, name: Name<'_>) -> ()); };
    (@ rmdir) => { forward!(@ fn rmdir(parent: NodeId, name: Name<'_>) -> ()); };
    (@ rename) => { forward!(@ fn rename(parent: NodeId, rename: &$crate::fuse::request::Rename<'_>) -> ()); };
    (@ link) => { forward!(@ fn link(node: NodeId, new_parent: NodeId, name: Name<'_>) -> Entry); };
    (@ open) => { forward!(@ fn open(node: NodeId, flags: u32, open_flags: OpenRequestFlags) -> Opened); };
    (@ read) => {
        forward!(@ fn read(node: NodeId, read: &$crate::fuse::request::Read, data: &mut GuestWriter<'_>)
            -> usize);
    };
    (@ statfs) => { forward!(@ fn statfs(node: NodeId) -> abi::Kstatfs); };
    (@ release) => {
        forward!(@ fn release(node: NodeId, handle: HandleId, flags: $crate::fuse::flags::ReleaseFlags,
            owner: LockOwner) -> ());
    };
    (@ fsync) => { forward!(@ fn fsync(node: NodeId, handle: HandleId, flags: FsyncFlags) -> ()); };
    (@ flush) => { forward!(@ fn flush(node: NodeId, handle: HandleId, owner: LockOwner) -> ()); };
    (@ opendir) => { forward!(@ fn opendir(node: NodeId, flags: u32) -> Opened); };
    (@ readdir) => {
        forward!(@ fn readdir(node: NodeId, handle: HandleId, offset: u64,
            out: &mut $crate::fuse::reply::DirectoryWriter<'_>) -> ());
    };
    (@ releasedir) => { forward!(@ fn releasedir(node: NodeId, handle: HandleId) -> ()); };
    (@ fsyncdir) => { forward!(@ fn fsyncdir(node: NodeId, handle: HandleId, flags: FsyncFlags) -> ()); };
    (@ access) => { forward!(@ fn access(node: NodeId, mask: u32) -> ()); };
    (@ lseek) => { forward!(@ fn lseek(node: NodeId, handle: HandleId, offset: u64, whence: u32) -> u64); };
    (@ syncfs) => { forward!(@ fn syncfs(node: NodeId) -> ()); };
    (@ setxattr) => {
        forward!(@ fn setxattr(node: NodeId, name: &CStr, value: &[u8], flags: u32, kill_sgid: bool) -> ());
    };
    (@ getxattr) => {
        forward!(@ fn getxattr(node: NodeId, name: &CStr, size: u32) -> $crate::fs::XattrReply);
    };
    (@ listxattr) => { forward!(@ fn listxattr(node: NodeId, size: u32) -> $crate::fs::XattrReply); };
    (@ removexattr) => { forward!(@ fn removexattr(node: NodeId, name: &CStr) -> ()); };
    (@ getlk) => { forward!(@ fn getlk(node: NodeId, lock: &Lock) -> abi::FileLock); };
    (@ setlk) => { forward!(@ fn setlk(node: NodeId, lock: &Lock) -> ()); };
    (@ setlkw) => { forward!(@ fn setlkw(node: NodeId, lock: &Lock) -> ()); };
    (@ fn $method:ident($($argument:ident: $type:ty),*) -> $result:ty) => {
        fn $method(&self, ctx: &Context, $($argument: $type),*) -> Result<$result> {
            self.inner.$method(ctx, $($argument),*)
        }
    };
    ($($method:ident),* $(,)?) => { $(forward!(@ $method);)* };
}

pub(super) use forward;
