//! Operations on names. The inode in the header is the directory.

use core::ffi::CStr;

use crate::abi;
use crate::decode::{Arguments, Cursor, Result};
use crate::flags::OpenRequestFlags;
use crate::ids::NodeId;
use crate::name::{LookupName, Name};
use crate::opcode::Opcode;

/// Arguments of LOOKUP.
#[derive(Clone, Copy, Debug)]
pub struct Lookup<'a> {
    /// The entry to find.
    pub name: LookupName<'a>,
}

impl<'a> Arguments<'a> for Lookup<'a> {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Lookup<'a>> {
        Ok(Lookup { name: cursor.lookup_name()? })
    }
}

/// Arguments of SYMLINK.
#[derive(Clone, Copy, Debug)]
pub struct Symlink<'a> {
    /// The entry to create.
    pub name: Name<'a>,
    /// Where the link points to: any bytes.
    pub target: &'a CStr,
}

impl<'a> Arguments<'a> for Symlink<'a> {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Symlink<'a>> {
        Ok(Symlink { name: cursor.name()?, target: cursor.c_str()? })
    }
}

/// Arguments of MKNOD.
#[derive(Clone, Copy, Debug)]
pub struct Mknod<'a> {
    /// The entry to create.
    pub name: Name<'a>,
    /// Type and permission bits; the guest applied the umask unless DONT_MASK was agreed on.
    pub mode: u32,
    /// Device number, for a device.
    pub rdev: u32,
    /// The caller's umask.
    pub umask: u32,
}

impl<'a> Arguments<'a> for Mknod<'a> {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Mknod<'a>> {
        let raw: abi::MknodIn = cursor.take()?;
        Ok(Mknod { name: cursor.name()?, mode: raw.mode, rdev: raw.rdev, umask: raw.umask })
    }
}

/// Arguments of MKDIR.
#[derive(Clone, Copy, Debug)]
pub struct Mkdir<'a> {
    /// The entry to create.
    pub name: Name<'a>,
    /// Permission bits; the guest applied the umask unless DONT_MASK was agreed on.
    pub mode: u32,
    /// The caller's umask.
    pub umask: u32,
}

impl<'a> Arguments<'a> for Mkdir<'a> {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Mkdir<'a>> {
        let raw: abi::MkdirIn = cursor.take()?;
        Ok(Mkdir { name: cursor.name()?, mode: raw.mode, umask: raw.umask })
    }
}

/// Arguments of UNLINK.
#[derive(Clone, Copy, Debug)]
pub struct Unlink<'a> {
    /// The entry to remove.
    pub name: Name<'a>,
}

impl<'a> Arguments<'a> for Unlink<'a> {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Unlink<'a>> {
        Ok(Unlink { name: cursor.name()? })
    }
}

/// Arguments of RMDIR.
#[derive(Clone, Copy, Debug)]
pub struct Rmdir<'a> {
    /// The directory to remove.
    pub name: Name<'a>,
}

impl<'a> Arguments<'a> for Rmdir<'a> {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Rmdir<'a>> {
        Ok(Rmdir { name: cursor.name()? })
    }
}

/// Arguments of RENAME and RENAME2.
#[derive(Clone, Copy, Debug)]
pub struct Rename<'a> {
    /// The entry to rename, in the directory that the header names.
    pub name: Name<'a>,
    /// The directory it goes to.
    pub new_parent: NodeId,
    /// Its name there.
    pub new_name: Name<'a>,
    /// `RENAME_*` of renameat2(2).
    pub flags: u32,
}

impl<'a> Arguments<'a> for Rename<'a> {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Rename<'a>> {
        let (new_parent, flags) = match cursor.opcode() {
            Opcode::Rename2 => {
                let raw: abi::Rename2In = cursor.take()?;
                (raw.newdir, raw.flags)
            }
            _ => (cursor.take::<abi::RenameIn>()?.newdir, 0),
        };
        let (name, new_name) = (cursor.name()?, cursor.name()?);
        Ok(Rename { name, new_parent: NodeId(new_parent), new_name, flags })
    }
}

/// Arguments of LINK: a new name in the directory of the header.
#[derive(Clone, Copy, Debug)]
pub struct Link<'a> {
    /// The inode that gets another name.
    pub target: NodeId,
    /// The entry to create.
    pub name: Name<'a>,
}

impl<'a> Arguments<'a> for Link<'a> {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Link<'a>> {
        let raw: abi::LinkIn = cursor.take()?;
        Ok(Link { target: NodeId(raw.oldnodeid), name: cursor.name()? })
    }
}

/// Arguments of CREATE.
#[derive(Clone, Copy, Debug)]
pub struct Create<'a> {
    /// The entry to create.
    pub name: Name<'a>,
    /// `O_*` of open(2).
    pub flags: u32,
    /// Type and permission bits; the guest applied the umask unless DONT_MASK was agreed on.
    pub mode: u32,
    /// The caller's umask.
    pub umask: u32,
    /// How to open.
    pub open_flags: OpenRequestFlags,
}

impl<'a> Arguments<'a> for Create<'a> {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Create<'a>> {
        let raw: abi::CreateIn = cursor.take()?;
        Ok(Create {
            name: cursor.name()?,
            flags: raw.flags,
            mode: raw.mode,
            umask: raw.umask,
            open_flags: cursor.open_flags(raw.open_flags),
        })
    }
}

/// Arguments of TMPFILE (a file without a name).
#[derive(Clone, Copy, Debug)]
pub struct Tmpfile {
    /// `O_*` of open(2).
    pub flags: u32,
    /// Type and permission bits.
    pub mode: u32,
    /// The caller's umask.
    pub umask: u32,
    /// How to open.
    pub open_flags: OpenRequestFlags,
}

impl<'a> Arguments<'a> for Tmpfile {
    /// The name that Linux sends along is that of an unnamed dentry and means nothing.
    fn decode(cursor: &mut Cursor<'a>) -> Result<Tmpfile> {
        let raw: abi::CreateIn = cursor.take()?;
        let _meaningless = cursor.c_str();
        Ok(Tmpfile {
            flags: raw.flags,
            mode: raw.mode,
            umask: raw.umask,
            open_flags: cursor.open_flags(raw.open_flags),
        })
    }
}
