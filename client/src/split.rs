//! The driver's side of a split virtqueue (virtio 1.3 section 2.7).

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY,
};

use crate::in_flight::InFlight;
use crate::indirect::{DESCRIPTOR_SIZE, IndirectTables, store_descriptor};
use crate::{Error, GuestMemory, SharedSlice, Used};

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
const NO_INTERRUPT: u16 = VRING_AVAIL_F_NO_INTERRUPT as u16;
const NO_NOTIFY: u16 = VRING_USED_F_NO_NOTIFY as u16;

/// Memory that a request names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where it starts.
    pub iova: u64,
    /// Its size in bytes.
    pub len: u32,
}

/// An entry of a descriptor table (section 2.7.5).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// The address of the memory.
    pub addr: u64,
    /// Its size in bytes.
    pub len: u32,
    /// `VRING_DESC_F_*`.
    pub flags: u16,
    /// The next descriptor, with `VRING_DESC_F_NEXT`.
    pub next: u16,
}

impl Descriptor {
    /// The two words of a descriptor, in the order of memory.
    fn to_words(self) -> [u64; 2] {
        let rest = u64::from(self.len) | u64::from(self.flags) << 32 | u64::from(self.next) << 48;
        [self.addr.to_le(), rest.to_le()]
    }

    fn from_words([addr, rest]: [u64; 2]) -> Descriptor {
        let rest = u64::from_le(rest);
        Descriptor { addr: u64::from_le(addr), len: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }
}

/// The three areas of a queue, open to be read and written field by field: the driver's use of them
/// is [`SplitDriver`], a test may write anything. Indexes into the areas count modulo the queue size.
/// Stores of an `idx` are Release, loads Acquire; everything else is relaxed.
#[derive(Clone)]
pub struct SplitMemory {
    areas: [u64; 3],
    mask: u16,
    descriptors: SharedSlice<AtomicU64>,
    avail: SharedSlice<AtomicU16>,
    used: SharedSlice<AtomicU16>,
    used_elements: SharedSlice<AtomicU32>,
    avail_event: SharedSlice<AtomicU16>,
}

const FLAGS: usize = 0;
const IDX: usize = 1;
const RING: usize = 2;

impl SplitMemory {
    /// Takes memory for a queue of `size` entries, a power of two up to 32768.
    ///
    /// # Errors
    /// [`Error::Device`] for another size, [`Error::OutOfMemory`].
    pub fn allocate(memory: &GuestMemory, size: u16) -> Result<SplitMemory, Error> {
        if !size.is_power_of_two() {
            return Err(Error::Device("a split queue has a power of two of entries"));
        }
        let count = usize::from(size);
        let descriptors = memory.allocate(DESCRIPTOR_SIZE * count, 16)?;
        // The areas that the two sides write lie in cache lines of their own.
        let avail = memory.allocate(6 + 2 * count, 64)?;
        let used = memory.allocate(6 + 8 * count, 64)?;
        Ok(SplitMemory {
            areas: [descriptors.iova(), avail.iova(), used.iova()],
            mask: size - 1,
            descriptors: descriptors.fields(0, 2 * count)?,
            avail: avail.fields(0, count + 3)?,
            used: used.fields(0, 2)?,
            used_elements: used.fields(4, 2 * count)?,
            avail_event: used.fields(4 + 8 * count, 1)?,
        })
    }

    /// The number of entries.
    pub fn size(&self) -> u16 {
        self.mask + 1
    }

    /// The addresses for `queue_desc`, `queue_driver` and `queue_device`.
    pub fn areas(&self) -> [u64; 3] {
        self.areas
    }

    /// Zeroes all three areas, as a queue that starts needs it.
    pub fn clear(&self) {
        self.descriptors.iter().for_each(|field| field.store(0, Ordering::Relaxed));
        let shorts = self.avail.iter().chain(self.used.iter()).chain(self.avail_event.iter());
        shorts.for_each(|field| field.store(0, Ordering::Relaxed));
        self.used_elements.iter().for_each(|field| field.store(0, Ordering::Relaxed));
    }

    /// Reads a descriptor.
    pub fn descriptor(&self, index: u16) -> Descriptor {
        let at = 2 * self.slot(index);
        let word = |at: usize| self.descriptors[at].load(Ordering::Relaxed);
        Descriptor::from_words([word(at), word(at + 1)])
    }

    /// Writes a descriptor.
    pub fn set_descriptor(&self, index: u16, descriptor: Descriptor) {
        store_descriptor(&self.descriptors[2 * self.slot(index)..], descriptor.to_words());
    }

    /// Reads `avail.flags`.
    pub fn avail_flags(&self) -> u16 {
        get(&self.avail[FLAGS], Ordering::Relaxed)
    }

    /// Writes `avail.flags`.
    pub fn set_avail_flags(&self, flags: u16) {
        set(&self.avail[FLAGS], flags, Ordering::Relaxed);
    }

    /// Reads `avail.idx`.
    pub fn avail_idx(&self) -> u16 {
        get(&self.avail[IDX], Ordering::Acquire)
    }

    /// Writes `avail.idx`.
    pub fn set_avail_idx(&self, idx: u16) {
        set(&self.avail[IDX], idx, Ordering::Release);
    }

    /// Reads `avail.ring[index]`.
    pub fn avail_entry(&self, index: u16) -> u16 {
        get(&self.avail[RING + self.slot(index)], Ordering::Relaxed)
    }

    /// Writes `avail.ring[index]`.
    pub fn set_avail_entry(&self, index: u16, head: u16) {
        set(&self.avail[RING + self.slot(index)], head, Ordering::Relaxed);
    }

    /// Reads `used_event`.
    pub fn used_event(&self) -> u16 {
        get(&self.avail[RING + usize::from(self.size())], Ordering::Relaxed)
    }

    /// Writes `used_event`.
    pub fn set_used_event(&self, idx: u16) {
        set(&self.avail[RING + usize::from(self.size())], idx, Ordering::Relaxed);
    }

    /// Reads `used.flags`.
    pub fn used_flags(&self) -> u16 {
        get(&self.used[FLAGS], Ordering::Relaxed)
    }

    /// Writes `used.flags`.
    pub fn set_used_flags(&self, flags: u16) {
        set(&self.used[FLAGS], flags, Ordering::Relaxed);
    }

    /// Reads `used.idx`.
    pub fn used_idx(&self) -> u16 {
        get(&self.used[IDX], Ordering::Acquire)
    }

    /// Writes `used.idx`.
    pub fn set_used_idx(&self, idx: u16) {
        set(&self.used[IDX], idx, Ordering::Release);
    }

    /// Reads `used.ring[index]`: `id` and `len`.
    pub fn used_entry(&self, index: u16) -> (u32, u32) {
        let at = 2 * self.slot(index);
        let word = |at: usize| u32::from_le(self.used_elements[at].load(Ordering::Relaxed));
        (word(at), word(at + 1))
    }

    /// Writes `used.ring[index]`.
    pub fn set_used_entry(&self, index: u16, id: u32, len: u32) {
        let at = 2 * self.slot(index);
        self.used_elements[at].store(id.to_le(), Ordering::Relaxed);
        self.used_elements[at + 1].store(len.to_le(), Ordering::Relaxed);
    }

    /// Reads `avail_event`.
    pub fn avail_event(&self) -> u16 {
        get(&self.avail_event[0], Ordering::Relaxed)
    }

    /// Writes `avail_event`.
    pub fn set_avail_event(&self, idx: u16) {
        set(&self.avail_event[0], idx, Ordering::Relaxed);
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index & self.mask)
    }
}

fn get(field: &AtomicU16, ordering: Ordering) -> u16 {
    u16::from_le(field.load(ordering))
}

fn set(field: &AtomicU16, value: u16, ordering: Ordering) {
    field.store(value.to_le(), ordering);
}

/// The driver of a split virtqueue.
///
/// Chains are added one by one and become visible together with [`publish`](SplitDriver::publish).
/// Nothing is allocated and nothing locked for a chain, and no decision rests on memory that the
/// device writes, except what it used.
pub struct SplitDriver {
    memory: SplitMemory,
    event_idx: bool,
    indirect: Option<IndirectTables>,
    free: Free,
    /// For each descriptor of a chain, the one behind it.
    next: Vec<u16>,
    in_flight: InFlight,
    /// By entry of the available ring, the heads that are not published yet. They are written there all at once: a device that looks
    /// at `avail.idx` would take their cache line away from between one and the next.
    heads: Vec<u16>,
    /// Where the next chain goes in the available ring.
    avail_idx: u16,
    /// `avail_idx` of the last `publish`.
    published_idx: u16,
    /// The next used entry to take.
    used_idx: u16,
    /// `used.idx` when last read.
    used_seen: u16,
}

/// The free descriptors.
enum Free {
    /// The last is the next head: its cache line is still at hand.
    Stack(Vec<u16>),
    /// `count` from `next` on: who gives back in order is given in order (section 2.7.5.3.1).
    Ring { next: u16, count: u16, size: u16 },
}

impl Free {
    fn all(size: u16, in_order: bool) -> Free {
        if in_order { Free::Ring { next: 0, count: size, size } } else { Free::Stack((0..size).rev().collect()) }
    }

    fn count(&self) -> usize {
        match self {
            Free::Stack(free) => free.len(),
            Free::Ring { count, .. } => usize::from(*count),
        }
    }

    fn peek(&self) -> Option<u16> {
        match self {
            Free::Stack(free) => free.last().copied(),
            Free::Ring { next, count, .. } => (*count > 0).then_some(*next),
        }
    }

    fn pop(&mut self) -> Option<u16> {
        match self {
            Free::Stack(free) => free.pop(),
            Free::Ring { next, count, size } => {
                *count = count.checked_sub(1)?;
                let first = *next;
                *next = if first + 1 < *size { first + 1 } else { 0 };
                Some(first)
            }
        }
    }

    fn push(&mut self, descriptor: u16) {
        match self {
            Free::Stack(free) => free.push(descriptor),
            Free::Ring { count, .. } => *count += 1,
        }
    }
}

impl SplitDriver {
    /// Makes the driver of a queue of `size` entries, with its memory. With `event_idx`, notifications
    /// follow `VIRTIO_RING_F_EVENT_IDX`. With `indirect_entries` above 0, chains of 2 up to as many
    /// segments take one descriptor (`VIRTIO_RING_F_INDIRECT_DESC`).
    ///
    /// # Errors
    /// As [`SplitMemory::allocate`].
    pub fn new(memory: &GuestMemory, size: u16, event_idx: bool, indirect_entries: u16) -> Result<SplitDriver, Error> {
        let rings = SplitMemory::allocate(memory, size)?;
        let count = usize::from(size);
        let mut driver = SplitDriver {
            memory: rings,
            event_idx,
            indirect: IndirectTables::new(memory, indirect_entries, count)?,
            free: Free::all(size, false),
            next: vec![0; count],
            heads: vec![0; count],
            in_flight: InFlight::new(size),
            avail_idx: 0,
            published_idx: 0,
            used_idx: 0,
            used_seen: 0,
        };
        driver.restart();
        Ok(driver)
    }

    /// The same for a device that gives back in order (`VIRTIO_F_IN_ORDER`).
    #[must_use]
    pub fn in_order(mut self) -> SplitDriver {
        self.in_flight.in_order();
        self.restart();
        self
    }

    /// Forgets all that is in flight and zeroes the memory: after a reset of the queue or the device.
    pub fn restart(&mut self) {
        self.memory.clear();
        self.free = Free::all(self.memory.size(), self.in_flight.is_in_order());
        self.in_flight.clear();
        (self.avail_idx, self.published_idx, self.used_idx, self.used_seen) = (0, 0, 0, 0);
    }

    /// The areas that are shared with the device.
    pub fn memory(&self) -> &SplitMemory {
        &self.memory
    }

    /// How many chains the device has and has not given back.
    pub fn in_flight(&self) -> u16 {
        self.in_flight.count()
    }

    /// The head that the next chain will have; `None` when no descriptor is free.
    pub fn next_head(&self) -> Option<u16> {
        self.free.peek()
    }

    /// Adds a chain and gives its head: first what the device reads, then what it writes
    /// (section 2.7.4.2). `None` when it is empty or too few descriptors are free.
    #[inline]
    pub fn add(&mut self, readable: &[Segment], writable: &[Segment]) -> Option<u16> {
        let count = readable.len() + writable.len();
        let head = self.next_head()?;
        let chain_len = match &self.indirect {
            Some(tables) if tables.takes(count) => {
                self.free.pop();
                let (addr, len) = tables.fill(head, readable, writable, |Segment { iova: addr, len }, write, next| {
                    let flags = if write { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
                    Descriptor { addr, len, flags, next: next.unwrap_or(0) }.to_words()
                });
                self.memory.set_descriptor(head, Descriptor { addr, len, flags: INDIRECT, next: 0 });
                1
            }
            _ => {
                if count == 0 || count > self.free.count() {
                    return None;
                }
                let chain = readable.iter().zip(std::iter::repeat(0));
                let chain = chain.chain(writable.iter().zip(std::iter::repeat(WRITE)));
                for (index, (segment, write)) in chain.enumerate() {
                    let Some(this) = self.free.pop() else { break };
                    let last = index + 1 == count;
                    let next = if last { 0 } else { self.next_head().unwrap_or_default() };
                    let flags = if last { write } else { write | NEXT };
                    let Segment { iova: addr, len } = *segment;
                    self.memory.set_descriptor(this, Descriptor { addr, len, flags, next });
                    self.next[usize::from(this)] = next;
                }
                // No more than the queue has entries.
                count as u16
            }
        };
        self.in_flight.add(head, chain_len, writable);
        let slot = self.memory.slot(self.avail_idx);
        self.heads[slot] = head;
        self.avail_idx = self.avail_idx.wrapping_add(1);
        Some(head)
    }

    /// Makes the chains added since the last call visible to the device, and says whether the device
    /// wants to be notified of them (sections 2.7.13 and 2.7.10).
    #[must_use = "a device that is not notified may sleep for ever"]
    #[inline]
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published_idx, self.avail_idx);
        if old == new {
            return false;
        }
        self.published_idx = new;
        let mut idx = old;
        while idx != new {
            self.memory.set_avail_entry(idx, self.heads[self.memory.slot(idx)]);
            idx = idx.wrapping_add(1);
        }
        self.memory.set_avail_idx(new);
        // ORDERING: our store of avail.idx before our load of avail_event or used.flags. The device
        // stores those, then looks at avail.idx again before it sleeps. Without full barriers on both
        // sides each may miss the other's store, and the chains would lie there with nobody awake.
        fence(Ordering::SeqCst);
        if self.event_idx {
            passed(self.memory.avail_event(), new, old)
        } else {
            self.memory.used_flags() & NO_NOTIFY == 0
        }
    }

    /// Takes the next chain that the device gave back, and frees its descriptors.
    ///
    /// # Errors
    /// [`Error::Device`] when the device gives back what it does not have; the queue is then of no
    /// further use.
    #[inline]
    pub fn take(&mut self) -> Result<Option<Used>, Error> {
        let (used, chain_len) = match self.in_flight.next_of_batch() {
            Some(next) => next,
            None => {
                if self.used_seen == self.used_idx {
                    self.used_seen = self.memory.used_idx();
                    let new = self.used_seen.wrapping_sub(self.used_idx);
                    if new == 0 {
                        return Ok(None);
                    }
                    if new > self.in_flight() {
                        self.used_seen = self.used_idx;
                        return Err(Error::Device("it gives back more chains than it has"));
                    }
                }
                let (id, written) = self.memory.used_entry(self.used_idx);
                self.in_flight.take(id, written)?
            }
        };
        let mut descriptor = used.head;
        for _ in 0..chain_len {
            self.free.push(descriptor);
            descriptor = self.next[usize::from(descriptor)];
        }
        self.used_idx = self.used_idx.wrapping_add(1);
        Ok(Some(used))
    }

    /// Whether a chain can be taken.
    pub fn has_used(&self) -> bool {
        self.in_flight.is_in_batch() || self.memory.used_idx() != self.used_idx
    }

    /// Asks the device for no interrupts. It may send one all the same.
    pub fn disable_interrupts(&mut self) {
        if self.event_idx {
            // The entry that has just gone by: as far ahead as there is.
            self.memory.set_used_event(self.used_idx.wrapping_sub(1));
        } else {
            self.memory.set_avail_flags(NO_INTERRUPT);
        }
    }

    /// Asks the device for an interrupt with the next chain that it gives back. True when there is one
    /// already: take it, for no interrupt may come (section 2.7.7).
    #[must_use = "who sleeps while a chain is there may sleep for ever"]
    pub fn enable_interrupts(&mut self) -> bool {
        if self.event_idx {
            self.memory.set_used_event(self.used_idx);
        } else {
            self.memory.set_avail_flags(0);
        }
        // ORDERING: our store of used_event or avail.flags before our load of used.idx. The device
        // stores used.idx, then loads those to decide on the interrupt. Without full barriers on both
        // sides each may miss the other's store, and we would sleep over a chain that is there.
        fence(Ordering::SeqCst);
        self.has_used()
    }
}

/// Whether an index on its way from `old` to `new` passes `event` (section 2.7.7.1).
fn passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, VecDeque};

    use proptest::prelude::*;

    use super::*;

    /// The device's side: takes chains and gives them back in any order.
    struct Device {
        memory: SplitMemory,
        avail_idx: u16,
        used_idx: u16,
    }

    impl Device {
        fn new(driver: &SplitDriver) -> Device {
            Device { memory: driver.memory().clone(), avail_idx: 0, used_idx: 0 }
        }

        fn pop(&mut self) -> Option<u16> {
            if self.memory.avail_idx() == self.avail_idx {
                return None;
            }
            let head = self.memory.avail_entry(self.avail_idx);
            self.avail_idx = self.avail_idx.wrapping_add(1);
            Some(head)
        }

        fn give_back(&mut self, id: u32, len: u32) {
            self.memory.set_used_entry(self.used_idx, id, len);
            self.used_idx = self.used_idx.wrapping_add(1);
            self.memory.set_used_idx(self.used_idx);
        }

        /// The segments of a chain: what the device reads and what it writes.
        fn segments(&self, guest: &GuestMemory, head: u16) -> (Vec<Segment>, Vec<Segment>) {
            let (mut readable, mut writable) = (Vec::new(), Vec::new());
            let first = self.memory.descriptor(head);
            let table = (first.flags & INDIRECT != 0).then(|| {
                assert_eq!(first.flags, INDIRECT);
                let offset = (first.addr - guest.base()) as usize;
                let words = guest.at(offset, first.len as usize).unwrap();
                let words = words.fields::<AtomicU64>(0, first.len as usize / 8).unwrap();
                move |index: u16| {
                    let word = |at: usize| words[at].load(Ordering::Relaxed);
                    let at = 2 * usize::from(index);
                    Descriptor::from_words([word(at), word(at + 1)])
                }
            });
            let mut index = if table.is_some() { 0 } else { head };
            loop {
                let descriptor = match &table {
                    Some(table) => table(index),
                    None => self.memory.descriptor(index),
                };
                let segment = Segment { iova: descriptor.addr, len: descriptor.len };
                if descriptor.flags & WRITE != 0 {
                    writable.push(segment);
                } else {
                    assert!(writable.is_empty());
                    readable.push(segment);
                }
                if descriptor.flags & NEXT == 0 {
                    return (readable, writable);
                }
                index = descriptor.next;
            }
        }
    }

    fn driver(size: u16, event_idx: bool, indirect: u16) -> (GuestMemory, SplitDriver) {
        let memory = GuestMemory::new(1 << 20, 0x10_0000).unwrap();
        let driver = SplitDriver::new(&memory, size, event_idx, indirect).unwrap();
        (memory, driver)
    }

    fn segments(count: usize, tag: u64) -> Vec<Segment> {
        (0..count as u64).map(|i| Segment { iova: tag << 16 | i, len: 1 + i as u32 }).collect()
    }

    #[test]
    fn a_descriptor_has_the_layout_of_the_specification() {
        let (memory, driver) = driver(4, false, 0);
        let descriptor = Descriptor { addr: 0x0102_0304_0506_0708, len: 0x090a_0b0c, flags: 0x0d0e, next: 0x0f10 };
        driver.memory().set_descriptor(1, descriptor);
        let table = (driver.memory().areas()[0] - memory.base()) as usize;
        let bytes = memory.at(table + 16, 16).unwrap().to_vec();
        assert_eq!(bytes, [8, 7, 6, 5, 4, 3, 2, 1, 12, 11, 10, 9, 14, 13, 16, 15]);
        assert_eq!(driver.memory().descriptor(1), descriptor);
    }

    #[test]
    fn ring_fields_have_the_layout_of_the_specification() {
        let (memory, driver) = driver(4, false, 0);
        let rings = driver.memory();
        let [_, avail, used] = rings.areas().map(|area| (area - memory.base()) as usize);
        rings.set_avail_flags(1);
        rings.set_avail_idx(2);
        (0..4).for_each(|i| rings.set_avail_entry(i, 3 + i));
        rings.set_used_event(7);
        let bytes = memory.at(avail, 14).unwrap().to_vec();
        assert_eq!(bytes, [1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7, 0]);
        rings.set_used_flags(1);
        rings.set_used_idx(2);
        rings.set_used_entry(0, 3, 4);
        rings.set_used_entry(3, 5, 6);
        rings.set_avail_event(7);
        let bytes = memory.at(used, 38).unwrap().to_vec();
        assert_eq!(bytes[..12], [1, 0, 2, 0, 3, 0, 0, 0, 4, 0, 0, 0]);
        assert_eq!(bytes[28..], [5, 0, 0, 0, 6, 0, 0, 0, 7, 0]);
        rings.clear();
        assert!(memory.at(0, memory.size()).unwrap().to_vec().iter().all(|byte| *byte == 0));
    }

    #[test]
    fn an_event_is_passed_exactly_between_old_and_new() {
        for old in [0u16, 5, 0xfffe, 0xffff] {
            for step in 0..4u16 {
                let new = old.wrapping_add(step);
                for distance in 0..=u16::MAX {
                    let event = old.wrapping_add(distance);
                    assert_eq!(passed(event, new, old), distance < step, "{event} {new} {old}");
                }
            }
        }
    }

    #[test]
    fn notification_follows_used_flags() {
        let (_memory, mut driver) = driver(4, false, 0);
        let device = Device::new(&driver);
        assert!(!driver.publish(), "nothing to notify of");
        driver.add(&segments(1, 0), &[]).unwrap();
        assert!(driver.publish());
        assert!(!driver.publish());
        device.memory.set_used_flags(NO_NOTIFY);
        driver.add(&segments(1, 0), &[]).unwrap();
        assert!(!driver.publish());
        assert_eq!(device.memory.avail_idx(), 2);
    }

    #[test]
    fn notification_follows_avail_event() {
        let (_memory, mut driver) = driver(8, true, 0);
        let device = Device::new(&driver);
        // Flags do not count with EVENT_IDX.
        device.memory.set_used_flags(NO_NOTIFY);
        device.memory.set_avail_event(2);
        let mut kicks = Vec::new();
        for _ in 0..4 {
            driver.add(&segments(1, 0), &[]).unwrap();
            kicks.push(driver.publish());
        }
        assert_eq!(kicks, [false, false, true, false]);
        // A batch that steps over the event.
        device.memory.set_avail_event(5);
        for _ in 0..3 {
            driver.add(&segments(1, 0), &[]).unwrap();
        }
        assert!(driver.publish());
    }

    #[test]
    fn interrupts_are_asked_for_and_checked_again() {
        for event_idx in [false, true] {
            let (_memory, mut driver) = driver(4, event_idx, 0);
            let mut device = Device::new(&driver);
            for _ in 0..2 {
                driver.add(&segments(1, 0), &[]).unwrap();
            }
            let _ = driver.publish();
            assert!(!driver.enable_interrupts());
            let wants = |device: &Device, old: u16| {
                if event_idx {
                    passed(device.memory.used_event(), device.used_idx, old)
                } else {
                    device.memory.avail_flags() & NO_INTERRUPT == 0
                }
            };
            let head = device.pop().unwrap();
            device.give_back(head.into(), 0);
            assert!(wants(&device, 0));
            assert!(driver.enable_interrupts(), "there is a chain to take");
            driver.take().unwrap().unwrap();
            driver.disable_interrupts();
            let head = device.pop().unwrap();
            device.give_back(head.into(), 0);
            assert!(!wants(&device, 1));
        }
    }

    #[test]
    fn a_full_queue_takes_no_chain_and_recovers() {
        let (_memory, mut driver) = driver(4, false, 0);
        let mut device = Device::new(&driver);
        assert_eq!(driver.add(&[], &[]), None);
        assert_eq!(driver.add(&segments(5, 0), &[]), None);
        for _ in 0..100_000 {
            driver.add(&segments(2, 0), &segments(1, 1)).unwrap();
            assert_eq!(driver.add(&segments(2, 0), &[]), None);
            let _ = driver.publish();
            let head = device.pop().unwrap();
            device.give_back(head.into(), 7);
            assert_eq!(driver.take().unwrap(), Some(Used { head, written: 7 }));
        }
        assert_eq!(driver.in_flight(), 0);
    }

    #[test]
    fn what_the_device_does_not_have_it_cannot_give_back() {
        for id in [1, 4, 0x1_0000, u32::MAX] {
            let (_memory, mut driver) = driver(4, false, 0);
            let mut device = Device::new(&driver);
            let head = driver.add(&segments(2, 0), &[]).unwrap();
            assert_eq!(head, 0);
            device.give_back(id, 0);
            assert!(matches!(driver.take(), Err(Error::Device(_))), "{id}");
        }
        let (_memory, mut driver) = driver(4, false, 0);
        let mut device = Device::new(&driver);
        let head = driver.add(&segments(1, 0), &[]).unwrap();
        device.give_back(head.into(), 0);
        device.give_back(head.into(), 0);
        assert!(matches!(driver.take(), Err(Error::Device(_))));
    }

    #[test]
    fn restart_forgets() {
        let (_memory, mut driver) = driver(4, false, 0);
        driver.add(&segments(3, 0), &[]).unwrap();
        let _ = driver.publish();
        driver.restart();
        assert_eq!((driver.in_flight(), driver.memory().avail_idx()), (0, 0));
        assert!(driver.add(&segments(4, 0), &[]).is_some());
    }

    proptest! {
        /// Chains of any shape arrive as they were added and come back in any order, however often
        /// the indexes wrap.
        #[test]
        fn chains_survive_the_ring(
            event_idx: bool,
            indirect in 0u16..5,
            steps in proptest::collection::vec((0usize..4, 0usize..4, any::<proptest::sample::Index>()), 1..300),
        ) {
            let (memory, mut driver) = driver(8, event_idx, indirect);
            let mut device = Device::new(&driver);
            let mut added = VecDeque::new();
            let mut held = BTreeMap::new();
            for (tag, (readable, writable, pick)) in steps.into_iter().enumerate() {
                let tag = tag as u64;
                let chain = (segments(readable, tag), segments(writable, tag));
                let expected_head = driver.next_head();
                if let Some(head) = driver.add(&chain.0, &chain.1) {
                    prop_assert_eq!(Some(head), expected_head);
                    added.push_back((head, chain));
                }
                let _ = driver.publish();
                while let Some(head) = device.pop() {
                    let (expected, chain) = added.pop_front().unwrap();
                    prop_assert_eq!(head, expected);
                    prop_assert_eq!(device.segments(&memory, head), chain);
                    prop_assert!(held.insert(head, tag).is_none());
                }
                prop_assert_eq!(usize::from(driver.in_flight()), held.len());
                if !held.is_empty() {
                    let head = *held.keys().nth(pick.index(held.len())).unwrap();
                    held.remove(&head);
                    device.give_back(head.into(), head.into());
                    prop_assert_eq!(driver.take().unwrap(), Some(Used { head, written: head.into() }));
                }
                prop_assert_eq!(driver.take().unwrap(), None);
            }
        }
    }
}
