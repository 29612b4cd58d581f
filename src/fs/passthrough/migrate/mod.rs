//! A share that moves to another daemon: the guest's inodes, handles and locks as a [`Snapshot`], and from one.
//!
//! | file | content |
//! |---|---|
//! | `locate.rs` | where an inode is: its directory and name, or its file handle |
//! | `links.rs` | other names of files whose first one was removed |
//! | `collector.rs` | the thread that finds that out for all inodes while the guest runs |
//! | `save.rs` | the snapshot |
//! | `content.rs` | the content of open files without a name |
//! | `load.rs` | the other way: nodes are taken over as they are and looked for later, handles are opened |
//! | `locks.rs` | locks, which the source lets go before the destination takes them |
//!
//! [`Snapshot`]: crate::migration::Snapshot

mod collector;
mod content;
mod links;
mod load;
mod locate;
mod locks;
mod save;
#[cfg(test)]
mod tests;

pub use self::collector::Collector;
pub use self::load::{load, resolve_in_background};
pub use self::locks::{SavedLocks, restore as restore_saved_locks, resume};
pub use self::save::save;
