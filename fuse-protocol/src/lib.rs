//! The FUSE protocol: bytes to typed requests, typed replies to bytes.
//!
//! Everything here is a pure function of its arguments: no I/O, no unsafe code, no operating system.
//! Decoding is total: every byte string is a request or a [`decode::DecodeError`].
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod abi;
pub mod decode;
pub mod errno;
pub mod extensions;
pub mod flags;
pub mod ids;
pub mod init;
pub mod ioctl;
pub mod name;
pub mod opcode;
pub mod reply;
pub mod request;
