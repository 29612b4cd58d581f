#![no_main]
//! See `decode.rs` of the library.

libfuzzer_sys::fuzz_target!(|data: &[u8]| lanefsd_fuzz::decode::decode(data));
