//! A server of one file, `/hello`, and a client that reads it: INIT, LOOKUP, OPEN, READ.
//!
//! The messages go through two arrays of bytes here; a real server reads them from `/dev/fuse` or from a
//! virtqueue.
#![allow(clippy::indexing_slicing, reason = "the client takes its own server's replies apart")]

use std::time::Duration;

use fuse_protocol::abi::{Attr, EntryOut, InHeader, InitIn, OpenIn, OpenOut, ReadIn};
use fuse_protocol::decode::{IN_HEADER_SIZE, RawHeader};
use fuse_protocol::errno::Errno;
use fuse_protocol::flags::{InitFlags, OpenReplyFlags};
use fuse_protocol::ids::{HandleId, NodeId, Unique};
use fuse_protocol::init::{Layout, Negotiated, major_mismatch, negotiate};
use fuse_protocol::name::LookupName;
use fuse_protocol::opcode::Opcode;
use fuse_protocol::reply::{self, Attributes, Entry, OUT_HEADER_SIZE, Opened, ReplyBody};
use fuse_protocol::request::{Init, Operation, Read, Request};
use zerocopy::{FromBytes, IntoBytes};

const FILE: NodeId = NodeId(2);
const CONTENT: &[u8] = b"Hello from fuse-protocol\n";
const ONE_SECOND: Duration = Duration::from_secs(1);

/// A session with one client.
#[derive(Default)]
struct Server {
    negotiated: Option<Negotiated>,
}

impl Server {
    /// Serves one message. `None` if it has no reply.
    fn serve(&mut self, message: &[u8]) -> Option<Vec<u8>> {
        let (wire, behind) = InHeader::read_from_prefix(message).ok()?;
        let header = RawHeader::from(wire);
        let layout = self.negotiated.map_or(Layout::default(), |negotiated| negotiated.layout());
        let decoded = header.argument_bytes(message.len()).and_then(|count| {
            let arguments = behind.get(..count).unwrap_or(behind);
            Request::decode(&header, arguments, layout)
        });
        let reply = match decoded {
            Ok(request) => self.dispatch(&request),
            Err(error) => failure(header.unique(), error.errno()),
        };
        let has_reply = !header.opcode().is_some_and(Opcode::has_no_reply);
        has_reply.then_some(reply)
    }

    fn dispatch(&mut self, request: &Request<'_>) -> Vec<u8> {
        let (unique, node) = (request.header.unique, request.header.node);
        match &request.operation {
            Operation::Init(init) => self.init(unique, init),
            Operation::Lookup(lookup) => match lookup.name {
                LookupName::Entry(name) if name.as_c_str() == c"hello" => success(unique, &entry()),
                _ => failure(unique, Errno::NOENT),
            },
            Operation::Getattr(_) if node == FILE => success(unique, &entry().attributes),
            Operation::Open(_) if node == FILE => {
                success(unique, &Opened { handle: HandleId(1), flags: OpenReplyFlags::empty() })
            }
            Operation::Read(read) if node == FILE => success(unique, &content(read)),
            Operation::Release(_) => success(unique, &()),
            _ => failure(unique, Errno::NOSYS),
        }
    }

    fn init(&mut self, unique: Unique, init: &Init) -> Vec<u8> {
        match negotiate(init, InitFlags::ASYNC_READ) {
            Ok(Some(negotiated)) => {
                self.negotiated = Some(negotiated);
                success(unique, &negotiated.to_wire())
            }
            Ok(None) => success(unique, &major_mismatch()),
            Err(_) => failure(unique, Errno::INVAL),
        }
    }
}

fn success(unique: Unique, body: &impl ReplyBody) -> Vec<u8> {
    reply::encode(unique, Ok(body))
}

fn failure(unique: Unique, errno: Errno) -> Vec<u8> {
    reply::encode::<()>(unique, Err(errno))
}

fn entry() -> Entry {
    let attr = Attr { ino: FILE.0, size: CONTENT.len() as u64, mode: 0o100_444, nlink: 1, ..Attr::default() };
    let attributes = Attributes { attr, valid: ONE_SECOND };
    Entry { node: FILE, generation: 0, entry_valid: ONE_SECOND, attributes }
}

fn content(read: &Read) -> Vec<u8> {
    let start = usize::try_from(read.offset).unwrap_or(usize::MAX);
    let size = usize::try_from(read.size).unwrap_or(usize::MAX);
    CONTENT.iter().skip(start).take(size).copied().collect()
}

/// Sends a request and returns the reply's body.
fn call(server: &mut Server, opcode: Opcode, node: NodeId, arguments: &[u8]) -> Result<Vec<u8>, String> {
    let len = u32::try_from(IN_HEADER_SIZE + arguments.len()).map_err(|error| error.to_string())?;
    let header = InHeader { len, opcode: opcode as u32, unique: 2, nodeid: node.0, ..InHeader::default() };
    let reply = server.serve(&[header.as_bytes(), arguments].concat()).ok_or("no reply")?;
    let error = i32::from_le_bytes([reply[4], reply[5], reply[6], reply[7]]);
    if error == 0 {
        Ok(reply[OUT_HEADER_SIZE..].to_vec())
    } else {
        Err(format!("{opcode:?}: errno {}", -error))
    }
}

fn main() -> Result<(), String> {
    let mut server = Server::default();
    let init = InitIn { major: 7, minor: 45, ..InitIn::default() };
    call(&mut server, Opcode::Init, NodeId(0), init.as_bytes())?;

    let found = call(&mut server, Opcode::Lookup, NodeId::ROOT, b"hello\0")?;
    let entry = EntryOut::read_from_bytes(&found).map_err(|error| error.to_string())?;
    println!("/hello is node {} with {} bytes", entry.nodeid, entry.attr.size);

    let node = NodeId(entry.nodeid);
    let opened = call(&mut server, Opcode::Open, node, OpenIn::default().as_bytes())?;
    let fh = OpenOut::read_from_bytes(&opened).map_err(|error| error.to_string())?.fh;
    let read = ReadIn { fh, size: 4096, ..ReadIn::default() };
    let data = call(&mut server, Opcode::Read, node, read.as_bytes())?;
    print!("{}", String::from_utf8_lossy(&data));
    assert_eq!(data, CONTENT);

    let missing = call(&mut server, Opcode::Lookup, NodeId::ROOT, b"missing\0");
    println!("/missing: {missing:?}");
    Ok(())
}
