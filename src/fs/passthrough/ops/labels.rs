//! Security labels that the guest gives new files, with `--security-label`.
//!
//! No system call creates a file with an extended attribute. A regular file gets its label before its name, so that it
//! is never visible without. Anything else has its name for a moment before, and is removed if the label cannot be
//! written.

use std::borrow::Cow;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, XattrFlags, linkat, openat, removexattr, setxattr};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::namespace_ops::remove_made;
use super::xattr::{host_name, refused};
use crate::fs::passthrough::config::{FeatureMode, FsConfig};
use crate::fs::passthrough::host::{PATH, PROC};
use crate::fs::passthrough::session::Session;
use crate::fs::passthrough::start_error::StartError;
use crate::fs::passthrough::state::PassthroughFs;
use crate::fs::{Context, Result};

/// The label that is tried at the start. Its value does not matter: an unknown one is refused with another errno than one
/// that must not be written.
const PROBED: &CStr = c"security.selinux";
const PROBE: &[u8] = b"system_u:object_r:unlabeled_t:s0\0";

/// Whether labels are offered to guests: if they were asked for and can be written.
pub fn offers_labels(root: impl AsFd, config: &FsConfig) -> std::result::Result<bool, StartError> {
    if config.security_label == FeatureMode::Never {
        return Ok(false);
    }
    let missing = match host_name(config, PROBED) {
        Err(_) => StartError::LabelsAreForbidden,
        Ok(name) => match probe(root.as_fd(), &name) {
            Err(Errno::NOTSUP) => StartError::NoLabels,
            Err(Errno::PERM | Errno::ACCESS) => {
                StartError::LabelsNeedPrivilege(name.to_string_lossy().into_owned())
            }
            // Every request that creates something gets any other error.
            _ => return Ok(true),
        },
    };
    if config.security_label == FeatureMode::Always {
        return Err(missing);
    }
    log::info!("security labels are not offered to the guest: {missing}");
    Ok(false)
}

/// Tries to label a temporary file without a name.
fn probe(root: BorrowedFd<'_>, name: &CStr) -> Result<()> {
    let flags = OFlags::TMPFILE | OFlags::RDWR;
    match openat(PROC, DecInt::from_fd(root), flags, Mode::empty()) {
        Ok(file) => {
            setxattr(DecInt::from_fd(&file), name, PROBE, XattrFlags::empty())?;
            removexattr(DecInt::from_fd(&file), name)
        }
        // A read-only share, or a file system without unnamed files: only reads the attribute.
        Err(_) => match rustix::fs::getxattr_query(DecInt::from_fd(root), name) {
            Err(Errno::NODATA) => Ok(()),
            result => result.map(drop),
        },
    }
}

/// Whether this request labels what it creates.
pub fn is_labelled(session: &Session, ctx: &Context) -> bool {
    session.labels && !ctx.labels.is_empty()
}

/// Labels the entry `name`, which was just created.
pub fn label_entry(
    fs: &PassthroughFs,
    session: &Session,
    ctx: &Context,
    parent: BorrowedFd<'_>,
    name: &CStr,
) -> Result<()> {
    if !is_labelled(session, ctx) {
        return Ok(());
    }
    let path = fs.inodes.with_room(|| openat(parent, name, PATH, Mode::empty()))?;
    write_labels(&fs.config, ctx, &path)
}

/// CREATE with labels, with `flags` as for openat(2): the file is created without a name, labelled, and linked. The
/// descriptor is open for reading and writing.
pub fn create_labelled(
    fs: &PassthroughFs,
    session: &Session,
    ctx: &Context,
    (parent, name): (BorrowedFd<'_>, &CStr),
    (mode, umask): (u32, u32),
    flags: OFlags,
) -> Result<OwnedFd> {
    let unnamed = ((flags - (OFlags::RWMODE | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW))
        | OFlags::TMPFILE)
        | OFlags::RDWR;
    let create = |mode| openat(PROC, DecInt::from_fd(parent), unnamed, mode);
    match fs.identity.create_as(session, ctx, mode, umask, create) {
        Ok(file) => {
            write_labels(&fs.config, ctx, &file)?;
            linkat(PROC, DecInt::from_fd(&file), parent, name, AtFlags::SYMLINK_FOLLOW)?;
            Ok(file)
        }
        // A file system without unnamed files (NFS, say).
        Err(Errno::NOTSUP | Errno::ISDIR) => {
            let create = |mode| openat(parent, name, flags, mode);
            let file = fs.identity.create_as(session, ctx, mode, umask, create)?;
            write_labels(&fs.config, ctx, &file).inspect_err(|_| remove_made(parent, name, &file))?;
            Ok(file)
        }
        Err(errno) => Err(errno),
    }
}

/// Writes the request's labels to what `file` refers to, with the daemon's own privileges: the guest's kernel has
/// decided on them.
pub fn write_labels(config: &FsConfig, ctx: &Context, file: impl AsFd) -> Result<()> {
    for label in ctx.labels.iter() {
        let name: Cow<'_, CStr> = host_name(config, label.name).map_err(refused)?;
        setxattr(DecInt::from_fd(file.as_fd()), &*name, label.value, XattrFlags::empty())?;
    }
    Ok(())
}
