//! A request and the room for its reply in guest memory, and how they are cut into descriptors.

use std::sync::Arc;

use crate::error::Result;
use crate::memory::{Buffer, Memory, PAGE};
use crate::random::Random;
use crate::ring::{Placement, Segment};

/// How the bytes of a request and its reply are cut into descriptors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Segmentation {
    /// As Linux does it: each header and argument on its own, one descriptor per page of data.
    #[default]
    Linux,
    /// As [`Segmentation::Linux`], but no two pages of data are neighbours.
    Scattered,
    /// As [`Segmentation::Linux`], but the data is one descriptor.
    Contiguous,
    /// One descriptor for the request, one for the reply.
    One,
    /// Every byte its own descriptor, with gaps; what is too long for the ring goes into the last one.
    Bytes,
    /// Pieces and gaps of random length, from this seed.
    Random(u64),
}

/// One direction of a chain: a buffer and the pieces of it that are used, in order.
#[derive(Debug)]
pub struct Segments {
    buffer: Option<Buffer>,
    /// Offset in the buffer and length.
    spans: Vec<(usize, usize)>,
    len: usize,
}

impl Segments {
    /// No bytes at all.
    pub fn none() -> Segments {
        Segments { buffer: None, spans: Vec::new(), len: 0 }
    }

    /// Room for `parts` (headers and arguments) and then `data` bytes, in at most `limit` descriptors.
    pub fn new(
        memory: &Arc<Memory>,
        parts: &[usize],
        data: usize,
        segmentation: Segmentation,
        limit: usize,
    ) -> Result<Segments> {
        let total = parts.iter().sum::<usize>() + data;
        if total == 0 {
            return Ok(Segments::none());
        }
        let mut random = Random::new(if let Segmentation::Random(seed) = segmentation { seed } else { 0 });
        let mut lens = cut_lengths(parts, data, segmentation, &mut random);
        lens.retain(|&len| len > 0);
        if lens.len() > limit {
            let tail: usize = lens.drain(limit.max(1)..).sum();
            *lens.last_mut().expect("at least one piece stays") += tail;
        }
        let before_data = total - data;
        let (mut spans, mut end, mut seen) = (Vec::with_capacity(lens.len()), 0, 0);
        for len in lens {
            let start = match segmentation {
                Segmentation::One => end,
                Segmentation::Bytes => end + 1,
                Segmentation::Random(_) => end + random.below(40),
                // Data pages are pages; what comes before them is packed.
                _ if seen < before_data => end,
                Segmentation::Scattered if seen > before_data => end.next_multiple_of(PAGE) + PAGE,
                _ => end.next_multiple_of(PAGE),
            };
            spans.push((start, len));
            end = start + len;
            seen += len;
        }
        Ok(Segments { buffer: Some(memory.allocate(end)?), spans, len: total })
    }

    /// Uses pieces of a buffer that the caller laid out, each `(offset, length)`.
    pub fn of(buffer: Buffer, spans: Vec<(usize, usize)>) -> Segments {
        let len = spans.iter().map(|&(_, len)| len).sum();
        Segments { buffer: Some(buffer), spans, len }
    }

    /// Bytes in all pieces.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of descriptors.
    pub fn count(&self) -> usize {
        self.spans.len()
    }

    /// Appends the pieces as ring segments.
    pub fn segments(&self, writable: bool, to: &mut Vec<Segment>) {
        let Some(buffer) = &self.buffer else { return };
        to.extend(self.spans.iter().map(|&(offset, len)| Segment {
            address: buffer.address() + offset as u64,
            len: len as u32,
            writable,
        }));
    }

    /// Copies `bytes` in, starting `at` bytes into the pieces. What does not fit is left out.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        self.walk(at, bytes.len(), |buffer, offset, range| buffer.write(offset, &bytes[range]));
    }

    /// Copies out, starting `at` bytes into the pieces. Bytes past the end are left as they are.
    pub fn read(&self, at: usize, bytes: &mut [u8]) {
        self.walk(at, bytes.len(), |buffer, offset, range| buffer.read(offset, &mut bytes[range]));
    }

    /// `len` bytes from `at`.
    pub fn to_vec(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read(at, &mut bytes);
        bytes
    }

    fn walk(&self, at: usize, len: usize, mut each: impl FnMut(&Buffer, usize, std::ops::Range<usize>)) {
        let Some(buffer) = &self.buffer else { return };
        let (mut skip, mut done) = (at, 0);
        for &(offset, span) in &self.spans {
            let here = span.saturating_sub(skip).min(len - done);
            if here > 0 {
                each(buffer, offset + skip, done..done + here);
                done += here;
            }
            skip = skip.saturating_sub(span);
            if done == len {
                break;
            }
        }
    }
}

fn cut_lengths(parts: &[usize], data: usize, segmentation: Segmentation, random: &mut Random) -> Vec<usize> {
    let total = parts.iter().sum::<usize>() + data;
    match segmentation {
        Segmentation::One => vec![total],
        Segmentation::Bytes => vec![1; total],
        Segmentation::Random(_) => {
            let most = [3, 40, 700, 9000][random.below(4)];
            let mut lens = Vec::new();
            let mut left = total;
            while left > 0 {
                let len = (1 + random.below(most)).min(left);
                lens.push(len);
                left -= len;
            }
            lens
        }
        Segmentation::Contiguous => parts.iter().copied().chain([data]).collect(),
        Segmentation::Linux | Segmentation::Scattered => {
            let pages = (0..data).step_by(PAGE).map(|at| PAGE.min(data - at));
            parts.iter().copied().chain(pages).collect()
        }
    }
}

/// A request and the room for its reply.
#[derive(Debug)]
pub struct Chain {
    /// What the device reads.
    pub readable: Segments,
    /// What the device writes.
    pub writable: Segments,
    /// Which descriptor table is used.
    pub placement: Placement,
    /// Memory that the device needs as long as it has the chain, e.g. a table written by hand.
    pub keep: Option<Buffer>,
}

impl Chain {
    /// A chain of raw bytes and room for `reply` bytes, for requests that are no requests.
    pub fn raw(
        memory: &Arc<Memory>,
        request: &[u8],
        reply: usize,
        segmentation: Segmentation,
        limit: usize,
    ) -> Result<Chain> {
        let readable = Segments::new(memory, &[request.len()], 0, segmentation, limit / 2)?;
        readable.write(0, request);
        let writable = Segments::new(memory, &[reply], 0, segmentation, limit / 2)?;
        Ok(Chain { readable, writable, placement: Placement::Auto, keep: None })
    }

    /// All pieces as ring segments, what the device reads first.
    pub fn segments(&self, to: &mut Vec<Segment>) {
        to.clear();
        self.readable.segments(false, to);
        self.writable.segments(true, to);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cut_keeps_every_byte() {
        let memory = Memory::new(1 << 24).unwrap();
        let mut cuts = vec![
            Segmentation::Linux,
            Segmentation::Scattered,
            Segmentation::Contiguous,
            Segmentation::One,
            Segmentation::Bytes,
        ];
        cuts.extend((0..50).map(Segmentation::Random));
        for segmentation in cuts {
            for data in [0, 1, 4096, 10_000] {
                let pieces = Segments::new(&memory, &[40, 0, 17], data, segmentation, 64).unwrap();
                assert!(pieces.count() <= 64);
                assert_eq!(pieces.len(), 57 + data);
                let bytes = Random::new(7).bytes(57 + data);
                pieces.write(0, &bytes[..30]);
                pieces.write(30, &bytes[30..]);
                assert_eq!(pieces.to_vec(0, bytes.len()), bytes, "{segmentation:?}");
                assert_eq!(pieces.to_vec(50, 7), bytes[50..57]);
            }
        }
    }

    #[test]
    fn linux_cut_has_one_descriptor_per_page() {
        let memory = Memory::new(1 << 24).unwrap();
        let pieces = Segments::new(&memory, &[40, 40], 1 << 20, Segmentation::Linux, 1024).unwrap();
        assert_eq!(pieces.count(), 2 + 256);
        let mut segments = Vec::new();
        pieces.segments(false, &mut segments);
        assert!(segments[2..].iter().all(|s| s.address % 4096 == 0 && s.len == 4096));
    }
}
