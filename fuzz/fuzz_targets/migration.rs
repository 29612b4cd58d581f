#![no_main]
//! See `migration.rs` of the library.

libfuzzer_sys::fuzz_target!(|data: &[u8]| lanefsd_fuzz::migration::migration(data));
