//! Properties of the public interface, over bytes and values of all kinds.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a failed test panics")]

use std::time::Duration;

use fuse_protocol::abi::{Attr, InHeader, OutHeader};
use fuse_protocol::decode::{IN_HEADER_SIZE, MAX_ARGUMENTS, RawHeader};
use fuse_protocol::errno::Errno;
use fuse_protocol::ids::{NodeId, Unique};
use fuse_protocol::init::Layout;
use fuse_protocol::name::{LookupName, NAME_MAX, Name};
use fuse_protocol::opcode::Opcode;
use fuse_protocol::reply::{
    self, Attributes, DirectoryEntry, DirectoryWriter, Entry, OUT_HEADER_SIZE, ReplyBody, XattrReply,
};
use fuse_protocol::request::{Operation, Request};
use proptest::collection::vec;
use proptest::prelude::*;
use zerocopy::{FromBytes, IntoBytes};

/// Every layout that INIT can agree on.
fn layouts() -> impl Iterator<Item = Layout> {
    (0..16).map(|bits| Layout {
        long_setxattr: bits & 1 != 0,
        trailing_labels: bits & 2 != 0,
        extensions: bits & 4 != 0,
        open_flags: bits & 8 != 0,
    })
}

/// A message of any kind, often with the length that its header declares.
fn message() -> impl Strategy<Value = Vec<u8>> {
    let opcode = prop_oneof![0u32..60, any::<u32>()];
    let arguments = prop_oneof![vec(any::<u8>(), 0..200), vec(prop_oneof![Just(0), Just(b'a')], 0..200)];
    (opcode, arguments, any::<Option<u32>>(), 0u16..4).prop_map(|(opcode, arguments, len, total_extlen)| {
        let known = usize::try_from(opcode).ok().and_then(|index| Opcode::ALL.get(index));
        let opcode = known.map_or(opcode, |(opcode, _)| *opcode as u32);
        let len = len.unwrap_or(u32::try_from(IN_HEADER_SIZE + arguments.len()).unwrap());
        let header = InHeader { len, opcode, unique: 1, nodeid: 1, total_extlen, ..InHeader::default() };
        [header.as_bytes(), &arguments].concat()
    })
}

fn is_one_component(name: Name<'_>) -> bool {
    let bytes = name.as_c_str().to_bytes();
    !bytes.is_empty() && bytes.len() <= NAME_MAX && bytes != b"." && bytes != b".." && !bytes.contains(&b'/')
}

/// The names in a request.
fn names<'a>(operation: &Operation<'a>) -> Vec<Name<'a>> {
    match operation {
        Operation::Lookup(op) => match op.name {
            LookupName::Entry(name) => vec![name],
            LookupName::This | LookupName::Parent => vec![],
        },
        Operation::Symlink(op) => vec![op.name],
        Operation::Mknod(op) => vec![op.name],
        Operation::Mkdir(op) => vec![op.name],
        Operation::Unlink(op) => vec![op.name],
        Operation::Rmdir(op) => vec![op.name],
        Operation::Rename(op) => vec![op.name, op.new_name],
        Operation::Link(op) => vec![op.name],
        Operation::Create(op) => vec![op.name],
        _ => vec![],
    }
}

proptest! {
    /// Decoding is total, and what it accepts holds what the types promise.
    #[test]
    fn every_message_is_a_request_or_an_error(message in message()) {
        let (wire, arguments) = InHeader::read_from_prefix(&message).unwrap();
        let header = RawHeader::from(wire);
        let count = match header.argument_bytes(message.len()) {
            Ok(count) => count,
            Err(error) => {
                prop_assert!(error.errno().raw() > 0 && !error.to_string().is_empty());
                return Ok(());
            }
        };
        prop_assert!(count <= arguments.len() && count <= MAX_ARGUMENTS);
        for layout in layouts() {
            let Ok(request) = Request::decode(&header, &arguments[..count], layout) else { continue };
            prop_assert_eq!(Some(request.header.opcode), header.opcode());
            prop_assert!(names(&request.operation).into_iter().all(is_one_component));
            let labels: usize = request.labels.iter().map(|label| label.value.len()).sum();
            prop_assert!(labels <= count);
        }
    }

    /// The length in a reply's header is that of the reply, and an error has no body.
    #[test]
    fn replies_have_the_length_that_they_declare(
        unique: u64, data in vec(any::<u8>(), 0..300), seconds: u32, nanoseconds in 0u32..1_000_000_000, errno in 1i32..512,
    ) {
        fn check<T: ReplyBody>(unique: u64, body: &T) -> Result<Vec<u8>, TestCaseError> {
            let bytes = reply::encode(Unique(unique), Ok(body));
            let (header, rest) = OutHeader::read_from_prefix(&bytes).unwrap();
            prop_assert_eq!((header.len as usize, header.error, header.unique), (bytes.len(), 0, unique));
            prop_assert!(rest.len() >= T::MIN_SIZE);
            Ok(rest.to_vec())
        }
        prop_assert_eq!(check(unique, &data)?, data.clone());
        prop_assert_eq!(check(unique, &XattrReply::Data(data.clone()))?, data);
        prop_assert!(check(unique, &())?.is_empty());
        let valid = Duration::new(u64::from(seconds), nanoseconds);
        let attributes = Attributes { attr: Attr { ino: unique, ..Attr::default() }, valid };
        check(unique, &attributes)?;
        let entry = Entry { node: NodeId(unique), generation: 0, entry_valid: valid, attributes };
        prop_assert_eq!(check(unique, &entry)?[..8].to_vec(), unique.to_le_bytes().to_vec());
        let error = reply::encode::<Entry>(Unique(unique), Err(Errno::from_raw(errno).unwrap()));
        prop_assert_eq!(error.len(), OUT_HEADER_SIZE);
        prop_assert_eq!(OutHeader::read_from_bytes(&error).unwrap().error, -errno);
    }

    /// A guest finds each record of a listing, whole and in order.
    #[test]
    fn listings_are_read_back(names in vec("[a-z]{1,40}", 0..40), limit in 0usize..2000) {
        let mut buffer = Vec::new();
        let mut writer = DirectoryWriter::new(&mut buffer, limit, false);
        let written = names.iter().zip(1..).take_while(|(name, next_offset)| {
            let entry = DirectoryEntry { ino: 1, next_offset: *next_offset, kind: 8, name: name.as_bytes() };
            writer.push(&entry, None).is_ok()
        });
        let written = written.count();
        let mut rest = &buffer[..];
        for (name, offset) in names.iter().zip(1..).take(written) {
            let (dirent, after) = fuse_protocol::abi::Dirent::read_from_prefix(rest).unwrap();
            let len = dirent.namelen as usize;
            prop_assert_eq!((&after[..len], dirent.off), (name.as_bytes(), offset));
            rest = &after[len.next_multiple_of(8)..];
        }
        prop_assert!(rest.is_empty() && buffer.len() <= limit);
    }
}

#[test]
fn numbers_outside_the_protocol_are_no_errno() {
    for number in [i32::MIN, -1, 0, 512, i32::MAX] {
        assert_eq!(Errno::from_raw(number), None);
    }
}
