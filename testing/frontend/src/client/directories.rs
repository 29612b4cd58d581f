//! Directories: open, list, close.

use fuse_protocol::abi::{
    Dirent, Direntplus, EntryOut, FsyncIn, OpenIn, OpenOut, RECORD_ALIGN, ReadIn, ReleaseIn,
};
use fuse_protocol::opcode::Opcode;
use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::Client;
use crate::error::{Error, Result};
use crate::request::Request;

/// One entry of a directory listing.
#[derive(Clone, Debug)]
pub struct DirEntry {
    /// Inode number.
    pub ino: u64,
    /// Offset to go on from after this entry.
    pub offset: u64,
    /// `DT_*` of readdir(3).
    pub kind: u8,
    /// The name.
    pub name: Vec<u8>,
    /// The lookup that READDIRPLUS does; its `nodeid` is 0 where it was left out.
    pub entry: Option<EntryOut>,
}

impl Client<'_> {
    /// OPENDIR.
    pub fn opendir(&self, node: u64) -> Result<OpenOut> {
        let arg = OpenIn { flags: libc::O_DIRECTORY.cast_unsigned(), open_flags: 0 };
        self.call(Request::new(Opcode::Opendir, node).arg(&arg).reply::<OpenOut>())
    }

    /// RELEASEDIR.
    pub fn releasedir(&self, node: u64, fh: u64) -> Result<()> {
        let arg = ReleaseIn { fh, flags: 0, release_flags: 0, lock_owner: 0 };
        self.call_empty(Request::new(Opcode::Releasedir, node).arg(&arg))
    }

    /// FSYNCDIR.
    pub fn fsyncdir(&self, node: u64, fh: u64) -> Result<()> {
        self.call_empty(Request::new(Opcode::Fsyncdir, node).arg(&FsyncIn { fh, ..FsyncIn::default() }))
    }

    /// One READDIR of up to `size` bytes from `offset`; empty at the end.
    pub fn readdir(&self, node: u64, fh: u64, offset: u64, size: usize) -> Result<Vec<DirEntry>> {
        parse::<Dirent>(&self.list(Opcode::Readdir, node, fh, offset, size)?, |dirent| (*dirent, None))
    }

    /// One READDIRPLUS of up to `size` bytes from `offset`. Every entry with a nodeid is a lookup.
    pub fn readdirplus(&self, node: u64, fh: u64, offset: u64, size: usize) -> Result<Vec<DirEntry>> {
        let bytes = self.list(Opcode::Readdirplus, node, fh, offset, size)?;
        parse::<Direntplus>(&bytes, |plus| (plus.dirent, Some(plus.entry_out)))
    }

    fn list(&self, opcode: Opcode, node: u64, fh: u64, offset: u64, size: usize) -> Result<Vec<u8>> {
        let arg = ReadIn { fh, offset, size: size as u32, ..ReadIn::default() };
        self.call_bytes(&Request::new(opcode, node).arg(&arg).reply_data(size))
    }

    /// The names in a directory except `.` and `..`, read in pieces of `size` bytes.
    pub fn list_names(&self, node: u64, size: usize) -> Result<Vec<String>> {
        let fh = self.opendir(node)?.fh;
        let (mut names, mut offset) = (Vec::new(), 0);
        loop {
            let entries = self.readdir(node, fh, offset, size)?;
            let Some(last) = entries.last() else { break };
            offset = last.offset;
            let named = entries.iter().filter(|entry| entry.name != b"." && entry.name != b"..");
            names.extend(named.map(|entry| String::from_utf8_lossy(&entry.name).into_owned()));
        }
        self.releasedir(node, fh)?;
        Ok(names)
    }
}

fn parse<T: FromBytes + KnownLayout + Immutable>(
    mut bytes: &[u8],
    split: impl Fn(&T) -> (Dirent, Option<EntryOut>),
) -> Result<Vec<DirEntry>> {
    let bad = |problem: String| Error::BadReply { operation: "FUSE_READDIR", problem };
    let mut entries = Vec::new();
    while !bytes.is_empty() {
        let (record, rest) =
            T::read_from_prefix(bytes).map_err(|_| bad(format!("{} bytes are left over", bytes.len())))?;
        let (dirent, entry) = split(&record);
        let len = dirent.namelen as usize;
        let name = rest.get(..len).ok_or_else(|| bad(format!("a name of {len} bytes is cut off")))?;
        if name.is_empty() || name.contains(&0) || name.contains(&b'/') {
            return Err(bad(format!("the name {:?}", String::from_utf8_lossy(name))));
        }
        entries.push(DirEntry {
            ino: dirent.ino,
            offset: dirent.off,
            kind: dirent.typ as u8,
            name: name.to_vec(),
            entry,
        });
        let padded = (size_of::<T>() + len).next_multiple_of(RECORD_ALIGN);
        bytes = bytes.get(padded..).ok_or_else(|| bad("the last record is not padded".into()))?;
    }
    Ok(entries)
}
