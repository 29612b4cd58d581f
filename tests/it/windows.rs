//! A guest that speaks the dialect of the driver for Windows, header for header, through a whole session.
//!
//! That is FUSE 7.31 with two flags and one request queue. Every request is one piece of memory. The header's
//! last word is never set, and neither is padding, so that both hold whatever was there before: the stack, or
//! memory that carried files' data. READ's length in the header is that of the data which it wants.

use std::cell::Cell;
use std::collections::BTreeMap;

use fuse_protocol::abi::{
    AttrOut, CreateIn, Direntplus, EntryOut, FallocateIn, FlushIn, ForgetIn, GetattrIn, InHeader, InitIn,
    InitOut, MkdirIn, OpenIn, OpenOut, ReadIn, ReleaseIn, Rename2In, RenameIn, SetattrIn, StatfsOut, WriteIn,
    WriteOut,
};
use fuse_protocol::flags::{InitFlags, SetattrValid};
use fuse_protocol::opcode::Opcode;
use lanefsd_frontend::chain::Segmentation;
use lanefsd_frontend::client::ROOT;
use lanefsd_frontend::{Backend, Caller, Request, Result, Session, SessionOptions};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::common;

/// `O_*` and `RENAME_*` as the driver has them.
const O_DIRECTORY: u32 = 0o200_000;
const O_EXCL: u32 = 0o200;
const NOREPLACE: u32 = 1;
/// Bytes of a name in the driver's structures (`MAX_PATH`).
const MAX_PATH: usize = 260;
/// Pages of a request that the driver carries, less those of headers.
const MAX_FRAGMENTS: u32 = 1024 - 4;

/// The driver, with the lookups that it counts.
struct Windows<'s> {
    session: &'s Session,
    rubbish: Cell<u32>,
    lookups: std::cell::RefCell<BTreeMap<u64, u64>>,
    owner: Cell<(u32, u32)>,
    max_write: Cell<usize>,
    max_read: Cell<usize>,
}

/// What an open file is to Windows.
struct Context {
    node: u64,
    handle: u64,
    directory: bool,
}

impl<'s> Windows<'s> {
    /// Starts the session.
    fn mount(session: &'s Session, flags: InitFlags) -> Windows<'s> {
        let windows = Windows {
            session,
            rubbish: Cell::new(0x9e37_79b9),
            lookups: Default::default(),
            owner: Cell::new((0, 0)),
            max_write: Cell::new(0),
            max_read: Cell::new(0),
        };
        let init = InitIn { major: 7, minor: 31, flags: flags.bits() as u32, ..InitIn::default() };
        let reply: InitOut = windows.call(Opcode::Init, ROOT, &init.as_bytes()[..16], &[]).unwrap();
        assert_eq!(reply.major, 7);
        assert!(reply.minor >= 31);
        let agreed = InitFlags::from_bits_retain(reply.flags.into());
        assert_eq!(agreed, flags, "no flag that the driver does not know");
        let pages = match agreed.contains(InitFlags::MAX_PAGES) {
            true => u32::from(reply.max_pages),
            false => 32,
        };
        assert!(pages > 0 && pages.max(reply.max_write / 4096) <= MAX_FRAGMENTS, "{pages} pages");
        windows.max_write.set(reply.max_write as usize);
        windows.max_read.set(pages as usize * 4096);
        let root = windows.lookup(ROOT, ".").unwrap();
        assert_eq!(root.nodeid, ROOT);
        windows.owner.set((root.attr.uid, root.attr.gid));
        windows
    }

    /// What memory held before.
    fn rubbish(&self) -> u32 {
        let next = self.rubbish.get().wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.rubbish.set(next);
        // Some of it looks like a small number of extensions.
        if next & 0x300 == 0 { next >> 29 | 1 } else { next | 1 }
    }

    fn request<'a>(&self, opcode: Opcode, node: u64, fixed: &[u8], rest: &[u8]) -> Request<'a> {
        let (uid, gid) = match opcode {
            Opcode::Create | Opcode::Mkdir | Opcode::Fallocate => self.owner.get(),
            _ => (0, 0),
        };
        let caller = Caller { uid, gid, pid: 4242, ..Caller::default() };
        let request = Request { caller, ..Request::new(opcode, node) };
        request.arg(&[fixed, rest].concat()[..]).last_word(self.rubbish())
    }

    fn bytes(&self, request: &Request<'_>, segmentation: Segmentation) -> Result<Vec<u8>> {
        self.session.finish(self.session.send(1, request, segmentation)?)
    }

    fn call<T: FromBytes>(&self, opcode: Opcode, node: u64, fixed: &[u8], rest: &[u8]) -> Result<T> {
        let reply = self.bytes(&self.request(opcode, node, fixed, rest).reply::<T>(), Segmentation::One)?;
        assert_eq!(reply.len(), size_of::<T>(), "{opcode:?}");
        Ok(T::read_from_bytes(&reply).map_err(drop).unwrap())
    }

    fn ask(&self, opcode: Opcode, node: u64, arg: &(impl IntoBytes + Immutable), rest: &[u8]) -> Result<()> {
        self.bytes(&self.request(opcode, node, arg.as_bytes(), rest), Segmentation::One).map(drop)
    }

    fn looked_up(&self, node: u64) {
        *self.lookups.borrow_mut().entry(node).or_default() += 1;
    }

    fn lookup(&self, parent: u64, name: &str) -> Result<EntryOut> {
        let entry: EntryOut = self.call(Opcode::Lookup, parent, &c_string(name), &[])?;
        self.looked_up(entry.nodeid);
        Ok(entry)
    }

    fn open(&self, parent: u64, name: &str) -> Result<Context> {
        let entry = self.lookup(parent, name)?;
        let directory = entry.attr.mode & libc::S_IFMT == libc::S_IFDIR;
        let handle = self.open_node(entry.nodeid, directory)?;
        Ok(Context { node: entry.nodeid, handle, directory })
    }

    fn open_node(&self, node: u64, directory: bool) -> Result<u64> {
        let (opcode, flags) =
            if directory { (Opcode::Opendir, O_DIRECTORY) } else { (Opcode::Open, libc::O_RDWR as u32) };
        let open = OpenIn { flags, open_flags: self.rubbish() };
        Ok(self.call::<OpenOut>(opcode, node, open.as_bytes(), &[])?.fh)
    }

    fn create(&self, parent: u64, name: &str) -> Result<Context> {
        let flags = libc::O_RDWR as u32 | O_EXCL;
        let create = CreateIn { flags, mode: 0o664, umask: 0, open_flags: self.rubbish() };
        let (entry, open): (EntryOut, OpenOut) = {
            let out: [u8; size_of::<EntryOut>() + size_of::<OpenOut>()] =
                self.call(Opcode::Create, parent, create.as_bytes(), &c_string(name))?;
            let (entry, open) = EntryOut::read_from_prefix(&out).map_err(drop).unwrap();
            (entry, OpenOut::read_from_bytes(open).map_err(drop).unwrap())
        };
        self.looked_up(entry.nodeid);
        assert_eq!(entry.attr.mode, libc::S_IFREG | 0o664);
        assert_eq!((entry.attr.uid, entry.attr.gid), self.owner.get());
        Ok(Context { node: entry.nodeid, handle: open.fh, directory: false })
    }

    fn create_directory(&self, parent: u64, name: &str) -> Result<Context> {
        let mkdir = MkdirIn { mode: 0o664 | 0o111, umask: 0 };
        let entry: EntryOut = self.call(Opcode::Mkdir, parent, mkdir.as_bytes(), &c_string(name))?;
        self.looked_up(entry.nodeid);
        Ok(Context { node: entry.nodeid, handle: self.open_node(entry.nodeid, true)?, directory: true })
    }

    fn attributes(&self, file: &Context) -> Result<AttrOut> {
        // The handle is there, and the flag that says so is not.
        let getattr = GetattrIn { getattr_flags: 0, dummy: self.rubbish(), fh: file.handle };
        self.call(Opcode::Getattr, file.node, getattr.as_bytes(), &[])
    }

    fn set(&self, file: &Context, valid: SetattrValid, set: SetattrIn) -> Result<AttrOut> {
        let set = SetattrIn { valid: valid.bits(), ..set };
        self.call(Opcode::Setattr, file.node, set.as_bytes(), &[])
    }

    fn write(&self, file: &Context, mut offset: u64, data: &[u8], segmentation: Segmentation) -> Result<()> {
        for piece in data.chunks(self.max_write.get()) {
            let write = WriteIn { fh: file.handle, offset, size: piece.len() as u32, ..WriteIn::default() };
            let write = WriteIn { padding: self.rubbish(), ..write };
            let request = self.request(Opcode::Write, file.node, write.as_bytes(), &[]);
            let reply = self.bytes(&Request { data: piece, ..request }.reply::<WriteOut>(), segmentation)?;
            let written = WriteOut::read_from_bytes(&reply).map_err(drop).unwrap();
            assert_eq!(written.size as usize, piece.len());
            offset += piece.len() as u64;
        }
        self.attributes(file).map(drop)
    }

    fn read(&self, file: &Context, offset: u64, len: usize, segmentation: Segmentation) -> Result<Vec<u8>> {
        let mut data = Vec::new();
        while data.len() < len {
            let size = (len - data.len()).min(self.max_read.get());
            let offset = offset + data.len() as u64;
            let read = ReadIn { fh: file.handle, offset, size: size as u32, ..ReadIn::default() };
            let read = ReadIn { padding: self.rubbish(), ..read };
            let request = self.request(Opcode::Read, file.node, read.as_bytes(), &[]).reply_data(size);
            // The header counts what is to be read.
            let piece = self.bytes(&request.declared((size_of::<InHeader>() + size) as u32), segmentation)?;
            if piece.is_empty() {
                break;
            }
            data.extend(piece);
        }
        Ok(data)
    }

    /// All names, and how many records READDIRPLUS gave without an inode.
    fn list(&self, directory: &Context) -> Result<(Vec<String>, usize)> {
        let (mut names, mut offset, mut without) = (Vec::new(), 0, 0);
        loop {
            let size = 2 * 8192;
            let read = ReadIn { fh: directory.handle, offset, size, ..ReadIn::default() };
            let request = self.request(Opcode::Readdirplus, directory.node, read.as_bytes(), &[]);
            let reply = self.bytes(&request.reply_data(size as usize), Segmentation::One)?;
            if reply.is_empty() {
                return Ok((names, without));
            }
            let mut rest = &reply[..];
            while rest.len() > size_of::<Direntplus>() {
                let (record, name) = Direntplus::read_from_prefix(rest).map_err(drop).unwrap();
                let len = record.dirent.namelen as usize;
                let name = String::from_utf8(name[..len].to_vec()).unwrap();
                if name == "." || name == ".." {
                    assert_eq!(record.entry_out.nodeid, 0, "the driver does not count these as looked up");
                    without += 1;
                } else {
                    assert_ne!(record.entry_out.nodeid, 0, "{name}");
                    self.looked_up(record.entry_out.nodeid);
                }
                names.push(name);
                offset = record.dirent.off;
                rest = &rest[(size_of::<Direntplus>() + len).next_multiple_of(8).min(rest.len())..];
            }
        }
    }

    /// Whether there are no more than two names, the way the driver finds out.
    fn is_empty(&self, directory: &Context) -> Result<bool> {
        let size = 0x1000 - 16;
        let read = ReadIn { fh: directory.handle, size, ..ReadIn::default() };
        let request = self.request(Opcode::Readdir, directory.node, read.as_bytes(), &[]);
        let reply = self.bytes(&request.reply_data(size as usize), Segmentation::One)?;
        let (mut entries, mut rest) = (0, &reply[..]);
        while rest.len() > 24 {
            entries += 1;
            let len = u32::from_ne_bytes(rest[16..20].try_into().unwrap()) as usize;
            rest = &rest[(24 + len).next_multiple_of(8).min(rest.len())..];
        }
        Ok(entries <= 2)
    }

    fn rename(&self, parent: u64, name: &str, new_parent: u64, new: &str, flags: u32) -> Result<()> {
        let rename = Rename2In { newdir: new_parent, flags, padding: self.rubbish() };
        self.ask(Opcode::Rename2, parent, &rename, &[c_string(name), c_string(new)].concat())
    }

    /// Deletes a file that is open, as Windows does, and closes it.
    fn delete(&self, file: Context, parent: u64, name: &str) -> Result<()> {
        let opcode = if file.directory { Opcode::Rmdir } else { Opcode::Unlink };
        let done = self.ask(opcode, parent, &[0u8; 0], &c_string(name));
        if done.is_ok() {
            self.forget(file.node);
        }
        self.close(&file)?;
        done
    }

    /// With room for a reply, for which older drivers wait: the chain has to come back.
    fn forget(&self, node: u64) {
        let nlookup = self.lookups.borrow_mut().remove(&node).unwrap_or(0);
        let forget = ForgetIn { nlookup };
        let request = self.request(Opcode::Forget, node, forget.as_bytes(), &[]);
        assert_eq!(request.reply, Some(0));
        let completion =
            self.session.wait(self.session.send(1, &request, Segmentation::One).unwrap()).unwrap();
        assert_eq!(completion.used, 0);
    }

    fn close(&self, file: &Context) -> Result<()> {
        let opcode = if file.directory { Opcode::Releasedir } else { Opcode::Release };
        self.ask(opcode, file.node, &ReleaseIn { fh: file.handle, ..ReleaseIn::default() }, &[])
    }

    /// Ends the session; what was looked up is not forgotten.
    fn unmount(self) {
        self.ask(Opcode::Destroy, 0, &[0u8; 0], &[]).unwrap();
    }
}

fn c_string(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

fn drivers() -> [InitFlags; 2] {
    // Since 2026, and before that.
    [InitFlags::DO_READDIRPLUS | InitFlags::MAX_PAGES, InitFlags::DO_READDIRPLUS]
}

/// A session over which INIT was not sent, with a daemon that has its default options.
fn start(args: &[&str]) -> (Backend, Session) {
    let backend = Backend::of(common::program()).args(args).start().unwrap();
    let connection = lanefsd_frontend::connection::Connection::connect(backend.socket()).unwrap();
    let options = SessionOptions { minor: 31, ..SessionOptions::default() };
    (backend, Session::start(connection, options).unwrap())
}

#[test]
fn a_volume_is_mounted_and_has_a_label_and_a_size() {
    for flags in drivers() {
        let (backend, session) = start(&["--tag=My files"]);
        let label = session.connection().config(0, 36).unwrap();
        assert!(label.starts_with(b"My files\0"));
        let windows = Windows::mount(&session, flags);
        let before = backend.descriptors().unwrap().len();
        let size: StatfsOut = windows.call(Opcode::Statfs, ROOT, &[], &[]).unwrap();
        assert!(size.st.bsize > 0 && size.st.blocks > 0 && size.st.bavail <= size.st.blocks);
        windows.unmount();
        // And again, without a restart of the guest.
        let windows = Windows::mount(&session, flags);
        windows.create(ROOT, "file").unwrap();
        windows.unmount();
        assert!(common::settled_descriptors(&backend, before) <= before);
    }
}

#[test]
fn files_are_created_written_read_renamed_and_deleted() {
    for flags in drivers() {
        let (backend, session) = start(&[]);
        let windows = Windows::mount(&session, flags);
        let directory = windows.create_directory(ROOT, "New folder").unwrap();
        let file = windows.create(directory.node, "New file.txt").unwrap();
        let exists = windows.create(directory.node, "New file.txt");
        assert_eq!(common::errno(exists.map(drop)), libc::EEXIST);
        // Explorer reserves room first; then sizes that READ's header makes short or long.
        let room = FallocateIn { fh: file.handle, length: 1 << 20, mode: 1, ..FallocateIn::default() };
        windows.ask(Opcode::Fallocate, file.node, &room, &[]).unwrap();
        let data: Vec<u8> = (0..70_000u32).map(|i| (i % 251) as u8).collect();
        windows.write(&file, 0, &data, Segmentation::One).unwrap();
        for (offset, len) in
            [(0, 1), (5, 39), (7, 40), (0, 41), (100, 80), (1, 4096), (0, 65_536), (0, 90_000)]
        {
            let read = windows.read(&file, offset, len, Segmentation::One).unwrap();
            let end = (offset as usize + len).min(data.len());
            assert_eq!(read, data[offset as usize..end], "{len} bytes at {offset}");
        }
        assert!(windows.read(&file, 70_000, 100, Segmentation::One).unwrap().is_empty());
        let flush = FlushIn { fh: file.handle, ..FlushIn::default() };
        windows.ask(Opcode::Flush, file.node, &flush, &[]).unwrap();
        let attr = windows.attributes(&file).unwrap().attr;
        assert_eq!(attr.size, 70_000);
        // Attributes, times and size.
        let set =
            SetattrIn { mode: 0o444, atime: 1_000_000_000, mtime: 1_100_000_000, ..SetattrIn::default() };
        let valid = SetattrValid::MODE | SetattrValid::ATIME | SetattrValid::MTIME;
        let attr = windows.set(&file, valid | SetattrValid::CTIME, set).unwrap().attr;
        assert_eq!(
            (attr.mode, attr.atime, attr.mtime),
            (libc::S_IFREG | 0o444, 1_000_000_000, 1_100_000_000)
        );
        let shorter = SetattrIn { size: 1000, ..SetattrIn::default() };
        assert_eq!(windows.set(&file, SetattrValid::SIZE, shorter).unwrap().attr.size, 1000);
        assert_eq!(windows.read(&file, 0, 5000, Segmentation::One).unwrap(), data[..1000]);
        // A new name that is free, one that is not, one that is to be replaced.
        let node = directory.node;
        windows.rename(node, "New file.txt", node, "A.txt", NOREPLACE).unwrap();
        windows.close(&windows.create(ROOT, "B.txt").unwrap()).unwrap();
        let taken = windows.rename(node, "A.txt", ROOT, "B.txt", NOREPLACE);
        assert_eq!(common::errno(taken), libc::EEXIST);
        windows.rename(node, "A.txt", ROOT, "B.txt", 0).unwrap();
        let rename = RenameIn { newdir: node };
        let names = [c_string("B.txt"), c_string("C.txt")].concat();
        windows.ask(Opcode::Rename, ROOT, &rename, &names).unwrap();
        assert_eq!(std::fs::read(backend.path("New folder/C.txt")).unwrap(), data[..1000]);
        // Windows knows no other case of a name until it has listed the directory.
        assert_eq!(common::errno(windows.lookup(node, "c.TXT")), libc::ENOENT);
        let (names, _) = windows.list(&directory).unwrap();
        let name = names.iter().find(|name| name.eq_ignore_ascii_case("c.TXT")).unwrap();
        let second = windows.open(node, name).unwrap();
        assert_eq!(second.node, file.node);
        // It is deleted while it is open, and read on through the other handle.
        windows.delete(second, node, "C.txt").unwrap();
        assert_eq!(windows.read(&file, 0, 10, Segmentation::One).unwrap(), data[..10]);
        windows.close(&file).unwrap();
        windows.delete(directory, ROOT, "New folder").unwrap();
        assert_eq!(std::fs::read_dir(backend.share()).unwrap().count(), 0);
        windows.unmount();
    }
}

#[test]
fn only_an_empty_directory_looks_empty() {
    // Whatever the guest may cache, and whether it reads ahead.
    for args in [&[][..], &["--cache=always"], &["--cache=never"], &["--no-readdirplus"]] {
        let (backend, session) = start(args);
        let flags = match args {
            ["--no-readdirplus"] => InitFlags::MAX_PAGES,
            _ => InitFlags::DO_READDIRPLUS | InitFlags::MAX_PAGES,
        };
        let windows = Windows::mount(&session, flags);
        let directory = windows.create_directory(ROOT, "dir").unwrap();
        assert!(windows.is_empty(&directory).unwrap());
        let (names, without) = windows.list(&directory).unwrap();
        assert_eq!((names.len(), without), (2, 2), "{names:?}");
        let file = windows.create(directory.node, "file").unwrap();
        assert!(!windows.is_empty(&directory).unwrap());
        let (mut names, without) = windows.list(&directory).unwrap();
        names.sort();
        assert_eq!(names, [".", "..", "file"]);
        assert_eq!(without, 2);
        let full = windows.ask(Opcode::Rmdir, ROOT, &[0u8; 0], &c_string("dir"));
        assert_eq!(common::errno(full), libc::ENOTEMPTY);
        windows.delete(file, directory.node, "file").unwrap();
        assert!(windows.is_empty(&directory).unwrap());
        windows.delete(directory, ROOT, "dir").unwrap();
        // The root has both names, too.
        let root = windows.open(ROOT, ".").unwrap();
        assert_eq!(windows.list(&root).unwrap().1, 2);
        assert!(windows.is_empty(&root).unwrap());
        windows.close(&root).unwrap();
        assert!(!backend.path("dir").exists());
    }
}

#[test]
fn large_directories_and_large_transfers() {
    for flags in drivers() {
        let (backend, session) = start(&[]);
        let windows = Windows::mount(&session, flags);
        let directory = windows.create_directory(ROOT, "many").unwrap();
        for i in 0..600 {
            std::fs::write(backend.path(&format!("many/{i}-{}", "n".repeat(i % 200))), "").unwrap();
        }
        assert_eq!(windows.list(&directory).unwrap().0.len(), 602);
        let file = windows.create(ROOT, "large").unwrap();
        let data: Vec<u8> = (0..9_000_001u32).map(|i| (i % 65_521) as u8).collect();
        for segmentation in [Segmentation::One, Segmentation::Scattered] {
            windows.write(&file, 0, &data, segmentation).unwrap();
            assert!(windows.read(&file, 0, data.len(), segmentation).unwrap() == data);
            assert!(
                windows.read(&file, 12_345, 8 << 20, segmentation).unwrap()
                    == data[12_345..12_345 + (8 << 20)]
            );
        }
        assert!(std::fs::read(backend.path("large")).unwrap() == data);
    }
}

#[test]
fn links_are_made_and_followed() {
    let (backend, session) = start(&[]);
    let windows = Windows::mount(&session, drivers()[0]);
    let names = [c_string("link"), c_string("folder/target")].concat();
    let entry: EntryOut = windows.call(Opcode::Symlink, ROOT, &[], &names).unwrap();
    assert_eq!(std::fs::read_link(backend.path("link")).unwrap().to_str(), Some("folder/target"));
    // The request is as long as the reply may be, and full of rubbish; newer drivers only say so.
    let rubbish = [0xa5; MAX_PATH];
    for sent in [&rubbish[..], &[]] {
        let request = windows.request(Opcode::Readlink, entry.nodeid, sent, &[]).reply_data(MAX_PATH);
        let request = request.declared((size_of::<InHeader>() + MAX_PATH) as u32);
        assert_eq!(windows.bytes(&request, Segmentation::One).unwrap(), b"folder/target");
    }
    // Nothing is open, and it is closed all the same.
    let closed = windows.close(&Context { node: entry.nodeid, handle: u64::MAX, directory: false });
    assert_eq!(common::errno(closed), libc::EBADF);
    windows.unmount();
}
