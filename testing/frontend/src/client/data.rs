//! Open files and their data.

use fuse_protocol::abi::{
    CopyFileRangeIn, CopyFileRangeOut, FallocateIn, FlushIn, FsyncIn, LseekIn, LseekOut, OpenIn, OpenOut,
    ReadIn, ReleaseIn, WriteIn, WriteOut,
};
use fuse_protocol::flags::{ReleaseFlags, WriteFlags};
use fuse_protocol::opcode::Opcode;

use super::Client;
use crate::error::{Error, Result};
use crate::request::Request;

impl Client<'_> {
    /// OPEN with `O_*` flags.
    pub fn open(&self, node: u64, flags: i32) -> Result<OpenOut> {
        self.open_with(node, flags, 0)
    }

    /// OPEN with `O_*` flags and `FUSE_OPEN_*` flags.
    pub fn open_with(&self, node: u64, flags: i32, open_flags: u32) -> Result<OpenOut> {
        let arg = OpenIn { flags: flags.cast_unsigned(), open_flags };
        self.call(Request::new(Opcode::Open, node).arg(&arg).reply::<OpenOut>())
    }

    /// RELEASE.
    pub fn release(&self, node: u64, fh: u64) -> Result<()> {
        self.release_with(node, fh, ReleaseFlags::empty(), 0)
    }

    /// RELEASE with flags and a lock owner.
    pub fn release_with(&self, node: u64, fh: u64, flags: ReleaseFlags, lock_owner: u64) -> Result<()> {
        let arg = ReleaseIn { fh, flags: 0, release_flags: flags.bits(), lock_owner };
        self.call_empty(Request::new(Opcode::Release, node).arg(&arg))
    }

    /// READ of up to `size` bytes.
    pub fn read(&self, node: u64, fh: u64, offset: u64, size: usize) -> Result<Vec<u8>> {
        self.call_bytes(&read_request(node, fh, offset, size))
    }

    /// READ with the `O_*` flags that the guest has for the file.
    pub fn read_with(
        &self,
        node: u64,
        fh: u64,
        offset: u64,
        size: usize,
        open_flags: i32,
    ) -> Result<Vec<u8>> {
        self.call_bytes(&read_request_with(node, fh, offset, size, open_flags))
    }

    /// WRITE; returns the bytes written.
    pub fn write(&self, node: u64, fh: u64, offset: u64, data: &[u8]) -> Result<usize> {
        self.write_with(node, fh, offset, data, WriteFlags::empty(), libc::O_RDWR)
    }

    /// WRITE with `FUSE_WRITE_*` flags and the `O_*` flags that the guest has for the file.
    pub fn write_with(
        &self,
        node: u64,
        fh: u64,
        offset: u64,
        data: &[u8],
        flags: WriteFlags,
        open_flags: i32,
    ) -> Result<usize> {
        let request = write_request(node, fh, offset, data, flags, open_flags);
        let out: WriteOut = self.call(request)?;
        if out.size as usize > data.len() {
            let problem = format!("{} of {} bytes are said to be written", out.size, data.len());
            return Err(Error::BadReply { operation: "FUSE_WRITE", problem });
        }
        Ok(out.size as usize)
    }

    /// FLUSH, as close(2) sends it.
    pub fn flush(&self, node: u64, fh: u64, lock_owner: u64) -> Result<()> {
        let arg = FlushIn { fh, unused: 0, padding: 0, lock_owner };
        self.call_empty(Request::new(Opcode::Flush, node).arg(&arg))
    }

    /// FSYNC; `data_only` as fdatasync(2).
    pub fn fsync(&self, node: u64, fh: u64, data_only: bool) -> Result<()> {
        let arg = FsyncIn { fh, fsync_flags: u32::from(data_only), padding: 0 };
        self.call_empty(Request::new(Opcode::Fsync, node).arg(&arg))
    }

    /// FALLOCATE with the mode of fallocate(2).
    pub fn fallocate(&self, node: u64, fh: u64, mode: i32, offset: u64, length: u64) -> Result<()> {
        let arg = FallocateIn { fh, offset, length, mode: mode.cast_unsigned(), padding: 0 };
        self.call_empty(Request::new(Opcode::Fallocate, node).arg(&arg))
    }

    /// LSEEK; Linux sends it for SEEK_DATA and SEEK_HOLE.
    pub fn lseek(&self, node: u64, fh: u64, offset: u64, whence: i32) -> Result<u64> {
        let arg = LseekIn { fh, offset, whence: whence.cast_unsigned(), padding: 0 };
        let request = Request::new(Opcode::Lseek, node).arg(&arg).reply::<LseekOut>();
        self.call::<LseekOut>(request).map(|out| out.offset)
    }

    /// COPY_FILE_RANGE from `(node, fh, offset)` to another; returns the bytes copied.
    pub fn copy_file_range(&self, from: (u64, u64, u64), to: (u64, u64, u64), len: u64) -> Result<usize> {
        let request = Request::new(Opcode::CopyFileRange, from.0).arg(&copy_argument(from, to, len));
        self.call::<WriteOut>(request.reply::<WriteOut>()).map(|out| out.size as usize)
    }

    /// COPY_FILE_RANGE_64, the same with a 64-bit answer.
    pub fn copy_file_range_64(&self, from: (u64, u64, u64), to: (u64, u64, u64), len: u64) -> Result<u64> {
        let request = Request::new(Opcode::CopyFileRange64, from.0).arg(&copy_argument(from, to, len));
        self.call::<CopyFileRangeOut>(request.reply::<CopyFileRangeOut>()).map(|out| out.bytes_copied)
    }

    /// A whole file through one OPEN, in reads of 64 KiB.
    pub fn read_file(&self, node: u64) -> Result<Vec<u8>> {
        let fh = self.open(node, libc::O_RDONLY)?.fh;
        let mut all = Vec::new();
        loop {
            let piece = self.read(node, fh, all.len() as u64, 64 << 10)?;
            if piece.is_empty() {
                break;
            }
            all.extend_from_slice(&piece);
        }
        self.release(node, fh)?;
        Ok(all)
    }
}

/// A READ, for [`Client::send`].
pub fn read_request<'a>(node: u64, fh: u64, offset: u64, size: usize) -> Request<'a> {
    read_request_with(node, fh, offset, size, libc::O_RDONLY)
}

/// A READ with the `O_*` flags that the guest has for the file, for [`Client::send`].
pub fn read_request_with<'a>(node: u64, fh: u64, offset: u64, size: usize, open_flags: i32) -> Request<'a> {
    let flags = open_flags.cast_unsigned();
    let arg = ReadIn { fh, offset, size: size as u32, read_flags: 0, lock_owner: 0, flags, padding: 0 };
    Request::new(Opcode::Read, node).arg(&arg).reply_data(size)
}

/// A WRITE, for [`Client::send`].
pub fn write_request<'a>(
    node: u64,
    fh: u64,
    offset: u64,
    data: &'a [u8],
    flags: WriteFlags,
    open_flags: i32,
) -> Request<'a> {
    let arg = WriteIn {
        fh,
        offset,
        size: data.len() as u32,
        write_flags: flags.bits(),
        lock_owner: 0,
        flags: open_flags.cast_unsigned(),
        padding: 0,
    };
    Request::new(Opcode::Write, node).arg(&arg).data(data).reply::<WriteOut>()
}

fn copy_argument(from: (u64, u64, u64), to: (u64, u64, u64), len: u64) -> CopyFileRangeIn {
    CopyFileRangeIn {
        fh_in: from.1,
        off_in: from.2,
        nodeid_out: to.0,
        fh_out: to.1,
        off_out: to.2,
        len,
        flags: 0,
    }
}
