//! What the start of a share may fail at.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::Dir;
use rustix::io::Errno;
use thiserror::Error;

use super::budget::Budget;
use super::config::InodeFileHandles;
use super::pins::Descriptors;

/// Why a directory cannot be served as it was asked for.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum StartError {
    /// The host's file system has no ACLs.
    #[error("the share's file system has no POSIX ACLs: leave --posix-acl out, or give --posix-acl=auto")]
    NoAcls,
    /// Rules for names and ACLs cannot go together.
    #[error(
        "--posix-acl needs ACLs under their own names, but --xattrmap changes or forbids them: put the rule \
         :ok:all:system.posix_acl_:system.posix_acl_: first"
    )]
    AclsAreMapped,
    /// The host's file system has no attributes for labels.
    #[error(
        "the share's file system cannot keep security labels: leave --security-label out, or give \
         --security-label=auto"
    )]
    NoLabels,
    /// Rules forbid the names of labels.
    #[error(
        "--security-label needs the attribute security.selinux, but --xattrmap forbids it: change the rules"
    )]
    LabelsAreForbidden,
    /// The daemon may not write labels.
    #[error(
        "--security-label needs the attribute {0}, which the daemon must not write: give it CAP_SYS_ADMIN with \
         --modcaps=+sys_admin, or leave --security-label out"
    )]
    LabelsNeedPrivilege(String),
    /// `--inode-file-handles=mandatory` cannot be had.
    #[error(
        "inodes cannot be held by file handles, which takes CAP_DAC_READ_SEARCH and a file system whose handles \
         last (those of FUSE do not): leave out --inode-file-handles=mandatory"
    )]
    NoFileHandles,
    /// A system call failed.
    #[error(transparent)]
    System(#[from] Errno),
}

/// How many descriptors this process has open; `proc_self_fd` lists them.
pub(super) fn open_descriptors(proc_self_fd: &OwnedFd) -> std::result::Result<usize, StartError> {
    let list = Dir::read_from(proc_self_fd)?;
    // Two entries are the directory and its parent, and one is of the list itself.
    Ok(list.count().saturating_sub(3))
}

/// How inodes share what descriptors there are.
pub(super) fn descriptors(
    wanted: InodeFileHandles,
    root: &OwnedFd,
    budget: &Arc<Budget>,
) -> std::result::Result<Descriptors, StartError> {
    match (wanted, Descriptors::limited(root, budget)) {
        (InodeFileHandles::Never, _) => Ok(Descriptors::unlimited(budget)),
        (_, Ok(descriptors)) => Ok(descriptors),
        (InodeFileHandles::Mandatory, Err(_)) => Err(StartError::NoFileHandles),
        (InodeFileHandles::Prefer, Err(errno)) => {
            budget.warn_without_handles(errno);
            Ok(Descriptors::unlimited(budget))
        }
    }
}
