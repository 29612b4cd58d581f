//! INIT: version and flags of a session, negotiated between guest and server.
//!
//! [`negotiate`] makes a reply that suits a virtio-fs device; a server with other limits changes the fields of
//! [`Negotiated`] before it sends them.

use thiserror::Error;

use crate::abi;
use crate::flags::InitFlags;
use crate::request::Init;

/// Pages of the longest request that is served, in pages of [`PAGE_SIZE`] bytes: for Linux, which cuts it
/// down to what its ring and its `fs.fuse.max_pages_limit` allow.
pub const MAX_PAGES: u16 = 4096;
/// The same for other guests, which may use it all and then meet limits of their own: the Windows
/// driver refuses requests of more than 1024 pages, headers included. Linux had this limit up to 6.12.
const CAREFUL_PAGES: u16 = 256;
/// Unit of [`MAX_PAGES`] in bytes.
pub const PAGE_SIZE: u32 = 4096;
/// Bytes of the longest WRITE of all guests.
pub const MAX_WRITE: u32 = MAX_PAGES as u32 * PAGE_SIZE;
/// Pages of the longest request when the guest lacks MAX_PAGES (`FUSE_DEFAULT_MAX_PAGES_PER_REQ`).
const DEFAULT_PAGES: u32 = 32;
/// Requests that the guest may send in the background (readahead, writeback, asynchronous I/O).
const MAX_BACKGROUND: u16 = 1024;
/// Background requests from which on the guest counts the device as congested.
const CONGESTION_THRESHOLD: u16 = 768;
/// Minor version from which on the header announces extensions (Linux 6.3).
const MINOR_EXTENSIONS: u32 = 38;
/// Minor version from which on DIRECT_IO_ALLOW_MMAP and parallel direct writes go together (Linux 6.9).
const MINOR_ALLOW_MMAP: u32 = 40;

/// Why a guest's INIT is refused.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum InitError {
    /// The guest is older than Linux 4.20.
    #[error(
        "the guest speaks FUSE {major}.{minor}; 7.{} (Linux 4.20) is the oldest that is served",
        abi::OLDEST_MINOR_VERSION
    )]
    TooOld {
        /// The guest's major version.
        major: u32,
        /// The guest's minor version.
        minor: u32,
    },
}

/// How requests of a session are laid out, where that was agreed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// SETXATTR has its long form (SETXATTR_EXT).
    pub long_setxattr: bool,
    /// Labels of new inodes follow the arguments without being announced in the header: Linux 5.17
    /// to 6.2.
    pub trailing_labels: bool,
    /// The header's last word counts, in requests that create something: it announces extensions.
    pub extensions: bool,
    /// OPEN and CREATE say how to open (HANDLE_KILLPRIV_V2).
    pub open_flags: bool,
}

impl Layout {
    /// The layout that goes with a minor version and the flags that were agreed on.
    pub fn new(minor: u32, flags: InitFlags) -> Layout {
        let labels = flags.contains(InitFlags::SECURITY_CTX);
        let announces = minor >= MINOR_EXTENSIONS;
        Layout {
            long_setxattr: flags.contains(InitFlags::SETXATTR_EXT),
            trailing_labels: labels && !announces,
            extensions: flags.contains(InitFlags::CREATE_SUPP_GROUP) || (labels && announces),
            open_flags: flags.contains(InitFlags::HANDLE_KILLPRIV_V2),
        }
    }
}

/// What both sides agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// The lower of both minor versions.
    pub minor: u32,
    /// Flags that both sides know and want.
    pub flags: InitFlags,
    /// Bytes of the longest WRITE.
    pub max_write: u32,
    /// Bytes of the longest read-ahead.
    pub max_readahead: u32,
    /// Pages of the longest request; 0 for a guest without MAX_PAGES, which does not ask.
    pub max_pages: u16,
}

/// Answers an INIT with what both the guest and the daemon (`offered`) want.
///
/// Returns `None` for a guest with a newer major version: it gets [`major_mismatch`] and asks again.
pub fn negotiate(init: &Init, offered: InitFlags) -> Result<Option<Negotiated>, InitError> {
    if init.major > abi::KERNEL_VERSION {
        return Ok(None);
    }
    if init.major < abi::KERNEL_VERSION || init.minor < abi::OLDEST_MINOR_VERSION {
        return Err(InitError::TooOld { major: init.major, minor: init.minor });
    }
    let minor = init.minor.min(abi::KERNEL_MINOR_VERSION);
    let mut flags = init.flags & (offered | InitFlags::MAX_PAGES | InitFlags::INIT_EXT);
    if minor < MINOR_ALLOW_MMAP {
        flags.remove(InitFlags::DIRECT_IO_ALLOW_MMAP);
    }
    // Only with HANDLE_KILLPRIV_V2 does an OPEN that truncates say whether set-id bits are to go. A
    // guest without it clears them by itself, if it truncates by SETATTR.
    if !flags.contains(InitFlags::HANDLE_KILLPRIV_V2) {
        flags.remove(InitFlags::ATOMIC_O_TRUNC);
    }
    let max_pages = max_pages(init, flags);
    let max_write = if max_pages == 0 { DEFAULT_PAGES * PAGE_SIZE } else { u32::from(max_pages) * PAGE_SIZE };
    Ok(Some(Negotiated { minor, flags, max_write, max_readahead: init.max_readahead, max_pages }))
}

/// Pages of the longest request, by whether the guest is known to cut requests by its ring. Linux does, and
/// of all guests it alone has PARALLEL_DIROPS, in every version since 4.7: the Windows driver, UEFI firmware
/// and those made after the Windows driver send no flags but READDIRPLUS and MAX_PAGES. Minor versions do not
/// tell them apart: Windows and Linux 5.4 both have 31.
fn max_pages(init: &Init, agreed: InitFlags) -> u16 {
    match agreed.contains(InitFlags::MAX_PAGES) {
        true if init.flags.contains(InitFlags::PARALLEL_DIROPS) => MAX_PAGES,
        true => CAREFUL_PAGES,
        false => 0,
    }
}

/// The answer to a guest whose major version is newer: ours, and nothing else.
pub fn major_mismatch() -> abi::InitOut {
    abi::InitOut { major: abi::KERNEL_VERSION, minor: abi::KERNEL_MINOR_VERSION, ..Default::default() }
}

impl Negotiated {
    /// How requests are laid out.
    pub fn layout(&self) -> Layout {
        Layout::new(self.minor, self.flags)
    }

    /// The reply's body.
    pub fn to_wire(&self) -> abi::InitOut {
        let [b0, b1, b2, b3, b4, b5, b6, b7] = self.flags.bits().to_le_bytes();
        abi::InitOut {
            major: abi::KERNEL_VERSION,
            minor: abi::KERNEL_MINOR_VERSION,
            max_readahead: self.max_readahead,
            flags: u32::from_le_bytes([b0, b1, b2, b3]),
            max_background: MAX_BACKGROUND,
            congestion_threshold: CONGESTION_THRESHOLD,
            max_write: self.max_write,
            // The host's time stamps are exact to the nanosecond.
            time_gran: 1,
            max_pages: self.max_pages,
            flags2: u32::from_le_bytes([b4, b5, b6, b7]),
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn init(minor: u32, flags: InitFlags) -> Init {
        Init { major: 7, minor, max_readahead: 131_072, flags }
    }

    #[test]
    fn truncating_opens_need_a_guest_with_killpriv_v2() {
        let agreed = |guest| negotiate(&init(36, guest), InitFlags::all()).unwrap().unwrap().flags;
        assert!(!agreed(InitFlags::ATOMIC_O_TRUNC).contains(InitFlags::ATOMIC_O_TRUNC));
        let both = InitFlags::ATOMIC_O_TRUNC | InitFlags::HANDLE_KILLPRIV_V2;
        assert!(agreed(both).contains(both));
    }

    #[test]
    fn the_flags_of_both_sides_are_negotiated() {
        let guest = InitFlags::ASYNC_READ | InitFlags::POSIX_LOCKS | InitFlags::MAX_PAGES;
        let offered = InitFlags::ASYNC_READ | InitFlags::SUBMOUNTS;
        let agreed = negotiate(&init(31, guest), offered).unwrap().unwrap();
        assert_eq!(agreed.flags, InitFlags::ASYNC_READ | InitFlags::MAX_PAGES);
        assert_eq!(agreed.minor, 31);
        assert_eq!(agreed.to_wire().minor, 45);
    }

    #[test]
    fn long_requests_are_for_guests_that_cut_them() {
        let (pages, linux) = (InitFlags::MAX_PAGES, InitFlags::PARALLEL_DIROPS);
        for (minor, guest, max_write, max_pages) in [
            // Linux 5.4, 5.10, 6.1 and 7.2.
            (31, pages | linux, 16 << 20, 4096),
            (32, pages | linux, 16 << 20, 4096),
            (37, pages | linux | InitFlags::INIT_EXT, 16 << 20, 4096),
            (45, pages | linux | InitFlags::INIT_EXT, 16 << 20, 4096),
            // Windows of today, and what may come of it.
            (31, pages | InitFlags::DO_READDIRPLUS, 1 << 20, 256),
            (38, pages | InitFlags::DO_READDIRPLUS | InitFlags::INIT_EXT, 1 << 20, 256),
            // Older drivers for Windows, and firmware.
            (31, InitFlags::DO_READDIRPLUS, 128 << 10, 0),
            (27, linux, 128 << 10, 0),
        ] {
            // Whether the daemon offers the flag that gives Linux away is another matter.
            for offered in [InitFlags::all(), InitFlags::empty()] {
                let wire = negotiate(&init(minor, guest), offered).unwrap().unwrap().to_wire();
                assert_eq!((wire.max_write, wire.max_pages), (max_write, max_pages), "{minor} {guest:?}");
            }
        }
    }

    #[test]
    fn flags_past_bit_31_travel_in_flags2() {
        let both = InitFlags::INIT_EXT | InitFlags::CREATE_SUPP_GROUP;
        let wire = negotiate(&init(45, both), both).unwrap().unwrap().to_wire();
        assert_eq!(wire.flags2, 1 << 2);
        assert_eq!(wire.flags, 1 << 30);
    }

    #[test]
    fn shared_mappings_need_minor_40() {
        let flag = InitFlags::DIRECT_IO_ALLOW_MMAP;
        assert!(!negotiate(&init(39, flag), flag).unwrap().unwrap().flags.contains(flag));
        assert!(negotiate(&init(40, flag), flag).unwrap().unwrap().flags.contains(flag));
    }

    #[test]
    fn older_versions_are_refused_and_newer_ones_corrected() {
        for (major, minor) in [(6, 50), (7, 26), (7, 0)] {
            let old = Init { major, minor, max_readahead: 0, flags: InitFlags::empty() };
            assert_eq!(negotiate(&old, InitFlags::all()), Err(InitError::TooOld { major, minor }));
        }
        let new = Init { major: 8, minor: 0, max_readahead: 0, flags: InitFlags::empty() };
        assert_eq!(negotiate(&new, InitFlags::all()), Ok(None));
        assert_eq!(negotiate(&init(99, InitFlags::empty()), InitFlags::all()).unwrap().unwrap().minor, 45);
    }
}
