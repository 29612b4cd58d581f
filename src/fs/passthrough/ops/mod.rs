//! The operations: what one request does to the host.

pub mod attributes;
pub mod data;
pub mod file_flags;
pub mod labels;
pub mod locks;
pub mod lookup;
pub mod namespace_ops;
pub mod open;
pub mod readdir;
pub mod release;
pub mod xattr;
