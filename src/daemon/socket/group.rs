//! The group that may connect to the socket (`--socket-group`).

use std::process::Command;

use rustix::fs::{AtFlags, CWD, Gid, Mode, chmodat, chownat};
use rustix::io::Errno;

use super::ListenError;
use super::path::{Node, SocketPath};

/// A group of the host.
#[derive(Debug)]
pub(super) struct Group {
    name: String,
    id: Gid,
}

impl Group {
    /// Finds a group by its name or its number.
    pub(super) fn find(name: &str) -> Result<Group, ListenError> {
        let local = std::fs::read_to_string("/etc/group").ok().and_then(|groups| group_id(&groups, name));
        let id = local.or_else(|| name.parse().ok()).or_else(|| from_a_service(name));
        let id = id.ok_or_else(|| ListenError::NoGroup(name.to_owned()))?;
        Ok(Group { name: name.to_owned(), id: Gid::from_raw(id) })
    }

    /// Lets the group connect to a socket of this process.
    pub(super) fn may_connect_to(&self, socket: &Node, place: &SocketPath) -> Result<(), ListenError> {
        // The directory's owner may have put another socket of the same user there. This process listens
        // on the right one.
        let peer = socket.connect().and_then(|stream| Ok(rustix::net::sockopt::socket_peercred(&stream)?));
        if !peer.is_ok_and(|peer| peer.pid == rustix::process::getpid()) {
            return Err(ListenError::Replaced(place.display()));
        }
        let failed = |errno: Errno| place.failed(errno.into());
        chownat(socket, "", None, Some(self.id), AtFlags::EMPTY_PATH).map_err(|errno| match errno {
            Errno::PERM | Errno::INVAL => ListenError::ForeignGroup(self.name.clone()),
            errno => failed(errno),
        })?;
        let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::WGRP;
        chmodat(CWD, socket.path(), mode, AtFlags::empty()).map_err(failed)
    }
}

/// The id of a group in the form of group(5).
fn group_id(groups: &str, name: &str) -> Option<u32> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok()).flatten()
    })
}

/// The id of a group from any source that nsswitch.conf(5) names, such as LDAP.
fn from_a_service(name: &str) -> Option<u32> {
    let output = Command::new("getent").args(["group", "--", name]).output().ok()?;
    let line = String::from_utf8(output.stdout).ok()?;
    line.split(':').nth(2)?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_found_by_name_and_number() {
        assert_eq!(group_id("root:x:0:\nkvm:x:104:qemu,me\n", "kvm"), Some(104));
        assert_eq!(group_id("root:x:0:\nkvm:x:104:qemu,me\n", "k"), None);
        assert_eq!(Group::find("root").unwrap().id, Gid::ROOT);
        assert_eq!(Group::find("4000000").unwrap().id.as_raw(), 4_000_000);
        assert!(matches!(Group::find("nobody-here"), Err(ListenError::NoGroup(_))));
        assert_eq!(from_a_service("root"), Some(0));
    }
}
