//! Who asks, for tests that call a file system without a server.

use fuse_protocol::extensions::Labels;
use fuse_protocol::ids::{GuestGid, GuestUid, Unique};
use lanefsd::fs::Context;
use lanefsd::state_file::Effects;

/// The user that the test runs as.
pub fn context() -> Context<'static> {
    let uid = GuestUid(rustix::process::geteuid().as_raw());
    let gid = GuestGid(rustix::process::getegid().as_raw());
    Context {
        unique: Unique(1),
        uid,
        gid,
        pid: 1,
        supplementary_group: None,
        labels: Labels::default(),
        effects: Effects::NONE,
    }
}
