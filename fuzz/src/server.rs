//! The whole server: a sequence of requests, the form of each reply, and what the guest holds by the replies.
//! Over a file system in memory that is compared with what the file system says it holds.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use fuse_protocol::abi;
use fuse_protocol::decode::{IN_HEADER_SIZE, RawHeader};
use fuse_protocol::ids::NodeId;
use fuse_protocol::init::Layout;
use fuse_protocol::opcode::Opcode;
use fuse_protocol::reply::OUT_HEADER_SIZE;
use fuse_protocol::request::{Operation, Request};
use lanefsd::fs::FileSystem;
use lanefsd::fs::null::NullStore;
use lanefsd::fs::read_only::ReadOnly;
use lanefsd::server::{Scratch, Server};
use lanefsd_memory_fs::MemoryFs;
use zerocopy::{FromBytes, IntoBytes};

use crate::buffers::{Buffers, FILLER};
use crate::input::Input;
use crate::requests::{Known, draft};

/// Most requests of one input.
const MAX_REQUESTS: usize = 100;
/// Bytes that the file system holds.
const CAPACITY: usize = 1 << 18;
/// A step with this first byte is a request as it stands; others choose an opcode.
pub const RAW: u8 = 0;
/// A step with this one is for the [`Workload`], if it has any use for it.
pub const WORKLOAD: u8 = 255;

/// What the guest holds, by the replies it got.
#[derive(Debug, Default)]
pub struct Guest {
    session: bool,
    lookups: HashMap<NodeId, u64>,
    /// Handles with their nodes and the flags they were opened with.
    handles: HashMap<u64, (u64, u32)>,
}

/// What the file system stands on, looked at while it is served.
pub trait Workload {
    /// Looks at it after a request, which may have had a reply.
    fn after_request(&self, guest: &Guest, reply: &[u8]);

    /// Changes something behind the server's back; false if it never does that.
    fn disturb(&self, _input: &mut Input<'_>) -> bool {
        false
    }

    /// Looks at it after the session, when guests hold nothing.
    fn at_end(&self);
}

/// What is served, and how.
pub struct TestConfig {
    /// The file system.
    pub fs: Arc<dyn FileSystem>,
    /// What it stands on.
    pub workload: Arc<dyn Workload>,
    /// What was written can be read.
    pub keeps_data: bool,
    /// A wait for a lock ends: otherwise none is asked for, since nobody else would unlock anything.
    pub waits_end: bool,
}

struct Driver {
    config: TestConfig,
    server: Server,
    scratch: Scratch,
    guest: Guest,
    unique: u64,
}

/// Serves the requests that `data` tells: a byte for the file system, then requests.
pub fn serve(data: &[u8]) {
    let mut input = Input::new(data);
    let choice = input.byte() % 4;
    let memory = MemoryFs::new(CAPACITY).without_waiting();
    let fs: Arc<dyn FileSystem> = match choice {
        2 => Arc::new(ReadOnly::new(memory.clone())),
        3 => Arc::new(NullStore::new(memory.clone(), Duration::ZERO)),
        _ => Arc::new(memory.clone()),
    };
    run(&mut input, TestConfig { fs, workload: Arc::new(memory), keeps_data: choice != 3, waits_end: true });
}

impl Workload for MemoryFs {
    /// The file system and the guest agree on what the guest holds.
    fn after_request(&self, guest: &Guest, _reply: &[u8]) {
        assert_eq!(self.lookups(), guest.lookups);
        assert_eq!(self.open_handles(), guest.handles.len());
    }

    fn at_end(&self) {
        self.after_request(&Guest::default(), &[]);
        assert_eq!(self.held_locks(), 0);
    }
}

/// Serves the requests that `input` tells, and looks at the workload meanwhile.
pub fn run(input: &mut Input<'_>, config: TestConfig) {
    let server = Server::new(Arc::clone(&config.fs));
    let (scratch, guest) = (Scratch::default(), Guest::default());
    let mut driver = Driver { config, server, scratch, guest, unique: 1 };
    let mut steps = 0;
    while !input.is_empty() && steps < MAX_REQUESTS {
        steps += 1;
        driver.step(input);
    }
    driver.server.end_session();
    driver.config.workload.at_end();
}

impl Driver {
    fn step(&mut self, input: &mut Input<'_>) {
        let kind = input.byte();
        if kind == WORKLOAD && self.config.workload.disturb(input) {
            return;
        }
        let mut message = if kind == RAW {
            let count = usize::from(input.short()) % 4096;
            input.bytes(count).to_vec()
        } else {
            self.message(kind, input)
        };
        if !self.config.waits_end {
            without_wait(&mut message);
        }
        let rooms = [4096, 144, 16, 160, 1 << 16, 0, 8, 15, 24, 104, 128, 17, 300];
        let (room, cuts) = (input.choose(&rooms), input.short().to_le_bytes());
        let exchanged = self.exchange(&message, room, cuts);
        if let Some((header, reply)) = &exchanged {
            self.note(header, &message, reply);
        }
        let reply = exchanged.as_ref().map_or(&[][..], |(_, reply)| reply);
        self.config.workload.after_request(&self.guest, reply);
        if let Some((header, reply)) = exchanged {
            self.read_back(&header, &message, &reply, cuts);
        }
    }

    /// A request of a chosen kind whose length is right, or nearly so.
    fn message(&mut self, kind: u8, input: &mut Input<'_>) -> Vec<u8> {
        let (opcode, _) = Opcode::ALL[usize::from(kind - 1) % Opcode::ALL.len()];
        let mut nodes: Vec<u64> = self.guest.lookups.keys().map(|node| node.0).collect();
        let mut handles: Vec<_> =
            self.guest.handles.iter().map(|(handle, (node, _))| (*handle, *node)).collect();
        nodes.sort_unstable();
        handles.sort_unstable();
        let draft = draft(opcode, input, &Known { nodes, handles });
        self.unique += 1;
        let len = IN_HEADER_SIZE + draft.arguments.len();
        let wrong = input.byte();
        let off = if wrong > 250 { i32::from(input.byte().cast_signed()) } else { 0 };
        let header = abi::InHeader {
            len: u32::try_from(len).unwrap_or(0).wrapping_add_signed(off),
            opcode: draft.opcode as u32,
            unique: self.unique,
            nodeid: draft.node,
            uid: u32::from(wrong & 1),
            gid: 0,
            pid: 1,
            total_extlen: draft.extensions,
            padding: 0,
        };
        [header.as_bytes(), &draft.arguments].concat()
    }

    /// Sends a message; its header and the reply, whose form is checked. `None` without a header.
    fn exchange(&mut self, message: &[u8], room: usize, cuts: [u8; 2]) -> Option<(abi::InHeader, Vec<u8>)> {
        let mut input = Buffers::new(message, cuts[0]);
        let mut output = Buffers::room(room, cuts[1]);
        let mut reader = input.reader();
        let header = Server::read_header(&reader)?;
        reader.skip(size_of::<abi::InHeader>());
        let len = self.server.serve(&header, reader, output.writer(), &mut self.scratch) as usize;
        let mut reply = output.contents();
        assert_eq!(input.contents(), message, "the request was changed");
        assert!(len <= room, "a reply longer than its room");
        let (opcode, header) = (header.opcode(), *header.wire());
        if len == 0 {
            assert!(room < OUT_HEADER_SIZE || opcode.is_some_and(Opcode::has_no_reply));
            assert!(reply.iter().all(|byte| *byte == FILLER), "written without a reply");
            return Some((header, Vec::new()));
        }
        reply.truncate(len);
        let (out, _) = abi::OutHeader::read_from_prefix(&reply).expect("a reply has a header");
        assert_eq!(out.len as usize, len);
        assert_eq!(out.unique, header.unique);
        assert!((-4095..=0).contains(&out.error), "{}", out.error);
        assert!(out.error == 0 || len == OUT_HEADER_SIZE, "an error with a body");
        if !self.guest.session && opcode != Some(Opcode::Init) {
            assert!(out.error != 0, "served without a session");
        }
        Some((header, reply))
    }

    /// Follows what a reply means to the guest.
    fn note(&mut self, header: &abi::InHeader, message: &[u8], reply: &[u8]) {
        let Some(opcode) = Opcode::from_number(header.opcode) else { return };
        if opcode.has_no_reply() {
            return self.forget(header, message);
        }
        let Ok((out, body)) = abi::OutHeader::read_from_prefix(reply) else { return };
        // A guest that begins anew has lost what it had, also if it is refused.
        if opcode == Opcode::Init && [0, -libc::EPROTO].contains(&out.error) {
            self.guest = Guest::default();
        }
        if out.error != 0 {
            return;
        }
        let arguments = &message[IN_HEADER_SIZE..];
        let first_long = u64::read_from_prefix(arguments).map_or(0, |(value, _)| value);
        let first_word = u32::read_from_prefix(arguments).map_or(0, |(value, _)| value);
        match opcode {
            // A guest with a newer major version is told ours, and asks again.
            Opcode::Init if first_word == abi::KERNEL_VERSION => {
                self.guest = Guest { session: true, ..Default::default() };
            }
            Opcode::Destroy => self.guest = Guest::default(),
            Opcode::Lookup | Opcode::Symlink | Opcode::Mknod | Opcode::Mkdir | Opcode::Link => {
                assert_eq!(body.len(), size_of::<abi::EntryOut>());
                self.looked_up(body);
            }
            Opcode::Create | Opcode::Tmpfile => {
                let node = self.looked_up(body);
                self.opened(&body[size_of::<abi::EntryOut>()..], node, first_word);
            }
            Opcode::Open | Opcode::Opendir => self.opened(body, header.nodeid, first_word),
            Opcode::Release | Opcode::Releasedir => {
                let (node, _) = self.guest.handles.remove(&first_long).expect("released, but never opened");
                assert_eq!(node, header.nodeid);
            }
            Opcode::Readdirplus => self.listed(body, size_of::<abi::EntryOut>()),
            Opcode::Readdir => self.listed(body, 0),
            Opcode::Read => {
                let (read, _) = abi::ReadIn::read_from_prefix(arguments).expect("READ has arguments");
                assert!(body.len() <= read.size as usize);
            }
            _ => {}
        }
    }

    fn forget(&mut self, header: &abi::InHeader, message: &[u8]) {
        let header = RawHeader::from(*header);
        let Ok(count) = header.argument_bytes(message.len()) else { return };
        let arguments = &message[IN_HEADER_SIZE..IN_HEADER_SIZE + count];
        let Ok(request) = Request::decode(&header, arguments, Layout::default()) else { return };
        let mut take = |node: NodeId, count: u64| {
            if let Some(held) = self.guest.lookups.get_mut(&node) {
                *held = held.saturating_sub(count);
            }
            self.guest.lookups.retain(|_, held| *held > 0);
        };
        match request.operation {
            Operation::Forget(forget) => take(request.header.node, forget.nlookup),
            Operation::BatchForget(items) => items.iter().for_each(|(node, count)| take(node, count)),
            _ => {}
        }
    }

    fn looked_up(&mut self, body: &[u8]) -> u64 {
        let (entry, _) = abi::EntryOut::read_from_prefix(body).expect("an entry is whole");
        assert_ne!(entry.nodeid, 0);
        *self.guest.lookups.entry(NodeId(entry.nodeid)).or_default() += 1;
        entry.nodeid
    }

    fn opened(&mut self, body: &[u8], node: u64, flags: u32) {
        let open = abi::OpenOut::read_from_bytes(body).expect("an OPEN reply is whole");
        assert!(self.guest.handles.insert(open.fh, (node, flags)).is_none(), "a handle given out twice");
    }

    /// Whole records, each with its entry in front if there is one.
    fn listed(&mut self, mut body: &[u8], entry_size: usize) {
        while !body.is_empty() {
            let (entry, record) = body.split_at(entry_size);
            let (dirent, rest) = abi::Dirent::read_from_prefix(record).expect("a record is whole");
            let len = (dirent.namelen as usize).next_multiple_of(abi::RECORD_ALIGN);
            assert!(dirent.namelen > 0 && len <= rest.len());
            if entry.iter().take(8).any(|byte| *byte != 0) {
                self.looked_up(entry);
            }
            body = &rest[len..];
        }
    }

    /// What was written is read again, cut in another way.
    fn read_back(&mut self, header: &abi::InHeader, message: &[u8], reply: &[u8], cuts: [u8; 2]) {
        let written = reply.get(OUT_HEADER_SIZE..).and_then(|body| abi::WriteOut::read_from_bytes(body).ok());
        if header.opcode != Opcode::Write as u32 || !self.config.keeps_data {
            return;
        }
        let Some(written) = written else { return };
        let (write, data) = abi::WriteIn::read_from_prefix(&message[IN_HEADER_SIZE..]).expect("decoded");
        let (_, flags) = self.guest.handles[&write.fh];
        // Each write may say for itself that it appends.
        if flags & 3 != 2 || (flags | write.flags) & libc::O_APPEND.cast_unsigned() != 0 {
            return;
        }
        let read =
            abi::ReadIn { fh: write.fh, offset: write.offset, size: written.size, ..Default::default() };
        let len = u32::try_from(IN_HEADER_SIZE + size_of::<abi::ReadIn>()).unwrap_or(0);
        let header = abi::InHeader { len, opcode: Opcode::Read as u32, total_extlen: 0, ..*header };
        let message = [header.as_bytes(), read.as_bytes()].concat();
        let cuts = [cuts[1].rotate_left(3), cuts[0].rotate_left(5)];
        let answer = self.exchange(&message, OUT_HEADER_SIZE + written.size as usize, cuts);
        let (_, reply) = answer.expect("READ has a header");
        assert_eq!(reply[OUT_HEADER_SIZE..], data[..written.size as usize], "read something else");
    }
}

/// Makes a request that would wait for a lock one that does not.
fn without_wait(message: &mut [u8]) {
    let Ok((header, _)) = abi::InHeader::mut_from_prefix(message) else { return };
    if header.opcode == Opcode::Setlkw as u32 {
        header.opcode = Opcode::Setlk as u32;
    }
}
