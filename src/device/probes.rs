//! Static probes (USDT) at the start and the end of a request, for bpftrace and others.
//!
//! | probe | arguments |
//! |---|---|
//! | `lanefsd:request_start` | opcode, the guest's number for it, queue, bytes of the request |
//! | `lanefsd:request_end` | opcode, the guest's number for it, queue, errno, bytes of data |
//!
//! While nobody traces, a probe is the test of a word in memory.

use crate::metrics::counts::Served;

/// A request was decoded.
#[inline(always)]
pub(super) fn start(served: &Served, queue: usize, len: u32) {
    probe::probe_lazy!(lanefsd, request_start, served.opcode, served.unique, queue, len);
}

/// It has its reply.
#[inline(always)]
pub(super) fn end(served: &Served, queue: usize) {
    probe::probe_lazy!(lanefsd, request_end, served.opcode, served.unique, queue, served.errno, served.bytes);
}
