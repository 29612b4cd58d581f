//! Security labels that the guest gives what it creates, with `--security-label`.
//!
//! No system call creates a file with an extended attribute. A regular file gets its label before
//! it gets its name, so that nobody meets it without. Anything else has its name for a moment
//! before, and loses it again if the label cannot be written.

use std::borrow::Cow;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, XattrFlags, linkat, openat, removexattr, setxattr};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::config::{FeatureMode, FsConfig};
use super::lookup::{PATH, PROC};
use super::names::take_away;
use super::xattr::{host_name, refused};
use super::{Context, PassthroughFs, StartError};
use crate::fs::Result;

/// What is tried at start. Which label it is does not matter: an unknown one is refused otherwise
/// than one that must not be written.
const PROBED: &CStr = c"security.selinux";
const PROBE: &[u8] = b"system_u:object_r:unlabeled_t:s0\0";

/// Whether labels are to be offered to guests: if they were asked for and can be written.
pub(super) fn can_be_had(root: impl AsFd, config: &FsConfig) -> std::result::Result<bool, StartError> {
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
            // Whatever else there is to say, each request that creates something hears it.
            _ => return Ok(true),
        },
    };
    if config.security_label == FeatureMode::Always {
        return Err(missing);
    }
    log::info!("security labels are not offered to the guest: {missing}");
    Ok(false)
}

/// Tries to label a file that has no name and goes at once.
fn probe(root: BorrowedFd<'_>, name: &CStr) -> Result<()> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match openat(PROC, DecInt::from_fd(root), flags, Mode::empty()) {
        Ok(file) => {
            setxattr(DecInt::from_fd(&file), name, PROBE, XattrFlags::empty())?;
            removexattr(DecInt::from_fd(&file), name)
        }
        // A share where nothing can be written, or no file can be without a name: ask instead.
        Err(_) => match rustix::fs::getxattr_query(DecInt::from_fd(root), name) {
            Err(Errno::NODATA) => Ok(()),
            result => result.map(drop),
        },
    }
}

impl PassthroughFs {
    /// Whether what this request creates is to be labelled.
    pub(super) fn is_labelled(&self, ctx: &Context) -> bool {
        self.session().labels && !ctx.labels.is_empty()
    }

    /// Labels the entry `name`, which was just created.
    pub(super) fn label_entry(&self, ctx: &Context, parent: BorrowedFd<'_>, name: &CStr) -> Result<()> {
        if !self.is_labelled(ctx) {
            return Ok(());
        }
        let path = self.with_room(|| openat(parent, name, PATH, Mode::empty()))?;
        self.write_labels(ctx, &path)
    }

    /// CREATE with labels, with `flags` as for openat(2): the file is made without a name,
    /// labelled, and linked. The descriptor is open for reading and writing.
    pub(super) fn create_labelled(
        &self,
        ctx: &Context,
        parent: BorrowedFd<'_>,
        name: &CStr,
        (mode, umask): (u32, u32),
        flags: OFlags,
    ) -> Result<OwnedFd> {
        let unnamed = ((flags - (OFlags::RWMODE | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW))
            | OFlags::TMPFILE)
            | OFlags::RDWR;
        let made =
            self.create_as(ctx, mode, umask, |mode| openat(PROC, DecInt::from_fd(parent), unnamed, mode));
        match made {
            Ok(file) => {
                self.write_labels(ctx, &file)?;
                linkat(PROC, DecInt::from_fd(&file), parent, name, AtFlags::SYMLINK_FOLLOW)?;
                Ok(file)
            }
            // A file system without unnamed files (NFS, say).
            Err(Errno::NOTSUP | Errno::ISDIR) => {
                let make = |mode| openat(parent, name, flags, mode);
                let file = self.create_as(ctx, mode, umask, make)?;
                self.write_labels(ctx, &file).inspect_err(|_| take_away(parent, name, &file))?;
                Ok(file)
            }
            Err(errno) => Err(errno),
        }
    }

    /// Writes the request's labels to what `file` refers to, with the daemon's own privileges: the
    /// guest's kernel has decided on them.
    pub(super) fn write_labels(&self, ctx: &Context, file: impl AsFd) -> Result<()> {
        for label in ctx.labels.iter().filter(|_| self.session().labels) {
            let name: Cow<'_, CStr> = host_name(&self.config, label.name).map_err(refused)?;
            setxattr(DecInt::from_fd(file.as_fd()), &*name, label.value, XattrFlags::empty())?;
        }
        Ok(())
    }
}
