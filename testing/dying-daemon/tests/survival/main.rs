//! What a guest sees of a worker that dies: one right answer to each request, and a share as if nothing had died.
//!
//! Each scenario runs once without a death and once for each [`trial::Moment`] at which a worker can die with its
//! request. The daemon is `lanefsd-dying`, with fail points around its file system; the later moments are reached
//! from outside, by guest memory that the worker cannot touch any more.
//!
//! `LANEFSD_TEST_MOMENT` names one moment to try, and `LANEFSD_TEST_ARGS` has further options of the daemon.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "a test fails by panicking, and knows its numbers"
)]

mod attributes;
mod data;
mod descriptors;
mod directories;
mod flights;
mod forgets;
mod locks;
mod names;
mod opens;
mod poison;
mod reconnects;
mod removals;
mod renames;
mod sessions;
mod trial;
mod xattrs;
