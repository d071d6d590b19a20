//! The walk over the descriptors of one request (virtio 1.3 §2.7.5).

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::ring::{Descriptor, RingMemory};
use crate::memory::{GuestMemory, Unmapped};

/// The most descriptors that one chain may have, an indirect table's included.
pub const MAX_DESCRIPTORS: u16 = 1024;

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
const DESCRIPTOR_LEN: usize = 16;

/// A piece of a chain: `len` bytes at `iova`; never empty, not yet looked up in the mappings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First address.
    pub iova: u64,
    /// Length in bytes, at least 1.
    pub len: u32,
}

/// What a guest did wrong in a chain.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChainError {
    /// An index beyond the table.
    #[error("descriptor {index} is beyond the table of {len}")]
    OutOfTable {
        /// The index.
        index: u16,
        /// Entries of the table.
        len: u16,
    },
    /// More descriptors than the table holds: a loop, or than [`MAX_DESCRIPTORS`].
    #[error("the chain has more than {0} descriptors, or is a loop")]
    TooLong(u16),
    /// A buffer to read after a buffer to write (§2.7.4.2).
    #[error("a device-readable descriptor follows a device-writable one")]
    ReadableAfterWritable,
    /// INDIRECT without the feature, inside an indirect table, or with NEXT (§2.7.5.3.1).
    #[error("an indirect descriptor where none is allowed")]
    MisplacedIndirect,
    /// An indirect table that is empty, no multiple of 16 bytes, or too long.
    #[error("an indirect table of {0} bytes: it must be a multiple of 16, of at most 16384")]
    IndirectLength(u32),
    /// An indirect table that is not in memory.
    #[error("indirect table: {0}")]
    IndirectUnmapped(#[from] Unmapped),
}

/// One request's buffers, as a list to read and a list to write. Meant to be filled again and again.
#[derive(Debug, Default)]
pub struct Chain {
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    indirect: Vec<u8>,
}

impl Chain {
    /// Device-readable pieces, in order.
    pub fn readable(&self) -> &[Segment] {
        &self.readable
    }

    /// Device-writable pieces, in order; they come after the readable ones.
    pub fn writable(&self) -> &[Segment] {
        &self.writable
    }

    /// Fills the lists with the chain that starts at `head`. The work is bounded by [`MAX_DESCRIPTORS`] and the table.
    pub(super) fn walk<M: RingMemory>(
        &mut self,
        ring: &M,
        head: u16,
        indirect_allowed: bool,
        memory: &mut GuestMemory,
    ) -> Result<(), ChainError> {
        self.readable.clear();
        self.writable.clear();
        let size = ring.size();
        let mut index = head;
        // Each step consumes one descriptor of a table with `size`: more steps than that are a loop.
        for _ in 0..size.min(MAX_DESCRIPTORS) {
            if index >= size {
                return Err(ChainError::OutOfTable { index, len: size });
            }
            let descriptor = ring.read_descriptor(index);
            if descriptor.flags & INDIRECT != 0 {
                if !indirect_allowed || descriptor.flags & NEXT != 0 {
                    return Err(ChainError::MisplacedIndirect);
                }
                return self.walk_indirect(descriptor, memory);
            }
            self.push(descriptor)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(ChainError::TooLong(size.min(MAX_DESCRIPTORS)))
    }

    /// The rest of a chain, in a table of its own. The table is copied first: nothing in it is read twice.
    fn walk_indirect(&mut self, table: Descriptor, memory: &mut GuestMemory) -> Result<(), ChainError> {
        let len = table.len as usize;
        let entries = len / DESCRIPTOR_LEN;
        if len == 0 || !len.is_multiple_of(DESCRIPTOR_LEN) || entries > usize::from(MAX_DESCRIPTORS) {
            return Err(ChainError::IndirectLength(table.len));
        }
        let mut copy = std::mem::take(&mut self.indirect);
        copy.resize(len, 0);
        let walked = memory.read(table.addr, &mut copy).map_err(ChainError::from).and_then(|()| {
            let mut index = 0;
            for _ in 0..entries {
                let out = ChainError::OutOfTable { index, len: entries as u16 };
                let descriptor = descriptor_at(&copy, index).ok_or(out)?;
                if descriptor.flags & INDIRECT != 0 {
                    return Err(ChainError::MisplacedIndirect);
                }
                self.push(descriptor)?;
                if descriptor.flags & NEXT == 0 {
                    return Ok(());
                }
                index = descriptor.next;
            }
            Err(ChainError::TooLong(entries as u16))
        });
        self.indirect = copy;
        walked
    }

    #[inline]
    fn push(&mut self, descriptor: Descriptor) -> Result<(), ChainError> {
        let segment = Segment { iova: descriptor.addr, len: descriptor.len };
        let list = if descriptor.flags & WRITE != 0 {
            &mut self.writable
        } else if self.writable.is_empty() {
            &mut self.readable
        } else {
            return Err(ChainError::ReadableAfterWritable);
        };
        if segment.len > 0 {
            list.push(segment);
        }
        Ok(())
    }
}

fn descriptor_at(table: &[u8], index: u16) -> Option<Descriptor> {
    let start = usize::from(index) * DESCRIPTOR_LEN;
    let entry: &[u8; DESCRIPTOR_LEN] = table.get(start..)?.first_chunk()?;
    let (addr, rest) = entry.split_at(8);
    let word = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_ne_bytes);
    Some(Descriptor::from_words([word(addr), word(rest)]))
}
