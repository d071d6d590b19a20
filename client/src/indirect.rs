//! Tables of indirect descriptors.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, GuestMemory, SharedSlice};

pub(crate) const DESCRIPTOR_SIZE: usize = 16;

/// The tables of indirect descriptors, one for each head.
pub(crate) struct IndirectTables {
    descriptors: SharedSlice<AtomicU64>,
    iova: u64,
    /// Entries of one table.
    entries: usize,
}

impl IndirectTables {
    /// Tables of `entries` each for `count` heads; none for no entries.
    pub(crate) fn new(memory: &GuestMemory, entries: u16, count: usize) -> Result<Option<IndirectTables>, Error> {
        if entries == 0 {
            return Ok(None);
        }
        let entries = usize::from(entries);
        let tables = memory.allocate(DESCRIPTOR_SIZE * entries * count, 16)?;
        let descriptors = tables.fields(0, 2 * entries * count)?;
        Ok(Some(IndirectTables { descriptors, iova: tables.iova(), entries }))
    }

    /// Whether a chain of `count` segments goes into a table.
    pub(crate) fn takes(&self, count: usize) -> bool {
        (2..=self.entries).contains(&count)
    }

    /// Writes one entry of a head's table.
    pub(crate) fn store(&self, head: u16, entry: usize, words: [u64; 2]) {
        store_descriptor(&self.descriptors, usize::from(head) * self.entries + entry, words);
    }

    /// The address and the length of a head's table with `count` entries.
    pub(crate) fn area(&self, head: u16, count: usize) -> (u64, u32) {
        let first = usize::from(head) * self.entries;
        (self.iova + (first * DESCRIPTOR_SIZE) as u64, (count * DESCRIPTOR_SIZE) as u32)
    }
}

/// Writes a descriptor's words, in the order of memory.
pub(crate) fn store_descriptor(table: &[AtomicU64], index: usize, words: [u64; 2]) {
    for (field, word) in table[2 * index..].iter().zip(words) {
        // What is there already is not written again: the device keeps its copy of the cache line.
        if field.load(Ordering::Relaxed) != word {
            field.store(word, Ordering::Relaxed);
        }
    }
}
