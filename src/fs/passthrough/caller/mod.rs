//! The caller of a request, as the host sees it: user, group, capabilities, and what is left of set-id bits.

pub mod credentials;
pub mod identity;
pub mod set_id;
