//! Takes the arguments of a request off the front of its bytes.

use core::ffi::CStr;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{DecodeError, RawHeader, Result};
use crate::flags::OpenRequestFlags;
use crate::init::Layout;
use crate::name::{LookupName, Name};
use crate::opcode::Opcode;

/// The arguments of one kind of request.
pub(crate) trait Arguments<'a>: Sized {
    /// Takes them off the front of `cursor`.
    fn decode(cursor: &mut Cursor<'a>) -> Result<Self>;
}

/// The bytes of a request that were not taken so far, and what their form depends on.
pub(crate) struct Cursor<'a> {
    opcode: Opcode,
    declared_length: u32,
    layout: Layout,
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    /// At the first of `arguments`.
    pub(crate) fn new(opcode: Opcode, header: &RawHeader, layout: Layout, arguments: &'a [u8]) -> Cursor<'a> {
        Cursor { opcode, declared_length: header.wire().len, layout, rest: arguments }
    }

    /// The kind of request.
    pub(crate) fn opcode(&self) -> Opcode {
        self.opcode
    }

    /// Bytes of the whole request, as its header declares them.
    pub(crate) fn declared_length(&self) -> u32 {
        self.declared_length
    }

    /// How requests of the session are laid out.
    pub(crate) fn layout(&self) -> Layout {
        self.layout
    }

    /// The bytes that were not taken.
    pub(crate) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// Arguments at the front.
    pub(crate) fn arguments<T: Arguments<'a>>(&mut self) -> Result<T> {
        T::decode(self)
    }

    /// How to open. Before HANDLE_KILLPRIV_V2 these bytes were padding, which guests do not clear.
    pub(crate) fn open_flags(&self, raw: u32) -> OpenRequestFlags {
        match self.layout.open_flags {
            true => OpenRequestFlags::from_bits_truncate(raw),
            false => OpenRequestFlags::empty(),
        }
    }

    /// A struct at the front.
    pub(crate) fn take<T: FromBytes + KnownLayout + Immutable>(&mut self) -> Result<T> {
        let (value, rest) =
            T::read_from_prefix(self.rest).map_err(|_| DecodeError::Truncated(self.opcode))?;
        self.rest = rest;
        Ok(value)
    }

    /// A struct whose end older guests leave out: what is missing is zero.
    pub(crate) fn take_padded<T: FromBytes + IntoBytes>(&mut self) -> T {
        let mut value = T::new_zeroed();
        value.as_mut_bytes().iter_mut().zip(self.rest).for_each(|(to, from)| *to = *from);
        value
    }

    /// The next `count` bytes.
    pub(crate) fn bytes(&mut self, count: usize) -> Result<&'a [u8]> {
        let (bytes, rest) = self.rest.split_at_checked(count).ok_or(DecodeError::Truncated(self.opcode))?;
        self.rest = rest;
        Ok(bytes)
    }

    /// A string with its NUL.
    pub(crate) fn c_str(&mut self) -> Result<&'a CStr> {
        let name =
            CStr::from_bytes_until_nul(self.rest).map_err(|_| DecodeError::UnterminatedName(self.opcode))?;
        self.bytes(name.count_bytes() + 1)?;
        Ok(name)
    }

    /// The name of an entry.
    pub(crate) fn name(&mut self) -> Result<Name<'a>> {
        Name::new(self.c_str()?).map_err(|error| DecodeError::Name(self.opcode, error))
    }

    /// What a LOOKUP may name.
    pub(crate) fn lookup_name(&mut self) -> Result<LookupName<'a>> {
        LookupName::new(self.c_str()?).map_err(|error| DecodeError::Name(self.opcode, error))
    }

    /// An offset or length that fits the host's signed ones.
    pub(crate) fn offset(&self, value: u64) -> Result<u64> {
        if i64::try_from(value).is_ok() { Ok(value) } else { Err(DecodeError::Range(self.opcode)) }
    }
}
