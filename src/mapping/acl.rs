//! Translation of ids inside the values of extended attributes: POSIX ACLs name users and groups, and file capabilities
//! can name the root user of a namespace.

use std::ffi::CStr;

use thiserror::Error;

use super::ids::{GidMap, HostGid, HostUid, Id, UidMap};
use fuse_protocol::ids::{GuestGid, GuestUid};

/// The access ACL of a file.
pub const ACCESS: &CStr = c"system.posix_acl_access";
/// The ACL that new files in a directory get.
pub const DEFAULT: &CStr = c"system.posix_acl_default";
/// The capabilities of a program.
pub const CAPABILITY: &CStr = c"security.capability";

/// Bytes of an ACL's header, a version (`struct posix_acl_xattr_header`).
const ACL_HEADER: usize = 4;
/// Bytes of an ACL's entry: tag, permissions, id (`struct posix_acl_xattr_entry`).
const ACL_ENTRY: usize = 8;
const ACL_VERSION: [u8; ACL_HEADER] = 2u32.to_le_bytes();
/// Tags of entries with an id (`ACL_USER`, `ACL_GROUP`).
const TAG_USER: u16 = 0x02;
const TAG_GROUP: u16 = 0x08;
/// The upper byte of `magic_etc` in capabilities that have a root user (`VFS_CAP_REVISION_3`).
const CAPABILITY_REVISION_3: u8 = 3;
/// Bytes before the root user in `struct vfs_ns_cap_data`.
const CAPABILITY_ROOT: usize = 20;

/// Why a value cannot be translated.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ValueError {
    /// It is malformed.
    #[error("it is not an ACL")]
    Malformed,
    /// It names an id that the guest must not use.
    #[error("it names a forbidden id")]
    Forbidden,
}

/// Whether this attribute is a POSIX ACL.
pub fn is_acl(name: &CStr) -> bool {
    name == ACCESS || name == DEFAULT
}

/// Whether ids may be in this attribute's value.
pub fn holds_ids(name: &CStr) -> bool {
    is_acl(name) || name == CAPABILITY
}

/// Puts the host's ids into a value from the guest.
pub fn value_to_host(name: &CStr, value: &mut [u8], uids: &UidMap, gids: &GidMap) -> Result<(), ValueError> {
    if uids.is_identity() && gids.is_identity() {
        return Ok(());
    }
    let uid = |id| uids.to_host(GuestUid::from_number(id)).map(HostUid::number);
    let gid = |id| gids.to_host(GuestGid::from_number(id)).map(HostGid::number);
    translate(name, value, uid, gid)
}

/// Puts the guest's ids into a value from the host.
pub fn value_to_guest(name: &CStr, value: &mut [u8], uids: &UidMap, gids: &GidMap) -> Result<(), ValueError> {
    if uids.is_identity() && gids.is_identity() {
        return Ok(());
    }
    let uid = |id| Some(uids.to_guest(HostUid::from_number(id)).number());
    let gid = |id| Some(gids.to_guest(HostGid::from_number(id)).number());
    translate(name, value, uid, gid)
}

fn translate(
    name: &CStr,
    value: &mut [u8],
    uid: impl Fn(u32) -> Option<u32>,
    gid: impl Fn(u32) -> Option<u32>,
) -> Result<(), ValueError> {
    if is_acl(name) {
        translate_acl(value, uid, gid)
    } else if name == CAPABILITY {
        translate_capability(value, uid)
    } else {
        Ok(())
    }
}

fn translate_acl(
    value: &mut [u8],
    uid: impl Fn(u32) -> Option<u32>,
    gid: impl Fn(u32) -> Option<u32>,
) -> Result<(), ValueError> {
    // setxattr(2) with no value at all removes an ACL.
    if value.is_empty() {
        return Ok(());
    }
    let (version, entries) = value.split_at_mut_checked(ACL_HEADER).ok_or(ValueError::Malformed)?;
    if version != ACL_VERSION || !entries.len().is_multiple_of(ACL_ENTRY) {
        return Err(ValueError::Malformed);
    }
    for entry in entries.chunks_exact_mut(ACL_ENTRY) {
        let [t0, t1, _, _, id @ ..] = entry else { return Err(ValueError::Malformed) };
        match u16::from_le_bytes([*t0, *t1]) {
            TAG_USER => replace(id, &uid)?,
            TAG_GROUP => replace(id, &gid)?,
            _ => {}
        }
    }
    Ok(())
}

/// Only the long form has a root user; of any other form the host is the judge.
fn translate_capability(value: &mut [u8], uid: impl Fn(u32) -> Option<u32>) -> Result<(), ValueError> {
    let revision = value.get(3).copied();
    match value.get_mut(CAPABILITY_ROOT..) {
        Some(root) if revision == Some(CAPABILITY_REVISION_3) && root.len() == size_of::<u32>() => {
            replace(root, uid)
        }
        _ => Ok(()),
    }
}

fn replace(id: &mut [u8], translate: impl Fn(u32) -> Option<u32>) -> Result<(), ValueError> {
    let old: [u8; 4] = (&*id).try_into().map_err(|_| ValueError::Malformed)?;
    let new = translate(u32::from_le_bytes(old)).ok_or(ValueError::Forbidden)?;
    id.copy_from_slice(&new.to_le_bytes());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn maps(uid: &[&str], gid: &[&str]) -> (UidMap, GidMap) {
        let parse = |rules: &[&str]| rules.iter().map(|rule| rule.parse().unwrap()).collect::<Vec<_>>();
        (UidMap::new(&parse(uid)).unwrap(), GidMap::new(&parse(gid)).unwrap())
    }

    fn acl(entries: &[(u16, u32)]) -> Vec<u8> {
        let mut value = ACL_VERSION.to_vec();
        for (tag, id) in entries {
            value.extend(tag.to_le_bytes());
            value.extend(7u16.to_le_bytes());
            value.extend(id.to_le_bytes());
        }
        value
    }

    #[test]
    fn users_and_groups_are_translated_each_with_their_own_map() {
        let (uids, gids) = maps(&["map:0:100000:65536"], &["map:0:200000:65536"]);
        // USER_OBJ, MASK and OTHER have no id; the field stays.
        let guest = acl(&[(0x01, u32::MAX), (0x02, 5), (0x04, 0), (0x08, 5), (0x10, 5), (0x20, u32::MAX)]);
        let mut value = guest.clone();
        value_to_host(ACCESS, &mut value, &uids, &gids).unwrap();
        let expected = acl(&[
            (0x01, u32::MAX),
            (0x02, 100_005),
            (0x04, 0),
            (0x08, 200_005),
            (0x10, 5),
            (0x20, u32::MAX),
        ]);
        assert_eq!(value, expected);
        value_to_guest(DEFAULT, &mut value, &uids, &gids).unwrap();
        assert_eq!(value, guest);
        // Other attributes stay as they are.
        value_to_host(c"user.posix_acl_access", &mut value, &uids, &gids).unwrap();
        assert_eq!(value, guest);
    }

    #[test]
    fn forbidden_ids_are_refused() {
        let (uids, gids) = maps(&["forbid-guest:0:10"], &["forbid-guest:20:10"]);
        let try_it = |entry| value_to_host(DEFAULT, &mut acl(&[entry]), &uids, &gids);
        assert_eq!(try_it((TAG_USER, 9)), Err(ValueError::Forbidden));
        assert_eq!(try_it((TAG_USER, 20)), Ok(()));
        assert_eq!(try_it((TAG_GROUP, 9)), Ok(()));
        assert_eq!(try_it((TAG_GROUP, 20)), Err(ValueError::Forbidden));
    }

    #[test]
    fn a_malformed_acl_is_refused() {
        let (uids, gids) = maps(&["map:0:1:1"], &[]);
        let good = acl(&[(TAG_USER, 0)]);
        for bad in [&good[..3], &good[..11], &[&good[..], &[0]].concat(), b"\x01\0\0\0"] {
            assert_eq!(
                value_to_host(ACCESS, &mut bad.to_vec(), &uids, &gids),
                Err(ValueError::Malformed),
                "{bad:?}"
            );
        }
        assert_eq!(value_to_host(ACCESS, &mut [], &uids, &gids), Ok(()));
        assert_eq!(value_to_host(ACCESS, &mut good[..4].to_vec(), &uids, &gids), Ok(()));
    }

    #[test]
    fn the_root_user_of_capabilities_is_translated() {
        let (uids, gids) = maps(&["map:0:1000:1"], &["forbid-guest:0:100"]);
        let mut long = vec![0; 24];
        long[3] = 3;
        let before = long.clone();
        value_to_host(CAPABILITY, &mut long, &uids, &gids).unwrap();
        assert_eq!(long[20..], 1000u32.to_le_bytes());
        value_to_guest(CAPABILITY, &mut long, &uids, &gids).unwrap();
        assert_eq!(long, before);
        let mut short = vec![0; 20];
        short[3] = 2;
        value_to_host(CAPABILITY, &mut short, &uids, &gids).unwrap();
        assert_eq!(short[..3], [0; 3]);
    }

    proptest! {
        /// Total, and the length never changes.
        #[test]
        fn any_value_is_translated_or_refused(
            value in proptest::collection::vec(any::<u8>(), 0..60), versioned: bool, name in 0..3usize,
        ) {
            let (uids, gids) = maps(&["map:0:100000:65536", "forbid-guest:65536:1000"], &["squash-guest:0:5:4294967295"]);
            let name = [ACCESS, DEFAULT, CAPABILITY][name];
            let mut new = if versioned { [&ACL_VERSION[..], &value].concat() } else { value };
            let len = new.len();
            let _ = value_to_host(name, &mut new, &uids, &gids);
            let _ = value_to_guest(name, &mut new, &uids, &gids);
            prop_assert_eq!(new.len(), len);
        }

        #[test]
        fn acls_go_round(entries in proptest::collection::vec((prop_oneof![Just(1u16), Just(2), Just(8), Just(16)], 0..65536u32), 0..10)) {
            let (uids, gids) = maps(&["map:0:100000:65536"], &["map:0:70000:65536"]);
            let guest = acl(&entries);
            let mut value = guest.clone();
            value_to_host(ACCESS, &mut value, &uids, &gids).unwrap();
            value_to_guest(ACCESS, &mut value, &uids, &gids).unwrap();
            prop_assert_eq!(value, guest);
        }
    }
}
