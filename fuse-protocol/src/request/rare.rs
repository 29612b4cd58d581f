//! Operations that virtio-fs devices seldom serve: BMAP, POLL, NOTIFY_REPLY and mappings in a DAX window.

use zerocopy::FromBytes;

use crate::abi;
use crate::decode::{Arguments, Cursor, Result};
use crate::flags::{PollFlags, SetupMappingFlags};
use crate::ids::HandleId;

/// Arguments of BMAP.
#[derive(Clone, Copy, Debug)]
pub struct Bmap {
    /// Block of the file.
    pub block: u64,
    /// Bytes of a block.
    pub block_size: u32,
}

impl<'a> Arguments<'a> for Bmap {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Bmap> {
        let raw: abi::BmapIn = cursor.take()?;
        Ok(Bmap { block: raw.block, block_size: raw.blocksize })
    }
}

/// Arguments of POLL.
#[derive(Clone, Copy, Debug)]
pub struct Poll {
    /// The open file.
    pub handle: HandleId,
    /// The guest's number for the waiter, for NOTIFY_POLL.
    pub waiter: u64,
    /// Whether to notify.
    pub flags: PollFlags,
    /// `POLL*` of poll(2) that are waited for.
    pub events: u32,
}

impl<'a> Arguments<'a> for Poll {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Poll> {
        let raw: abi::PollIn = cursor.take()?;
        let flags = PollFlags::from_bits_truncate(raw.flags);
        Ok(Poll { handle: HandleId(raw.fh), waiter: raw.kh, flags, events: raw.events })
    }
}

/// Arguments of NOTIFY_REPLY: what a NOTIFY_RETRIEVE asked for.
#[derive(Clone, Copy, Debug)]
pub struct NotifyReply<'a> {
    /// Where the data stands in the file, in bytes.
    pub offset: u64,
    /// The cached data.
    pub data: &'a [u8],
}

impl<'a> Arguments<'a> for NotifyReply<'a> {
    fn decode(cursor: &mut Cursor<'a>) -> Result<NotifyReply<'a>> {
        let raw: abi::NotifyRetrieveIn = cursor.take()?;
        let data = cursor.bytes(usize::try_from(raw.size).unwrap_or(usize::MAX))?;
        Ok(NotifyReply { offset: raw.offset, data })
    }
}

/// Arguments of SETUPMAPPING.
#[derive(Clone, Copy, Debug)]
pub struct SetupMapping {
    /// The open file.
    pub handle: HandleId,
    /// Offset in the file in bytes; at most `i64::MAX`.
    pub file_offset: u64,
    /// Bytes; at most `i64::MAX`.
    pub length: u64,
    /// How the guest uses the mapping.
    pub flags: SetupMappingFlags,
    /// Offset in the DAX window in bytes.
    pub window_offset: u64,
}

impl<'a> Arguments<'a> for SetupMapping {
    fn decode(cursor: &mut Cursor<'a>) -> Result<SetupMapping> {
        let raw: abi::SetupMappingIn = cursor.take()?;
        Ok(SetupMapping {
            handle: HandleId(raw.fh),
            file_offset: cursor.offset(raw.foffset)?,
            length: cursor.offset(raw.len)?,
            flags: SetupMappingFlags::from_bits_truncate(raw.flags),
            window_offset: raw.moffset,
        })
    }
}

/// The items of a REMOVEMAPPING.
#[derive(Clone, Copy, Debug)]
pub struct RemoveMapping<'a>(&'a [u8]);

impl RemoveMapping<'_> {
    /// Offset in the DAX window and length of each mapping, in bytes.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        let items = self.0.chunks_exact(size_of::<abi::RemoveMappingOne>());
        items
            .filter_map(|item| abi::RemoveMappingOne::read_from_bytes(item).ok())
            .map(|one| (one.moffset, one.len))
    }
}

impl<'a> Arguments<'a> for RemoveMapping<'a> {
    fn decode(cursor: &mut Cursor<'a>) -> Result<RemoveMapping<'a>> {
        let count = usize::try_from(cursor.take::<abi::RemoveMappingIn>()?.count);
        let bytes = count.ok().and_then(|n| n.checked_mul(size_of::<abi::RemoveMappingOne>()));
        cursor.bytes(bytes.unwrap_or(usize::MAX)).map(RemoveMapping)
    }
}
