//! The caller of a request, as the host sees it: user, groups, capabilities, and what a change of a file does to
//! set-id bits.
//!
//! A request acts as its caller for the length of one system call, and leaves nothing on the thread but CAP_FSETID
//! ([`credentials`]).

pub mod credentials;
pub mod identity;
pub mod set_id;
