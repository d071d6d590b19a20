//! The driver's side of a packed virtqueue (virtio 1.3 section 2.8).

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_PACKED_DESC_F_AVAIL, VRING_PACKED_DESC_F_USED,
    VRING_PACKED_EVENT_FLAG_DESC, VRING_PACKED_EVENT_FLAG_DISABLE, VRING_PACKED_EVENT_FLAG_ENABLE,
};

use crate::in_flight::InFlight;
use crate::indirect::{DESCRIPTOR_SIZE, IndirectTables};
use crate::{Error, GuestMemory, Segment, SharedSlice, Used};

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
const AVAIL: u16 = 1 << VRING_PACKED_DESC_F_AVAIL;
const USED: u16 = 1 << VRING_PACKED_DESC_F_USED;
const WRAP: u16 = 1 << 15;
/// The largest ring.
const MAX_SIZE: u16 = 1 << 15;

/// A descriptor (section 2.8.13).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PackedDescriptor {
    /// The address of the memory.
    pub addr: u64,
    /// Its size in bytes.
    pub len: u32,
    /// The buffer ID.
    pub id: u16,
    /// `VRING_DESC_F_*`, and the flags that say whose it is.
    pub flags: u16,
}

impl PackedDescriptor {
    /// The two words of a descriptor, in the order of memory.
    fn to_words(self) -> [u64; 2] {
        let rest = u64::from(self.len) | u64::from(self.id) << 32 | u64::from(self.flags) << 48;
        [self.addr.to_le(), rest.to_le()]
    }

    fn from_words([addr, rest]: [u64; 2]) -> PackedDescriptor {
        let rest = u64::from_le(rest);
        let (id, flags) = ((rest >> 32) as u16, (rest >> 48) as u16);
        PackedDescriptor { addr: u64::from_le(addr), len: rest as u32, id, flags }
    }
}

/// What one side wants to be told of (section 2.8.14): `desc`, with the wrap counter in bit 15, and `flags`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EventSuppression {
    /// `RING_EVENT_FLAGS_*`.
    pub flags: u16,
    /// The descriptor, if the flags ask for one.
    pub desc: u16,
}

impl EventSuppression {
    const ENABLE: EventSuppression = EventSuppression { flags: VRING_PACKED_EVENT_FLAG_ENABLE as u16, desc: 0 };
    const DISABLE: EventSuppression = EventSuppression { flags: VRING_PACKED_EVENT_FLAG_DISABLE as u16, desc: 0 };

    fn at(place: Place) -> EventSuppression {
        let wrap = if place.wrap { WRAP } else { 0 };
        EventSuppression { flags: VRING_PACKED_EVENT_FLAG_DESC as u16, desc: place.index | wrap }
    }
}

/// Where one side stands: the index of a descriptor and the wrap counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    index: u16,
    wrap: bool,
}

impl Place {
    const START: Place = Place { index: 0, wrap: true };

    /// The place `count` descriptors further, at most once around a ring of `size`.
    fn after(self, count: u16, size: u16) -> Place {
        // At most 2 * 32768 - 1.
        let index = self.index + count;
        if index < size { Place { index, ..self } } else { Place { index: index - size, wrap: !self.wrap } }
    }

    /// The flags of a descriptor that was made available here.
    fn avail(self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }

    /// The flags of a descriptor that was used here.
    fn used(self) -> u16 {
        if self.wrap { AVAIL | USED } else { 0 }
    }
}

/// The three areas of a queue, open to be read and written field by field: the driver's use of them
/// is [`PackedDriver`], a test may write anything. Indexes are below the queue size.
#[derive(Clone)]
pub struct PackedMemory {
    areas: [u64; 3],
    size: u16,
    /// The descriptors' words.
    descriptors: SharedSlice<AtomicU64>,
    /// The same memory.
    shorts: SharedSlice<AtomicU16>,
    driver_event: SharedSlice<AtomicU32>,
    device_event: SharedSlice<AtomicU32>,
}

impl PackedMemory {
    /// Takes memory for a queue of `size` descriptors, 1 to 32768.
    ///
    /// # Errors
    /// [`Error::Device`] for another size, [`Error::OutOfMemory`].
    pub fn allocate(memory: &GuestMemory, size: u16) -> Result<PackedMemory, Error> {
        if !(1..=MAX_SIZE).contains(&size) {
            return Err(Error::Device("a packed queue has 1 to 32768 entries"));
        }
        let count = usize::from(size);
        let descriptors = memory.allocate(DESCRIPTOR_SIZE * count, 64)?;
        // What the two sides write lies in cache lines of its own.
        let driver = memory.allocate(4, 64)?;
        let device = memory.allocate(4, 64)?;
        Ok(PackedMemory {
            areas: [descriptors.iova(), driver.iova(), device.iova()],
            size,
            shorts: descriptors.fields(0, 8 * count)?,
            descriptors: descriptors.fields(0, 2 * count)?,
            driver_event: driver.fields(0, 1)?,
            device_event: device.fields(0, 1)?,
        })
    }

    /// The number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The addresses for `queue_desc`, `queue_driver` and `queue_device`.
    pub fn areas(&self) -> [u64; 3] {
        self.areas
    }

    /// Zeroes all three areas, as a queue that starts needs it.
    pub fn clear(&self) {
        self.descriptors.iter().for_each(|field| field.store(0, Ordering::Relaxed));
        self.set_driver_event(EventSuppression::default());
        self.set_device_event(EventSuppression::default());
    }

    /// Reads the flags of a descriptor, Acquire.
    pub fn flags(&self, index: u16) -> u16 {
        u16::from_le(self.shorts[8 * usize::from(index) + 7].load(Ordering::Acquire))
    }

    /// Reads a descriptor.
    pub fn descriptor(&self, index: u16) -> PackedDescriptor {
        let at = 2 * usize::from(index);
        PackedDescriptor::from_words([at, at + 1].map(|at| self.descriptors[at].load(Ordering::Relaxed)))
    }

    /// Writes a descriptor: the flags and what shares a word with them Release, after the address.
    pub fn set_descriptor(&self, index: u16, descriptor: PackedDescriptor) {
        let [addr, rest] = descriptor.to_words();
        self.set_addr(index, addr);
        self.set_rest(index, rest, Ordering::Release);
    }

    fn set_addr(&self, index: u16, addr: u64) {
        self.descriptors[2 * usize::from(index)].store(addr, Ordering::Relaxed);
    }

    fn set_rest(&self, index: u16, rest: u64, ordering: Ordering) {
        self.descriptors[2 * usize::from(index) + 1].store(rest, ordering);
    }

    /// Reads the driver's event suppression.
    pub fn driver_event(&self) -> EventSuppression {
        event(&self.driver_event)
    }

    /// Writes the driver's event suppression.
    pub fn set_driver_event(&self, event: EventSuppression) {
        set_event(&self.driver_event, event);
    }

    /// Reads the device's event suppression.
    pub fn device_event(&self) -> EventSuppression {
        event(&self.device_event)
    }

    /// Writes the device's event suppression.
    pub fn set_device_event(&self, event: EventSuppression) {
        set_event(&self.device_event, event);
    }
}

fn event(word: &[AtomicU32]) -> EventSuppression {
    let word = u32::from_le(word[0].load(Ordering::Relaxed));
    EventSuppression { flags: (word >> 16) as u16, desc: word as u16 }
}

fn set_event(word: &[AtomicU32], event: EventSuppression) {
    let value = u32::from(event.flags) << 16 | u32::from(event.desc);
    word[0].store(value.to_le(), Ordering::Relaxed);
}

/// The driver of a packed virtqueue. It is used as [`SplitDriver`](crate::SplitDriver) is; a head is a buffer ID here.
pub struct PackedDriver {
    memory: PackedMemory,
    event_idx: bool,
    indirect: Option<IndirectTables>,
    /// Free buffer IDs; the last is the next head.
    ids: Vec<u16>,
    /// Free descriptors of the ring.
    free: u16,
    in_flight: InFlight,
    /// Where the next chain goes.
    avail: Place,
    /// Where the first chain is that was added since the last `publish`, and what the word with its flags will be.
    unpublished: Option<(Place, u64)>,
    /// The next used descriptor to take.
    used: Place,
}

impl PackedDriver {
    /// Makes the driver of a queue of `size` descriptors, with its memory. With `event_idx`, notifications
    /// follow `VIRTIO_RING_F_EVENT_IDX`. With `indirect_entries` above 0, chains of 2 up to as many
    /// segments take one descriptor (`VIRTIO_RING_F_INDIRECT_DESC`).
    ///
    /// # Errors
    /// As [`PackedMemory::allocate`].
    pub fn new(memory: &GuestMemory, size: u16, event_idx: bool, indirect_entries: u16) -> Result<PackedDriver, Error> {
        let ring = PackedMemory::allocate(memory, size)?;
        let count = usize::from(size);
        let mut driver = PackedDriver {
            memory: ring,
            event_idx,
            indirect: IndirectTables::new(memory, indirect_entries, count)?,
            ids: Vec::with_capacity(count),
            free: size,
            in_flight: InFlight::new(size),
            avail: Place::START,
            unpublished: None,
            used: Place::START,
        };
        driver.restart();
        Ok(driver)
    }

    /// The same for a device that gives back in order (`VIRTIO_F_IN_ORDER`).
    #[must_use]
    pub fn in_order(mut self) -> PackedDriver {
        self.in_flight.in_order();
        self
    }

    /// Forgets all that is in flight and zeroes the memory: after a reset of the queue or the device.
    pub fn restart(&mut self) {
        let size = self.memory.size();
        self.memory.clear();
        self.ids.clear();
        self.ids.extend((0..size).rev());
        self.free = size;
        self.in_flight.clear();
        (self.avail, self.unpublished, self.used) = (Place::START, None, Place::START);
    }

    /// The areas that are shared with the device.
    pub fn memory(&self) -> &PackedMemory {
        &self.memory
    }

    /// How many chains the device has and has not given back.
    pub fn in_flight(&self) -> u16 {
        self.in_flight.count()
    }

    /// The buffer ID that the next chain will have; `None` when no descriptor is free.
    pub fn next_head(&self) -> Option<u16> {
        self.ids.last().copied().filter(|_| self.free > 0)
    }

    /// Adds a chain and gives its buffer ID: first what the device reads, then what it writes
    /// (section 2.8.17). `None` when it is empty or too few descriptors are free.
    #[inline]
    pub fn add(&mut self, readable: &[Segment], writable: &[Segment]) -> Option<u16> {
        let count = readable.len() + writable.len();
        let id = self.next_head()?;
        let len = match &self.indirect {
            Some(tables) if tables.takes(count) => {
                let (addr, len) = tables.fill(id, readable, writable, |Segment { iova: addr, len }, write, _| {
                    let flags = if write { WRITE } else { 0 };
                    PackedDescriptor { addr, len, id: 0, flags }.to_words()
                });
                self.place(PackedDescriptor { addr, len, id, flags: INDIRECT });
                1
            }
            _ => {
                if count == 0 || count > usize::from(self.free) {
                    return None;
                }
                let chain = readable.iter().zip(std::iter::repeat(0));
                let chain = chain.chain(writable.iter().zip(std::iter::repeat(WRITE)));
                for (index, (segment, write)) in chain.enumerate() {
                    let next = if index + 1 == count { 0 } else { NEXT };
                    let Segment { iova: addr, len } = *segment;
                    self.place(PackedDescriptor { addr, len, id, flags: write | next });
                }
                // No more than the queue has descriptors.
                count as u16
            }
        };
        self.ids.pop();
        self.free -= len;
        self.in_flight.add(id, len, writable);
        Some(id)
    }

    /// Writes the next descriptor; of the first one that is not published yet all but the word with its flags.
    fn place(&mut self, mut descriptor: PackedDescriptor) {
        let place = self.avail;
        descriptor.flags |= place.avail();
        let [addr, rest] = descriptor.to_words();
        self.memory.set_addr(place.index, addr);
        match self.unpublished {
            None => self.unpublished = Some((place, rest)),
            Some(_) => self.memory.set_rest(place.index, rest, Ordering::Relaxed),
        }
        self.avail = place.after(1, self.memory.size());
    }

    /// Makes the chains added since the last call visible to the device, and says whether the device
    /// wants to be notified of them (section 2.8.19).
    #[must_use = "a device that is not notified may sleep for ever"]
    #[inline]
    pub fn publish(&mut self) -> bool {
        let Some((first, rest)) = self.unpublished.take() else { return false };
        self.memory.set_rest(first.index, rest, Ordering::Release);
        // ORDERING: our store of the flags before our load of the device's event suppression. The device
        // stores that, then looks at the flags again before it sleeps. Without full barriers on both
        // sides each may miss the other's store, and the chains would lie there with nobody awake.
        fence(Ordering::SeqCst);
        let event = self.memory.device_event();
        match u32::from(event.flags & 3) {
            VRING_PACKED_EVENT_FLAG_DISABLE => false,
            VRING_PACKED_EVENT_FLAG_DESC if self.event_idx => {
                let event = Place { index: event.desc & !WRAP, wrap: event.desc & WRAP != 0 };
                passed(event, self.avail, first)
            }
            _ => true,
        }
    }

    /// Takes the next chain that the device gave back, and frees its descriptors.
    ///
    /// # Errors
    /// [`Error::Device`] when the device gives back what it does not have; the queue is then of no
    /// further use.
    #[inline]
    pub fn take(&mut self) -> Result<Option<Used>, Error> {
        let (used, len) = match self.in_flight.next_of_batch() {
            Some(next) => next,
            None if !self.is_used() => return Ok(None),
            None => {
                let PackedDescriptor { id, len, .. } = self.memory.descriptor(self.used.index);
                self.in_flight.take(id.into(), len)?
            }
        };
        self.ids.push(used.head);
        self.free += len;
        self.used = self.used.after(len, self.memory.size());
        Ok(Some(used))
    }

    fn is_used(&self) -> bool {
        self.memory.flags(self.used.index) & (AVAIL | USED) == self.used.used() && self.in_flight() > 0
    }

    /// Whether a chain can be taken.
    pub fn has_used(&self) -> bool {
        self.in_flight.is_in_batch() || self.is_used()
    }

    /// Asks the device for no interrupts. It may send one all the same.
    pub fn disable_interrupts(&mut self) {
        self.memory.set_driver_event(EventSuppression::DISABLE);
    }

    /// Asks the device for an interrupt with the next chain that it gives back. True when there is one
    /// already: take it, for no interrupt may come.
    #[must_use = "who sleeps while a chain is there may sleep for ever"]
    pub fn enable_interrupts(&mut self) -> bool {
        let event = if self.event_idx { EventSuppression::at(self.used) } else { EventSuppression::ENABLE };
        self.memory.set_driver_event(event);
        // ORDERING: our store of the driver's event suppression before our load of the flags. The device
        // stores those, then loads it to decide on the interrupt. Without full barriers on both sides
        // each may miss the other's store, and we would sleep over a chain that is there.
        fence(Ordering::SeqCst);
        self.has_used()
    }
}

/// Whether a side on its way from `old` to `new`, at most once around the ring, passes `event`.
fn passed(event: Place, new: Place, old: Place) -> bool {
    if old.wrap == new.wrap {
        // Not around the end of the ring: what lies in between does so in one turn.
        event.wrap == old.wrap && (old.index..new.index).contains(&event.index)
    } else if event.wrap == old.wrap {
        event.index >= old.index
    } else {
        event.index < new.index
    }
}

#[cfg(test)]
mod tests;
