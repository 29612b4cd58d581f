//! Cost of the decoder: one request of each usual kind, from bytes in our own memory.
#![allow(missing_docs, clippy::unwrap_used, reason = "a benchmark; a failed step ends it")]

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use fuse_protocol::abi::{BatchForgetIn, CreateIn, ForgetOne, GetattrIn, InHeader, ReadIn, WriteIn};
use fuse_protocol::decode::RawHeader;
use fuse_protocol::init::Layout;
use fuse_protocol::opcode::Opcode;
use fuse_protocol::request::Request;
use zerocopy::IntoBytes;

fn header(opcode: Opcode, arguments: usize, data: usize) -> InHeader {
    InHeader {
        len: u32::try_from(size_of::<InHeader>() + arguments + data).unwrap(),
        opcode: opcode as u32,
        unique: 2,
        nodeid: 1,
        uid: 0,
        gid: 0,
        pid: 1,
        total_extlen: 0,
        padding: 0,
    }
}

fn decode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decode");
    group.sample_size(20).measurement_time(Duration::from_secs(2)).warm_up_time(Duration::from_millis(500));
    let layout = Layout { long_setxattr: true, trailing_labels: false, extensions: true, open_flags: true };
    let size = 4096;
    let create = [CreateIn::default().as_bytes(), b"name\0"].concat();
    let forgets = [ForgetOne { nodeid: 2, nlookup: 1 }; 64];
    let batch = [BatchForgetIn { count: 64, dummy: 0 }.as_bytes(), forgets.as_bytes()].concat();
    let requests: [(&str, Opcode, Vec<u8>, usize); 6] = [
        ("read", Opcode::Read, ReadIn { size, ..ReadIn::default() }.as_bytes().to_vec(), 0),
        ("write", Opcode::Write, WriteIn { size, ..WriteIn::default() }.as_bytes().to_vec(), 4096),
        ("getattr", Opcode::Getattr, GetattrIn::default().as_bytes().to_vec(), 0),
        ("lookup", Opcode::Lookup, b"name\0".to_vec(), 0),
        ("create", Opcode::Create, create, 0),
        ("batch_forget_64", Opcode::BatchForget, batch, 0),
    ];
    for (name, opcode, arguments, data) in requests {
        let header = RawHeader::from(header(opcode, arguments.len(), data));
        // A malformed request would measure an early error.
        Request::decode(&header, &arguments, layout).unwrap();
        group.bench_function(name, |bench| {
            bench.iter(|| {
                let request = Request::decode(black_box(&header), black_box(&arguments), layout);
                black_box(request.is_ok())
            });
        });
    }
    group.finish();
}

criterion_group!(benches, decode);
criterion_main!(benches);
