//! Extended attributes.

use fuse_protocol::abi::{COMPAT_SETXATTR_IN_SIZE, GetxattrIn, GetxattrOut, SetxattrIn};
use fuse_protocol::flags::{InitFlags, SetxattrFlags};
use fuse_protocol::opcode::Opcode;
use zerocopy::IntoBytes;

use super::Client;
use crate::error::Result;
use crate::request::Request;

impl Client<'_> {
    /// SETXATTR with the flags of setxattr(2).
    pub fn setxattr(&self, node: u64, name: impl AsRef<[u8]>, value: &[u8], flags: i32) -> Result<()> {
        self.setxattr_with(node, name, value, flags, SetxattrFlags::empty())
    }

    /// SETXATTR with the flags of setxattr(2) and those of the protocol, which need SETXATTR_EXT.
    pub fn setxattr_with(
        &self,
        node: u64,
        name: impl AsRef<[u8]>,
        value: &[u8],
        flags: i32,
        setxattr_flags: SetxattrFlags,
    ) -> Result<()> {
        let arg = SetxattrIn {
            size: value.len() as u32,
            flags: flags.cast_unsigned(),
            setxattr_flags: setxattr_flags.bits(),
            ..SetxattrIn::default()
        };
        let long = self.session.init_flags().contains(InitFlags::SETXATTR_EXT);
        let len = if long { size_of::<SetxattrIn>() } else { COMPAT_SETXATTR_IN_SIZE };
        self.call_empty(
            Request::new(Opcode::Setxattr, node).arg(&arg.as_bytes()[..len]).name(name).arg(value),
        )
    }

    /// GETXATTR with room for `size` bytes.
    pub fn getxattr(&self, node: u64, name: impl AsRef<[u8]>, size: usize) -> Result<Vec<u8>> {
        let arg = GetxattrIn { size: size as u32, padding: 0 };
        self.call_bytes(&Request::new(Opcode::Getxattr, node).arg(&arg).name(name).reply_data(size))
    }

    /// GETXATTR of size 0: how long the value is.
    pub fn getxattr_size(&self, node: u64, name: impl AsRef<[u8]>) -> Result<usize> {
        let request = Request::new(Opcode::Getxattr, node).arg(&GetxattrIn::default()).name(name);
        self.call::<GetxattrOut>(request.reply::<GetxattrOut>()).map(|out| out.size as usize)
    }

    /// LISTXATTR with room for `size` bytes: names, each with its NUL.
    pub fn listxattr(&self, node: u64, size: usize) -> Result<Vec<u8>> {
        let arg = GetxattrIn { size: size as u32, padding: 0 };
        self.call_bytes(&Request::new(Opcode::Listxattr, node).arg(&arg).reply_data(size))
    }

    /// LISTXATTR of size 0: how long the list is.
    pub fn listxattr_size(&self, node: u64) -> Result<usize> {
        let request = Request::new(Opcode::Listxattr, node).arg(&GetxattrIn::default());
        self.call::<GetxattrOut>(request.reply::<GetxattrOut>()).map(|out| out.size as usize)
    }

    /// REMOVEXATTR.
    pub fn removexattr(&self, node: u64, name: impl AsRef<[u8]>) -> Result<()> {
        self.call_empty(Request::new(Opcode::Removexattr, node).name(name))
    }
}
