//! The decoder: any bytes are a request or an error, and what was decoded holds what it promises.

use fuse_protocol::abi;
use fuse_protocol::decode::{IN_HEADER_SIZE, MAX_ARGUMENTS, RawHeader};
use fuse_protocol::init::{Layout, negotiate};
use fuse_protocol::name::{LookupName, NAME_MAX, Name};
use fuse_protocol::opcode::Opcode;
use fuse_protocol::request::{Lookup, Operation, Request, SetTime};
use zerocopy::FromBytes;

/// Decodes `data`: a byte that chooses the layout, the header, the arguments.
pub fn decode(data: &[u8]) {
    let Some((&choice, message)) = data.split_first() else { return };
    let Ok((header, rest)) = abi::InHeader::read_from_prefix(message) else { return };
    let bit = |number: u8| choice & (1 << number) != 0;
    let layout =
        Layout { long_setxattr: bit(0), trailing_labels: bit(1), extensions: bit(2), open_flags: bit(3) };
    let header = RawHeader::from(header);
    // As the server does it, and with bytes that the header's length does not cover.
    if let Ok(count) = header.argument_bytes(message.len()) {
        assert!(count <= MAX_ARGUMENTS && count <= rest.len());
        check(&header, &rest[..count], layout);
    }
    check(&header, rest, layout);
}

fn check(header: &RawHeader, arguments: &[u8], layout: Layout) {
    let request = match Request::decode(header, arguments, layout) {
        Ok(request) => request,
        Err(error) => {
            assert!((1..512).contains(&error.errno().raw()), "{error}");
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    assert_eq!(request.header.unique, header.unique());
    assert_eq!(Opcode::from_number(header.wire().opcode), Some(request.header.opcode));
    let mut labelled = 0;
    for label in request.labels.iter() {
        labelled += label.name.count_bytes() + label.value.len();
    }
    assert!(labelled <= arguments.len());
    assert_eq!(request.labels.is_empty(), request.labels.iter().next().is_none());
    check_operation(header, &request.operation);
}

fn check_operation(header: &RawHeader, operation: &Operation<'_>) {
    match operation {
        Operation::Init(init) => {
            if let Ok(Some(agreed)) = negotiate(init, init.flags) {
                assert!(init.flags.contains(agreed.flags), "more was agreed on than was asked for");
                assert!(agreed.minor <= init.minor);
                assert_eq!(agreed.to_wire().max_write, agreed.max_write);
            }
        }
        Operation::Lookup(Lookup { name: LookupName::Entry(name) }) => check_name(*name),
        Operation::Symlink(op) => check_name(op.name),
        Operation::Mknod(op) => check_name(op.name),
        Operation::Mkdir(op) => check_name(op.name),
        Operation::Unlink(op) => check_name(op.name),
        Operation::Rmdir(op) => check_name(op.name),
        Operation::Link(op) => check_name(op.name),
        Operation::Rename(rename) => {
            check_name(rename.name);
            check_name(rename.new_name);
        }
        Operation::Create(create) => check_name(create.name),
        Operation::BatchForget(items) => {
            let most = (header.wire().len as usize).max(MAX_ARGUMENTS) / size_of::<abi::ForgetOne>();
            assert!(items.iter().count() <= most);
        }
        Operation::Read(read) => check_offset(read.offset),
        Operation::Write(write) => {
            check_offset(write.offset);
            let declared = IN_HEADER_SIZE + size_of::<abi::WriteIn>() + write.size as usize;
            assert_eq!(header.wire().len as usize, declared);
        }
        Operation::Fallocate(op) => {
            check_offset(op.offset);
            check_offset(op.length);
        }
        Operation::CopyFileRange(copy) => {
            check_offset(copy.offset_in);
            check_offset(copy.offset_out);
        }
        Operation::Getlk(lock) | Operation::Setlk(lock) | Operation::Setlkw(lock) => {
            assert!(lock.start <= lock.end);
            check_offset(lock.end);
        }
        Operation::Ioctl(ioctl) => {
            assert!(ioctl.data.len() <= MAX_ARGUMENTS);
            let _ = ioctl.command();
        }
        Operation::Setattr(set) => {
            for time in [set.atime, set.mtime].into_iter().flatten() {
                assert!(matches!(time, SetTime::Now | SetTime::At { .. }));
            }
        }
        _ => {}
    }
}

/// One safe path component.
fn check_name(name: Name<'_>) {
    let bytes = name.as_c_str().to_bytes();
    assert!(!bytes.is_empty() && bytes.len() <= NAME_MAX);
    assert!(bytes != b"." && bytes != b".." && !bytes.contains(&b'/'));
}

/// A number that the host's signed offsets can hold.
fn check_offset(offset: u64) {
    assert!(i64::try_from(offset).is_ok());
}
