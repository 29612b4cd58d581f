//! lanefsd: a vhost-user virtio-fs daemon that lets many writers in a guest write one file at once.
//!
//! One request goes straight through: [`device`] takes a descriptor chain, [`fuse_protocol`] decodes it,
//! [`server`] calls the [`fs::FileSystem`], and the reply goes back into the chain.

pub mod cli;
pub mod config;
pub mod daemon;
pub mod device;
pub mod fs;
pub mod limits;
pub mod logging;
pub mod mapping;
pub mod metrics;
pub mod migration;
pub mod process;
pub mod sandbox;
pub mod server;
pub mod state_file;
pub mod sync;
pub mod sys;
