//! A reference to a part of something that several owners share.

use std::fmt;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;

/// A `T` that is a part of what an [`Arc`] holds, and lives as long.
pub struct ArcRef<T> {
    part: NonNull<T>,
    /// Keeps the part.
    _owner: Arc<dyn Send + Sync>,
}

// SAFETY: all that is reached is a `&T`, and the owner may be used and dropped on all threads.
unsafe impl<T: Sync> Send for ArcRef<T> {}
// SAFETY: the same.
unsafe impl<T: Sync> Sync for ArcRef<T> {}

impl<T> ArcRef<T> {
    /// The part of `owner` that `part` finds.
    pub fn new<O: Send + Sync + 'static>(owner: Arc<O>, part: impl FnOnce(&O) -> &T) -> ArcRef<T> {
        let part = NonNull::from(part(&owner));
        ArcRef { part, _owner: owner }
    }
}

impl<T> Deref for ArcRef<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: the part was borrowed from what the owner holds, whatever its lifetime, and may be for as long as that
        // is not moved, dropped or borrowed mutably: the `Arc` here keeps it, and nobody else has all of its references.
        unsafe { self.part.as_ref() }
    }
}

impl<T> Clone for ArcRef<T> {
    fn clone(&self) -> ArcRef<T> {
        ArcRef { part: self.part, _owner: Arc::clone(&self._owner) }
    }
}

/// Two are equal if they refer to the same part.
impl<T> PartialEq for ArcRef<T> {
    fn eq(&self, other: &ArcRef<T>) -> bool {
        self.part == other.part
    }
}

impl<T> Eq for ArcRef<T> {}

impl<T: fmt::Debug> fmt::Debug for ArcRef<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl<T: Default + Send + Sync + 'static> Default for ArcRef<T> {
    fn default() -> ArcRef<T> {
        ArcRef::new(Arc::new(T::default()), |whole| whole)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_keeps_the_whole() {
        let whole = Arc::new((String::from("one"), String::from("two")));
        let weak = Arc::downgrade(&whole);
        let part = ArcRef::new(whole, |whole| &whole.1);
        let other = part.clone();
        drop(part);
        assert_eq!((other.as_str(), weak.strong_count()), ("two", 1));
        drop(other);
        assert!(weak.upgrade().is_none());
    }
}
