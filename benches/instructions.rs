//! Instructions in user mode for one request, from the kick to the notification.
//!
//! One thread does all of it: epoll_pwait(2) returns, the chain is popped, walked and decoded, the
//! request is served, the used entry is added, the guest is notified, and the ring is polled once more. What the kernel does in system calls is not counted. `benches/instructions` compares
//! the counts with those in the repository.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a benchmark; a failed step ends it"
)]

mod guest;

use fuse_protocol::abi::{GetattrIn, ReadIn, WriteIn};
use fuse_protocol::opcode::Opcode;
use gungraun::{Callgrind, LibraryBenchmarkConfig, library_benchmark, library_benchmark_group, main};
use lanefsd::config::{CachePolicy, FsConfig};
use zerocopy::IntoBytes;

use guest::{Guest, Request};

const BLOCK: usize = 4096;

/// A guest that has sent `count` requests of this kind, and many before.
fn ready(opcode: Opcode, count: u16) -> (Guest, u16) {
    let config = FsConfig { cache: CachePolicy::Auto, ..FsConfig::default() };
    let mut guest = Guest::new(config);
    let node = guest.file("file");
    let handle = guest.open(node);
    let size = u32::try_from(BLOCK).unwrap();
    let read = ReadIn { fh: handle, size, ..ReadIn::default() };
    let write = WriteIn { fh: handle, size, ..WriteIn::default() };
    let getattr = GetattrIn::default();
    let nothing = Request { opcode, node, arguments: Vec::new(), data: 0, body: 0, room: 0 };
    let request = match opcode {
        Opcode::Read => Request { arguments: vec![read.as_bytes()], room: BLOCK, ..nothing },
        Opcode::Write => Request { arguments: vec![write.as_bytes()], data: BLOCK, body: 8, ..nothing },
        Opcode::Getattr => Request { arguments: vec![getattr.as_bytes()], body: 104, ..nothing },
        Opcode::Lookup => Request { node: 1, arguments: vec![b"file\0"], body: 128, ..nothing },
        _ => panic!("{opcode:?} is not measured"),
    };
    guest.prepare(&request);
    // So that nothing is done for the first time.
    for _ in 0..20 {
        guest.send(count);
        guest.serve();
        guest.check(count);
    }
    guest.send(count);
    (guest, count)
}

/// Ends a measurement.
fn done((guest, count): (Guest, u16)) {
    guest.check(count);
}

#[library_benchmark(setup = ready, teardown = done)]
#[bench::read(Opcode::Read, 1)]
#[bench::write(Opcode::Write, 1)]
#[bench::getattr(Opcode::Getattr, 1)]
#[bench::lookup(Opcode::Lookup, 1)]
fn kick_to_notification((mut guest, count): (Guest, u16)) -> (Guest, u16) {
    guest.serve();
    (guest, count)
}

library_benchmark_group!(name = requests; benchmarks = kick_to_notification);

main!(
    config = LibraryBenchmarkConfig::default().tool(Callgrind::with_args(["--cache-sim=no"]));
    library_benchmark_groups = requests
);
