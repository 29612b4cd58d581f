//! Extended attributes, with `--xattr`.

use std::borrow::Cow;
use std::ffi::{CStr, CString};

use rustix::fs::{XattrFlags, getxattr, getxattr_query, listxattr, listxattr_query, removexattr, setxattr};
use rustix::io::Errno;

use super::credentials::without_fsetid;
use super::inodes::Inode;
use super::lookup::proc_name;
use super::{NO_XATTR, PassthroughFs};
use crate::config::FsConfig;
use crate::fs::{Result, XattrReply};
use crate::mapping::acl::{CAPABILITY, ValueError, holds_ids, value_to_guest, value_to_host};
use crate::mapping::xattrs::Refusal;

/// Longest value and longest list of names (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const SIZE_MAX: usize = 64 << 10;
/// Room for the names that inodes have as a rule.
const USUAL_LIST: usize = 1 << 10;

/// What `security.capability` is called on the host, if that is another name: the host's kernel
/// does not know such capabilities then, and they are ours to take away.
pub(super) fn mapped_capability(config: &FsConfig) -> Option<CString> {
    let host = config.xattr_map.as_ref()?.to_host(CAPABILITY).ok()?;
    (*host != *CAPABILITY).then(|| host.into_owned())
}

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
        let name = match self.host_name(name) {
            // The host has its own errno for names that are too long.
            Err(Refusal::TooLong) => return Err(Errno::RANGE),
            result => result.map_err(refused)?,
        };
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let mut value = Cow::Borrowed(value);
        if holds_ids(&name) {
            value_to_host(&name, value.to_mut(), &self.config.uid_map, &self.config.gid_map).map_err(
                |error| match error {
                    ValueError::Malformed => Errno::INVAL,
                    ValueError::Forbidden => Errno::PERM,
                },
            )?;
        }
        // Setting an ACL clears the set-group-id bit as it would for the caller.
        let _unprivileged = acl_kill_sgid.then(without_fsetid).transpose()?;
        setxattr(proc_name(inode), &*name, &value, flags)
    }

    pub(super) fn get_xattr(&self, inode: &Inode, name: &CStr, size: u32) -> Result<XattrReply> {
        self.check_xattr()?;
        let name = self.host_name(name).map_err(|refusal| match refusal {
            Refusal::Unsupported => Errno::NOTSUP,
            // What the guest must not have is not there.
            Refusal::Bad | Refusal::TooLong => Errno::NODATA,
        })?;
        let path = proc_name(inode);
        let mut reply = answer(
            size,
            || getxattr_query(path.as_c_str(), &*name),
            |buffer| getxattr(path.as_c_str(), &*name, buffer),
        )?;
        if let XattrReply::Data(value) = &mut reply {
            value_to_guest(&name, value, &self.config.uid_map, &self.config.gid_map)
                .map_err(|_| Errno::IO)?;
        }
        Ok(reply)
    }

    pub(super) fn list_xattr(&self, inode: &Inode, size: u32) -> Result<XattrReply> {
        self.check_xattr()?;
        let Some(map) = &self.config.xattr_map else {
            let path = proc_name(inode);
            return answer(
                size,
                || listxattr_query(path.as_c_str()),
                |buffer| listxattr(path.as_c_str(), buffer),
            );
        };
        let mut names = Vec::new();
        for name in host_names(inode)?.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
            if let Some(name) = map.to_guest(name) {
                names.extend_from_slice(name);
                names.push(0);
            }
        }
        match usize::try_from(size) {
            Ok(0) => Ok(XattrReply::Size(u32::try_from(names.len()).unwrap_or(u32::MAX))),
            Ok(room) if room < names.len() => Err(Errno::RANGE),
            _ => Ok(XattrReply::Data(names)),
        }
    }

    pub(super) fn remove_xattr(&self, inode: &Inode, name: &CStr) -> Result<()> {
        self.check_xattr()?;
        removexattr(proc_name(inode), &*self.host_name(name).map_err(refused)?)
    }

    /// Takes capabilities off a file whose data or owner is about to change, where the host's
    /// kernel does not do it.
    pub(super) fn drop_mapped_capability(&self, inode: &Inode) -> Result<()> {
        let Some(name) = &self.mapped_capability else { return Ok(()) };
        match removexattr(proc_name(inode), name) {
            // Most files have none; on some inodes and file systems there is no such attribute.
            Err(Errno::NODATA | Errno::NOTSUP | Errno::PERM) => Ok(()),
            result => result,
        }
    }

    /// What an attribute of the guest is called on the host.
    fn host_name<'a>(&self, name: &'a CStr) -> std::result::Result<Cow<'a, CStr>, Refusal> {
        match &self.config.xattr_map {
            None => Ok(Cow::Borrowed(name)),
            Some(map) => map.to_host(name),
        }
    }

    fn check_xattr(&self) -> Result<()> {
        if self.config.xattr { Ok(()) } else { Err(NO_XATTR) }
    }
}

/// What a change of a refused attribute is answered with.
fn refused(refusal: Refusal) -> Errno {
    match refusal {
        Refusal::Bad => Errno::PERM,
        Refusal::Unsupported => Errno::NOTSUP,
        Refusal::TooLong => Errno::NODATA,
    }
}

/// All names that the host has, each with its NUL.
fn host_names(inode: &Inode) -> Result<Vec<u8>> {
    let path = proc_name(inode);
    for size in [USUAL_LIST, SIZE_MAX] {
        let mut names = vec![0; size];
        match listxattr(path.as_c_str(), names.as_mut_slice()) {
            Ok(len) => {
                names.truncate(len);
                return Ok(names);
            }
            Err(Errno::RANGE) => {}
            Err(errno) => return Err(errno),
        }
    }
    Err(Errno::TOOBIG)
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
