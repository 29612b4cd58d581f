//! A copy between mappings that reports a page that cannot be had, in place of ending the process.
//!
//! A page of a file's mapping may be past the end of the file by the time it is touched, or its file system may have no
//! room or cannot read it. The kernel tells that by SIGBUS. The copy is a function of assembly with one place where it can
//! fault; the handler of SIGBUS compares the interrupted instruction with that place, as the kernel does with its own table of
//! exceptions, and lets the function return how much is left. Any other fault has the effect that it had before: the handler puts the
//! former action back, and the instruction faults once more. A SIGBUS that somebody sends has none.
//!
//! The handler reads and writes the interrupted registers and calls sigaction(2), and so is safe at any moment. It never touches
//! memory that a thread of this process may have locked.
//!
//! preadv2(2) from the guest's memory file into the mapping needs no handler: there the kernel answers EFAULT. It was measured
//! (`examples/mapped_writes.rs`) at a third to two thirds of the speed for 4 KiB and 64 KiB, and it reads zeros from pages that
//! post-copy has not brought yet. process_vm_writev(2) writes into pages that writeback may have cleaned meanwhile.

use std::arch::global_asm;
use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::sync::OnceLock;

use rustix::io::{Errno, Result};

// Whoever changes this keeps the labels in `handle` right: between `_begin` and `_end` the third register of the call holds no
// less than what is left, and nothing is on the stack.
#[cfg(target_arch = "x86_64")]
global_asm!(
    ".text",
    ".balign 16",
    ".globl lanefsd_fault_copy",
    ".hidden lanefsd_fault_copy",
    ".globl lanefsd_fault_copy_begin",
    ".hidden lanefsd_fault_copy_begin",
    ".globl lanefsd_fault_copy_end",
    ".hidden lanefsd_fault_copy_end",
    ".type lanefsd_fault_copy, @function",
    "lanefsd_fault_copy:",
    "mov rcx, rdx",
    "lanefsd_fault_copy_begin:",
    "rep movsb",
    "lanefsd_fault_copy_end:",
    "mov rax, rcx",
    "ret",
    ".size lanefsd_fault_copy, . - lanefsd_fault_copy",
);

#[cfg(target_arch = "aarch64")]
global_asm!(
    ".text",
    ".balign 16",
    ".globl lanefsd_fault_copy",
    ".hidden lanefsd_fault_copy",
    ".globl lanefsd_fault_copy_begin",
    ".hidden lanefsd_fault_copy_begin",
    ".globl lanefsd_fault_copy_end",
    ".hidden lanefsd_fault_copy_end",
    ".type lanefsd_fault_copy, %function",
    "lanefsd_fault_copy:",
    "lanefsd_fault_copy_begin:",
    "1: cmp x2, #64",
    "b.lo 2f",
    "ldp x4, x5, [x1]",
    "ldp x6, x7, [x1, #16]",
    "ldp x8, x9, [x1, #32]",
    "ldp x10, x11, [x1, #48]",
    "stp x4, x5, [x0]",
    "stp x6, x7, [x0, #16]",
    "stp x8, x9, [x0, #32]",
    "stp x10, x11, [x0, #48]",
    "add x1, x1, #64",
    "add x0, x0, #64",
    "sub x2, x2, #64",
    "b 1b",
    "2: cbz x2, lanefsd_fault_copy_end",
    "ldrb w4, [x1], #1",
    "strb w4, [x0], #1",
    "sub x2, x2, #1",
    "b 2b",
    "lanefsd_fault_copy_end:",
    "mov x0, x2",
    "ret",
    ".size lanefsd_fault_copy, . - lanefsd_fault_copy",
);

unsafe extern "C" {
    fn lanefsd_fault_copy(to: *mut u8, from: *const u8, len: usize) -> usize;
    static lanefsd_fault_copy_begin: u8;
    static lanefsd_fault_copy_end: u8;
}

/// A page could not be had; what comes before it was copied, and perhaps a part of what follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault;

/// The action of SIGBUS before ours.
static BEFORE: OnceLock<Before> = OnceLock::new();

struct Before(libc::sigaction);

// SAFETY: it is plain data: a mask, flags and addresses of functions.
unsafe impl Send for Before {}
// SAFETY: the same.
unsafe impl Sync for Before {}

/// That the handler is installed, without which nothing may be copied.
#[derive(Clone, Copy, Debug)]
pub struct Guarded(());

impl Guarded {
    /// Installs the handler, for all threads of the process, at the first call.
    pub fn new() -> Result<Guarded> {
        static INSTALLED: OnceLock<Result<()>> = OnceLock::new();
        (*INSTALLED.get_or_init(install)).map(|()| Guarded(()))
    }

    /// Copies `len` bytes.
    ///
    /// # Safety
    /// Both places are mapped for as long as this runs, and the target is writable: that a page of them cannot be had does not
    /// matter. No Rust reference to the target exists, and none that is not to `from`'s volatile memory.
    pub unsafe fn copy(self, to: *mut u8, from: *const u8, len: usize) -> std::result::Result<(), Fault> {
        // SAFETY: the caller promises that both are mapped; a page that cannot be had ends the function early, by the handler.
        let left = unsafe { lanefsd_fault_copy(to, from, len) };
        if left == 0 { Ok(()) } else { Err(Fault) }
    }
}

fn install() -> Result<()> {
    let mut before = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: the first call only reads the action into `before`. The second one installs a handler that is safe at any moment,
    // after what it falls back on is stored. The struct is all zeros (an empty mask) but for what is set.
    let result = unsafe {
        libc::sigaction(libc::SIGBUS, std::ptr::null(), before.as_mut_ptr());
        let _ = BEFORE.set(Before(before.assume_init()));
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handle as extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) as usize;
        // On the stack for signals: the thread's own may be what overflowed, in which case the action before has to tell it.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut())
    };
    if result < 0 { Err(Errno::INVAL) } else { Ok(()) }
}

extern "C" fn handle(_signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let begin = (&raw const lanefsd_fault_copy_begin).addr();
    let end = (&raw const lanefsd_fault_copy_end).addr();
    // SAFETY: with SA_SIGINFO the kernel passes a `ucontext_t`, which is this handler's alone and is loaded when it returns.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    if (begin..end).contains(&instruction(context)) {
        set_instruction(context, end);
        return;
    }
    // SAFETY: with SA_SIGINFO the kernel passes what it knows of the signal.
    let code = unsafe { (*info).si_code };
    if code <= 0 || code == libc::BUS_MCEERR_AO {
        // No instruction has faulted: somebody has sent it, or memory elsewhere is broken. Whoever touches that faults.
        return;
    }
    if let Some(Before(before)) = BEFORE.get() {
        // SAFETY: it was the action before, which holds for the fault that comes again.
        unsafe { libc::sigaction(libc::SIGBUS, before, std::ptr::null_mut()) };
    }
}

#[cfg(target_arch = "x86_64")]
fn instruction(context: &libc::ucontext_t) -> usize {
    let rip = usize::try_from(libc::REG_RIP).unwrap_or(usize::MAX);
    context.uc_mcontext.gregs.get(rip).map_or(0, |value| usize::try_from(*value).unwrap_or(0))
}

#[cfg(target_arch = "x86_64")]
fn set_instruction(context: &mut libc::ucontext_t, address: usize) {
    let rip = usize::try_from(libc::REG_RIP).unwrap_or(usize::MAX);
    if let (Some(register), Ok(address)) = (context.uc_mcontext.gregs.get_mut(rip), i64::try_from(address)) {
        *register = address;
    }
}

#[cfg(target_arch = "aarch64")]
fn instruction(context: &libc::ucontext_t) -> usize {
    usize::try_from(context.uc_mcontext.pc).unwrap_or(0)
}

#[cfg(target_arch = "aarch64")]
fn set_instruction(context: &mut libc::ucontext_t, address: usize) {
    context.uc_mcontext.pc = address as u64;
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

    use super::*;

    const PAGE: usize = 4096;

    /// Two pages of a file that has one.
    fn with_pages(test: impl FnOnce(*mut u8, &std::fs::File)) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(PAGE as u64).unwrap();
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the address, and nothing uses the mapping after the test.
        unsafe {
            let start =
                mmap(std::ptr::null_mut(), 2 * PAGE, protection, MapFlags::SHARED, file.as_fd(), 0).unwrap();
            test(start.cast(), &file);
            munmap(start, 2 * PAGE).unwrap();
        }
    }

    #[test]
    fn what_is_there_is_copied() {
        with_pages(|pages, file| {
            let from: Vec<u8> = (0..=250).cycle().take(PAGE).collect();
            let guarded = Guarded::new().unwrap();
            for (at, len) in [(0, PAGE), (1, 0), (5, 1), (3, 77), (64, 640), (PAGE - 1, 1), (0, PAGE)] {
                // SAFETY: both are mapped.
                assert_eq!(unsafe { guarded.copy(pages.add(at), from.as_ptr(), len) }, Ok(()), "{at} {len}");
                let mut found = vec![0; len];
                std::os::unix::fs::FileExt::read_exact_at(file, &mut found, at as u64).unwrap();
                assert_eq!(found, from[..len]);
            }
        });
    }

    #[test]
    fn a_page_past_the_end_is_reported() {
        with_pages(|pages, file| {
            let from = vec![7; 2 * PAGE];
            let guarded = Guarded::new().unwrap();
            // SAFETY: both are mapped.
            let copy = |at: usize, len| unsafe { guarded.copy(pages.add(at), from.as_ptr(), len) };
            assert_eq!(copy(PAGE, 1), Err(Fault));
            assert_eq!(copy(PAGE - 100, 200), Err(Fault));
            let mut found = [0; 100];
            std::os::unix::fs::FileExt::read_exact_at(file, &mut found, PAGE as u64 - 100).unwrap();
            assert_eq!(found, [7; 100], "what comes before the page is copied");
            file.set_len(0).unwrap();
            assert_eq!(copy(0, 1), Err(Fault));
            file.set_len(2 * PAGE as u64).unwrap();
            assert_eq!(copy(0, 2 * PAGE), Ok(()));
            // SAFETY: the source is mapped.
            assert_eq!(unsafe { guarded.copy(from.as_ptr().cast_mut(), pages, 2 * PAGE) }, Ok(()));
        });
    }

    #[test]
    fn faults_of_many_threads_do_not_mix() {
        with_pages(|pages, _file| {
            let pages = pages as usize;
            std::thread::scope(|scope| {
                for thread in 0..4usize {
                    scope.spawn(move || {
                        let from = [9; 64];
                        let guarded = Guarded::new().unwrap();
                        for round in 0..2000 {
                            let outside = (thread + round) % 2;
                            let to = (pages + outside * PAGE + thread * 64) as *mut u8;
                            // SAFETY: both are mapped, and no other thread writes these bytes.
                            let copied = unsafe { guarded.copy(to, from.as_ptr(), 64) };
                            assert_eq!(copied.is_err(), outside == 1);
                        }
                    });
                }
            });
        });
    }
}
