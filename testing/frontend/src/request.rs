//! FUSE requests and replies as bytes, and their way into and out of a chain.

use std::sync::Arc;

use fuse_protocol::abi::{EXT_GROUPS, ExtHeader, InHeader, OutHeader, Secctx, SuppGroups};
use fuse_protocol::opcode::Opcode;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::chain::{Chain, Segmentation, Segments};
use crate::errno::Errno;
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::queue::Completion;
use crate::ring::Placement;

/// On whose behalf a request is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Caller {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Process id in the guest.
    pub pid: u32,
    /// The supplementary group that a creating request carries (CREATE_SUPP_GROUP).
    pub group: Option<u32>,
}

/// A FUSE request, not yet in guest memory.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// Operation; any number for a request that is none.
    pub opcode: u32,
    /// Node it is about.
    pub nodeid: u64,
    /// On whose behalf.
    pub caller: Caller,
    /// Arguments; Linux gives each its own descriptor.
    pub args: Vec<Vec<u8>>,
    /// Data after the arguments, as of WRITE.
    pub data: &'a [u8],
    /// Room for the fixed part of the reply after its header; `None` if no reply is expected.
    pub reply: Option<usize>,
    /// Room for the reply's data, as of READ.
    pub reply_data: usize,
    /// A security label of what is created (SECURITY_CTX), as an extension.
    pub label: Vec<u8>,
    /// What the header's last word says of extensions that are not there; Linux clears it.
    pub last_word: u32,
    /// The length that the header says, where it is not the request's.
    pub declared: Option<u32>,
}

impl<'a> Request<'a> {
    /// A request without arguments whose reply is a header.
    pub fn new(opcode: Opcode, nodeid: u64) -> Request<'a> {
        Request {
            opcode: opcode as u32,
            nodeid,
            caller: Caller::default(),
            args: Vec::new(),
            data: &[],
            reply: Some(0),
            reply_data: 0,
            label: Vec::new(),
            last_word: 0,
            declared: None,
        }
    }

    /// Adds a struct.
    pub fn arg(mut self, arg: &(impl IntoBytes + Immutable + ?Sized)) -> Self {
        self.args.push(arg.as_bytes().to_vec());
        self
    }

    /// Adds a name and its NUL.
    pub fn name(mut self, name: impl AsRef<[u8]>) -> Self {
        let mut bytes = name.as_ref().to_vec();
        bytes.push(0);
        self.args.push(bytes);
        self
    }

    /// Labels what is created with this extended attribute.
    pub fn label(mut self, name: &str, value: &[u8]) -> Self {
        self.label = label_extension(name, value);
        self
    }

    /// Sets the data.
    pub fn data(mut self, data: &'a [u8]) -> Self {
        self.data = data;
        self
    }

    /// Gives room for a struct in the reply.
    pub fn reply<T>(mut self) -> Self {
        self.reply = Some(size_of::<T>());
        self
    }

    /// Gives room for `len` bytes of data in the reply.
    pub fn reply_data(mut self, len: usize) -> Self {
        self.reply_data = len;
        self
    }

    /// Leaves this in the header's last word, which guests up to FUSE 7.37 do not know.
    pub fn last_word(mut self, word: u32) -> Self {
        self.last_word = word;
        self
    }

    /// Has the header say another length.
    pub fn declared(mut self, len: u32) -> Self {
        self.declared = Some(len);
        self
    }

    /// Expects no reply, as for FORGET.
    pub fn no_reply(mut self) -> Self {
        self.reply = None;
        self
    }

    /// The operation's name, for messages.
    pub fn operation(&self) -> &'static str {
        operation_name(self.opcode)
    }

    /// The bytes of the request before its data, header first.
    pub fn parts(&self, unique: u64) -> Vec<Vec<u8>> {
        let creates = [Opcode::Mknod, Opcode::Mkdir, Opcode::Symlink, Opcode::Create, Opcode::Tmpfile];
        let mut extension = self.label.clone();
        extension.extend(match self.caller.group {
            Some(group) if creates.iter().any(|&op| op as u32 == self.opcode) => group_extension(group),
            _ => Vec::new(),
        });
        let len = size_of::<InHeader>() + self.args.iter().map(Vec::len).sum::<usize>();
        let [low, high]: [u16; 2] = zerocopy::transmute!(self.last_word);
        let header = InHeader {
            len: self.declared.unwrap_or((len + extension.len() + self.data.len()) as u32),
            opcode: self.opcode,
            unique,
            nodeid: self.nodeid,
            uid: self.caller.uid,
            gid: self.caller.gid,
            pid: self.caller.pid,
            // In units of eight bytes.
            total_extlen: (extension.len() / 8) as u16 | low,
            padding: high,
        };
        let mut parts = vec![header.as_bytes().to_vec()];
        parts.extend(self.args.iter().cloned());
        parts.extend((!extension.is_empty()).then_some(extension));
        parts
    }

    /// Puts the request into guest memory, in a chain of at most `limit` descriptors.
    pub fn to_chain(
        &self,
        memory: &Arc<Memory>,
        unique: u64,
        segmentation: Segmentation,
        limit: usize,
    ) -> Result<Chain> {
        let parts = self.parts(unique);
        let lens: Vec<usize> = parts.iter().map(Vec::len).collect();
        let reply_parts = self.reply.map_or(vec![], |reply| vec![size_of::<OutHeader>(), reply]);
        // The side without data gets what it needs, the other one the rest.
        let left = limit.saturating_sub(2).max(1);
        let (read_limit, write_limit) = match segmentation {
            Segmentation::Bytes | Segmentation::Random(_) => (limit.div_ceil(2), limit / 2),
            _ if self.data.is_empty() => (lens.len().min(left), limit - lens.len().min(left)),
            _ => (left, 2),
        };
        let readable = Segments::new(memory, &lens, self.data.len(), segmentation, read_limit)?;
        let mut at = 0;
        for part in parts.iter().map(Vec::as_slice).chain([self.data]) {
            readable.write(at, part);
            at += part.len();
        }
        let writable = Segments::new(memory, &reply_parts, self.reply_data, segmentation, write_limit)?;
        // A reply that was never written must not look like one from before.
        writable.write(0, &[0xff; size_of::<OutHeader>()]);
        Ok(Chain { readable, writable, placement: Placement::Auto, keep: None })
    }
}

/// A label as Linux sends it; from 5.17 to 6.2 these bytes follow the arguments unannounced.
pub fn label_extension(name: &str, value: &[u8]) -> Vec<u8> {
    let mut label = Secctx { size: value.len() as u32, padding: 0 }.as_bytes().to_vec();
    label.extend_from_slice(name.as_bytes());
    label.push(0);
    label.extend_from_slice(value);
    label.resize(label.len().next_multiple_of(8), 0);
    let size = (size_of::<ExtHeader>() + label.len()) as u32;
    [ExtHeader { size, typ: 1 }.as_bytes(), &label].concat()
}

fn group_extension(group: u32) -> Vec<u8> {
    let size = (size_of::<ExtHeader>() + size_of::<SuppGroups>() + 4) as u32;
    let mut bytes = ExtHeader { size: size.next_multiple_of(8), typ: EXT_GROUPS }.as_bytes().to_vec();
    bytes.extend_from_slice(SuppGroups { nr_groups: 1 }.as_bytes());
    bytes.extend_from_slice(&group.to_ne_bytes());
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

/// The kernel's name of an operation.
pub fn operation_name(opcode: u32) -> &'static str {
    Opcode::from_number(opcode)
        .and_then(|op| Opcode::ALL.iter().find(|(known, _)| *known == op))
        .map_or("an unknown operation", |(_, name)| name)
}

/// A FUSE reply, read from a completed chain.
#[derive(Debug)]
pub struct Reply<'a> {
    completion: &'a Completion,
    /// The operation's name.
    pub operation: &'static str,
    /// What the request was answered with; `None` for success.
    pub errno: Option<Errno>,
    /// Bytes after the reply's header.
    pub len: usize,
}

impl<'a> Reply<'a> {
    /// Checks the reply's header against the request and against the used length.
    pub fn of(completion: &'a Completion) -> Result<Reply<'a>> {
        let mut header = InHeader::default();
        completion.chain.readable.read(0, header.as_mut_bytes());
        let mut out = OutHeader::default();
        completion.chain.writable.read(0, out.as_mut_bytes());
        let operation = operation_name(header.opcode);
        let problem = if completion.used < size_of::<OutHeader>() {
            format!("the used length is {}, less than a header", completion.used)
        } else if out.len as usize != completion.used {
            format!("its header says {} bytes, the used entry says {}", out.len, completion.used)
        } else if out.unique != header.unique {
            format!("it is the reply to request {}, not to {}", out.unique, header.unique)
        } else if out.error > 0 || out.error < -4095 {
            format!("its error is {}", out.error)
        } else if out.error != 0 && completion.used != size_of::<OutHeader>() {
            format!("it is an error with {} bytes of body", completion.used - size_of::<OutHeader>())
        } else {
            let errno = (out.error != 0).then_some(Errno(-out.error));
            return Ok(Reply { completion, operation, errno, len: completion.used - size_of::<OutHeader>() });
        };
        Err(Error::BadReply { operation, problem })
    }

    /// Turns an errno into an error.
    pub fn success(self) -> Result<Self> {
        match self.errno {
            Some(errno) => Err(Error::Refused { operation: self.operation, errno }),
            None => Ok(self),
        }
    }

    /// The struct after the header.
    pub fn body<T: FromBytes>(&self) -> Result<T> {
        T::read_from_prefix(&self.bytes()).map(|(body, _)| body).map_err(|_| Error::BadReply {
            operation: self.operation,
            problem: format!("its body has {} bytes, fewer than {}", self.len, size_of::<T>()),
        })
    }

    /// All bytes after the header.
    pub fn bytes(&self) -> Vec<u8> {
        self.completion.chain.writable.to_vec(size_of::<OutHeader>(), self.len)
    }
}
