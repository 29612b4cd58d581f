//! The FUSE protocol: bytes to typed requests, typed replies to bytes.
//!
//! All public items are the interface of this crate, for servers of any transport; see the README for what
//! is not. Everything is a pure function of its arguments: no I/O, no unsafe code, no operating system.
//! Decoding is total: every byte string is a request or a [`decode::DecodeError`].
//!
//! A server takes these steps for each message:
//!
//! 1. Read [`abi::InHeader`] and make it a [`decode::RawHeader`], which looks the opcode up.
//! 2. Copy [`argument_bytes`](decode::RawHeader::argument_bytes) of arguments. The data of a WRITE is not
//!    among them and can stay where it is.
//! 3. Decode the [`request::Request`] and match its [`request::Operation`]. What the session has negotiated
//!    decides the [`init::Layout`]; [`init::negotiate`] answers INIT.
//! 4. Encode the [`reply`], if the opcode [has one](opcode::Opcode::has_no_reply).
//!
//! # Example
//!
//! A LOOKUP of `hello` in the root, as Linux sends it, and its reply:
//!
//! ```
//! use core::time::Duration;
//!
//! use fuse_protocol::abi::{Attr, EntryOut, InHeader};
//! use fuse_protocol::decode::{IN_HEADER_SIZE, RawHeader};
//! use fuse_protocol::errno::Errno;
//! use fuse_protocol::ids::NodeId;
//! use fuse_protocol::init::Layout;
//! use fuse_protocol::name::LookupName;
//! use fuse_protocol::opcode::Opcode;
//! use fuse_protocol::reply::{self, Attributes, Entry, OUT_HEADER_SIZE};
//! use fuse_protocol::request::{Operation, Request};
//! use zerocopy::{FromBytes, IntoBytes};
//!
//! fn serve(message: &[u8]) -> Option<Vec<u8>> {
//!     let (wire, arguments) = InHeader::read_from_prefix(message).ok()?;
//!     let header = RawHeader::from(wire);
//!     let decoded = header
//!         .argument_bytes(message.len())
//!         .and_then(|count| Request::decode(&header, &arguments[..count], Layout::default()));
//!     let request = match decoded {
//!         Ok(request) => request,
//!         Err(error) => return Some(reply::encode::<()>(header.unique(), Err(error.errno()))),
//!     };
//!     Some(match request.operation {
//!         Operation::Lookup(lookup) => match lookup.name {
//!             LookupName::Entry(name) if name.as_c_str() == c"hello" => {
//!                 let attr = Attr { ino: 2, size: 5, mode: 0o100_444, nlink: 1, ..Attr::default() };
//!                 let attributes = Attributes { attr, valid: Duration::from_secs(1) };
//!                 let valid = Duration::from_secs(1);
//!                 let entry = Entry { node: NodeId(2), generation: 0, entry_valid: valid, attributes };
//!                 reply::encode(header.unique(), Ok(&entry))
//!             }
//!             _ => reply::encode::<Entry>(header.unique(), Err(Errno::NOENT)),
//!         },
//!         _ => reply::encode::<()>(header.unique(), Err(Errno::NOSYS)),
//!     })
//! }
//!
//! let len = u32::try_from(IN_HEADER_SIZE + 6)?;
//! let header = InHeader { len, opcode: Opcode::Lookup as u32, unique: 2, nodeid: 1, ..InHeader::default() };
//! let reply = serve(&[header.as_bytes(), b"hello\0"].concat()).expect("a LOOKUP has a reply");
//! let entry = EntryOut::read_from_bytes(&reply[OUT_HEADER_SIZE..]).expect("it carries an entry");
//! assert_eq!((entry.nodeid, entry.attr.size), (2, 5));
//!
//! // Bytes that are no request are an error, not a panic.
//! let refused = serve(&[header.as_bytes(), b"a/b\0\0\0"].concat()).expect("an error is a reply, too");
//! assert_eq!(refused.len(), OUT_HEADER_SIZE);
//! # Ok::<(), std::num::TryFromIntError>(())
//! ```
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod abi;
pub mod decode;
pub mod errno;
pub mod extensions;
pub mod flags;
pub mod ids;
pub mod init;
pub mod ioctl;
pub mod name;
pub mod notification;
pub mod opcode;
pub mod reply;
pub mod request;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
