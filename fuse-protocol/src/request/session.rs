//! INIT, INTERRUPT, FORGET and BATCH_FORGET.

use zerocopy::FromBytes;

use crate::abi;
use crate::decode::{Arguments, Cursor, DecodeError, Result};
use crate::flags::InitFlags;
use crate::ids::{NodeId, Unique};

/// Arguments of INIT.
#[derive(Clone, Copy, Debug)]
pub struct Init {
    /// Major version; 7.
    pub major: u32,
    /// Minor version of the guest.
    pub minor: u32,
    /// Longest read-ahead of the guest in bytes.
    pub max_readahead: u32,
    /// What the guest can do.
    pub flags: InitFlags,
}

impl<'a> Arguments<'a> for Init {
    /// Both halves of the flags are put together. Guests below 7.36 send less.
    fn decode(cursor: &mut Cursor<'a>) -> Result<Init> {
        if cursor.rest().len() < abi::COMPAT_INIT_IN_SIZE {
            return Err(DecodeError::Truncated(cursor.opcode()));
        }
        let raw: abi::InitIn = cursor.take_padded();
        let low = InitFlags::from_bits_truncate(u64::from(raw.flags));
        let high = if low.contains(InitFlags::INIT_EXT) { u64::from(raw.flags2) << 32 } else { 0 };
        Ok(Init {
            major: raw.major,
            minor: raw.minor,
            max_readahead: raw.max_readahead,
            flags: low | InitFlags::from_bits_truncate(high),
        })
    }
}

/// Arguments of INTERRUPT.
#[derive(Clone, Copy, Debug)]
pub struct Interrupt {
    /// The request to interrupt.
    pub unique: Unique,
}

impl<'a> Arguments<'a> for Interrupt {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Interrupt> {
        Ok(Interrupt { unique: Unique(cursor.take::<abi::InterruptIn>()?.unique) })
    }
}

/// Arguments of FORGET.
#[derive(Clone, Copy, Debug)]
pub struct Forget {
    /// What to take off the inode's lookup count.
    pub nlookup: u64,
}

impl<'a> Arguments<'a> for Forget {
    fn decode(cursor: &mut Cursor<'a>) -> Result<Forget> {
        Ok(Forget { nlookup: cursor.take::<abi::ForgetIn>()?.nlookup })
    }
}

/// The items of a BATCH_FORGET.
#[derive(Clone, Copy, Debug)]
pub struct BatchForget<'a>(&'a [u8]);

impl BatchForget<'_> {
    /// Each inode and what to take off its lookup count.
    pub fn iter(&self) -> impl Iterator<Item = (NodeId, u64)> {
        let items = self.0.chunks_exact(size_of::<abi::ForgetOne>());
        items
            .filter_map(|item| abi::ForgetOne::read_from_bytes(item).ok())
            .map(|one| (NodeId(one.nodeid), one.nlookup))
    }
}

impl<'a> Arguments<'a> for BatchForget<'a> {
    fn decode(cursor: &mut Cursor<'a>) -> Result<BatchForget<'a>> {
        let count = usize::try_from(cursor.take::<abi::BatchForgetIn>()?.count);
        let bytes = count.ok().and_then(|n| n.checked_mul(size_of::<abi::ForgetOne>()));
        cursor.bytes(bytes.unwrap_or(usize::MAX)).map(BatchForget)
    }
}
