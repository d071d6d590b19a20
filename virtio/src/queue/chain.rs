//! The walk over the descriptors of one request (virtio 1.3 §2.7.5, §2.8.5 to §2.8.7).

use std::num::NonZeroU16;

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::ring::{Descriptor, PackedDescriptor, PackedRing, PackedRingMemory, Position, RingMemory};
use crate::memory::{Bits, FrameRecords, GuestMemory, PinnedBuffers, Pinning, Rest, Unmapped};

/// The most descriptors that one chain may have, an indirect table's included.
pub const MAX_DESCRIPTORS: u16 = 1024;

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
const DESCRIPTOR_LEN: u32 = 16;
/// Descriptors of a header, data, and a status: nearly all requests have a table of these.
const FRAME: NonZeroU16 = match NonZeroU16::new(3) {
    Some(three) => three,
    None => NonZeroU16::MIN,
};

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
    /// INDIRECT without the feature, inside an indirect table, or with NEXT (§2.7.5.3.1); in a packed ring, inside a list.
    #[error("an indirect descriptor where none is allowed")]
    MisplacedIndirect,
    /// An indirect table that is empty, no multiple of 16 bytes, or too long.
    #[error("an indirect table of {0} bytes: it must be a multiple of 16, of at most 16384")]
    IndirectLength(u32),
    /// A buffer or an indirect table that is not in memory.
    #[error(transparent)]
    Unmapped(#[from] Unmapped),
}

/// A list of descriptors in a packed ring (§2.8.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct List {
    /// Buffer ID, which its last descriptor has.
    pub(super) id: u16,
    /// Descriptors.
    pub(super) len: u16,
}

/// A table of three descriptors, each linked to the next: flags, then the next one's index.
struct SplitFrame;

impl FrameRecords for SplitFrame {
    const HEADER: Bits = Bits { mask: !0, value: NEXT as u32 | 1 << 16 };
    const DATA: Bits = Bits { mask: !Self::WRITE, value: NEXT as u32 | 2 << 16 };
    const WRITE: u32 = WRITE as u32;
    const TRAILER: Bits = Bits { mask: 0xffff, value: Self::WRITE };
}

/// The same of a packed virtqueue, which is read from end to end: the buffer ID, and the flags, of which only WRITE matters
/// (§2.8.7).
struct PackedFrame;

impl FrameRecords for PackedFrame {
    const HEADER: Bits = Bits { mask: Self::WRITE, value: 0 };
    const DATA: Bits = Bits { mask: 0, value: 0 };
    const WRITE: u32 = (WRITE as u32) << 16;
    const TRAILER: Bits = Bits { mask: Self::WRITE, value: Self::WRITE };
}

/// The walks over the chains of one queue.
#[derive(Debug)]
pub(super) struct Walk {
    indirect_desc: bool,
    /// The second word of the descriptor of a table of a frame, but for `next`, which is of no account there; without the
    /// feature no descriptor's.
    frame: u64,
    /// Our own copy of the indirect table at hand, if that crosses mappings.
    table: Vec<[u64; 2]>,
}

impl Walk {
    /// For a queue for which `VIRTIO_F_INDIRECT_DESC` was negotiated, or not.
    pub(super) fn new(indirect_desc: bool) -> Self {
        let table =
            Descriptor { len: u32::from(FRAME.get()) * DESCRIPTOR_LEN, flags: INDIRECT, ..Descriptor::default() };
        Self { indirect_desc, frame: if indirect_desc { table.words()[1] << 16 } else { !0 }, table: Vec::new() }
    }

    /// Pins the buffers of the chain that starts at `head`, as far as the ring's own table goes. The work is bounded by
    /// [`MAX_DESCRIPTORS`] and the table.
    #[inline(always)]
    pub(super) fn start<M: RingMemory>(
        &self,
        ring: &M,
        head: u16,
        memory: &mut GuestMemory,
        buffers: &mut PinnedBuffers,
    ) -> Result<(), ChainError> {
        let first = ring.read_descriptor(head);
        let [addr, rest] = first.words();
        if rest << 16 == self.frame {
            note_table(addr, FRAME, memory, buffers);
            return Ok(());
        }
        if first.flags & INDIRECT != 0 {
            return self.table(first.addr, first.len, first.flags, memory, buffers);
        }
        self.start_direct(ring, addr, rest, memory, buffers)
    }

    /// The same for a chain whose first descriptor, of these words, is no indirect table.
    #[inline(never)]
    fn start_direct<M: RingMemory>(
        &self,
        ring: &M,
        addr: u64,
        rest: u64,
        memory: &mut GuestMemory,
        buffers: &mut PinnedBuffers,
    ) -> Result<(), ChainError> {
        let size = ring.size();
        let mut pinning = memory.pinning(buffers);
        let mut descriptor = Descriptor::from_words([addr, rest].map(u64::to_le));
        // Each step consumes one descriptor of a table with `size`: more steps than that are a loop.
        for _ in 0..size.min(MAX_DESCRIPTORS) {
            if descriptor.flags & INDIRECT != 0 {
                return self.table(descriptor.addr, descriptor.len, descriptor.flags, memory, buffers);
            }
            push(descriptor.addr, descriptor.len, descriptor.flags, &mut pinning)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            let index = descriptor.next;
            if index >= size {
                return Err(ChainError::OutOfTable { index, len: size });
            }
            descriptor = ring.read_descriptor(index);
        }
        Err(ChainError::TooLong(size.min(MAX_DESCRIPTORS)))
    }

    /// Pins the buffers of the list that starts at `position`, where the driver has made the descriptor available by `flags`,
    /// as far as the ring itself goes. It must have no more than `limit` descriptors.
    #[inline(always)]
    pub(super) fn start_packed<M: PackedRingMemory>(
        &self,
        ring: &PackedRing<M>,
        position: Position,
        flags: u16,
        limit: u16,
        memory: &mut GuestMemory,
        buffers: &mut PinnedBuffers,
    ) -> Result<List, ChainError> {
        let first = ring.descriptor(position, flags);
        if flags & INDIRECT != 0 {
            self.table(first.addr, first.len, flags, memory, buffers)?;
            return Ok(List { id: first.id, len: 1 });
        }
        start_list(ring, position, first, limit, memory, buffers)
    }

    /// Notes the indirect table that a descriptor points to (§2.7.5.3). The processor is asked to have it at hand.
    #[inline(always)]
    fn table(
        &self,
        iova: u64,
        len: u32,
        flags: u16,
        memory: &GuestMemory,
        buffers: &mut PinnedBuffers,
    ) -> Result<(), ChainError> {
        // What is no multiple of a descriptor's length becomes a large number.
        let entries = len.rotate_right(DESCRIPTOR_LEN.trailing_zeros());
        let well_formed = (1..=MAX_DESCRIPTORS.into()).contains(&entries) && flags & NEXT == 0 && self.indirect_desc;
        match NonZeroU16::new(entries as u16) {
            Some(entries) if well_formed => {
                note_table(iova, entries, memory, buffers);
                Ok(())
            }
            _ => Err(self.no_table(len, flags)),
        }
    }

    #[cold]
    fn no_table(&self, len: u32, flags: u16) -> ChainError {
        if self.indirect_desc && flags & NEXT == 0 {
            ChainError::IndirectLength(len)
        } else {
            ChainError::MisplacedIndirect
        }
    }

    /// Pins the buffers of the rest of a chain, and asks the processor to have the first and the last at hand.
    #[inline(always)]
    pub(super) fn finish(
        &mut self,
        table: Rest,
        memory: &mut GuestMemory,
        buffers: &mut PinnedBuffers,
    ) -> Result<(), ChainError> {
        if table.records == FRAME && memory.pin_frame::<SplitFrame>(table.iova, buffers) {
            return Ok(());
        }
        self.finish_any(table, memory, buffers)?;
        buffers.prefetch();
        Ok(())
    }

    /// The same for a table of any form.
    #[inline(never)]
    fn finish_any(
        &mut self,
        table: Rest,
        memory: &mut GuestMemory,
        buffers: &mut PinnedBuffers,
    ) -> Result<(), ChainError> {
        let entries = table.records.get();
        let (table, mut pinning) = memory.records(table.iova, entries, &mut self.table, buffers)?;
        let mut index = 0;
        let mut left = entries;
        loop {
            let record = table.read(index).ok_or(ChainError::OutOfTable { index, len: entries })?;
            let descriptor = Descriptor::from_words(record);
            if descriptor.flags & INDIRECT != 0 {
                return Err(ChainError::MisplacedIndirect);
            }
            push(descriptor.addr, descriptor.len, descriptor.flags, &mut pinning)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            // As in `start_direct`.
            left = left.wrapping_sub(1);
            if left == 0 {
                return Err(ChainError::TooLong(entries));
            }
            index = descriptor.next;
        }
    }

    /// [`finish`](Self::finish) for the table of a packed virtqueue, which is read from end to end (§2.8.7).
    #[inline(always)]
    pub(super) fn finish_packed(
        &mut self,
        table: Rest,
        memory: &mut GuestMemory,
        buffers: &mut PinnedBuffers,
    ) -> Result<(), ChainError> {
        if table.records == FRAME && memory.pin_frame::<PackedFrame>(table.iova, buffers) {
            return Ok(());
        }
        self.finish_packed_any(table, memory, buffers)?;
        buffers.prefetch();
        Ok(())
    }

    /// The same for a table of any form.
    #[inline(never)]
    fn finish_packed_any(
        &mut self,
        table: Rest,
        memory: &mut GuestMemory,
        buffers: &mut PinnedBuffers,
    ) -> Result<(), ChainError> {
        let (table, mut pinning) = memory.records(table.iova, table.records.get(), &mut self.table, buffers)?;
        for record in (0..table.len()).filter_map(|index| table.read(index)) {
            // All flags but WRITE, and the buffer ID, are ignored.
            let descriptor = PackedDescriptor::from_words(record);
            push(descriptor.addr, descriptor.len, descriptor.flags, &mut pinning)?;
        }
        Ok(())
    }
}

#[inline(always)]
fn note_table(iova: u64, records: NonZeroU16, memory: &GuestMemory, buffers: &mut PinnedBuffers) {
    memory.prefetch(iova);
    buffers.set_rest(Rest { iova, records });
}

/// A list in the ring, whose first descriptor is no indirect table.
#[inline(never)]
fn start_list<M: PackedRingMemory>(
    ring: &PackedRing<M>,
    mut position: Position,
    mut descriptor: PackedDescriptor,
    limit: u16,
    memory: &mut GuestMemory,
    buffers: &mut PinnedBuffers,
) -> Result<List, ChainError> {
    let limit = limit.min(MAX_DESCRIPTORS);
    let mut pinning = memory.pinning(buffers);
    for len in 1..=limit {
        let PackedDescriptor { addr, len: bytes, id, flags } = descriptor;
        if flags & INDIRECT != 0 {
            // A list has descriptors of one kind (§2.8.5).
            return Err(ChainError::MisplacedIndirect);
        }
        push(addr, bytes, flags, &mut pinning)?;
        if flags & NEXT == 0 {
            return Ok(List { id, len });
        }
        position = position.after(1, ring.size());
        descriptor = ring.next_descriptor(position);
    }
    Err(ChainError::TooLong(limit))
}

#[inline(always)]
fn push(addr: u64, len: u32, flags: u16, pinning: &mut Pinning<'_>) -> Result<(), ChainError> {
    if flags & WRITE != 0 {
        if len > 0 {
            pinning.add::<true>(addr, len)?;
        }
    } else if pinning.has_writable() {
        return Err(ChainError::ReadableAfterWritable);
    } else if len > 0 {
        pinning.add::<false>(addr, len)?;
    }
    Ok(())
}
