//! File handles: names for inodes that outlive descriptors (open_by_handle_at(2)).

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::{Errno, Result};

use super::last_errno;

/// Longest handle that a file system may have, in bytes (`MAX_HANDLE_SZ`).
const MAX_BYTES: usize = 128;

/// `struct file_handle` with room for the longest.
#[repr(C)]
struct Raw {
    bytes: u32,
    kind: i32,
    handle: [u8; MAX_BYTES],
}

/// What a file system calls an inode. It means the same inode for as long as that exists, and
/// nothing (ESTALE) afterwards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileHandle {
    kind: i32,
    bytes: HandleBytes,
}

/// `FILEID_INO64_GEN` of linux/exportfs.h: a number of 64 bits, its upper half first, and a generation.
const INO64_GEN: i32 = 0x81;

/// Bytes of a handle that are kept without further memory: enough for the handles of ext4 (8), XFS
/// and tmpfs (12) and btrfs (20).
const SHORT: usize = 22;

/// There may be millions of them.
#[derive(Clone, Debug, PartialEq, Eq)]
enum HandleBytes {
    Short { len: u8, bytes: [u8; SHORT] },
    Long(Box<[u8]>),
}

impl From<&[u8]> for HandleBytes {
    fn from(from: &[u8]) -> HandleBytes {
        let mut bytes = [0; SHORT];
        match (u8::try_from(from.len()), bytes.get_mut(..from.len())) {
            (Ok(len), Some(room)) => {
                room.copy_from_slice(from);
                HandleBytes::Short { len, bytes }
            }
            _ => HandleBytes::Long(from.into()),
        }
    }
}

impl FileHandle {
    /// A handle that was stored.
    pub fn new(kind: i32, bytes: &[u8]) -> FileHandle {
        FileHandle { kind, bytes: bytes.into() }
    }

    /// Its type, which the file system chose.
    pub fn kind(&self) -> i32 {
        self.kind
    }

    /// Number and generation of the inode, in a handle of the form that FUSE gives.
    pub fn number_and_generation(&self) -> Option<(u64, u32)> {
        let bytes: &[u8; 12] = self.bytes().try_into().ok().filter(|_| self.kind == INO64_GEN)?;
        let [a, b, c, d, e, f, g, h, i, j, k, l] = *bytes;
        let (upper, lower) = (u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]));
        Some((u64::from(upper) << 32 | u64::from(lower), u32::from_ne_bytes([i, j, k, l])))
    }

    /// What stands in it.
    pub fn bytes(&self) -> &[u8] {
        match &self.bytes {
            HandleBytes::Short { len, bytes } => bytes.get(..usize::from(*len)).unwrap_or_default(),
            HandleBytes::Long(bytes) => bytes,
        }
    }
}

/// The handle of what `fd` refers to (O_PATH is enough).
///
/// EOPNOTSUPP where the file system has no handles.
pub fn name_to_handle(fd: BorrowedFd<'_>) -> Result<FileHandle> {
    name_to_handle_at(fd, c"", libc::AT_EMPTY_PATH)
}

/// The handle of the entry `name` of a directory; links are not followed.
pub fn entry_to_handle(directory: BorrowedFd<'_>, name: &CStr) -> Result<FileHandle> {
    name_to_handle_at(directory, name, 0)
}

fn name_to_handle_at(fd: BorrowedFd<'_>, name: &CStr, flags: i32) -> Result<FileHandle> {
    let mut raw = Raw { bytes: u32::try_from(MAX_BYTES).unwrap_or(0), kind: 0, handle: [0; MAX_BYTES] };
    let mut mount = 0;
    // SAFETY: `raw` has the layout of a file_handle whose `handle_bytes` says how much room there
    // is; the name ends with a NUL, and `mount` is an int.
    let result = unsafe {
        libc::name_to_handle_at(
            fd.as_raw_fd(),
            name.as_ptr(),
            (&raw mut raw).cast::<libc::file_handle>(),
            &raw mut mount,
            flags,
        )
    };
    if result < 0 {
        return Err(last_errno());
    }
    let bytes =
        usize::try_from(raw.bytes).ok().and_then(|len| raw.handle.get(..len)).ok_or(Errno::OVERFLOW)?;
    Ok(FileHandle { kind: raw.kind, bytes: bytes.into() })
}

/// An O_PATH descriptor of the inode with this handle, on the file system that `mount` (not an
/// O_PATH descriptor) is on. ESTALE if the inode is gone; needs CAP_DAC_READ_SEARCH.
pub fn open_by_handle(mount: BorrowedFd<'_>, handle: &FileHandle) -> Result<OwnedFd> {
    let mut raw = Raw { bytes: 0, kind: handle.kind, handle: [0; MAX_BYTES] };
    let bytes = handle.bytes();
    raw.bytes = u32::try_from(bytes.len()).map_err(|_| Errno::OVERFLOW)?;
    raw.handle.get_mut(..bytes.len()).ok_or(Errno::OVERFLOW)?.copy_from_slice(bytes);
    let flags = libc::O_PATH | libc::O_NOFOLLOW;
    // SAFETY: `raw` has the layout of a file_handle with `handle_bytes` bytes behind it.
    let fd = unsafe {
        libc::open_by_handle_at(mount.as_raw_fd(), (&raw mut raw).cast::<libc::file_handle>(), flags)
    };
    if fd < 0 {
        return Err(last_errno());
    }
    // SAFETY: the kernel has just given this descriptor to us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_of_all_lengths_keep_their_bytes() {
        for len in 0..=MAX_BYTES {
            let bytes: Vec<u8> = (1..=len).map(|byte| u8::try_from(byte).unwrap()).collect();
            let handle = FileHandle { kind: 1, bytes: bytes.as_slice().into() };
            assert_eq!(handle.bytes(), bytes);
            assert_eq!(matches!(handle.bytes, HandleBytes::Short { .. }), len <= SHORT);
        }
    }

    #[test]
    fn handles_of_fuse_say_number_and_generation() {
        let bytes = [1u32, 2, 3].map(u32::to_ne_bytes).concat();
        let handle = |kind, bytes: &[u8]| FileHandle { kind, bytes: bytes.into() };
        assert_eq!(handle(INO64_GEN, &bytes).number_and_generation(), Some((1 << 32 | 2, 3)));
        assert_eq!(handle(1, &bytes).number_and_generation(), None);
        assert_eq!(handle(INO64_GEN, bytes.get(..8).unwrap()).number_and_generation(), None);
    }
}
