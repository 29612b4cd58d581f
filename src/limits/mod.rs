//! Quotas: what a guest may take of the host.

pub mod fd_quota;
