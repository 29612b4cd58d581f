//! What has other names in the guest than on the host: users and groups, and extended attributes.
//!
//! Rules and tables alone: no I/O, and nothing of the command line but the language of the rules.

pub mod acl;
pub mod ids;
pub mod xattrs;
