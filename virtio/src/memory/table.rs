//! All mappings of a client.

use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;

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

/// Mappings in a run: a change copies one run, and a pointer for each of the others. With some ten thousands of mappings
/// there are about as many runs as there are mappings in one.
const RUN: usize = if cfg!(test) { 4 } else { 128 };

/// A snapshot of all mappings, by IOVA. To copy one is to copy a pointer for each run, and older snapshots stay as they
/// were; to find a mapping is two binary searches in memory that lies together.
#[derive(Clone, Debug, Default)]
pub struct IovaTable {
    /// By rising address; none is empty.
    runs: Vec<Run>,
}

/// Mappings that follow each other.
#[derive(Clone, Debug)]
struct Run {
    /// The address of the first entry.
    iova: u64,
    /// At most [`RUN`].
    entries: Arc<Vec<Entry>>,
}

#[derive(Clone, Debug)]
struct Entry {
    /// The mapping's, at hand.
    iova: u64,
    mapping: Arc<Mapping>,
}

impl IovaTable {
    /// The mapping that holds `iova`.
    pub fn find(&self, iova: u64) -> Option<&Arc<Mapping>> {
        self.floor(iova).filter(|mapping| iova <= mapping.last())
    }

    /// The last mapping that starts at `iova` or before.
    fn floor(&self, iova: u64) -> Option<&Arc<Mapping>> {
        let run = self.runs.partition_point(|run| run.iova <= iova).checked_sub(1)?;
        let entries = &self.runs.get(run)?.entries;
        let entry = entries.partition_point(|entry| entry.iova <= iova).checked_sub(1)?;
        entries.get(entry).map(|entry| &entry.mapping)
    }

    /// How many ranges are mapped.
    pub fn len(&self) -> usize {
        self.runs.iter().map(|run| run.entries.len()).sum()
    }

    /// Whether nothing is mapped.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// All mappings, by rising address.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Mapping>> {
        self.runs.iter().flat_map(|run| run.entries.iter()).map(|entry| &entry.mapping)
    }

    fn map(&mut self, mapping: Mapping) -> Result<(), OverlapError> {
        // Mappings do not overlap, so the one that starts last before our end is the only one that can reach into us.
        if let Some(other) = self.floor(mapping.last())
            && other.last() >= mapping.iova()
        {
            return Err(OverlapError { iova: other.iova(), len: other.len() });
        }
        let iova = mapping.iova();
        let entry = Entry { iova, mapping: Arc::new(mapping) };
        let at = self.runs.partition_point(|run| run.iova <= iova).saturating_sub(1);
        let Some(run) = self.runs.get_mut(at) else {
            self.runs.push(Run { iova, entries: Arc::new(vec![entry]) });
            return Ok(());
        };
        let entries = Arc::make_mut(&mut run.entries);
        entries.insert(entries.partition_point(|entry| entry.iova < iova), entry);
        run.iova = run.iova.min(iova);
        if entries.len() > RUN {
            let second = entries.split_off(RUN / 2);
            if let Some(first) = second.first() {
                self.runs.insert(at.saturating_add(1), Run { iova: first.iova, entries: Arc::new(second) });
            }
        }
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
        let mut gone = Vec::new();
        let start = self.runs.partition_point(|run| run.iova <= iova).saturating_sub(1);
        for run in self.runs.iter_mut().skip(start).take_while(|run| run.iova <= last) {
            let from = run.entries.partition_point(|entry| entry.iova < iova);
            let to = run.entries.partition_point(|entry| entry.iova <= last);
            if from < to {
                let entries = Arc::make_mut(&mut run.entries);
                gone.extend(entries.drain(from..to).map(|entry| entry.mapping));
                run.iova = entries.first().map_or(run.iova, |entry| entry.iova);
            }
        }
        if gone.is_empty() {
            return Err(UnmapError::NotMapped);
        }
        self.join_runs();
        Ok(gone)
    }

    /// Drops empty runs, and makes one of two that have become so small that half a run holds both.
    fn join_runs(&mut self) {
        let mut joined: Vec<Run> = Vec::with_capacity(self.runs.len());
        for run in self.runs.drain(..).filter(|run| !run.entries.is_empty()) {
            match joined.last_mut() {
                Some(before) if before.entries.len().saturating_add(run.entries.len()) <= RUN / 2 => {
                    Arc::make_mut(&mut before.entries).extend(run.entries.iter().cloned());
                }
                _ => joined.push(run),
            }
        }
        self.runs = joined;
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
    use std::collections::{BTreeMap, BTreeSet};

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

    /// What is in `table`, and in what runs.
    fn check(table: &IovaTable, pages: &BTreeMap<u64, u64>) {
        for page in 0..96 {
            let found = table.find(page * PAGE + 5).map(|found| found.iova() / PAGE);
            assert_eq!(found, pages.get(&page).copied());
        }
        let starts: BTreeSet<u64> = pages.values().copied().collect();
        assert_eq!((table.len(), table.is_empty()), (starts.len(), starts.is_empty()));
        assert!(table.iter().map(|mapping| mapping.iova() / PAGE).eq(starts));
        for run in &table.runs {
            assert!((1..=RUN).contains(&run.entries.len()));
            assert_eq!(run.iova, run.entries[0].iova);
            assert!(run.entries.iter().all(|entry| entry.iova == entry.mapping.iova()));
        }
        // Or many runs of few entries each would be left of what was large once.
        assert!(table.runs.len() <= 1 + 4 * table.len().div_ceil(RUN), "{} in {}", table.len(), table.runs.len());
    }

    proptest! {
        /// The table against a plain array of pages.
        #[test]
        fn behaves_like_an_array_of_pages(
            steps in prop::collection::vec((prop::bool::weighted(0.7), 0u64..58, 1u64..6), 1..150)
        ) {
            let table = SharedTable::default();
            let mut pages: BTreeMap<u64, u64> = BTreeMap::new(); // page -> start of its mapping
            let mut before = (table.load(), pages.clone());
            for (map, start, len) in steps {
                // Now and then much at a time.
                let len = if map || len < 5 { len } else { len * 6 };
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
                    let bisects = (0..128).any(|page| !range.contains(&page) && inside(page));
                    let result = table.unmap(start * PAGE, (start + len) * PAGE - 1);
                    prop_assert_eq!(result.is_ok(), !starts.is_empty() && !bisects);
                    if result.is_ok() {
                        pages.retain(|page, _| !range.contains(page));
                    }
                }
                check(&before.0, &before.1);
                before = (table.load(), pages.clone());
                check(&before.0, &before.1);
            }
        }
    }
}
