//! Extended attributes, with `--xattr`.

use std::borrow::Cow;
use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;

use log::info;
use rustix::fs::{
    AtFlags, FileType, Mode, XattrFlags, chmodat, getxattr, getxattr_query, listxattr, removexattr, setxattr,
};
use rustix::io::Errno;
use rustix::path::DecInt;
use rustix::thread::CapabilitySet;

use crate::fs::passthrough::caller::credentials::{self, SetIdBits, set_id_bits};
use crate::fs::passthrough::caller::identity::Identity;
use crate::fs::passthrough::config::{FeatureMode, FsConfig};
use crate::fs::passthrough::host::{PROC, proc_name, stat};
use crate::fs::passthrough::inode::Inode;
use crate::fs::passthrough::session::Session;
use crate::fs::passthrough::start_error::StartError;
use crate::fs::{Context, Result, XattrReply};
use crate::mapping::acl::{
    ACCESS, CAPABILITY, DEFAULT, ValueError, holds_ids, is_acl, value_to_guest, value_to_host,
};
use crate::mapping::xattrs::Refusal;
use crate::sys::memory;
use fuse_protocol::ids::GuestUid;

/// The daemon serves no extended attributes: the guest does not ask again.
const NO_XATTR: Errno = Errno::NOSYS;
/// Longest value and longest list of names (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const SIZE_MAX: usize = 64 << 10;
/// Room for the names that inodes have as a rule.
const USUAL_LIST: usize = 1 << 10;

/// The name of `security.capability` on the host, if it is another one: the host's kernel does not know such capabilities
/// then, and the daemon has to remove them.
pub fn mapped_capability(config: &FsConfig) -> Option<CString> {
    let host = config.xattr_map.as_ref()?.to_host(CAPABILITY).ok()?;
    (*host != *CAPABILITY).then(|| host.into_owned())
}

/// Whether ACLs are offered to guests: if they were asked for and the host has them.
pub fn offers_acls(root: &OwnedFd, config: &FsConfig) -> std::result::Result<bool, StartError> {
    let is_unmapped = |name: &CStr| {
        config.xattr_map.as_ref().is_none_or(|map| {
            map.to_host(name).is_ok_and(|host| *host == *name)
                && map.to_guest(name.to_bytes()) == Some(name.to_bytes())
        })
    };
    let missing = if config.posix_acl == FeatureMode::Never {
        return Ok(false);
    } else if !is_unmapped(ACCESS) || !is_unmapped(DEFAULT) {
        StartError::AclsAreMapped
    } else if getxattr_query(DecInt::from_fd(root).as_c_str(), ACCESS) == Err(Errno::NOTSUP) {
        StartError::NoAcls
    } else {
        return Ok(true);
    };
    if config.posix_acl == FeatureMode::Always {
        return Err(missing);
    }
    info!("POSIX ACLs are not offered to the guest: {missing}");
    Ok(false)
}

/// `XATTR_SIZE_MAX` of linux/limits.h.
const LONGEST_VALUE: u32 = 65_536;

/// The extended attributes of a share, as the guest of a session sees them.
#[derive(Clone, Copy, Debug)]
pub struct Xattrs<'a> {
    config: &'a FsConfig,
    identity: &'a Identity,
    session: Session,
}

impl<'a> Xattrs<'a> {
    /// By the rules of `config`.
    pub fn new(config: &'a FsConfig, identity: &'a Identity, session: Session) -> Xattrs<'a> {
        Xattrs { config, identity, session }
    }

    /// SETXATTR.
    pub fn setxattr(
        &self,
        ctx: &Context,
        inode: &Inode,
        (name, value): (&CStr, &[u8]),
        flags: u32,
        acl_kill_sgid: bool,
    ) -> Result<()> {
        self.check_offered()?;
        let name = match self.host_name(name) {
            // The host has its own errno for names that are too long.
            Err(Refusal::TooLong) => return Err(Errno::RANGE),
            result => result.map_err(refused)?,
        };
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let mut value = Cow::Borrowed(value);
        if holds_ids(&name) {
            let (uid_map, gid_map) = self.identity.maps();
            value_to_host(&name, value.to_mut(), uid_map, gid_map).map_err(|error| match error {
                ValueError::Malformed => Errno::INVAL,
                ValueError::Forbidden => Errno::PERM,
            })?;
        }
        if *name == *ACCESS {
            if acl_kill_sgid || self.acl_is_from_outside_the_group(ctx, inode)? {
                return set_acl_and_clear_sgid(inode, &value, flags);
            }
            set_id_bits(SetIdBits::Keep)?;
        }
        setxattr(proc_name(&*inode.path()?), &*name, &value, flags).map_err(|errno| unsupported(errno, &name))
    }

    /// Whether the caller who sets an access ACL is outside of the file's group, for guests that do not say so.
    fn acl_is_from_outside_the_group(&self, ctx: &Context, inode: &Inode) -> Result<bool> {
        if self.session.long_setxattr || ctx.uid == GuestUid(0) {
            return Ok(false);
        }
        Ok(self.identity.owner(&stat(inode.path()?)?).gid != ctx.gid)
    }

    /// Whether an attribute has this value.
    pub fn has_value(&self, inode: &Inode, name: &CStr, value: &[u8]) -> bool {
        let found = self.getxattr(inode, name, LONGEST_VALUE);
        matches!(found, Ok(XattrReply::Data(found)) if found == value)
    }

    /// GETXATTR.
    pub fn getxattr(&self, inode: &Inode, name: &CStr, size: u32) -> Result<XattrReply> {
        self.check_offered()?;
        let name = self.host_name(name).map_err(|refusal| match refusal {
            Refusal::Unsupported => Errno::NOTSUP,
            // A forbidden attribute does not exist for the guest.
            Refusal::Bad | Refusal::TooLong => Errno::NODATA,
        })?;
        let fd = inode.path()?;
        let path = proc_name(&fd);
        let mut reply = answer(
            size,
            || getxattr_query(path.as_c_str(), &*name),
            |buffer| getxattr(path.as_c_str(), &*name, buffer),
        )?;
        if let XattrReply::Data(value) = &mut reply {
            let (uid_map, gid_map) = self.identity.maps();
            value_to_guest(&name, value, uid_map, gid_map).map_err(|_| Errno::IO)?;
        }
        Ok(reply)
    }

    /// LISTXATTR.
    pub fn listxattr(&self, inode: &Inode, size: u32) -> Result<XattrReply> {
        self.check_offered()?;
        let host = host_names(inode)?;
        let mut names = Vec::new();
        names.try_reserve(host.len()).map_err(|_| Errno::NOMEM)?;
        for name in host.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
            if let Some(name) = self.guest_name(name) {
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

    /// REMOVEXATTR.
    pub fn removexattr(&self, inode: &Inode, name: &CStr) -> Result<()> {
        self.check_offered()?;
        let name = self.host_name(name).map_err(refused)?;
        removexattr(proc_name(&*inode.path()?), &*name).map_err(|errno| unsupported(errno, &name))
    }

    /// The name on the host of an attribute of the guest. A guest that does not evaluate ACLs has none: it would take the
    /// mode's group bits, which an ACL widens, for the group's.
    fn host_name<'n>(&self, name: &'n CStr) -> std::result::Result<Cow<'n, CStr>, Refusal> {
        let host = host_name(self.config, name)?;
        let is_acl = is_acl(name) || is_acl(&host);
        if is_acl && !self.session.acls { Err(Refusal::Unsupported) } else { Ok(host) }
    }

    /// The guest's name of an attribute of the host; `None` if it does not see it.
    fn guest_name<'n>(&self, name: &'n [u8]) -> Option<&'n [u8]> {
        if !self.session.acls && [ACCESS, DEFAULT].iter().any(|acl| acl.to_bytes() == name) {
            return None;
        }
        self.config.xattr_map.as_ref().map_or(Some(name), |map| map.to_guest(name))
    }

    /// Values are longer than what other requests need memory for.
    fn check_offered(&self) -> Result<()> {
        if self.config.xattr { memory::ask_for_some() } else { Err(NO_XATTR) }
    }
}

/// The name on the host of an attribute of the guest, by the rules alone.
pub fn host_name<'a>(config: &FsConfig, name: &'a CStr) -> std::result::Result<Cow<'a, CStr>, Refusal> {
    match &config.xattr_map {
        None => Ok(Cow::Borrowed(name)),
        Some(map) => map.to_host(name),
    }
}

/// The errno for a change of a refused attribute.
pub fn refused(refusal: Refusal) -> Errno {
    match refusal {
        Refusal::Bad => Errno::PERM,
        Refusal::Unsupported => Errno::NOTSUP,
        Refusal::TooLong => Errno::NODATA,
    }
}

/// The errno for an attribute that the host refuses: ENOTSUP for one that the daemon never may write. Programs that copy
/// attributes continue without it then, and fail at EPERM.
fn unsupported(errno: Errno, host_name: &CStr) -> Errno {
    let name = host_name.to_bytes();
    let privileged =
        name.starts_with(b"trusted.") || (name.starts_with(b"security.") && name != CAPABILITY.to_bytes());
    let may = credentials::permitted().is_ok_and(|permitted| permitted.contains(CapabilitySet::SYS_ADMIN));
    if errno == Errno::PERM && privileged && !may { Errno::NOTSUP } else { errno }
}

/// Sets an access ACL for a caller who is not in the file's group, and clears the set-group-ID bit.
fn set_acl_and_clear_sgid(inode: &Inode, value: &[u8], flags: XattrFlags) -> Result<()> {
    set_id_bits(SetIdBits::Clear)?;
    setxattr(proc_name(&*inode.path()?), ACCESS, value, flags)?;
    // The host has done so by itself, unless the file's group is the daemon's own.
    let mode = Mode::from_raw_mode(u32::from(stat(inode.path()?)?.stx_mode));
    if mode.contains(Mode::SGID) && inode.kind() != FileType::Symlink {
        chmodat(PROC, proc_name(&*inode.path()?), mode - Mode::SGID, AtFlags::empty())?;
    }
    Ok(())
}

/// All names that the host has, each with its NUL.
fn host_names(inode: &Inode) -> Result<Vec<u8>> {
    let fd = inode.path()?;
    let path = proc_name(&fd);
    for size in [USUAL_LIST, SIZE_MAX] {
        let mut names = Vec::new();
        memory::resize(&mut names, size)?;
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
    let mut value = Vec::new();
    memory::resize(&mut value, usize::try_from(size).unwrap_or(usize::MAX).min(SIZE_MAX))?;
    let len = ask(&mut value)?;
    value.truncate(len);
    Ok(XattrReply::Data(value))
}
