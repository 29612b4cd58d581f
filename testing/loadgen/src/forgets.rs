//! FORGET requests on the high-priority queue, which all queue threads share. Nobody waits for them.

use std::sync::{Mutex, PoisonError};
use std::thread;

use fuse_protocol::abi::ForgetIn;
use fuse_protocol::opcode::Opcode;
use lanefsd_frontend::chain::{Chain, Segmentation};
use lanefsd_frontend::queue::{Pending, Queue};
use lanefsd_frontend::request::Request;
use lanefsd_frontend::ring::{Descriptor, Ring};
use lanefsd_frontend::session::Session;
use zerocopy::IntoBytes;

use crate::error::Result;
use crate::exchange::IN_HEADER;

/// Requests that may be on their way at once.
const CHAINS: u16 = 512;

/// The high-priority queue, and requests that lie ready.
#[derive(Debug)]
pub struct Forgets<'s> {
    queue: &'s Queue,
    pool: Mutex<Pool>,
}

#[derive(Debug)]
struct Pool {
    chains: Vec<Chain>,
    /// Numbers of the chains that the device does not own; these are also their descriptors.
    free: Vec<u16>,
}

impl<'s> Forgets<'s> {
    /// Prepares the requests. The session must not use the queue otherwise from now on.
    pub fn new(session: &'s Session) -> Result<Forgets<'s>> {
        let queue = session.queue(0);
        let count = CHAINS.min(session.options().ring_size);
        let request = Request::new(Opcode::Forget, 0).arg(&ForgetIn::default()).no_reply();
        let (mut chains, mut segments) = (Vec::new(), Vec::new());
        for head in 0..count {
            let chain = request.to_chain(session.memory(), 0, Segmentation::One, 1)?;
            chain.segments(&mut segments);
            let (address, len) = segments.first().map_or((0, 0), |segment| (segment.address, segment.len));
            queue.with_ring(|ring| {
                ring.write_descriptor(head, Descriptor { address, len, flags: 0, next: 0 })
            });
            chains.push(chain);
        }
        Ok(Forgets { queue, pool: Mutex::new(Pool { chains, free: (0..count).collect() }) })
    }

    /// Tells the back end that the guest forgets `lookups` lookups of a node.
    pub fn forget(&self, node: u64, lookups: u64) -> Result<()> {
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        let kick = loop {
            let sent = self.queue.with_ring(|ring| pool.send(ring, node, lookups));
            match sent {
                Some(kick) => break kick,
                // All are on their way. That is rare, and the device is at them.
                None => thread::yield_now(),
            }
        };
        drop(pool);
        if kick { Ok(self.queue.kick()?) } else { Ok(()) }
    }
}

impl Pool {
    /// Sends a request if there is one to be had; returns whether the device wants to be told.
    fn send(&mut self, ring: &mut Ring<Pending>, node: u64, lookups: u64) -> Option<bool> {
        while let Some((head, _)) = ring.take_used_entry() {
            self.free.extend(u16::try_from(head).ok());
        }
        ring.refuse_calls();
        let head = self.free.pop()?;
        let chain = self.chains.get(usize::from(head))?;
        chain.readable.write(16, node.as_bytes());
        chain.readable.write(IN_HEADER, lookups.as_bytes());
        ring.offer(head);
        ring.publish();
        Some(ring.needs_kick())
    }
}
