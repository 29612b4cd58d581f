//! Tables cut into parts with a lock each, so that workers seldom meet.

/// Number of parts.
pub const SHARDS: usize = 32;

/// `SHARDS` things, of which a number chooses one.
#[derive(Debug)]
pub struct Shards<T>([T; SHARDS]);

impl<T: Default> Default for Shards<T> {
    fn default() -> Shards<T> {
        Shards(std::array::from_fn(|_| T::default()))
    }
}

impl<T> Shards<T> {
    /// The part that `number` belongs to.
    #[allow(
        clippy::indexing_slicing,
        clippy::cast_possible_truncation,
        reason = "the remainder is below the array's length"
    )]
    pub fn of(&self, number: u64) -> &T {
        &self.0[(number % SHARDS as u64) as usize]
    }

    /// All parts.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter()
    }
}
