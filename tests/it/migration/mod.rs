//! A share moves to another daemon, or is saved: DEVICE_STATE of vhost-user.

mod hosts;
mod peer;
mod postcopy;
mod races;
mod sessions;
mod streams;
mod transfer;
