//! What follows for the host's files from the [`Agreement`] with the guest.

use super::inode::io_mode::IoPolicy;
use crate::fs::Agreement;
use crate::fs::passthrough::config::FsConfig;
use fuse_protocol::flags::InitFlags;

/// What guest and daemon agreed on.
#[derive(Clone, Copy, Debug)]
pub struct Session {
    /// How files are opened.
    pub policy: IoPolicy,
    /// Directories that are roots of other mounts are marked.
    pub submounts: bool,
    /// The guest says whether a change clears set-id bits (HANDLE_KILLPRIV_V2).
    pub says_who_clears: bool,
    /// The guest says whether an ACL clears the set-group-ID bit (SETXATTR_EXT).
    pub long_setxattr: bool,
    /// New files keep the set-group-ID bit that they are created with: the guest's kernel has decided.
    pub keeps_group_bit: bool,
    /// The daemon applies umasks (DONT_MASK).
    pub leaves_umask: bool,
    /// The guest evaluates ACLs, and so may see and set them.
    pub acls: bool,
    /// What is created gets the guest's security labels.
    pub labels: bool,
}

impl Session {
    /// What follows from the agreement with the guest; without a session, from no flags.
    pub fn new(config: &FsConfig, agreement: &Agreement) -> Session {
        let flags = agreement.flags();
        Session {
            policy: IoPolicy::new(config, flags),
            submounts: flags.contains(InitFlags::SUBMOUNTS),
            says_who_clears: flags.contains(InitFlags::HANDLE_KILLPRIV_V2),
            long_setxattr: flags.contains(InitFlags::SETXATTR_EXT),
            keeps_group_bit: guest_strips_group_bit(agreement.minor(), flags),
            leaves_umask: flags.contains(InitFlags::DONT_MASK),
            acls: flags.contains(InitFlags::POSIX_ACL),
            labels: flags.contains(InitFlags::SECURITY_CTX),
        }
    }
}

/// Whether the guest's kernel alone decides on the set-group-ID bit of new files. From Linux 6.1 on it clears the bit
/// itself where the caller is not in the directory's group. The host does so as well, but worse where it does not know
/// the caller's groups: it clears the bit for members, too.
fn guest_strips_group_bit(minor: u32, flags: InitFlags) -> bool {
    minor >= 37 && !flags.contains(InitFlags::CREATE_SUPP_GROUP)
}
