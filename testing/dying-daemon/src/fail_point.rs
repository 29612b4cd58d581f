//! Where the process dies: one fail point, in memory that outlives it.

use std::ptr::null_mut;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use anyhow::{Context, Result, bail};
use fuse_protocol::opcode::Opcode;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};

/// Before or after the file system below serves an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It has not begun.
    Before = 1,
    /// It is done, and nobody knows of it.
    After = 2,
}

/// Where a process fails by a panic, in place of an operation: as its file system begins, in its main thread, ...
pub const START: u32 = 0xfff0;
/// ... and as a message of the front end changes how many descriptors the device has, in the thread of these messages.
pub const CONTROL: u32 = 0xfff1;

/// What is printed when a thread hangs.
const HANGING: &str = "lanefsd-dying: a thread hangs";

/// No fail point is armed.
const DISARMED: u32 = 0;
/// Bit of [`FailPoint::armed`]: it stays armed.
const ALWAYS: u32 = 1 << 16;
/// The same: the thread hangs, until somebody kills the process.
const HANGS: u32 = 1 << 17;
/// Where the phase begins in it.
const PHASE_SHIFT: u32 = 24;
/// Bytes of a name.
const NAME_LEN: usize = 255;

/// The fail point of the daemon. All its fields are atomic: several processes and threads share it.
#[repr(C)]
#[derive(Debug)]
pub struct FailPoint {
    /// The opcode in its lower 16 bits, [`ALWAYS`], and the [`Phase`]; 0 if none is armed.
    armed: AtomicU32,
    /// Calls until the process dies.
    calls: AtomicU32,
    /// Only calls with this name count, if it is not empty.
    name: [AtomicU8; NAME_LEN],
    name_len: AtomicU8,
}

impl FailPoint {
    /// A fail point that this process and its children share.
    #[allow(unsafe_code)]
    pub fn share() -> Result<&'static FailPoint> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses a free place, so nothing of this process is unmapped.
        let memory =
            unsafe { mmap_anonymous(null_mut(), size_of::<FailPoint>(), protection, MapFlags::SHARED) };
        let memory = memory.context("no memory for the fail point")?.cast::<FailPoint>();
        // SAFETY: the memory is large enough, aligned to a page, never unmapped, and zero, which all fields may be.
        // They are atomic, so that anybody may change them at any time.
        Ok(unsafe { &*memory })
    }

    /// Arms the fail point as `PHASE:OPERATION:WHICH`.
    pub fn arm(&self, text: &str) -> Result<()> {
        let mut parts = text.splitn(3, ':');
        let phase = match parts.next() {
            Some("before") => Phase::Before,
            Some("after" | "hang") => Phase::After,
            _ => bail!("{text}: the phase is before, after or hang"),
        };
        let hangs = if text.starts_with("hang:") { HANGS } else { 0 };
        let opcode = number_of(parts.next().unwrap_or_default());
        let opcode = opcode.with_context(|| format!("{text}: an unknown operation"))?;
        let which = parts.next().unwrap_or("1");
        let (calls, name, always) = match (which, which.strip_prefix("name=")) {
            (_, Some(name)) => (1, name, ALWAYS),
            ("always", _) => (1, "", ALWAYS),
            (number, _) => (number.parse().with_context(|| format!("{text}: which call?"))?, "", 0),
        };
        let name_len = u8::try_from(name.len()).with_context(|| format!("{text}: the name is too long"))?;
        self.armed.store(DISARMED, Ordering::Release);
        self.name.iter().zip(name.bytes()).for_each(|(place, byte)| place.store(byte, Ordering::Relaxed));
        self.name_len.store(name_len, Ordering::Relaxed);
        self.calls.store(calls, Ordering::Relaxed);
        self.armed.store(word(phase, opcode) | always | hangs, Ordering::Release);
        Ok(())
    }

    /// An operation comes here: the process dies if this is where it has to.
    pub fn pass(&self, phase: Phase, opcode: Opcode, name: &[u8]) {
        let hangs = self.armed.load(Ordering::Acquire) & HANGS != 0;
        if !self.is_due(word(phase, opcode as u32), name) {
            return;
        }
        if !hangs {
            std::process::abort();
        }
        eprintln!("{HANGING}");
        loop {
            std::thread::park();
        }
    }

    /// The process comes to [`START`] or [`CONTROL`]: it panics if this is where it has to.
    #[allow(clippy::panic)]
    pub fn pass_with_panic(&self, place: u32) {
        if self.is_due(word(Phase::Before, place), &[]) {
            panic!("on purpose");
        }
    }

    fn is_due(&self, word: u32, name: &[u8]) -> bool {
        let armed = self.armed.load(Ordering::Acquire);
        if armed & !(ALWAYS | HANGS) != word || !self.is_meant(name) {
            return false;
        }
        if armed & ALWAYS == 0 {
            if self.calls.fetch_sub(1, Ordering::AcqRel) != 1 {
                return false;
            }
            self.armed.store(DISARMED, Ordering::Release);
        }
        true
    }

    fn is_meant(&self, name: &[u8]) -> bool {
        let len = usize::from(self.name_len.load(Ordering::Relaxed));
        let armed = self.name.iter().take(len).map(|byte| byte.load(Ordering::Relaxed));
        len == 0 || armed.eq(name.iter().copied())
    }
}

/// What [`FailPoint::armed`] holds for an operation.
fn word(phase: Phase, opcode: u32) -> u32 {
    (opcode & 0xffff) | (phase as u32) << PHASE_SHIFT
}

/// The number of an operation, by its name without `FUSE_`, or of a place.
fn number_of(name: &str) -> Option<u32> {
    match name {
        "START" => Some(START),
        "CONTROL" => Some(CONTROL),
        _ => {
            let known = Opcode::ALL.iter().find(|(_, known)| known.strip_prefix("FUSE_") == Some(name));
            known.map(|(opcode, _)| *opcode as u32)
        }
    }
}
