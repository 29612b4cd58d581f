//! Attributes, access and extended attributes of an inode.

use core::ffi::CStr;

use zerocopy::{FromZeros, IntoBytes};

use crate::abi;
use crate::decode::{Arguments, Cursor, Result};
use crate::flags::{GetattrFlags, SetattrValid, SetxattrFlags};
use crate::ids::{GuestGid, GuestUid, HandleId};

/// Arguments of GETATTR.
#[derive(Clone, Copy, Debug)]
pub struct Getattr {
    /// An open handle of the file, if the caller has one.
    pub handle: Option<HandleId>,
}

impl<'a> Arguments<'a> for Getattr {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Getattr> {
        let raw: abi::GetattrIn = cursor.take()?;
        Ok(Getattr { handle: handle_if(raw.getattr_flags, raw.fh) })
    }
}

/// The handle of a GETATTR or STATX, if its flags declare one.
fn handle_if(getattr_flags: u32, fh: u64) -> Option<HandleId> {
    GetattrFlags::from_bits_truncate(getattr_flags).contains(GetattrFlags::FH).then_some(HandleId(fh))
}

/// A time to set: now, or seconds and nanoseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// The host's clock at the call.
    Now,
    /// A given time; seconds may be negative.
    At {
        /// Seconds since 1970.
        seconds: i64,
        /// 0 to 999,999,999.
        nanoseconds: u32,
    },
}

/// Arguments of SETATTR: what is `None` stays as it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Setattr {
    /// An open handle of the file, if the caller has one.
    pub handle: Option<HandleId>,
    /// Permission bits; the file type in it is ignored.
    pub mode: Option<u32>,
    /// New owner.
    pub uid: Option<GuestUid>,
    /// New group.
    pub gid: Option<GuestGid>,
    /// New size in bytes.
    pub size: Option<u64>,
    /// New access time.
    pub atime: Option<SetTime>,
    /// New modification time.
    pub mtime: Option<SetTime>,
    /// Clear set-id bits as for an unprivileged caller.
    pub kill_suidgid: bool,
}

impl<'a> Arguments<'a> for Setattr {
    /// Sorts out which fields count.
    fn decode(cursor: &mut Cursor<'a>) -> Result<Setattr> {
        let raw: abi::SetattrIn = cursor.take()?;
        let valid = SetattrValid::from_bits_truncate(raw.valid);
        let time = |set, now, seconds: u64, nanoseconds| {
            if valid.contains(now) {
                Some(SetTime::Now)
            } else {
                valid.contains(set).then_some(SetTime::At { seconds: seconds.cast_signed(), nanoseconds })
            }
        };
        Ok(Setattr {
            handle: valid.contains(SetattrValid::FH).then_some(HandleId(raw.fh)),
            mode: valid.contains(SetattrValid::MODE).then_some(raw.mode),
            uid: valid.contains(SetattrValid::UID).then_some(GuestUid(raw.uid)),
            gid: valid.contains(SetattrValid::GID).then_some(GuestGid(raw.gid)),
            size: valid.contains(SetattrValid::SIZE).then_some(raw.size),
            atime: time(SetattrValid::ATIME, SetattrValid::ATIME_NOW, raw.atime, raw.atimensec),
            mtime: time(SetattrValid::MTIME, SetattrValid::MTIME_NOW, raw.mtime, raw.mtimensec),
            kill_suidgid: valid.contains(SetattrValid::KILL_SUIDGID),
        })
    }
}

/// Arguments of STATX.
#[derive(Clone, Copy, Debug)]
pub struct Statx {
    /// An open handle of the file, if the caller has one.
    pub handle: Option<HandleId>,
    /// `AT_STATX_*` of the caller.
    pub flags: u32,
    /// `STATX_*` fields that are wanted.
    pub mask: u32,
}

impl<'a> Arguments<'a> for Statx {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Statx> {
        let raw: abi::StatxIn = cursor.take()?;
        let handle = handle_if(raw.getattr_flags, raw.fh);
        Ok(Statx { handle, flags: raw.sx_flags, mask: raw.sx_mask })
    }
}

/// Arguments of ACCESS.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// `R_OK`, `W_OK` and `X_OK` of access(2).
    pub mask: u32,
}

impl<'a> Arguments<'a> for Access {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Access> {
        Ok(Access { mask: cursor.take::<abi::AccessIn>()?.mask })
    }
}

/// Arguments of SETXATTR.
#[derive(Clone, Copy, Debug)]
pub struct Setxattr<'a> {
    /// The attribute's name.
    pub name: &'a CStr,
    /// Its new value.
    pub value: &'a [u8],
    /// `XATTR_*` of setxattr(2).
    pub flags: u32,
    /// What else to do; empty without SETXATTR_EXT.
    pub setxattr_flags: SetxattrFlags,
}

impl<'a> Arguments<'a> for Setxattr<'a> {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Setxattr<'a>> {
        let mut raw = abi::SetxattrIn::new_zeroed();
        if cursor.layout().long_setxattr {
            raw = cursor.take()?;
        } else {
            let short = cursor.bytes(abi::COMPAT_SETXATTR_IN_SIZE)?;
            raw.as_mut_bytes().iter_mut().zip(short).for_each(|(to, from)| *to = *from);
        }
        let name = cursor.c_str()?;
        let value = cursor.bytes(usize::try_from(raw.size).unwrap_or(usize::MAX))?;
        let setxattr_flags = SetxattrFlags::from_bits_truncate(raw.setxattr_flags);
        Ok(Setxattr { name, value, flags: raw.flags, setxattr_flags })
    }
}

/// Arguments of GETXATTR.
#[derive(Clone, Copy, Debug)]
pub struct Getxattr<'a> {
    /// The attribute's name.
    pub name: &'a CStr,
    /// Bytes that the caller has room for; 0 asks for the length of the value.
    pub size: u32,
}

impl<'a> Arguments<'a> for Getxattr<'a> {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Getxattr<'a>> {
        let size = cursor.take::<abi::GetxattrIn>()?.size;
        Ok(Getxattr { name: cursor.c_str()?, size })
    }
}

/// Arguments of LISTXATTR.
#[derive(Clone, Copy, Debug)]
pub struct Listxattr {
    /// Bytes that the caller has room for; 0 asks for the length of the list.
    pub size: u32,
}

impl<'a> Arguments<'a> for Listxattr {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Listxattr> {
        Ok(Listxattr { size: cursor.take::<abi::GetxattrIn>()?.size })
    }
}

/// Arguments of REMOVEXATTR.
#[derive(Clone, Copy, Debug)]
pub struct Removexattr<'a> {
    /// The attribute's name.
    pub name: &'a CStr,
}

impl<'a> Arguments<'a> for Removexattr<'a> {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Removexattr<'a>> {
        Ok(Removexattr { name: cursor.c_str()? })
    }
}
