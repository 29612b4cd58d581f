//! Tables in shards with a lock each, so that workers seldom contend.

use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Deref;

/// Number of shards.
pub const SHARDS: usize = 32;

/// A value with cache lines of its own (two are fetched together): processors that change it do not slow down others that
/// use its neighbours.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct CachePadded<T>(T);

impl<T> Deref for CachePadded<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

/// `SHARDS` values, of which a number selects one.
#[derive(Debug)]
pub struct Shards<T>([CachePadded<T>; SHARDS]);

/// The number of the shard that a number selects.
#[allow(clippy::cast_possible_truncation, reason = "the remainder is small")]
pub fn shard_of(number: u64) -> usize {
    (number % SHARDS as u64) as usize
}

impl<T: Default> Default for Shards<T> {
    fn default() -> Shards<T> {
        Shards(std::array::from_fn(|_| CachePadded::default()))
    }
}

impl<T> Shards<T> {
    /// The shard of `number`.
    #[allow(clippy::indexing_slicing, reason = "the remainder is below the array's length")]
    pub fn of(&self, number: u64) -> &T {
        &self.0[shard_of(number)]
    }

    /// All shards.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|part| &**part)
    }
}

/// For tables by ids that the daemon assigns in sequence. A guest can at worst make its own look-ups slower, by keeping
/// ids that collide and forgetting the others.
pub type BuildIdHasher = BuildHasherDefault<IdHasher>;

/// Fibonacci hashing: one multiplication.
#[derive(Debug, Default)]
pub struct IdHasher(u64);

impl Hasher for IdHasher {
    fn write_u64(&mut self, number: u64) {
        // By 2^64 over the golden ratio. The upper half of the product depends on all bits of the number, and tables use
        // both ends.
        let product = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = product ^ (product >> 32);
    }

    fn write_u32(&mut self, number: u32) {
        self.write_u64(number.into());
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(self.0.rotate_left(8) ^ u64::from(*byte));
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::hash::BuildHasher;

    #[test]
    fn ids_of_one_shard_spread_over_its_table() {
        // In a table of 1024 places: the place is in the low bits, the tag in the high ones.
        let hash = |number: u64| BuildIdHasher::default().hash_one(number);
        let numbers = || (0..1000).map(|i| 7 + i * SHARDS as u64);
        let places: HashSet<u64> = numbers().map(|number| hash(number) % 1024).collect();
        let tags: HashSet<u64> = numbers().map(|number| hash(number) >> 57).collect();
        assert!(places.len() > 500, "{} places", places.len());
        assert!(tags.len() > 100, "{} tags", tags.len());
    }
}
