//! Offsets, sizes and ranges at the ends of what a number can be: each is answered, and what is done is
//! right to the byte.

use std::fs;
use std::os::unix::fs::FileExt;

use fuse_protocol::opcode::Opcode;
use lanefsd_frontend::client::{Change, Lock, ROOT};
use lanefsd_frontend::{Backend, Request, Segmentation, Session};

use crate::common;

/// Where numbers change their length or sign.
const EDGES: [u64; 9] = [0, 4096, 1 << 16, 1 << 31, 1 << 32, 1 << 44, 1 << 62, 1 << 63, u64::MAX];

/// Each edge, and its neighbours.
fn edges() -> impl Iterator<Item = u64> {
    EDGES.iter().flat_map(|edge| [edge.wrapping_sub(1), *edge, edge.wrapping_add(1)])
}

fn serve(args: &[&str]) -> (Backend, Session, u64, u64) {
    let (backend, session) = common::serve_with(args, common::queues(2));
    let (node, fh) = common::create_file(&session);
    (backend, session, node, fh)
}

/// Done, or refused with an errno; anything else is no answer.
fn answered<T>(what: &str, result: lanefsd_frontend::Result<T>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            assert!(error.errno().is_some_and(|errno| errno.0 > 0), "{what}: {error}");
            None
        }
    }
}

/// Attack: READ, WRITE, LSEEK, FALLOCATE, COPY_FILE_RANGE and SETATTR at integer limits.
/// Outcome: done to the byte, or an errno.
#[test]
fn offsets_and_sizes_of_data() {
    let (backend, session, node, fh) = serve(&["--cache=never"]);
    let client = session.client();
    let host = fs::File::options().read(true).write(true).open(backend.path("file")).unwrap();
    let mut written = 0;
    for offset in edges() {
        for len in [0usize, 1, 4095, 4096, 4097, 65_537] {
            let what = format!("{len} bytes at {offset:#x}");
            host.set_len(0).unwrap();
            let bytes: Vec<u8> = (0..len).map(|at| (at % 251) as u8 + 1).collect();
            if let Some(count) = answered(&what, client.write(node, fh, offset, &bytes)) {
                assert!(count <= len, "{what}: {count} were written");
                let size = if count == 0 { 0 } else { offset + count as u64 };
                assert_eq!(host.metadata().unwrap().len(), size, "{what}");
                let mut found = vec![0; count];
                host.read_exact_at(&mut found, if count == 0 { 0 } else { offset }).unwrap();
                assert_eq!(found, bytes[..count], "{what}");
                written += 1;
            } else {
                assert_eq!(host.metadata().unwrap().len(), 0, "{what} was refused, and done");
            }
            if let Some(found) = answered(&what, client.read(node, fh, offset, len)) {
                assert!(found.len() <= len && found == bytes[..found.len()], "{what}: read otherwise");
            }
        }
        let what = format!("at {offset:#x}");
        for whence in [libc::SEEK_SET, libc::SEEK_CUR, libc::SEEK_END, libc::SEEK_DATA, libc::SEEK_HOLE, 99] {
            answered(&what, client.lseek(node, fh, offset, whence));
        }
        for other in edges() {
            answered(&what, client.fallocate(node, fh, libc::FALLOC_FL_PUNCH_HOLE, offset, other));
            answered(&what, client.fallocate(node, fh, libc::FALLOC_FL_KEEP_SIZE, u64::MAX - 4096, other));
            // Else a file with a far end would be copied whole.
            host.set_len(10).unwrap();
            answered(&what, client.copy_file_range((node, fh, offset), (node, fh, other), 4096));
            host.set_len(10).unwrap();
            answered(&what, client.copy_file_range_64((node, fh, 0), (node, fh, offset), other));
        }
        host.set_len(10).unwrap();
        let size = answered(&what, client.setattr(node, Change::none().size(offset))).map_or(10, |_| offset);
        assert_eq!(host.metadata().unwrap().len(), size, "{what}");
    }
    assert!(written > 40, "{written} writes were done");
    host.set_len(0).unwrap();
    assert_eq!(client.write(node, fh, 0, b"well").unwrap(), 4);
    client.on(2).getattr(ROOT).unwrap();
}

/// Attack: attributes and listings with room for less, for all, and for more than can be.
/// Outcome: ERANGE or EINVAL, or all of it; never more than the room.
#[test]
fn sizes_of_attributes_and_listings() {
    let (backend, session, node, _) = serve(&["--xattr"]);
    let client = session.client();
    client.setxattr(node, "user.name", &[7; 100], 0).unwrap();
    for number in 0..100 {
        fs::write(backend.path(&format!("entry{number}")), "").unwrap();
    }
    for size in edges().map(|edge| edge as u32).chain([99, 100, 101]) {
        let [low, high] = [size.to_ne_bytes(), [0; 4]];
        let argument: Vec<u8> = [low, high].concat();
        for (opcode, name) in [(Opcode::Getxattr, Some("user.name")), (Opcode::Listxattr, None)] {
            // The room in guest memory is what it is, whatever the request says.
            let mut request = Request::new(opcode, node).arg(argument.as_slice()).reply_data(200);
            if let Some(name) = name {
                request = request.name(name);
            }
            let what = format!("{size} bytes of {opcode:?}");
            if let Some(reply) = answered(&what, client.call_bytes(&request)) {
                assert!(size == 0 || reply.len() <= size as usize, "{what}");
                assert!(size == 0 || opcode != Opcode::Getxattr || reply == [7; 100], "{what}");
            } else {
                assert!(size != 0 && (size < 100 || opcode == Opcode::Getxattr), "{what}");
            }
        }
        let open = client.opendir(ROOT).unwrap().fh;
        for opcode in [Opcode::Readdir, Opcode::Readdirplus] {
            for offset in edges() {
                let mut read = [0u8; 40];
                read[..8].copy_from_slice(&open.to_ne_bytes());
                read[8..16].copy_from_slice(&offset.to_ne_bytes());
                read[16..20].copy_from_slice(&size.to_ne_bytes());
                let request = Request::new(opcode, ROOT).arg(&read).reply_data(1000);
                let what = format!("{size} bytes of {opcode:?} from {offset:#x}");
                if let Some(reply) = answered(&what, client.call_bytes(&request)) {
                    assert!(reply.len() <= 1000.min(size as usize), "{what}: {} bytes", reply.len());
                }
            }
        }
        client.releasedir(ROOT, open).unwrap();
    }
    client.on(2).getattr(ROOT).unwrap();
}

/// Attack: lock ranges at integer limits, and reversed.
/// Outcome: as on the host, or EINVAL.
#[test]
fn ranges_of_locks() {
    let (_backend, session, node, fh) = serve(&["--posix-lock"]);
    let client = session.client();
    for start in edges() {
        for end in edges() {
            let what = format!("{start:#x} to {end:#x}");
            let lock = Lock::posix(1, libc::F_WRLCK, start, end);
            if answered(&what, client.setlk(node, fh, lock)).is_some() {
                assert!(start <= end && start <= i64::MAX as u64, "{what} was locked");
                let other = Lock::posix(2, libc::F_WRLCK, start, start);
                assert_eq!(common::errno(client.setlk(node, fh, other)), libc::EAGAIN, "{what}");
                let found = client.getlk(node, fh, other).unwrap();
                assert_eq!((found.start, found.end), (start, end), "{what}");
            }
            answered(&what, client.getlk(node, fh, lock));
            client.setlk(node, fh, Lock::posix(1, libc::F_UNLCK, 0, i64::MAX as u64)).unwrap();
        }
    }
    let sent =
        session.send(1, &Request::new(Opcode::Setlk, node).arg(&[0xffu8; 48]), Segmentation::Linux).unwrap();
    assert!(common::errno(session.finish(sent)) > 0);
    client.on(2).getattr(ROOT).unwrap();
}
