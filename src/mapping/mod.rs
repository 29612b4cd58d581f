//! Translation between guest and host: ids of users and groups, and names of extended attributes.
//!
//! Rules and tables only: no I/O. Of the command line it knows the syntax of the rules.

pub mod acl;
pub mod ids;
pub mod xattrs;
