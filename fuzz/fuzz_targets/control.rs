#![no_main]
//! See `control.rs` of the library.

libfuzzer_sys::fuzz_target!(|data: &[u8]| lanefsd_fuzz::control::converse(data));
