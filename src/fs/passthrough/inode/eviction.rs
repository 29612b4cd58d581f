//! Descriptors for the guest when they are scarce: inodes that were not used lately give theirs up.

use std::os::fd::OwnedFd;
use std::sync::PoisonError;

use rustix::io::Errno;

use super::InodeTable;
use crate::fs::{DeviceDescriptors, Result};
use crate::limits::FdPermit;

/// Inodes that one sweep of the clock evicts, at two system calls each, ...
const EVICT_MAX: usize = 8;
/// ... and reference bits that it tests.
const SWEEP: usize = 32;
/// Sweeps of a request that gets no descriptor.
const MAX_SWEEPS: usize = 32;

impl InodeTable {
    /// The permit to keep one more descriptor open for the guest. Inodes are evicted for it if need be.
    pub fn acquire_fd(&self) -> Result<FdPermit> {
        match self.fds().acquire() {
            Err(Errno::MFILE) if self.make_room() => self.fds().acquire(),
            result => result,
        }
    }

    /// What `open` opens. Where the process has no descriptor left at all, inodes are evicted.
    pub fn with_room(&self, open: impl Fn() -> Result<OwnedFd>) -> Result<OwnedFd> {
        match open() {
            Err(Errno::MFILE | Errno::NFILE) if self.process_is_full() => open(),
            result => result,
        }
    }

    /// Evicts a few inodes that were not used lately. One thread does that at a time.
    pub(super) fn evict_some(&self) {
        if let Ok(mut hand) = self.hand.try_lock() {
            self.sweep(&mut hand);
        }
    }

    /// Evicts inodes until a descriptor is free; false if none can be evicted.
    fn make_room(&self) -> bool {
        if !self.fd_cache.evicts() {
            return false;
        }
        // The clock has only what was made.
        self.make_rest();
        let mut hand = self.hand.lock().unwrap_or_else(PoisonError::into_inner);
        (0..MAX_SWEEPS).any(|_| self.sweep(&mut hand) > 0)
    }

    /// The process got no descriptor, as the device took more than its reserve: from now on inodes may have fewer. False
    /// if none can be evicted.
    pub(super) fn process_is_full(&self) -> bool {
        if self.fd_cache.evicts() {
            self.fd_cache.lower_limit();
        }
        self.make_room()
    }

    /// The device has opened descriptors, or closed some: inodes are evicted until the guest is within its quota.
    pub fn reserve_for(&self, device: DeviceDescriptors) {
        let quota = self.fds();
        if quota.reserve_for(device) {
            self.fd_cache.on_quota_change();
            while quota.is_exceeded() && self.make_room() {}
        }
    }

    /// Moves the hand of the clock on; returns how many inodes were evicted. No lock but the hand is held across system
    /// calls.
    fn sweep(&self, hand: &mut u64) -> usize {
        let (mut evicted, mut refused) = (0, 0);
        for _ in 0..SWEEP {
            let shard = *hand;
            *hand = hand.wrapping_add(1);
            let Some(node) = self.fd_cache.clock(shard).next() else { continue };
            let Some(inode) = self.made(node) else { continue };
            // The second chance: evicted when the hand comes again, unless it was used meanwhile.
            if inode.fd.take_reference() {
                self.fd_cache.clock(shard).push(node);
            } else if inode.fd.evict(node) {
                evicted += 1;
            } else {
                refused += 1;
                self.fd_cache.clock(shard).push(node);
            }
            if evicted + refused == EVICT_MAX {
                break;
            }
        }
        if evicted == 0 && refused > 0 {
            self.fd_cache.raise_limit();
        }
        evicted
    }
}
