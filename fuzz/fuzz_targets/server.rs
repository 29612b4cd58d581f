#![no_main]
//! See `server.rs` of the library.

libfuzzer_sys::fuzz_target!(|data: &[u8]| lanefsd_fuzz::server::serve(data));
