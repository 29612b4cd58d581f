//! The daemon's start-up.
fn main() {}
