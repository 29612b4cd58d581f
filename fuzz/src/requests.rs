//! Requests that get past the decoder: arguments of every kind, about inodes and handles that are
//! there.

use fuse_protocol::abi;
use fuse_protocol::opcode::Opcode;
use zerocopy::{Immutable, IntoBytes};

use crate::input::Input;

/// What a request may be about.
#[derive(Debug, Default)]
pub struct Known {
    /// Node ids that the guest was told of.
    pub nodes: Vec<u64>,
    /// Handles that are open, and their nodes.
    pub handles: Vec<(u64, u64)>,
}

const NAMES: &[&[u8]] =
    &[b"a", b"b", b"file", b"dir", b".", b"..", b"", b"x/y", b"\xff\xfe", &[b'n'; 255], &[b'n'; 256]];
const ATTRIBUTES: &[&[u8]] = &[b"user.a", b"user.b", b"security.selinux", b"system.posix_acl_access", b""];

/// One request, not yet in memory.
#[derive(Debug)]
pub struct Draft {
    /// Its kind.
    pub opcode: Opcode,
    /// The inode it is about.
    pub node: u64,
    /// All that follows the header.
    pub arguments: Vec<u8>,
    /// 8-byte units of extensions at the end of the arguments.
    pub extensions: u16,
}

/// Writes arguments out of the fuzzer's bytes.
struct Writer<'a, 'b> {
    input: &'a mut Input<'b>,
    known: &'a Known,
    out: Vec<u8>,
}

/// A request of kind `opcode` that `input` chooses.
pub fn draft(opcode: Opcode, input: &mut Input<'_>, known: &Known) -> Draft {
    let mut writer = Writer { input, known, out: Vec::new() };
    let mut node = writer.node();
    writer.arguments(opcode, &mut node);
    let mut out = writer.out;
    let mut extensions = 0;
    if opcode.creates() && input.byte() & 7 == 1 {
        let typ = input.choose(&[1, 2, abi::EXT_GROUPS, 0, 33]);
        let body = match typ {
            abi::EXT_GROUPS => [1u32.to_le_bytes(), input.word().to_le_bytes()].concat(),
            _ => [&4u64.to_le_bytes()[..], b"security.x\0", input.bytes(13)].concat(),
        };
        let size = (body.len() + 8).next_multiple_of(8);
        let header = abi::ExtHeader { size: u32::try_from(size).unwrap_or(0), typ };
        out.extend(header.as_bytes());
        out.extend(&body);
        out.resize(out.len() + size - 8 - body.len(), 0);
        extensions = u16::try_from(size / 8).unwrap_or(0);
    }
    Draft { opcode, node, arguments: out, extensions }
}

impl Writer<'_, '_> {
    fn node(&mut self) -> u64 {
        match self.input.byte() {
            0..=63 => 1,
            choice @ 64..=247 if !self.known.nodes.is_empty() => {
                self.known.nodes[usize::from(choice) % self.known.nodes.len()]
            }
            _ => self.input.edge(),
        }
    }

    /// An open handle; the request is about its node as a rule.
    fn handle(&mut self, node: &mut u64) -> u64 {
        let choice = self.input.byte();
        if choice > 240 || self.known.handles.is_empty() {
            return self.input.edge();
        }
        let (handle, its_node) = self.known.handles[usize::from(choice) % self.known.handles.len()];
        if choice < 220 {
            *node = its_node;
        }
        handle
    }

    fn put<T: IntoBytes + Immutable>(&mut self, value: T) {
        self.out.extend(value.as_bytes());
    }

    fn name(&mut self) {
        let name = self.input.choose(NAMES);
        self.out.extend(name);
        self.out.push(0);
    }

    fn size(&mut self) -> u32 {
        u32::try_from(self.input.edge() & u64::from(u32::MAX)).unwrap_or(0)
    }

    fn open_flags(&mut self) -> u32 {
        let flags = [0, 1, 2, 2 | 0o1000, 1 | 0o2000, 2 | 0o200, 2 | 0o40000];
        match self.input.byte() {
            255 => self.input.word(),
            choice => flags[usize::from(choice) % flags.len()],
        }
    }

    fn arguments(&mut self, opcode: Opcode, node: &mut u64) {
        use Opcode::{
            Access, BatchForget, Create, Forget, Getattr, Getxattr, Init, Interrupt, Link, Listxattr, Lookup,
            Mkdir, Mknod, Open, Opendir, Removexattr, Rename, Rename2, Rmdir, Setattr, Setxattr, Statx,
            Symlink, Tmpfile, Unlink,
        };
        match opcode {
            Init => self.init(),
            Lookup | Unlink | Rmdir => self.name(),
            Forget => {
                let nlookup = self.input.edge();
                self.put(abi::ForgetIn { nlookup });
            }
            BatchForget => self.batch_forget(),
            Getattr | Statx => {
                let (getattr_flags, fh) = (u32::from(self.input.byte() & 1), self.handle(node));
                self.put(abi::StatxIn { getattr_flags, fh, ..Default::default() });
            }
            Setattr => self.setattr(node),
            Symlink => {
                self.name();
                self.name();
            }
            Mknod => {
                let mode = self.input.choose(&[0o644, 0o100_600, 0o010_644, 0o020_600, 0o140_777, 0o040_755]);
                self.put(abi::MknodIn { mode, rdev: 259, umask: 0o22, padding: 0 });
                self.name();
            }
            Mkdir => {
                self.put(abi::MkdirIn { mode: 0o755, umask: 0 });
                self.name();
            }
            Rename => {
                let newdir = self.node();
                self.put(abi::RenameIn { newdir });
                self.name();
                self.name();
            }
            Rename2 => {
                let (newdir, flags) = (self.node(), u32::from(self.input.byte() & 7));
                self.put(abi::Rename2In { newdir, flags, padding: 0 });
                self.name();
                self.name();
            }
            Link => {
                let oldnodeid = self.node();
                self.put(abi::LinkIn { oldnodeid });
                self.name();
            }
            Open | Opendir => {
                let flags = self.open_flags();
                self.put(abi::OpenIn { flags, open_flags: 0 });
            }
            Create | Tmpfile => {
                let flags = self.open_flags();
                self.put(abi::CreateIn { flags, mode: 0o100_644, umask: 0o22, open_flags: 0 });
                self.name();
            }
            Setxattr => self.setxattr(),
            Getxattr => {
                let size = self.size();
                self.put(abi::GetxattrIn { size, padding: 0 });
                self.attribute();
            }
            Listxattr => {
                let size = self.size();
                self.put(abi::GetxattrIn { size, padding: 0 });
            }
            Removexattr => self.attribute(),
            Access => self.put(abi::AccessIn { mask: 7, padding: 0 }),
            Interrupt => {
                let unique = self.input.edge();
                self.put(abi::InterruptIn { unique });
            }
            _ => self.on_handle(opcode, node),
        }
    }

    fn on_handle(&mut self, opcode: Opcode, node: &mut u64) {
        use Opcode::{
            CopyFileRange, CopyFileRange64, Fallocate, Flush, Fsync, Fsyncdir, Getlk, Ioctl, Lseek, Read,
            Readdir, Readdirplus, Release, Releasedir, Setlk, Setlkw, Write,
        };
        match opcode {
            Read | Readdir | Readdirplus => {
                let (fh, offset, size) = (self.handle(node), self.input.edge(), self.size());
                self.put(abi::ReadIn { fh, offset, size, ..Default::default() });
            }
            Write => self.write(node),
            Release | Releasedir => {
                let (fh, lock_owner) = (self.handle(node), u64::from(self.input.byte() & 3));
                self.put(abi::ReleaseIn { fh, lock_owner, ..Default::default() });
            }
            Flush => {
                let (fh, lock_owner) = (self.handle(node), u64::from(self.input.byte() & 3));
                self.put(abi::FlushIn { fh, lock_owner, ..Default::default() });
            }
            Fsync | Fsyncdir => {
                let fh = self.handle(node);
                self.put(abi::FsyncIn { fh, ..Default::default() });
            }
            Fallocate => {
                let (fh, offset, length) = (self.handle(node), self.input.edge(), self.input.edge());
                let mode = self.input.choose(&[0, 1, 3, 0x10]);
                self.put(abi::FallocateIn { fh, offset, length, mode, padding: 0 });
            }
            Lseek => {
                let (fh, offset, whence) =
                    (self.handle(node), self.input.edge(), self.input.choose(&[3, 4, 0]));
                self.put(abi::LseekIn { fh, offset, whence, padding: 0 });
            }
            CopyFileRange | CopyFileRange64 => {
                let (mut nodeid_out, fh_in, off_in) = (self.node(), self.handle(node), self.input.edge());
                let (fh_out, off_out, len) =
                    (self.handle(&mut nodeid_out), self.input.edge(), self.input.edge());
                self.put(abi::CopyFileRangeIn { fh_in, off_in, nodeid_out, fh_out, off_out, len, flags: 0 });
            }
            Getlk | Setlk | Setlkw => {
                let (fh, owner) = (self.handle(node), u64::from(self.input.byte() & 3));
                let (start, end, typ) =
                    (self.input.edge(), self.input.edge(), self.input.choose(&[0, 1, 2, 9]));
                let lk = abi::FileLock { start, end, typ, pid: 1 };
                let lk_flags = u32::from(self.input.byte() & 1);
                self.put(abi::LkIn { fh, owner, lk, lk_flags, padding: 0 });
            }
            Ioctl => self.ioctl(node),
            _ => {
                let count = usize::from(self.input.byte());
                self.out.extend(self.input.bytes(count));
            }
        }
    }

    /// Flags and attributes of files, of plausible sizes as a rule.
    fn ioctl(&mut self, node: &mut u64) {
        let fh = self.handle(node);
        let cmd = match self.input.byte() {
            255 => self.input.word(),
            _ => self.input.choose(&[
                0x8008_6601,
                0x4008_6602,
                0x8004_6601,
                0x4004_6602,
                0x801c_581f,
                0x401c_5820,
                0x5401,
            ]),
        };
        let (len, out_size) =
            (self.input.choose(&[0, 4, 8, 28]), self.input.choose(&[0, 4, 8, 28, u32::MAX]));
        let data = self.input.bytes(len);
        let in_size = u32::try_from(data.len()).unwrap_or(0);
        let flags = u32::from(self.input.byte() & 0x1a);
        self.put(abi::IoctlIn { fh, flags, cmd, arg: 0, in_size, out_size });
        self.out.extend(data);
    }

    fn init(&mut self) {
        let major = self.input.choose(&[7, 7, 7, 7, 7, 8, 6]);
        let minor = self.input.choose(&[45, 38, 37, 36, 31, 27, 26, 99]);
        let flags = self.input.word() | 1 << 30;
        let init = abi::InitIn {
            major,
            minor,
            max_readahead: 1 << 17,
            flags,
            flags2: self.input.word(),
            unused: [0; 11],
        };
        self.put(init);
        if self.input.byte() & 3 == 3 {
            self.out.truncate(abi::COMPAT_INIT_IN_SIZE);
        }
    }

    fn batch_forget(&mut self) {
        let count = u32::from(self.input.byte() & 7);
        self.put(abi::BatchForgetIn { count, dummy: 0 });
        for _ in 0..count {
            let (nodeid, nlookup) = (self.node(), self.input.edge());
            self.put(abi::ForgetOne { nodeid, nlookup });
        }
    }

    fn setattr(&mut self, node: &mut u64) {
        let (valid, fh, size) = (u32::from(self.input.short()), self.handle(node), self.input.edge());
        let mode = u32::from(self.input.short());
        self.put(abi::SetattrIn { valid, fh, size, mode, atimensec: 5, ..Default::default() });
    }

    /// In the long form or the short one: which of them counts was agreed on at INIT.
    fn setxattr(&mut self) {
        let (size, form) = (u32::from(self.input.byte()), self.input.byte());
        self.put(abi::GetxattrIn { size, padding: u32::from(form >> 6) });
        if form & 1 == 0 {
            self.put(0u64);
        }
        self.attribute();
        let value = self.input.bytes(usize::try_from(size).unwrap_or(0));
        self.out.extend(value);
        if form & 2 == 0 {
            self.out.resize(self.out.len() + usize::try_from(size).unwrap_or(0) - value.len(), 0);
        }
    }

    fn attribute(&mut self) {
        let name = self.input.choose(ATTRIBUTES);
        self.out.extend(name);
        self.out.push(0);
    }

    fn write(&mut self, node: &mut u64) {
        let (fh, offset) = (self.handle(node), self.input.edge());
        let data = match self.input.byte() {
            long @ 224.. => vec![long; usize::from(long - 223) * 997],
            short => (0..short).collect(),
        };
        let size = u32::try_from(data.len()).unwrap_or(0);
        self.put(abi::WriteIn { fh, offset, size, ..Default::default() });
        self.out.extend(data);
    }
}
