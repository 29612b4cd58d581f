//! IOCTL: flags and attributes of files, for chattr(1) and lsattr(1).
//!
//! Guests from Linux 5.13 on have checked their caller, and those that map ids (6.12) do not even name it. Older ones
//! pass on every program's request through any handle. So where the caller is named the command runs as the caller, and
//! the host's kernel checks: only the owner changes flags, and only CAP_LINUX_IMMUTABLE makes files immutable or
//! append-only, which the guest's root alone can act with, if the daemon has it.

use rustix::io::Errno;
use rustix::thread::{CapabilitySet, capabilities};

use crate::fs::passthrough::caller::identity::Identity;
use crate::fs::passthrough::handle_table::Handle;
use crate::fs::{Context, Result};
use crate::sys::file_flags;
use fuse_protocol::abi::INVALID_UIDGID;
use fuse_protocol::ids::GuestUid;
use fuse_protocol::ioctl::{Command, FileAttributes, PROJINHERIT_FLAG, PROJINHERIT_XFLAG, Reply};

/// IOCTL.
pub fn ioctl(identity: &Identity, ctx: &Context, handle: &Handle, command: Command) -> Result<Reply> {
    let file = handle.fd();
    match command {
        Command::GetFlags => return file_flags::flags(file).map(Reply::Flags),
        Command::GetAttributes => return attributes(handle).map(Reply::Attributes),
        Command::SetFlags(new) => {
            if (file_flags::flags(file)? ^ new) & PROJINHERIT_FLAG != 0 {
                may_change_projects()?;
            }
        }
        Command::SetAttributes(new) => {
            let old = attributes(handle)?;
            if old.projid != new.projid || (old.xflags ^ new.xflags) & PROJINHERIT_XFLAG != 0 {
                may_change_projects()?;
            }
        }
    }
    let named = ![GuestUid(0), GuestUid(INVALID_UIDGID)].contains(&ctx.uid);
    let _caller = named.then(|| identity.become_user(ctx)).transpose()?;
    match command {
        Command::SetFlags(flags) => file_flags::set_flags(file, flags)?,
        Command::SetAttributes(new) => file_flags::set_attributes(file, zerocopy::transmute!(new))?,
        Command::GetFlags | Command::GetAttributes => {}
    }
    Ok(Reply::Done)
}

fn attributes(handle: &Handle) -> Result<FileAttributes> {
    file_flags::attributes(handle.fd()).map(|bytes| zerocopy::transmute!(bytes))
}

/// The host limits a guest's disk space by projects, so a guest does not choose them, as containers do not: EPERM, unless
/// the daemon has the capability to which no quota applies anyway.
fn may_change_projects() -> Result<()> {
    match capabilities(None)?.effective.contains(CapabilitySet::SYS_RESOURCE) {
        true => Ok(()),
        false => Err(Errno::PERM),
    }
}
