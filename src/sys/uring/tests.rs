//! Rings, with the kernel that there is.

use super::*;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;

use libc::iovec;

/// A list of one segment.
fn segment(bytes: &mut [u8]) -> Vec<iovec> {
    vec![iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }]
}

/// Waits for all that is in flight.
fn all(ring: &mut Uring, count: usize) -> Vec<Completed> {
    let mut found = Vec::new();
    while found.len() < count {
        assert!(ring.submit().unwrap());
        ring.reap(|completed| found.push(completed));
        std::thread::sleep(PAUSE);
    }
    found.sort_by_key(|completed| completed.tag);
    found
}

#[test]
fn files_are_read_and_written() {
    let file = tempfile::tempfile().unwrap();
    let mut ring = Uring::new(8).unwrap();
    let (mut out, mut back) = ([7; 100], [0; 100]);
    let (mut out_iov, mut back_iov) = (segment(&mut out), segment(&mut back));
    // SAFETY: both lists and their buffers live to the end of the test.
    let write = Data::Write(unsafe { GuestReader::new(&mut out_iov) });
    // SAFETY: the same.
    let read = Data::Read(unsafe { GuestWriter::new(&mut back_iov) });
    // SAFETY: nothing is touched before `all` returns.
    assert_eq!(unsafe { ring.push(file.as_fd(), 5, 0, &write, 1) }, Ok(true));
    assert_eq!(all(&mut ring, 1)[0].result, Ok(100));
    // SAFETY: the same.
    assert_eq!(unsafe { ring.push(file.as_fd(), 55, 0, &read, 2) }, Ok(true));
    let read = all(&mut ring, 1)[0];
    assert_eq!((read.tag, read.result), (2, Ok(50)));
    assert_eq!(back[..50], [7; 50]);
    assert_eq!(file.metadata().unwrap().len(), 105);
}

#[test]
fn a_ring_does_nothing_else() {
    let mut ring = Uring::new(8).unwrap();
    let entry = opcode::Nop::new().build().user_data(3);
    // SAFETY: it names no memory.
    unsafe { ring.ring.submission().push(&entry) }.unwrap();
    let refused = all(&mut ring, 1)[0];
    assert_eq!((refused.tag, refused.result), (3, Err(Errno::ACCESS)));
    let flagged = opcode::Readv::new(Fd(0), std::ptr::null(), 0).build().flags(squeue::Flags::ASYNC);
    // SAFETY: the same.
    unsafe { ring.ring.submission().push(&flagged.user_data(4)) }.unwrap();
    assert_eq!(all(&mut ring, 1)[0].result, Err(Errno::ACCESS));
    // Nor can it be changed.
    assert!(ring.ring.submitter().register_files(&[0]).is_err());
    assert!(ring.ring.submitter().register_restrictions(&mut [Restriction::sqe_op(0)]).is_err());
}

#[test]
fn a_ring_tells_what_is_in_flight() {
    let (reader, writer) = std::io::pipe().unwrap();
    let mut ring = Uring::new(8).unwrap();
    let fd = ring.fd().as_raw_fd();
    let counts = Counts::of(fd, Offsets::of_this_kernel().unwrap()).unwrap();
    let mut bytes = [0; 1];
    let mut iov = segment(&mut bytes);
    // SAFETY: both live to the end of the test.
    let data = Data::Read(unsafe { GuestWriter::new(&mut iov) });
    assert_eq!(counts.in_flight(), 0);
    for tag in 0..3 {
        // SAFETY: nothing is touched before `all` returns.
        unsafe { ring.push(reader.as_fd(), 0, 0, &data, tag) }.unwrap();
    }
    assert_eq!(counts.in_flight(), 0, "it was not submitted");
    assert!(ring.submit().unwrap());
    assert_eq!(counts.in_flight(), 3);
    assert_eq!(strays([0, fd, reader.as_raw_fd()]).unwrap(), [fd]);
    std::io::Write::write_all(&mut &writer, b"x").unwrap();
    assert_eq!(all(&mut ring, 1).len(), 1);
    assert_eq!(counts.in_flight(), 2);
    drop(writer);
    assert!(all(&mut ring, 2).iter().all(|completed| completed.result == Ok(0)));
    assert_eq!(counts.in_flight(), 0);
    wait_for_strays([fd]).unwrap();
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(b"x", 0).unwrap();
}
