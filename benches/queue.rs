//! Cost of a ring without the requests: to pop a chain, to walk it, to add its used entry.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a benchmark; a failed step ends it"
)]

mod guest;

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use lanefsd::device::chain::ChainBuffers;
use lanefsd::device::ring::Ring;

use guest::{LAYOUT, lay_chain, memory, offer};

fn queue(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("queue");
    group.sample_size(20).measurement_time(Duration::from_secs(2)).warm_up_time(Duration::from_millis(500));
    let memory = memory();

    let mut ring = Ring::new(&memory, LAYOUT, 0, true).unwrap();
    group.bench_function("pop_and_add_used", |bench| {
        bench.iter(|| {
            offer(&memory, 1);
            assert_eq!(ring.avail_len(&memory).unwrap(), 1);
            let head = ring.pop(&memory).unwrap();
            ring.enable_notification(&memory).unwrap();
            ring.add_used(&memory, head, 16).unwrap();
            black_box(ring.needs_notification(&memory).unwrap())
        });
    });

    // A 4 KiB WRITE, a 1 MiB WRITE in pages that are no neighbours, and one in pages that are.
    let pages = |stride: u64| (0..256u64).map(move |page| (0x100_000 + page * stride, 4096));
    let around = |data: Vec<(u64, usize)>| {
        let mut buffers = vec![(0x10_000, 40), (0x10_100, 40)];
        buffers.extend(data);
        let readable = buffers.len();
        buffers.extend([(0x20_000, 16), (0x20_100, 8)]);
        (buffers, readable)
    };
    for (name, data) in [
        ("walk_4k", vec![(0x100_000, 4096)]),
        ("walk_1m_scattered", pages(8192).collect()),
        ("walk_1m_neighbours", pages(4096).collect()),
    ] {
        let (buffers, readable) = around(data);
        lay_chain(&memory, &buffers, readable);
        let mut chain = ChainBuffers::default();
        group.bench_function(name, |bench| {
            bench.iter(|| {
                let (reader, writer) = chain.walk(&memory, LAYOUT, 0).unwrap();
                black_box(reader.len() + writer.len())
            });
        });
    }
    group.finish();
}

criterion_group!(benches, queue);
criterion_main!(benches);
