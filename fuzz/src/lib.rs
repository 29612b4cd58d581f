//! What the fuzz targets do with their input. The targets themselves are one line each, so that
//! all of this can be linted and read without libFuzzer.

pub mod decode;
