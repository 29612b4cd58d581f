//! The integration tests: the program as its users start it, the front end for tests in a guest's place.
//!
//! All of them are one program, since linking takes longer than running most of them. What changes its own process
//! stands beside this folder, in a program of its own. A test that needs another umask, limit or directory starts a
//! child with it; mounts belong to the thread of a test (`common::own_mounts`).
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

mod absolute_paths;
mod acls;
mod appends;
mod architecture;
mod attack_table;
mod boundaries;
mod callers;
mod capabilities;
mod common;
mod confined;
mod descriptors;
mod dirty_log;
mod engine;
mod exhaustion;
mod failing_host;
#[allow(
    clippy::duplicate_mod,
    reason = "the same tests, with the engine that they find by the name of the module"
)]
#[path = "failing_host.rs"]
mod failing_host_by_io_uring;
mod file_flags;
mod firmware;
mod frozen_host;
mod guest_memory;
mod guest_writeback;
mod half_made;
mod host_direct_io;
mod hostile;
mod hostile_front_end;
mod hostile_log;
mod hostile_paths;
mod hostile_queues;
mod hostile_requests;
mod id_maps;
mod ids;
mod inodes;
mod labels;
mod launchers;
mod lifecycle;
mod limits;
mod listings;
mod lock_owners;
mod locks;
mod manifests;
mod many_callers;
mod mapped_on_unreliable_host;
mod mapped_writes;
mod migration;
mod monitor;
mod mounts;
mod negotiation;
mod open_flags;
mod operations;
mod overlapping_writes;
mod queues;
mod sandbox;
mod set_ids;
mod socket;
mod special_files;
mod startup;
mod supervisor;
mod survival;
mod synchronous_writes;
mod unreliable_host;
mod windows;
mod xattrs;
