//! All mappings of a client.

use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use rpds::RedBlackTreeMapSync;

use super::mapping::Mapping;

/// The new range lies across one that is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the range overlaps {iova:#x}+{len:#x}, which is mapped")]
pub struct OverlapError {
    /// First address of the mapped range.
    pub iova: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// Why a range could not be unmapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UnmapError {
    /// Nothing in the range is mapped.
    #[error("nothing is mapped there")]
    NotMapped,
    /// The range would cut a mapping in two.
    #[error("the range cuts the mapping {iova:#x}+{len:#x} in two")]
    Bisects {
        /// First address of the mapping.
        iova: u64,
        /// Its length in bytes.
        len: u64,
    },
}

/// A snapshot of all mappings, by IOVA. To copy one is to copy a pointer; to change one is O(log n), and older
/// snapshots stay as they were.
#[derive(Clone, Debug, Default)]
pub struct IovaTable {
    by_iova: RedBlackTreeMapSync<u64, Arc<Mapping>>,
}

impl IovaTable {
    /// The mapping that holds `iova`.
    pub fn find(&self, iova: u64) -> Option<&Arc<Mapping>> {
        let (_, mapping) = self.by_iova.range(..=iova).next_back()?;
        (iova <= mapping.last()).then_some(mapping)
    }

    /// How many ranges are mapped.
    pub fn len(&self) -> usize {
        self.by_iova.size()
    }

    /// Whether nothing is mapped.
    pub fn is_empty(&self) -> bool {
        self.by_iova.is_empty()
    }

    /// All mappings, by rising address.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Mapping>> {
        self.by_iova.values()
    }

    fn map(&mut self, mapping: Mapping) -> Result<(), OverlapError> {
        // Mappings do not overlap, so the one that starts last before our end is the only one that can reach into us.
        if let Some((_, other)) = self.by_iova.range(..=mapping.last()).next_back()
            && other.last() >= mapping.iova()
        {
            return Err(OverlapError { iova: other.iova(), len: other.len() });
        }
        self.by_iova.insert_mut(mapping.iova(), Arc::new(mapping));
        Ok(())
    }

    fn unmap(&mut self, iova: u64, last: u64) -> Result<Vec<Arc<Mapping>>, UnmapError> {
        for edge in [iova, last] {
            if let Some(mapping) = self.find(edge)
                && (mapping.iova() < iova || mapping.last() > last)
            {
                return Err(UnmapError::Bisects { iova: mapping.iova(), len: mapping.len() });
            }
        }
        let gone: Vec<_> = self.by_iova.range(iova..=last).map(|(_, mapping)| Arc::clone(mapping)).collect();
        if gone.is_empty() {
            return Err(UnmapError::NotMapped);
        }
        for mapping in &gone {
            self.by_iova.remove_mut(&mapping.iova());
        }
        Ok(gone)
    }
}

/// The newest [`IovaTable`] of a client: changed by its session, read by its queues without a lock.
#[derive(Debug, Default)]
pub struct SharedTable {
    current: ArcSwap<IovaTable>,
    /// Held while a change is made; readers never take it.
    changing: Mutex<()>,
}

impl SharedTable {
    /// The newest snapshot.
    pub fn load(&self) -> Arc<IovaTable> {
        self.current.load_full()
    }

    /// Adds a mapping; queues that meet an address they do not know look here again.
    ///
    /// # Errors
    /// If it overlaps another.
    pub fn map(&self, mapping: Mapping) -> Result<(), OverlapError> {
        self.change(|table| table.map(mapping))
    }

    /// Takes out all mappings that lie within `iova..=last` and returns them. Views made earlier still hold
    /// them until [`GuestMemory::refresh`](super::GuestMemory::refresh).
    ///
    /// # Errors
    /// If nothing is mapped there or a mapping lies across an edge of the range; nothing is changed then.
    pub fn unmap(&self, iova: u64, last: u64) -> Result<Vec<Arc<Mapping>>, UnmapError> {
        self.change(|table| table.unmap(iova, last))
    }

    fn change<T, E>(&self, change: impl FnOnce(&mut IovaTable) -> Result<T, E>) -> Result<T, E> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut table = IovaTable::clone(&self.current.load());
        let done = change(&mut table)?;
        self.current.store(Arc::new(table));
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::memory::Access;

    const PAGE: u64 = 4096;

    fn mapping(page: u64, pages: u64) -> Mapping {
        Mapping::unreachable(page * PAGE, pages * PAGE, Access::READ_WRITE).unwrap()
    }

    #[test]
    fn the_last_page_of_the_address_space() {
        let table = SharedTable::default();
        table.map(mapping(u64::MAX / PAGE, 1)).unwrap();
        assert!(table.load().find(u64::MAX).is_some());
        assert_eq!(table.unmap(0, u64::MAX).unwrap().len(), 1);
    }

    proptest! {
        /// The table against a plain array of pages.
        #[test]
        fn behaves_like_an_array_of_pages(steps in prop::collection::vec((any::<bool>(), 0u64..24, 1u64..6), 1..60)) {
            let table = SharedTable::default();
            let mut pages: BTreeMap<u64, u64> = BTreeMap::new(); // page -> start of its mapping
            for (map, start, len) in steps {
                let range = start..start + len;
                if map {
                    let free = range.clone().all(|page| !pages.contains_key(&page));
                    prop_assert_eq!(table.map(mapping(start, len)).is_ok(), free);
                    if free {
                        pages.extend(range.map(|page| (page, start)));
                    }
                } else {
                    let starts: Vec<u64> = range.clone().filter_map(|page| pages.get(&page).copied()).collect();
                    let inside = |page: u64| starts.contains(pages.get(&page).unwrap_or(&u64::MAX));
                    let bisects = (0..64).any(|page| !range.contains(&page) && inside(page));
                    let result = table.unmap(start * PAGE, (start + len) * PAGE - 1);
                    prop_assert_eq!(result.is_ok(), !starts.is_empty() && !bisects);
                    if result.is_ok() {
                        pages.retain(|page, _| !range.contains(page));
                    }
                }
                for page in 0..32 {
                    let found = table.load().find(page * PAGE + 5).map(|found| found.iova() / PAGE);
                    prop_assert_eq!(found, pages.get(&page).copied());
                }
            }
        }
    }
}
