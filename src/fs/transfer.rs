//! A READ or WRITE whose system call is made by an engine: submitted by one thread, and completed later.
//!
//! The file system begins it: it finds the file, locks the bytes, and says what is to be read or written where. All of that
//! belongs to the request from then on and to no thread. The engine submits it, tells what came of it, and perhaps submits
//! the rest, until it is over.

use std::os::fd::BorrowedFd;

use super::Result;

/// Who else reads and writes data for the same queue just now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// Nobody: a system call on the calling thread is faster, where it holds nobody up.
    Alone,
    /// Others.
    Shared,
}

/// One system call of a transfer.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// The file.
    pub file: BorrowedFd<'a>,
    /// Where in it.
    pub offset: u64,
    /// `RWF_*` flags.
    pub flags: i32,
}

/// How a transfer goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// By the next [`Transfer::call`].
    Again,
    /// The same, but on the calling thread: the kernel does not take it otherwise.
    Here,
    /// It is over: the bytes of the reply, or its error.
    Over(Result<usize>),
}

/// A READ or WRITE that has begun. What it has locked is unlocked when it is dropped.
pub trait Transfer: Send {
    /// What is to be done next, with what is left of the data.
    fn call(&self) -> Call<'_>;

    /// What the thread needs that makes the call. Threads that were prepared for an equal number are prepared.
    fn preparation(&self) -> u8;

    /// Prepares the calling thread for the call.
    fn prepare(&self) -> Result<()>;

    /// The call has returned `result`, and `left` bytes are left.
    fn advance(&mut self, result: Result<usize>, left: usize) -> Progress;
}
