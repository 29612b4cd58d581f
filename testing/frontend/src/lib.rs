//! A guest without a VM: plays the guest's side of vhost-user virtio-fs against any back end.
//!
//! From the bottom up: [`connection`] speaks vhost-user, [`memory`] is the guest's memory, [`ring`] and
//! [`queue`] are virtqueues, [`chain`] and [`request`] are FUSE requests in memory, [`session`] holds
//! all of them together, [`client`] has a method per FUSE operation. [`migration`] copies guest memory while it is in use, and
//! [`postcopy`] does without it. [`backend`] starts the process
//! under test, and [`malicious`] is what a hostile guest does.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    clippy::cast_lossless,
    reason = "for tests: a panic fails the test, and no guest chooses the numbers"
)]

pub mod backend;
pub mod chain;
pub mod client;
pub mod connection;
pub mod errno;
pub mod error;
pub mod malicious;
pub mod memory;
pub mod message;
pub mod migration;
pub mod postcopy;
pub mod queue;
pub mod random;
pub mod request;
pub mod ring;
pub mod session;

pub use backend::Backend;
pub use chain::Segmentation;
pub use client::Client;
pub use errno::Errno;
pub use error::{Error, Result};
pub use memory::Memory;
pub use migration::Migration;
pub use request::{Caller, Request};
pub use session::{Session, SessionOptions};
