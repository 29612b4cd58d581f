//! IOCTL.

use fuse_protocol::abi::{IoctlIn, IoctlOut};
use fuse_protocol::flags::IoctlFlags;
use fuse_protocol::opcode::Opcode;

use super::Client;
use crate::error::Result;
use crate::request::Request;

impl Client<'_> {
    /// IOCTL of a file: hands `data` in and returns what comes back, at most `room` bytes.
    pub fn ioctl(&self, node: u64, fh: u64, command: u32, data: &[u8], room: u32) -> Result<Vec<u8>> {
        self.ioctl_with(node, fh, command, data, room, IoctlFlags::empty())
    }

    /// The same with any flags, such as those of a directory.
    pub fn ioctl_with(
        &self,
        node: u64,
        fh: u64,
        command: u32,
        data: &[u8],
        room: u32,
        flags: IoctlFlags,
    ) -> Result<Vec<u8>> {
        let in_size = data.len() as u32;
        let arg = IoctlIn { fh, flags: flags.bits(), cmd: command, arg: 0, in_size, out_size: room };
        let request = Request::new(Opcode::Ioctl, node).arg(&arg).arg(data);
        let reply = self.call_bytes(&request.reply::<IoctlOut>().reply_data(room as usize))?;
        Ok(reply.get(size_of::<IoctlOut>()..).unwrap_or_default().to_vec())
    }
}
