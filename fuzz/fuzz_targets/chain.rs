#![no_main]
//! See `chain.rs` of the library.

libfuzzer_sys::fuzz_target!(|data: &[u8]| lanefsd_fuzz::chain::serve(data));
