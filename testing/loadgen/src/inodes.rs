//! `loadgen inodes`: what a back end needs for inodes that a guest has looked up and keeps.

use std::path::PathBuf;

use fuse_protocol::abi::EntryOut;
use fuse_protocol::opcode::Opcode;
use lanefsd_frontend::backend::Backend;
use lanefsd_frontend::chain::Segmentation;
use lanefsd_frontend::request::{Reply, Request};
use lanefsd_frontend::session::{Session, SessionOptions};
use serde::Serialize;

use crate::error::{LoadError, Result};
use crate::layout::{self, entry_name};
use crate::options::InodesOptions;

/// LOOKUPs that are in flight at once.
const DEPTH: u32 = 64;

/// What the back end needed.
#[derive(Debug, Serialize)]
pub struct InodesReport {
    backend: PathBuf,
    /// Files that the guest knows.
    files: u32,
    /// The back end's RLIMIT_NOFILE.
    descriptor_limit: u64,
    /// Descriptors that it has open at the end.
    descriptors: usize,
    /// Anonymous resident memory before the first LOOKUP, in KiB.
    resident_kib_before: usize,
    /// The same with all files known.
    resident_kib_after: usize,
    /// The difference by the number of files.
    bytes_per_inode: f64,
}

/// A back end and a session with it, and the directory with the files, none of them looked up.
pub fn begin(options: &InodesOptions) -> Result<(Backend, Session, u64)> {
    layout::make_entries(&options.share, options.files)?;
    let limit = format!("--rlimit-nofile={}", options.limit);
    let backend = Backend::of(&options.backend)
        .args([limit])
        .args(&options.backend_arg)
        .share(&options.share)
        .start()?;
    let session = backend.connect(SessionOptions::default())?;
    let directory = session.client().lookup(1, layout::many(options.files))?.nodeid;
    Ok((backend, session, directory))
}

/// Looks all files up.
pub fn look_up_all(session: &Session, directory: u64, files: u32) -> Result<()> {
    for first in (0..files).step_by(DEPTH as usize) {
        look_up(session, directory, first..files.min(first + DEPTH))?;
    }
    Ok(())
}

/// Looks up many files and forgets none.
pub fn inodes(options: &InodesOptions) -> Result<InodesReport> {
    let (backend, session, directory) = begin(options)?;
    // Workers have what they need for serving before the first look.
    look_up(&session, directory, 0..options.files.min(2 * DEPTH))?;
    let before = backend.resident_kib()?;
    look_up_all(&session, directory, options.files)?;
    let after = backend.resident_kib()?;
    Ok(InodesReport {
        backend: options.backend.clone(),
        files: options.files,
        descriptor_limit: options.limit,
        descriptors: backend.descriptors()?.len(),
        resident_kib_before: before,
        resident_kib_after: after,
        bytes_per_inode: after.saturating_sub(before) as f64 * 1024.0 / f64::from(options.files),
    })
}

/// Looks these files up, all at once.
fn look_up(session: &Session, directory: u64, files: std::ops::Range<u32>) -> Result<()> {
    let queue = session.queue(1);
    let chain = |number: u32| {
        let request = Request::new(Opcode::Lookup, directory).name(entry_name(number)).reply::<EntryOut>();
        request.to_chain(session.memory(), 1_000_000 + 2 * u64::from(number), Segmentation::One, 64)
    };
    let chains = files.map(chain).collect::<lanefsd_frontend::Result<Vec<_>>>().map_err(LoadError::from)?;
    queue.submit_batch(chains)?;
    while let Some(completion) = queue.complete()? {
        Reply::of(&completion)?.success()?;
    }
    Ok(())
}
