//! Messages that a guest can cause are limited.

macro_rules! warn_limited {
    ($($arg:tt)*) => { log::warn!($($arg)*) };
}
pub(crate) use warn_limited;
