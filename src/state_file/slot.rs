//! What the [journal](super::journal) knows of one chain.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::sys::shared_map::Record;

pub(super) const FREE: u32 = 0;
pub(super) const TAKEN: u32 = 1;
pub(super) const STARTED: u32 = 2;
pub(super) const DONE: u32 = 3;
pub(super) const COMPLETING: u32 = 4;
/// Bits of a slot's word that hold the phase.
pub(super) const PHASE: u32 = 0xff;
/// The request is being served again and no other one is.
pub(super) const ALONE: u32 = 1 << 8;
/// The request holds a descriptor.
pub(super) const HOLDS: u32 = 1 << 9;
/// Where the [`Attempt`] of the request is.
const ATTEMPT_SHIFT: u32 = 10;
const ATTEMPT: u32 = 3 << ATTEMPT_SHIFT;
/// Where the number of processes that have died with the request begins, or in a slot that is completing the
/// used index before its entry.
pub(super) const DEATHS_SHIFT: u32 = 16;

/// What is known of one chain.
#[repr(C)]
pub(super) struct Slot {
    /// The number of the chain: how many were popped before it.
    pub(super) number: AtomicU64,
    /// Phase, [`ALONE`], and what stands from [`DEATHS_SHIFT`] on.
    pub(super) word: AtomicU32,
    /// Bytes of the reply.
    pub(super) written: AtomicU32,
    /// The guest's number for the request.
    pub(super) unique: AtomicU64,
    pub(super) opcode: AtomicU32,
    /// Bytes of the request.
    pub(super) len: AtomicU32,
    /// See [`Effects`](super::effects::Effects).
    pub(super) counted: AtomicU32,
    pub(super) first: AtomicU32,
    pub(super) list: AtomicU32,
    pub(super) progress: AtomicU32,
    pub(super) before: AtomicU64,
    pub(super) handle: AtomicU64,
}

// SAFETY: `repr(C)`, and all fields are atomic.
unsafe impl Record for Slot {}

/// How far a request has come with the one system call that it must not make twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// It was not made.
    NotMade,
    /// It was made, and nobody knows what came of it.
    UnderWay,
    /// It has changed nothing.
    Failed,
    /// It has done its work.
    Succeeded,
}

/// A chain that was popped before the queue began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resumed {
    /// Its first descriptor.
    pub head: u16,
    /// The reply is complete and has this length: only the used entry is missing.
    pub written: Option<u32>,
    /// Processes that have died with it.
    pub deaths: u32,
    /// A process has died while it served this request alone.
    pub is_poison: bool,
    /// The guest's number for it; 0 if it was not decoded.
    pub unique: u64,
    /// Its opcode; 0 if it was not decoded.
    pub opcode: u32,
    /// Its bytes; 0 if it was not decoded.
    pub len: u32,
}

impl Resumed {
    /// Whether another process has begun to serve it, and was cut off: by its death, or by an upgrade, which is no death.
    /// (No request has opcode 0.)
    pub fn is_started(&self) -> bool {
        self.opcode != 0
    }
}

impl Slot {
    pub(super) fn phase(&self) -> u32 {
        self.word.load(Ordering::Acquire) & PHASE
    }

    /// Whether the request was decoded and has no reply.
    pub(super) fn is_started(&self) -> bool {
        self.phase() == STARTED
    }

    /// Whether a worker has died with it, if it dies now.
    pub(super) fn is_unfinished(&self) -> bool {
        matches!(self.phase(), TAKEN | STARTED)
    }

    /// Whether its used entry was added, so that the ring has this used index.
    pub(super) fn is_added(&self, used_index: u16) -> bool {
        let before = self.word.load(Ordering::Relaxed) >> DEATHS_SHIFT;
        self.phase() == COMPLETING && before == u32::from(used_index.wrapping_sub(1))
    }

    pub(super) fn number(&self) -> u64 {
        self.number.load(Ordering::Relaxed)
    }

    pub(super) fn free(&self) {
        self.word.store(FREE, Ordering::Release);
    }

    pub(super) fn attempt(&self) -> Attempt {
        match (self.word.load(Ordering::Acquire) & ATTEMPT) >> ATTEMPT_SHIFT {
            0 => Attempt::NotMade,
            1 => Attempt::UnderWay,
            2 => Attempt::Failed,
            _ => Attempt::Succeeded,
        }
    }

    pub(super) fn set_attempt(&self, attempt: Attempt) {
        let bits = match attempt {
            Attempt::NotMade => 0,
            Attempt::UnderWay => 1,
            Attempt::Failed => 2,
            Attempt::Succeeded => 3,
        };
        let update = |word: u32| Some(word & !ATTEMPT | bits << ATTEMPT_SHIFT);
        // It never fails: `update` always has a value.
        let _ = self.word.fetch_update(Ordering::AcqRel, Ordering::Relaxed, update);
    }

    /// Says that `progress` has a descriptor.
    pub(super) fn hold(&self, descriptor: RawFd) {
        self.progress.store(descriptor.cast_unsigned(), Ordering::Relaxed);
        self.word.fetch_or(HOLDS, Ordering::Release);
    }

    pub(super) fn let_go(&self) {
        self.word.fetch_and(!HOLDS, Ordering::Release);
    }

    /// The descriptor that is held for the request.
    pub(super) fn held(&self) -> Option<RawFd> {
        let holds = self.is_started() && self.word.load(Ordering::Acquire) & HOLDS != 0;
        holds.then(|| self.progress.load(Ordering::Relaxed).cast_signed())
    }

    pub(super) fn resumed(&self, head: u16) -> Resumed {
        let word = self.word.load(Ordering::Relaxed);
        let phase = word & PHASE;
        let (is_started, is_unfinished) = (phase == STARTED, self.is_unfinished());
        let if_started = |value: u32| if is_started { value } else { 0 };
        Resumed {
            head,
            written: (!is_unfinished).then(|| self.written.load(Ordering::Relaxed)),
            deaths: if is_unfinished { word >> DEATHS_SHIFT } else { 0 },
            is_poison: is_unfinished && word & ALONE != 0,
            unique: if is_started { self.unique.load(Ordering::Relaxed) } else { 0 },
            opcode: if_started(self.opcode.load(Ordering::Relaxed)),
            len: if_started(self.len.load(Ordering::Relaxed)),
        }
    }

    /// Sets or removes [`ALONE`], unless the reply is complete.
    pub(super) fn mark(&self, is_alone: bool) {
        let marked = |word: u32| {
            let is_unfinished = matches!(word & PHASE, TAKEN | STARTED);
            is_unfinished.then_some(if is_alone { word | ALONE } else { word & !ALONE })
        };
        // It fails only if the reply is complete.
        let _ = self.word.fetch_update(Ordering::AcqRel, Ordering::Relaxed, marked);
    }

    /// One more process has died with it.
    pub(super) fn count_death(&self) {
        if self.is_unfinished() {
            let word = self.word.load(Ordering::Relaxed);
            let deaths = (word >> DEATHS_SHIFT).saturating_add(1).min(u32::MAX >> DEATHS_SHIFT);
            self.word
                .store(deaths << DEATHS_SHIFT | word & (PHASE | ALONE | HOLDS | ATTEMPT), Ordering::Release);
        }
    }
}
