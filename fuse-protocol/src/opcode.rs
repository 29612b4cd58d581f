//! Opcodes.

macro_rules! opcodes {
    ($($name:ident = $value:literal, $c_name:literal;)*) => {
        /// The kind of a request (`enum fuse_opcode`).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        #[allow(missing_docs, reason = "the names are the kernel's")]
        pub enum Opcode { $($name = $value,)* }

        impl Opcode {
            /// All opcodes with their names in `linux/fuse.h`.
            pub const ALL: &[(Opcode, &'static str)] = &[$((Opcode::$name, $c_name),)*];

            /// The opcode with this number, if there is one.
            pub fn from_number(number: u32) -> Option<Opcode> {
                match number {
                    $($value => Some(Opcode::$name),)*
                    _ => None,
                }
            }
        }
    };
}

opcodes! {
    Lookup = 1, "FUSE_LOOKUP";
    Forget = 2, "FUSE_FORGET";
    Getattr = 3, "FUSE_GETATTR";
    Setattr = 4, "FUSE_SETATTR";
    Readlink = 5, "FUSE_READLINK";
    Symlink = 6, "FUSE_SYMLINK";
    Mknod = 8, "FUSE_MKNOD";
    Mkdir = 9, "FUSE_MKDIR";
    Unlink = 10, "FUSE_UNLINK";
    Rmdir = 11, "FUSE_RMDIR";
    Rename = 12, "FUSE_RENAME";
    Link = 13, "FUSE_LINK";
    Open = 14, "FUSE_OPEN";
    Read = 15, "FUSE_READ";
    Write = 16, "FUSE_WRITE";
    Statfs = 17, "FUSE_STATFS";
    Release = 18, "FUSE_RELEASE";
    Fsync = 20, "FUSE_FSYNC";
    Setxattr = 21, "FUSE_SETXATTR";
    Getxattr = 22, "FUSE_GETXATTR";
    Listxattr = 23, "FUSE_LISTXATTR";
    Removexattr = 24, "FUSE_REMOVEXATTR";
    Flush = 25, "FUSE_FLUSH";
    Init = 26, "FUSE_INIT";
    Opendir = 27, "FUSE_OPENDIR";
    Readdir = 28, "FUSE_READDIR";
    Releasedir = 29, "FUSE_RELEASEDIR";
    Fsyncdir = 30, "FUSE_FSYNCDIR";
    Getlk = 31, "FUSE_GETLK";
    Setlk = 32, "FUSE_SETLK";
    Setlkw = 33, "FUSE_SETLKW";
    Access = 34, "FUSE_ACCESS";
    Create = 35, "FUSE_CREATE";
    Interrupt = 36, "FUSE_INTERRUPT";
    Bmap = 37, "FUSE_BMAP";
    Destroy = 38, "FUSE_DESTROY";
    Ioctl = 39, "FUSE_IOCTL";
    Poll = 40, "FUSE_POLL";
    NotifyReply = 41, "FUSE_NOTIFY_REPLY";
    BatchForget = 42, "FUSE_BATCH_FORGET";
    Fallocate = 43, "FUSE_FALLOCATE";
    Readdirplus = 44, "FUSE_READDIRPLUS";
    Rename2 = 45, "FUSE_RENAME2";
    Lseek = 46, "FUSE_LSEEK";
    CopyFileRange = 47, "FUSE_COPY_FILE_RANGE";
    SetupMapping = 48, "FUSE_SETUPMAPPING";
    RemoveMapping = 49, "FUSE_REMOVEMAPPING";
    Syncfs = 50, "FUSE_SYNCFS";
    Tmpfile = 51, "FUSE_TMPFILE";
    Statx = 52, "FUSE_STATX";
    CopyFileRange64 = 53, "FUSE_COPY_FILE_RANGE_64";
}

impl Opcode {
    /// Whether the server sends no reply.
    pub fn has_no_reply(self) -> bool {
        matches!(self, Opcode::Forget | Opcode::BatchForget)
    }

    /// Whether such a request makes a new inode.
    pub fn creates(self) -> bool {
        use Opcode::{Create, Mkdir, Mknod, Symlink, Tmpfile};
        matches!(self, Create | Mkdir | Mknod | Symlink | Tmpfile)
    }
}
