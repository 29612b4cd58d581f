//! The operations: what one request does to the host. Each is a function with the operation's name, which takes the
//! narrowest thing that it needs: an inode, a handle, a table, the view of the guest; only those that create or open
//! something take the whole share.

pub mod attributes;
pub mod data;
pub mod file_flags;
pub mod growing;
pub mod guest_view;
pub mod labels;
pub mod locks;
pub mod lookup;
pub mod mapped;
pub mod namespace_ops;
pub mod open;
pub mod readdir;
pub mod replay;
pub mod transfer;
pub mod xattr;
