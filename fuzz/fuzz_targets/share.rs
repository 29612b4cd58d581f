#![no_main]
//! See `share.rs` of the library.

libfuzzer_sys::fuzz_target!(|data: &[u8]| lanefsd_fuzz::share::serve(data));
