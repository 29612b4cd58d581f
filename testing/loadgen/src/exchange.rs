//! A request that lies ready in guest memory, to be sent again and again with a few bytes changed.

use std::sync::Arc;

use lanefsd_frontend::chain::{Chain, Segmentation};
use lanefsd_frontend::memory::{Buffer, Memory};
use lanefsd_frontend::request::Request;
use lanefsd_frontend::ring::{Descriptor, INDIRECT, describe};
use zerocopy::IntoBytes;

use crate::error::Result;

/// Bytes of a request's header.
pub const IN_HEADER: usize = 40;
/// Bytes of a reply's header.
pub const OUT_HEADER: usize = 16;
/// Where a request's header names the node.
const NODE: usize = 16;

/// A request, the room for its reply, and the descriptor table of both.
#[derive(Debug)]
pub struct Exchange {
    chain: Chain,
    descriptor: Descriptor,
    /// Kept for the device, which `descriptor` points here.
    _table: Buffer,
}

impl Exchange {
    /// Lays the request out in guest memory, with a descriptor table of its own as Linux does it.
    pub fn new(
        memory: &Arc<Memory>,
        request: &Request<'_>,
        unique: u64,
        segmentation: Segmentation,
    ) -> Result<Exchange> {
        let chain = request.to_chain(memory, unique, segmentation, 1024)?;
        let mut segments = Vec::new();
        chain.segments(&mut segments);
        let table = memory.allocate(16 * segments.len())?;
        for (i, segment) in segments.iter().enumerate() {
            let next = (i + 1 < segments.len()).then_some(i as u16 + 1);
            table.write(16 * i, describe(segment, next).as_bytes());
        }
        let len = 16 * segments.len() as u32;
        let descriptor = Descriptor { address: table.address(), len, flags: INDIRECT, next: 0 };
        Ok(Exchange { chain, descriptor, _table: table })
    }

    /// What stands in the ring's table for this request.
    pub fn descriptor(&self) -> Descriptor {
        self.descriptor
    }

    /// Changes the node that the request is about.
    pub fn set_node(&self, node: u64) {
        self.chain.readable.write(NODE, node.as_bytes());
    }

    /// Changes eight bytes of the arguments.
    pub fn set(&self, offset: usize, value: u64) {
        self.set_bytes(offset, value.as_bytes());
    }

    /// Changes bytes of the arguments.
    pub fn set_bytes(&self, offset: usize, bytes: &[u8]) {
        self.chain.readable.write(IN_HEADER + offset, bytes);
    }

    /// Eight bytes of the reply's body.
    pub fn body(&self, offset: usize) -> u64 {
        let mut value = 0u64;
        self.chain.writable.read(OUT_HEADER + offset, value.as_mut_bytes());
        value
    }

    /// Copies the begin of the reply's body out.
    pub fn copy_body(&self, to: &mut [u8]) {
        self.chain.writable.read(OUT_HEADER, to);
    }

    /// Bytes in the reply's body; an error if the reply is one or contradicts the used length.
    pub fn succeeded(&self, used: u32) -> std::result::Result<usize, String> {
        let mut header = [0u32; 2];
        self.chain.writable.read(0, header.as_mut_bytes());
        let [len, error] = header;
        if error != 0 {
            return Err(std::io::Error::from_raw_os_error(error.cast_signed().wrapping_neg()).to_string());
        }
        if len != used || (used as usize) < OUT_HEADER {
            return Err(format!("the reply says {len} bytes, the used entry {used}"));
        }
        Ok(used as usize - OUT_HEADER)
    }
}
