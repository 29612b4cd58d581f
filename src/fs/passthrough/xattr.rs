//! Extended attributes, with `--xattr`.

use std::borrow::Cow;
use std::ffi::CStr;

use rustix::fs::{XattrFlags, getxattr, getxattr_query, listxattr, listxattr_query, removexattr, setxattr};
use rustix::io::Errno;

use super::credentials::without_fsetid;
use super::inodes::Inode;
use super::lookup::proc_name;
use super::{NO_XATTR, PassthroughFs};
use crate::fs::{Result, XattrReply};
use crate::mapping::acl::{ValueError, holds_ids, value_to_guest, value_to_host};

/// Longest value and longest list of names (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const SIZE_MAX: usize = 64 << 10;

impl PassthroughFs {
    pub(super) fn set_xattr(
        &self,
        inode: &Inode,
        name: &CStr,
        value: &[u8],
        flags: u32,
        acl_kill_sgid: bool,
    ) -> Result<()> {
        self.check_xattr()?;
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        // Setting an ACL clears the set-group-id bit as it would for the caller.
        let _unprivileged = acl_kill_sgid.then(without_fsetid).transpose()?;
        let mut value = Cow::Borrowed(value);
        if holds_ids(name) {
            value_to_host(name, value.to_mut(), &self.config.uid_map, &self.config.gid_map).map_err(
                |error| match error {
                    ValueError::Malformed => Errno::INVAL,
                    ValueError::Forbidden => Errno::PERM,
                },
            )?;
        }
        setxattr(proc_name(inode), name, &value, flags)
    }

    pub(super) fn get_xattr(&self, inode: &Inode, name: &CStr, size: u32) -> Result<XattrReply> {
        self.check_xattr()?;
        let path = proc_name(inode);
        let mut reply = answer(
            size,
            || getxattr_query(path.as_c_str(), name),
            |buffer| getxattr(path.as_c_str(), name, buffer),
        )?;
        if let XattrReply::Data(value) = &mut reply {
            value_to_guest(name, value, &self.config.uid_map, &self.config.gid_map).map_err(|_| Errno::IO)?;
        }
        Ok(reply)
    }

    pub(super) fn list_xattr(&self, inode: &Inode, size: u32) -> Result<XattrReply> {
        self.check_xattr()?;
        let path = proc_name(inode);
        answer(size, || listxattr_query(path.as_c_str()), |buffer| listxattr(path.as_c_str(), buffer))
    }

    pub(super) fn remove_xattr(&self, inode: &Inode, name: &CStr) -> Result<()> {
        self.check_xattr()?;
        removexattr(proc_name(inode), name)
    }

    fn check_xattr(&self) -> Result<()> {
        if self.config.xattr { Ok(()) } else { Err(NO_XATTR) }
    }
}

/// Asks the host for a value with as much room as the guest has, or for its length alone.
fn answer(
    size: u32,
    ask_length: impl FnOnce() -> Result<usize>,
    ask: impl FnOnce(&mut [u8]) -> Result<usize>,
) -> Result<XattrReply> {
    if size == 0 {
        return ask_length().map(|len| XattrReply::Size(u32::try_from(len).unwrap_or(u32::MAX)));
    }
    let mut value = vec![0; usize::try_from(size).unwrap_or(usize::MAX).min(SIZE_MAX)];
    let len = ask(&mut value)?;
    value.truncate(len);
    Ok(XattrReply::Data(value))
}
