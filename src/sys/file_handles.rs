//! File handles: names for inodes that outlive descriptors (open_by_handle_at(2)).

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
    mount: i32,
    bytes: HandleBytes,
}

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
    /// The id of the mount that the inode was reached by.
    pub fn mount(&self) -> i32 {
        self.mount
    }

    fn bytes(&self) -> &[u8] {
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
    let mut raw = Raw { bytes: u32::try_from(MAX_BYTES).unwrap_or(0), kind: 0, handle: [0; MAX_BYTES] };
    let mut mount = 0;
    // SAFETY: `raw` has the layout of a file_handle whose `handle_bytes` says how much room there
    // is; the path is an empty string, and `mount` an int.
    let result = unsafe {
        libc::name_to_handle_at(
            fd.as_raw_fd(),
            c"".as_ptr(),
            (&raw mut raw).cast::<libc::file_handle>(),
            &raw mut mount,
            libc::AT_EMPTY_PATH,
        )
    };
    if result < 0 {
        return Err(last_errno());
    }
    let bytes =
        usize::try_from(raw.bytes).ok().and_then(|len| raw.handle.get(..len)).ok_or(Errno::OVERFLOW)?;
    Ok(FileHandle { kind: raw.kind, mount, bytes: bytes.into() })
}

/// An O_PATH descriptor of the inode with this handle, on the file system that `mount` (not an
/// O_PATH descriptor) is on. ESTALE if the inode is gone; needs CAP_DAC_READ_SEARCH.
pub fn open_by_handle(mount: BorrowedFd<'_>, handle: &FileHandle) -> Result<OwnedFd> {
    let mut raw = Raw { bytes: 0, kind: handle.kind, handle: [0; MAX_BYTES] };
    let bytes = handle.bytes();
    raw.bytes = u32::try_from(bytes.len()).map_err(|_| Errno::OVERFLOW)?;
    raw.handle.get_mut(..bytes.len()).ok_or(Errno::OVERFLOW)?.copy_from_slice(bytes);
    let flags = libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC;
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
            let handle = FileHandle { kind: 1, mount: 2, bytes: bytes.as_slice().into() };
            assert_eq!(handle.bytes(), bytes);
            assert_eq!(matches!(handle.bytes, HandleBytes::Short { .. }), len <= SHORT);
        }
    }
}
