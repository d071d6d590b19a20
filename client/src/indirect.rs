//! Tables of indirect descriptors.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, GuestMemory, Segment, SharedSlice};

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

    /// Writes a head's table of a chain that it [`takes`](Self::takes): what the device reads, then what it writes. `words` makes a
    /// descriptor of a segment, of whether the device writes it, and of the entry behind it, if there is one. Gives the address
    /// and the length of the table.
    #[inline]
    pub(crate) fn fill(
        &self,
        head: u16,
        readable: &[Segment],
        writable: &[Segment],
        words: impl Fn(Segment, bool, Option<u16>) -> [u64; 2],
    ) -> (u64, u32) {
        let first = usize::from(head) * self.entries;
        let count = readable.len() + writable.len();
        let fields = &self.descriptors[2 * first..2 * (first + count)];
        let (to_read, to_write) = fields.split_at(2 * readable.len());
        // A table has at most 65535 entries.
        let mut next = 0;
        for (fields, segments, write) in [(to_read, readable, false), (to_write, writable, true)] {
            for (fields, segment) in fields.chunks_exact(2).zip(segments) {
                next += 1;
                store_descriptor(fields, words(*segment, write, (usize::from(next) < count).then_some(next)));
            }
        }
        (self.iova + (first * DESCRIPTOR_SIZE) as u64, (count * DESCRIPTOR_SIZE) as u32)
    }
}

/// Writes a descriptor's words, in the order of memory.
#[inline]
pub(crate) fn store_descriptor(fields: &[AtomicU64], words: [u64; 2]) {
    for (field, word) in fields.iter().zip(words) {
        // What is there already is not written again: the device keeps its copy of the cache line.
        if field.load(Ordering::Relaxed) != word {
            field.store(word, Ordering::Relaxed);
        }
    }
}
