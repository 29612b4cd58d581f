//! GETLK, SETLK and SETLKW.

use crate::abi;
use crate::decode::{Arguments, Cursor, DecodeError, Result};
use crate::flags::LockFlags;
use crate::ids::{HandleId, LockOwner};

/// The kind of a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// Shared.
    Read,
    /// Exclusive.
    Write,
    /// None: unlock.
    Unlock,
}

impl LockKind {
    /// The kind with this number in [`abi::FileLock`], if there is one.
    pub fn from_wire(number: u32) -> Option<LockKind> {
        match number {
            abi::F_RDLCK => Some(LockKind::Read),
            abi::F_WRLCK => Some(LockKind::Write),
            abi::F_UNLCK => Some(LockKind::Unlock),
            _ => None,
        }
    }

    /// Its number in [`abi::FileLock`].
    pub fn to_wire(self) -> u32 {
        match self {
            LockKind::Read => abi::F_RDLCK,
            LockKind::Write => abi::F_WRLCK,
            LockKind::Unlock => abi::F_UNLCK,
        }
    }
}

/// Arguments of GETLK, SETLK and SETLKW.
#[derive(Clone, Copy, Debug)]
pub struct Lock {
    /// The open file.
    pub handle: HandleId,
    /// Who holds or wants the lock.
    pub owner: LockOwner,
    /// First byte.
    pub start: u64,
    /// Last byte, inclusive; `i64::MAX` for "to the end of the file".
    pub end: u64,
    /// What is wanted.
    pub kind: LockKind,
    /// The process in the guest.
    pub pid: u32,
    /// A flock(2) lock on the handle, not a POSIX one.
    pub flock: bool,
}

impl<'a> Arguments<'a> for Lock {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Lock> {
        let raw: abi::LkIn = cursor.take()?;
        let out_of_range = DecodeError::Range(cursor.opcode());
        let kind = LockKind::from_wire(raw.lk.typ).ok_or(out_of_range)?;
        let (start, end) = (cursor.offset(raw.lk.start)?, cursor.offset(raw.lk.end)?);
        if start > end {
            return Err(out_of_range);
        }
        Ok(Lock {
            handle: HandleId(raw.fh),
            owner: LockOwner(raw.owner),
            start,
            end,
            kind,
            pid: raw.lk.pid,
            flock: LockFlags::from_bits_truncate(raw.lk_flags).contains(LockFlags::FLOCK),
        })
    }
}
