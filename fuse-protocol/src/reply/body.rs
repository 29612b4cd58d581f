//! The bodies of replies, as bytes.

use alloc::vec::Vec;

use zerocopy::IntoBytes;

use crate::abi;
use crate::ioctl;
use crate::reply::{Attributes, Entry, Opened, StatxReply, XattrReply};

/// What follows the header of a reply without an error.
pub trait ReplyBody {
    /// Bytes of the shortest body of this kind. A server refuses a request without room for them before it
    /// changes anything.
    const MIN_SIZE: usize;

    /// Calls `write` with the body's bytes, which may be in several pieces.
    fn with_bytes<R>(&self, write: impl FnOnce(&[&[u8]]) -> R) -> R;
}

/// Bodies that are one wire struct.
macro_rules! one_struct {
    ($($(#[$doc:meta])* $body:ty: $wire:ty, |$value:ident| $to_wire:expr;)*) => {$(
        $(#[$doc])*
        impl ReplyBody for $body {
            const MIN_SIZE: usize = size_of::<$wire>();

            #[inline]
            fn with_bytes<R>(&self, write: impl FnOnce(&[&[u8]]) -> R) -> R {
                let $value = self;
                let wire: $wire = $to_wire;
                write(&[wire.as_bytes()])
            }
        }
    )*};
}

/// Bytes that a WRITE has written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written(pub u32);

/// The offset that an LSEEK has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offset(pub u64);

/// Bytes that a COPY_FILE_RANGE has copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copied {
    /// For COPY_FILE_RANGE.
    Narrow(u32),
    /// For COPY_FILE_RANGE_64.
    Wide(u64),
}

/// The block of the device that BMAP has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block(pub u64);

/// `POLL*` of poll(2) that hold for a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Events(pub u32);

one_struct! {
    /// INIT.
    abi::InitOut: abi::InitOut, |init| *init;
    /// LOOKUP and what creates a name.
    Entry: abi::EntryOut, |entry| entry.to_wire();
    /// GETATTR and SETATTR.
    Attributes: abi::AttrOut, |attributes| attributes.to_wire();
    /// STATX.
    StatxReply: abi::StatxOut, |statx| statx.to_wire();
    /// OPEN and OPENDIR.
    Opened: abi::OpenOut, |opened| opened.to_wire();
    /// WRITE.
    Written: abi::WriteOut, |written| abi::WriteOut { size: written.0, padding: 0 };
    /// STATFS.
    abi::Kstatfs: abi::StatfsOut, |figures| abi::StatfsOut { st: *figures };
    /// LSEEK.
    Offset: abi::LseekOut, |offset| abi::LseekOut { offset: offset.0 };
    /// BMAP.
    Block: abi::BmapOut, |block| abi::BmapOut { block: block.0 };
    /// POLL.
    Events: abi::PollOut, |events| abi::PollOut { revents: events.0, padding: 0 };
    /// GETLK.
    abi::FileLock: abi::LkOut, |lock| abi::LkOut { lk: *lock };
}

/// Requests whose reply has no body.
impl ReplyBody for () {
    const MIN_SIZE: usize = 0;

    #[inline]
    fn with_bytes<R>(&self, write: impl FnOnce(&[&[u8]]) -> R) -> R {
        write(&[])
    }
}

/// CREATE and TMPFILE.
impl ReplyBody for (Entry, Opened) {
    const MIN_SIZE: usize = size_of::<abi::EntryOut>() + size_of::<abi::OpenOut>();

    #[inline]
    fn with_bytes<R>(&self, write: impl FnOnce(&[&[u8]]) -> R) -> R {
        write(&[self.0.to_wire().as_bytes(), self.1.to_wire().as_bytes()])
    }
}

/// COPY_FILE_RANGE and COPY_FILE_RANGE_64, whose bodies have the same size.
impl ReplyBody for Copied {
    const MIN_SIZE: usize = size_of::<abi::WriteOut>();

    fn with_bytes<R>(&self, write: impl FnOnce(&[&[u8]]) -> R) -> R {
        match *self {
            Copied::Narrow(size) => write(&[abi::WriteOut { size, padding: 0 }.as_bytes()]),
            Copied::Wide(bytes_copied) => write(&[abi::CopyFileRangeOut { bytes_copied }.as_bytes()]),
        }
    }
}

/// READLINK (the target) and READDIR (the records of a [`DirectoryWriter`](super::DirectoryWriter)).
impl ReplyBody for Vec<u8> {
    const MIN_SIZE: usize = 0;

    fn with_bytes<R>(&self, write: impl FnOnce(&[&[u8]]) -> R) -> R {
        write(&[self])
    }
}

/// GETXATTR and LISTXATTR.
impl ReplyBody for XattrReply {
    const MIN_SIZE: usize = 0;

    fn with_bytes<R>(&self, write: impl FnOnce(&[&[u8]]) -> R) -> R {
        match self {
            XattrReply::Size(size) => write(&[abi::GetxattrOut { size: *size, padding: 0 }.as_bytes()]),
            XattrReply::Data(data) => write(&[data]),
        }
    }
}

/// IOCTL.
impl ReplyBody for ioctl::Reply {
    const MIN_SIZE: usize = size_of::<abi::IoctlOut>();

    fn with_bytes<R>(&self, write: impl FnOnce(&[&[u8]]) -> R) -> R {
        write(&[abi::IoctlOut::default().as_bytes(), self.bytes()])
    }
}
