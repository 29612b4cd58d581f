//! Guest memory, in which the region of an address is found by comparing it with the few that there are.
//!
//! A request looks some seventeen addresses up. vm-memory's own collection searches by halves, with an indirection for
//! each region that it compares, and then checks the region once more.

use std::sync::Arc;

use vm_memory::mmap::FromRangesError;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionCollection, GuestRegionCollectionError,
    GuestRegionMmap, MemoryRegionAddress, VolatileSlice,
};

type Result<T> = std::result::Result<T, GuestRegionCollectionError>;

/// Most regions that are compared one by one.
const FEW: usize = 8;

/// The guest's memory: regions by their addresses, which do not overlap.
#[derive(Clone, Debug, Default)]
pub struct GuestMemoryMmap {
    regions: Vec<Place>,
}

#[derive(Clone, Debug)]
struct Place {
    start: u64,
    len: u64,
    region: Arc<GuestRegionMmap>,
}

impl GuestMemoryMmap {
    /// No memory.
    pub fn new() -> GuestMemoryMmap {
        GuestMemoryMmap::default()
    }

    /// These regions, sorted by address; an error if they are not, or overlap.
    pub fn from_arc_regions(regions: Vec<Arc<GuestRegionMmap>>) -> Result<GuestMemoryMmap> {
        let place = |region: &Arc<GuestRegionMmap>| Place {
            start: region.start_addr().0,
            len: region.len(),
            region: Arc::clone(region),
        };
        let places = regions.iter().map(place).collect();
        GuestRegionCollection::from_arc_regions(regions)?;
        Ok(GuestMemoryMmap { regions: places })
    }

    /// These bytes, if they lie in one region.
    #[inline]
    pub fn slice_of_one(&self, address: u64, len: usize) -> Option<VolatileSlice<'_>> {
        let region = self.find_region(GuestAddress(address))?;
        let offset = address.wrapping_sub(region.start_addr().0);
        region.get_slice(MemoryRegionAddress(offset), len).ok()
    }

    /// Anonymous memory at these addresses.
    pub fn from_ranges(
        ranges: &[(GuestAddress, usize)],
    ) -> std::result::Result<GuestMemoryMmap, FromRangesError> {
        let region = |(start, len): &(GuestAddress, usize)| GuestRegionMmap::from_range(*start, *len, None);
        let regions: std::result::Result<Vec<_>, _> = ranges.iter().map(region).collect();
        Ok(GuestMemoryMmap::from_arc_regions(regions?.into_iter().map(Arc::new).collect())?)
    }

    /// The same with one region more.
    pub fn insert_region(&self, region: Arc<GuestRegionMmap>) -> Result<GuestMemoryMmap> {
        let mut regions: Vec<_> = self.regions.iter().map(|place| Arc::clone(&place.region)).collect();
        regions.push(region);
        regions.sort_by_key(|region| region.start_addr());
        GuestMemoryMmap::from_arc_regions(regions)
    }

    /// The same without the region of this address and length.
    pub fn remove_region(&self, start: GuestAddress, len: u64) -> Result<GuestMemoryMmap> {
        let mut rest = self.clone();
        rest.regions.retain(|place| (place.start, place.len) != (start.0, len));
        if rest.regions.len() == self.regions.len() {
            return Err(GuestRegionCollectionError::NoMemoryRegion);
        }
        Ok(rest)
    }
}

impl GuestMemoryBackend for GuestMemoryMmap {
    type R = GuestRegionMmap;

    fn num_regions(&self) -> usize {
        self.regions.len()
    }

    // Inlined, it keeps vm-memory's iterator from being inlined, which costs more.
    #[inline(never)]
    fn find_region(&self, address: GuestAddress) -> Option<&GuestRegionMmap> {
        let mut near = self.regions.as_slice();
        if near.len() > FEW {
            let behind = near.partition_point(|place| place.start <= address.0);
            near = near.get(behind.checked_sub(1)?..behind)?;
        }
        let found = near.iter().find(|place| address.0.wrapping_sub(place.start) < place.len)?;
        Some(&found.region)
    }

    fn iter(&self) -> impl Iterator<Item = &GuestRegionMmap> {
        self.regions.iter().map(|place| &*place.region)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Regions of two pages, three pages apart.
    fn memory(count: u64) -> GuestMemoryMmap {
        let ranges: Vec<_> = (1..=count).map(|number| (GuestAddress(number * 0x3000), 0x2000)).collect();
        if count == 0 { GuestMemoryMmap::new() } else { GuestMemoryMmap::from_ranges(&ranges).unwrap() }
    }

    fn region(start: u64) -> Arc<GuestRegionMmap> {
        Arc::new(GuestRegionMmap::from_range(GuestAddress(start), 0x1000, None).unwrap())
    }

    #[test]
    fn an_address_is_in_the_region_around_it() {
        for count in [0, 1, 2, 8, 9, 30] {
            let memory = memory(count);
            for number in 0..=count + 1 {
                let start = number * 0x3000;
                let is_there = (1..=count).contains(&number);
                for (address, inside) in [
                    (start, is_there),
                    (start + 0x1fff, is_there),
                    (start + 0x2000, false),
                    (start + 0x2fff, false),
                ] {
                    let found = memory.find_region(GuestAddress(address)).map(|region| region.start_addr().0);
                    assert_eq!(found, inside.then_some(start), "{count} regions, {address:#x}");
                }
            }
            assert!(memory.find_region(GuestAddress(u64::MAX)).is_none());
        }
    }

    #[test]
    fn regions_come_and_go() {
        let memory = memory(2);
        let more = memory.insert_region(region(0x2000)).unwrap();
        assert_eq!(
            more.iter().map(|region| region.start_addr().0).collect::<Vec<_>>(),
            [0x2000, 0x3000, 0x6000]
        );
        assert!(more.insert_region(region(0x4000)).is_err(), "it overlaps");
        assert!(more.remove_region(GuestAddress(0x2000), 0x2000).is_err(), "another length");
        let less = more.remove_region(GuestAddress(0x3000), 0x2000).unwrap();
        assert!(less.find_region(GuestAddress(0x3000)).is_none());
        assert_eq!((less.num_regions(), memory.num_regions()), (2, 2));
        assert!(
            GuestMemoryMmap::from_arc_regions(vec![region(0x2000), region(0x1000)]).is_err(),
            "not sorted"
        );
    }
}
