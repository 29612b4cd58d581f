//! The operations as sequences of requests: what is changed before each is sent, and what follows.

use std::sync::Arc;

use fuse_protocol::abi::{
    CreateIn, Direntplus, EntryOut, FlushIn, GetattrIn, OpenIn, OpenOut, ReadIn, ReleaseIn,
};
use fuse_protocol::flags::WriteFlags;
use fuse_protocol::opcode::Opcode;
use lanefsd_frontend::chain::Segmentation;
use lanefsd_frontend::client::data::{read_request, read_request_with, write_request};
use lanefsd_frontend::random::Random;
use lanefsd_frontend::request::Request;
use zerocopy::FromBytes;

use crate::error::Result;
use crate::exchange::Exchange;
use crate::forgets::Forgets;
use crate::layout::{NAME_LEN, entry_name};
use crate::options::{Op, Segments, Work};

/// Where the handle stands in the arguments of WRITE, READ, FLUSH and RELEASE.
const HANDLE: usize = 0;
/// Where the offset stands in the arguments of WRITE, READ and READDIRPLUS.
const OFFSET: usize = 8;
/// Where the handle stands in the body of a reply to CREATE.
const CREATED_HANDLE: usize = size_of::<EntryOut>();
/// Bytes of a small file.
const SMALL_FILE: usize = 4096;

/// The nodes and handles that the slots of all queues use.
#[derive(Debug)]
pub struct Workload {
    /// The measured work.
    pub work: Work,
    /// The nodes and handles of the data files.
    pub data: Vec<(u64, u64)>,
    /// The directory of many files, or the one where files come and go.
    pub directory: u64,
    /// Nodes of the many files, where they matter.
    pub nodes: Vec<u64>,
}

/// One operation after the other in one slot of a queue.
pub trait Cycle: Send {
    /// Prepares the first request of an operation; returns its number.
    fn begin(&mut self, exchanges: &[Exchange]) -> usize;

    /// Takes the reply to request `step`, which has a body of `len` bytes, and returns the number of
    /// the next request or `None` at the end; an error says what is wrong with the reply.
    fn next(&mut self, step: usize, len: usize, exchanges: &[Exchange], forgets: &Forgets<'_>) -> Step;
}

/// What follows a reply.
pub type Step = std::result::Result<Option<usize>, String>;

/// The cycle of one slot, and its requests before they lie in guest memory.
pub fn requests<'a>(
    workload: &Arc<Workload>,
    slot: usize,
    block: &'a [u8],
) -> (Box<dyn Cycle>, Vec<Request<'a>>) {
    let random = Random::new(slot as u64 + 1);
    let work = &workload.work;
    let (node, fh) = workload.data.get(slot % usize::from(work.files)).copied().unwrap_or_default();
    let name = format!("s{slot:08}");
    let dir = workload.directory;
    match work.op {
        Op::Write => {
            let flags = if work.user == 0 { WriteFlags::empty() } else { WriteFlags::KILL_SUIDGID };
            let request = write_request(node, fh, 0, block, flags, work.open_flags());
            (Box::new(Data::new(work, slot, random)), vec![request])
        }
        Op::Read => (
            Box::new(Data::new(work, slot, random)),
            vec![read_request_with(node, fh, 0, work.block, work.open_flags())],
        ),
        Op::Getattr => {
            let request = Request::new(Opcode::Getattr, 0).arg(&GetattrIn::default());
            let request = request.reply::<fuse_protocol::abi::AttrOut>();
            (Box::new(Getattr { workload: Arc::clone(workload), random }), vec![request])
        }
        Op::Lookup => {
            let names = (0..work.entries).map(|i| entry_name(i).into_bytes()).collect();
            (
                Box::new(Lookup { names, nodes: Arc::clone(workload), asked: 0, random }),
                vec![lookup(dir, &entry_name(0))],
            )
        }
        Op::Create => {
            let requests = vec![create(dir, &name), release(), Request::new(Opcode::Unlink, dir).name(&name)];
            (Box::new(Churn { node: 0 }), requests)
        }
        Op::List => {
            let open = Request::new(Opcode::Opendir, dir).arg(&OpenIn::default()).reply::<OpenOut>();
            let arg = ReadIn { size: work.block as u32, ..ReadIn::default() };
            let list = Request::new(Opcode::Readdirplus, dir).arg(&arg).reply_data(work.block);
            let close = Request::new(Opcode::Releasedir, dir).arg(&ReleaseIn::default());
            let cycle = List { expected: work.entries, seen: 0, body: vec![0; work.block] };
            (Box::new(cycle), vec![open, list, close])
        }
        Op::Small => (Box::new(Small { node: 0 }), small(dir, &name, block)),
    }
}

/// How the requests of an operation are cut into descriptors.
pub fn segmentation(segments: Segments) -> Segmentation {
    match segments {
        Segments::Contiguous => Segmentation::Contiguous,
        Segments::Pages => Segmentation::Scattered,
    }
}

/// Bytes of data that a WRITE of the operation carries.
pub fn written(work: &Work) -> usize {
    match work.op {
        Op::Write => work.block,
        Op::Small => SMALL_FILE,
        _ => 0,
    }
}

fn lookup<'a>(dir: u64, name: &str) -> Request<'a> {
    Request::new(Opcode::Lookup, dir).name(name).reply::<EntryOut>()
}

fn create<'a>(dir: u64, name: &str) -> Request<'a> {
    let flags = (libc::O_RDWR | libc::O_EXCL).cast_unsigned();
    let arg = CreateIn { flags, mode: libc::S_IFREG | 0o644, umask: 0, open_flags: 0 };
    Request::new(Opcode::Create, dir).arg(&arg).name(name).reply::<(EntryOut, OpenOut)>()
}

fn release<'a>() -> Request<'a> {
    Request::new(Opcode::Release, 0).arg(&ReleaseIn::default())
}

fn small<'a>(dir: u64, name: &str, block: &'a [u8]) -> Vec<Request<'a>> {
    let flush = || Request::new(Opcode::Flush, 0).arg(&FlushIn::default());
    let flags = libc::O_RDWR;
    let open = OpenIn { flags: flags.cast_unsigned(), open_flags: 0 };
    vec![
        create(dir, name),
        write_request(0, 0, 0, block, WriteFlags::empty(), flags),
        flush(),
        release(),
        lookup(dir, name),
        Request::new(Opcode::Open, 0).arg(&open).reply::<OpenOut>(),
        read_request(0, 0, 0, SMALL_FILE),
        flush(),
        release(),
        Request::new(Opcode::Unlink, dir).name(name),
    ]
}

/// READ or WRITE of random blocks in the slot's own part of the file.
struct Data {
    block: u64,
    first: u64,
    blocks: usize,
    /// Body of a good reply in bytes.
    expected: usize,
    /// A WRITE's reply says how much was written.
    written: Option<u32>,
    random: Random,
}

impl Data {
    fn new(work: &Work, slot: usize, random: Random) -> Data {
        let block = work.block as u64;
        let files = usize::from(work.files);
        // Slots of one file have parts of it.
        let parts = work.in_flight().div_ceil(files);
        let blocks = work.bytes_of_file() / parts as u64 / block;
        let writes = work.op == Op::Write;
        Data {
            block,
            first: (slot / files) as u64 * blocks,
            blocks: usize::try_from(blocks).unwrap_or(usize::MAX),
            expected: if writes { 8 } else { work.block },
            written: writes.then_some(work.block as u32),
            random,
        }
    }
}

impl Cycle for Data {
    fn begin(&mut self, exchanges: &[Exchange]) -> usize {
        let block = self.first + self.random.below(self.blocks) as u64;
        exchanges[0].set(OFFSET, block * self.block);
        0
    }

    fn next(&mut self, _: usize, len: usize, exchanges: &[Exchange], _: &Forgets<'_>) -> Step {
        if len != self.expected {
            return Err(format!("a body of {len} bytes instead of {}", self.expected));
        }
        match self.written {
            Some(size) if exchanges[0].body(0) != u64::from(size) => Err("a short write".into()),
            _ => Ok(None),
        }
    }
}

/// One request, as it is.
pub struct Repeated;

impl Cycle for Repeated {
    fn begin(&mut self, _: &[Exchange]) -> usize {
        0
    }

    fn next(&mut self, _: usize, _: usize, _: &[Exchange], _: &Forgets<'_>) -> Step {
        Ok(None)
    }
}

struct Getattr {
    workload: Arc<Workload>,
    random: Random,
}

impl Cycle for Getattr {
    fn begin(&mut self, exchanges: &[Exchange]) -> usize {
        exchanges[0].set_node(self.workload.nodes[self.random.below(self.workload.nodes.len())]);
        0
    }

    fn next(&mut self, _: usize, len: usize, _: &[Exchange], _: &Forgets<'_>) -> Step {
        if len < 96 { Err(format!("a body of {len} bytes")) } else { Ok(None) }
    }
}

struct Lookup {
    names: Vec<Vec<u8>>,
    nodes: Arc<Workload>,
    asked: usize,
    random: Random,
}

impl Cycle for Lookup {
    fn begin(&mut self, exchanges: &[Exchange]) -> usize {
        self.asked = self.random.below(self.names.len());
        exchanges[0].set_bytes(0, &self.names[self.asked][..NAME_LEN]);
        0
    }

    fn next(&mut self, _: usize, _: usize, exchanges: &[Exchange], _: &Forgets<'_>) -> Step {
        let (found, known) = (exchanges[0].body(0), self.nodes.nodes[self.asked]);
        if found == known { Ok(None) } else { Err(format!("node {found} instead of {known}")) }
    }
}

struct Churn {
    node: u64,
}

impl Cycle for Churn {
    fn begin(&mut self, _: &[Exchange]) -> usize {
        0
    }

    fn next(&mut self, step: usize, _: usize, exchanges: &[Exchange], forgets: &Forgets<'_>) -> Step {
        match step {
            0 => {
                self.node = exchanges[0].body(0);
                exchanges[1].set_node(self.node);
                exchanges[1].set(HANDLE, exchanges[0].body(CREATED_HANDLE));
                Ok(Some(1))
            }
            1 => Ok(Some(2)),
            _ => forgets.forget(self.node, 1).map(|()| None).map_err(|error| error.to_string()),
        }
    }
}

struct List {
    expected: u32,
    seen: u32,
    body: Vec<u8>,
}

impl Cycle for List {
    fn begin(&mut self, exchanges: &[Exchange]) -> usize {
        self.seen = 0;
        exchanges[1].set(OFFSET, 0);
        0
    }

    fn next(&mut self, step: usize, len: usize, exchanges: &[Exchange], _: &Forgets<'_>) -> Step {
        match step {
            0 => {
                let handle = exchanges[0].body(0);
                exchanges[1].set(HANDLE, handle);
                exchanges[2].set(HANDLE, handle);
                Ok(Some(1))
            }
            1 if len == 0 && self.seen < self.expected => {
                Err(format!("{} entries instead of {}", self.seen, self.expected))
            }
            1 if len == 0 => Ok(Some(2)),
            1 => {
                exchanges[1].copy_body(&mut self.body[..len]);
                exchanges[1].set(OFFSET, self.read_entries(len)?);
                Ok(Some(1))
            }
            _ => Ok(None),
        }
    }
}

impl List {
    /// Counts the entries in the reply; returns the offset to go on from.
    fn read_entries(&mut self, len: usize) -> std::result::Result<u64, String> {
        let (mut rest, mut next) = (&self.body[..len], 0);
        while let Ok((record, _)) = Direntplus::ref_from_prefix(rest) {
            let record_len = (size_of::<Direntplus>() + record.dirent.namelen as usize).next_multiple_of(8);
            next = record.dirent.off;
            self.seen += 1;
            rest = rest.get(record_len..).ok_or("an entry that is cut off")?;
        }
        Ok(next)
    }
}

struct Small {
    node: u64,
}

impl Cycle for Small {
    fn begin(&mut self, _: &[Exchange]) -> usize {
        0
    }

    fn next(&mut self, step: usize, len: usize, exchanges: &[Exchange], forgets: &Forgets<'_>) -> Step {
        match step {
            0 => {
                self.node = exchanges[0].body(0);
                [1, 2, 3, 5, 6, 7, 8].iter().for_each(|&i| exchanges[i].set_node(self.node));
                let handle = exchanges[0].body(CREATED_HANDLE);
                [1, 2, 3].iter().for_each(|&i| exchanges[i].set(HANDLE, handle));
            }
            4 if exchanges[4].body(0) != self.node => return Err("the file has changed its node".into()),
            5 => [6, 7, 8].iter().for_each(|&i| exchanges[i].set(HANDLE, exchanges[5].body(0))),
            6 if len != SMALL_FILE => return Err(format!("{len} bytes were read")),
            9 => {
                return forgets.forget(self.node, 2).map(|()| None).map_err(|error| error.to_string());
            }
            _ => {}
        }
        Ok(Some(step + 1))
    }
}

/// Prepares the workload for `work` through a session's client, making what is missing.
pub fn prepare(client: &lanefsd_frontend::client::Client<'_>, work: &Work) -> Result<Arc<Workload>> {
    use crate::layout;
    let mut workload = Workload { work: work.clone(), data: Vec::new(), directory: 0, nodes: Vec::new() };
    match work.op {
        Op::Read | Op::Write => workload.data = layout::data_files(client, work)?,
        Op::Create | Op::Small => workload.directory = layout::directory(client, layout::CHURN)?,
        Op::Getattr | Op::Lookup | Op::List => {
            (workload.directory, workload.nodes) =
                layout::entries(client, work.entries, work.op != Op::List)?;
        }
    }
    Ok(Arc::new(workload))
}
