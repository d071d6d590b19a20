//! The device's side of a virtqueue: whatever is in its ring and in the tables that it points to, and however that changes
//! between two reads, a chain is taken as it was read or the driver is at fault, and no more work is done than the queue is
//! long. Where nothing changes, the crate `virtio-queue` must see the same chain.

#![no_main]

use std::cell::RefCell;
use std::fs::File;
use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock};

use libfuzzer_sys::arbitrary::{Arbitrary, Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use nix::sys::memfd::{MFdFlags, memfd_create};
use virtio::memory::{Access, GuestMemory, MappedRing, Mapping, MemoryFile, PinnedBuffers, RingAddresses, SharedTable};
use virtio::queue::{
    Armed, Descriptor, EventSuppression, Field, Head, MAX_DESCRIPTORS, PackedDescriptor, PackedQueue, PackedRingMemory,
    Position, QueueState, RingFeatures, RingMemory, Signal, SplitQueue, UsedDescriptor, Virtqueue,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

const PAGE: u64 = 4096;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Guest memory: first address, place in the file, pages. The second follows the first in the file too, the third follows
/// the second as the guest sees it alone, and nothing follows the third.
const RANGES: [(u64, u64, u64); 3] = [(0x1_0000, 0, 4), (0x1_4000, 4 * PAGE, 2), (0x1_6000, 7 * PAGE, 2)];
const END: u64 = 0x1_8000;
/// Where the tables of indirect descriptors are: inside a range, across two, with the end of memory inside.
const TABLES: [u64; 4] = [0x1_3000, 0x1_3fe0, 0x1_5ff8, END - 40];
/// Entries of each.
const ENTRIES: u16 = 8;

struct World {
    file: Arc<MemoryFile>,
    ours: Arc<SharedTable>,
    theirs: GuestMemoryMmap,
}

static WORLD: LazyLock<World> = LazyLock::new(|| {
    let file = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).expect("a file in memory"));
    file.set_len(9 * PAGE).expect("its length");
    let ranges = RANGES.map(|(iova, offset, pages)| {
        let file = FileOffset::new(file.try_clone().expect("a descriptor"), offset);
        (GuestAddress(iova), (pages * PAGE) as usize, Some(file))
    });
    let theirs = GuestMemoryMmap::from_ranges_with_files(ranges).expect("their mappings");
    let (file, ours) = (Arc::new(MemoryFile::map(file).expect("our mapping")), Arc::new(SharedTable::default()));
    for (iova, offset, pages) in RANGES {
        let mapping = Mapping::of_file(iova, pages * PAGE, Access::READ_WRITE, Arc::clone(&file), offset);
        ours.map(mapping.expect("in the file")).expect("apart");
    }
    World { file, ours, theirs }
});

fuzz_target!(|data: &[u8]| {
    // An input that ends early has done all it can.
    let _ended = run(&mut Unstructured::new(data));
});

fn run(input: &mut Unstructured<'_>) -> Result<()> {
    match input.arbitrary::<u8>()? % 4 {
        0 | 1 => split_in_memory(input),
        2 => {
            let at: u16 = input.arbitrary()?;
            let avail_idx = at.wrapping_add(u16::from(input.arbitrary::<u8>()? % 18));
            let ring = RefCell::new(Restless { avail_idx, used_idx: at, ..Restless::new() });
            history::<SplitQueue<Ring<'_>>>(input, &ring, QueueState { next_avail: at, next_used: at }, true)
        }
        _ => {
            let ring = RefCell::new(Restless::new());
            history::<PackedQueue<Ring<'_>>>(input, &ring, PackedQueue::<Ring<'_>>::START, false)
        }
    }
}

/// A descriptor that makes sense more often than not.
fn descriptor(input: &mut Unstructured<'_>, index: u16) -> Result<Descriptor> {
    let [place, len, flags, next]: [u8; 4] = input.arbitrary()?;
    let flags = u16::from(flags % 8);
    let descriptor = Descriptor {
        addr: 0x1_0000 + 0x80 * u64::from(place),
        len: if len < 0xf0 { u32::from(len) } else { u32::MAX - u32::from(len & 0xf) },
        // Mostly not indirect, and one after the other.
        flags: if place < 0xc0 { flags & !INDIRECT } else { flags },
        next: if next < 0xc0 { index + 1 } else { u16::from(next & 0x1f) },
    };
    if descriptor.flags & INDIRECT == 0 {
        return Ok(descriptor);
    }
    let table = TABLES.get(usize::from(place % 5)).copied().unwrap_or(u64::MAX - 31);
    let len = if len < 0xe0 { 16 * u32::from(len % 10) } else { u32::from(len) };
    // NEXT beside INDIRECT is a fault: not always.
    let flags = if next & 1 == 0 { descriptor.flags & !NEXT } else { descriptor.flags };
    Ok(Descriptor { addr: table, len, flags, ..descriptor })
}

fn bytes(descriptor: &Descriptor) -> Vec<u8> {
    let mut bytes = descriptor.addr.to_le_bytes().to_vec();
    bytes.extend(descriptor.len.to_le_bytes());
    bytes.extend(descriptor.flags.to_le_bytes());
    bytes.extend(descriptor.next.to_le_bytes());
    bytes
}

/// Writes the indirect tables, as far as there is memory for them.
fn write_tables(input: &mut Unstructured<'_>, memory: &mut GuestMemory) -> Result<()> {
    for table in TABLES {
        for index in 0..ENTRIES {
            if input.is_empty() {
                return Ok(());
            }
            let descriptor = descriptor(input, index)?;
            let _end_of_memory = memory.write(table + 16 * u64::from(index), &bytes(&descriptor));
        }
    }
    Ok(())
}

/// A piece of the file: first byte, the one after the last, and whether the device writes it.
type Piece = (u64, u64, bool);

/// What must hold of the buffers of every chain; gives their places in the file.
fn check(buffers: &PinnedBuffers, size: u16) -> Vec<Piece> {
    let [readable, writable] = buffers.pieces();
    let all = readable.len() + writable.len();
    assert!(all <= RANGES.len() * usize::from(MAX_DESCRIPTORS + size), "{all} pieces");
    let mut pieces = Vec::new();
    for (iovecs, write) in [(readable, false), (writable, true)] {
        for iovec in iovecs {
            let start = WORLD.file.offset_of(&iovec).expect("a piece of guest memory");
            assert!(iovec.iov_len > 0, "an empty piece");
            add(&mut pieces, (start, start + iovec.iov_len as u64, write));
        }
    }
    pieces
}

/// Adds a piece; neighbours become one.
fn add(pieces: &mut Vec<Piece>, (start, end, write): Piece) {
    match pieces.last_mut() {
        Some(last) if last.1 == start && last.2 == write => last.1 = end,
        _ => pieces.push((start, end, write)),
    }
}

/// The same of a buffer as a descriptor has it; false if not all of it is there.
fn add_buffer(pieces: &mut Vec<Piece>, mut iova: u64, len: u32, write: bool) -> bool {
    let mut left = u64::from(len);
    while left > 0 {
        let holds = |(start, _, pages): &&(u64, u64, u64)| (*start..start + pages * PAGE).contains(&iova);
        let Some((start, offset, pages)) = RANGES.iter().find(holds) else { return false };
        let here = left.min(start + pages * PAGE - iova);
        add(pieces, (offset + iova - start, offset + iova - start + here, write));
        (iova, left) = (iova + here, left - here);
    }
    true
}

/// A ring in guest memory that stands still: ours and theirs take the same chains.
fn split_in_memory(input: &mut Unstructured<'_>) -> Result<()> {
    let mut memory = GuestMemory::new(Arc::clone(&WORLD.ours));
    for (iova, _, pages) in RANGES {
        memory.write(iova, &vec![0; (pages * PAGE) as usize]).expect("memory");
    }
    let size = 1u16 << input.int_in_range(0..=4)?;
    // In one range, or across two.
    let desc = [0x1_0000, 0x1_3fc0, 0x1_5fc0][usize::from(input.arbitrary::<u8>()? % 3)];
    let at = RingAddresses { desc, driver: 0x1_1000, device: 0x1_2000 };
    for index in 0..size {
        let descriptor = descriptor(input, index)?;
        memory.write(desc + 16 * u64::from(index), &bytes(&descriptor)).expect("memory");
    }
    let shown = input.int_in_range(0..=size)?;
    for slot in 0..shown {
        let head = u16::from(input.arbitrary::<u8>()? & 0x1f) % (size + 1);
        memory.write(at.driver + 4 + 2 * u64::from(slot), &head.to_le_bytes()).expect("memory");
    }
    let ahead = if input.ratio(1, 16)? { size } else { 0 };
    memory.write(at.driver + 2, &(shown + ahead).to_le_bytes()).expect("memory");
    let indirect_desc = input.ratio(7, 8)?;
    write_tables(input, &mut memory)?;

    let ring = MappedRing::new(&mut memory, at, size).expect("a ring in memory");
    let mut ours =
        SplitQueue::new(ring, RingFeatures { event_idx: false, indirect_desc, in_order: false }, QueueState::default());
    let mut theirs = Queue::new(size).expect("a power of two");
    theirs.set_size(size);
    theirs.set_desc_table_address(Some(at.desc as u32), Some(0));
    theirs.set_avail_ring_address(Some(at.driver as u32), Some(0));
    theirs.set_used_ring_address(Some(at.device as u32), Some(0));
    theirs.set_ready(true);

    for _ in 0..=size {
        let mut buffers = PinnedBuffers::default();
        let head = match ours.pop(&mut memory, &mut buffers) {
            Ok(Some(head)) => head,
            Ok(None) => {
                assert!(theirs.pop_descriptor_chain(&WORLD.theirs).is_none());
                return Ok(());
            }
            // Theirs has its own way with what is broken.
            Err(_) => return Ok(()),
        };
        let seen = theirs.pop_descriptor_chain(&WORLD.theirs).expect("they see a head too");
        if ours.resolve(&head, &mut memory, &mut buffers).is_err() {
            return Ok(());
        }
        assert_eq!(head.id(), seen.head_index());
        let mut pieces = Vec::new();
        for buffer in seen {
            let there = add_buffer(&mut pieces, buffer.addr().0, buffer.len(), buffer.is_write_only());
            assert!(there, "{buffer:?} is not in memory");
        }
        assert_eq!(check(&buffers, size), pieces);
        ours.complete(head, 1u32);
    }
    panic!("more chains than the ring has entries");
}

/// What the device or the driver does next.
enum Step {
    Pop,
    Complete {
        which: u8,
        written: u32,
    },
    Publish,
    Arm,
    /// The ring's memory is taken away and given back.
    Remap,
    /// The driver writes to the ring.
    Change(Change),
    /// The driver writes to an indirect table.
    Table {
        table: u8,
        index: u8,
        descriptor: Descriptor,
    },
}

/// Something that the driver writes.
#[derive(Clone, Copy)]
enum Change {
    Descriptor(u16, Descriptor),
    Avail { slot: u16, head: u16 },
    AvailIdx(u16),
    UsedEvent(u16),
    AvailFlags(u16),
    PackedDescriptor(u16, PackedDescriptor),
    DriverEvent(u32),
}

impl<'a> Arbitrary<'a> for Change {
    fn arbitrary(input: &mut Unstructured<'a>) -> Result<Self> {
        Ok(match input.arbitrary::<u8>()? % 12 {
            0..=2 => {
                let index = u16::from(input.arbitrary::<u8>()? % SIZE as u8);
                Change::Descriptor(index, descriptor(input, index)?)
            }
            3 | 4 => Change::Avail {
                slot: input.arbitrary::<u8>()?.into(),
                head: u16::from(input.arbitrary::<u8>()? & 0x1f) % (SIZE + 2),
            },
            5 => Change::AvailIdx(input.arbitrary::<u8>()?.into()),
            6 => Change::UsedEvent(input.arbitrary::<u8>()?.into()),
            7 => Change::AvailFlags(input.arbitrary::<u8>()?.into()),
            8..=10 => {
                let index = u16::from(input.arbitrary::<u8>()? % SIZE as u8);
                Change::PackedDescriptor(index, packed_descriptor(input, index)?)
            }
            _ => Change::DriverEvent(input.arbitrary()?),
        })
    }
}

impl<'a> Arbitrary<'a> for Step {
    fn arbitrary(input: &mut Unstructured<'a>) -> Result<Self> {
        Ok(match input.arbitrary::<u8>()? % 13 {
            0..=3 => Step::Pop,
            4 | 5 => Step::Complete { which: input.arbitrary()?, written: input.arbitrary()? },
            6 => Step::Publish,
            7 => Step::Arm,
            8 => Step::Remap,
            9 => {
                let (table, index) = (input.arbitrary()?, input.arbitrary::<u8>()? % ENTRIES as u8);
                Step::Table { table, index, descriptor: descriptor(input, index.into())? }
            }
            _ => Step::Change(input.arbitrary()?),
        })
    }
}

/// The flags AVAIL and USED of a packed descriptor.
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// One that is available in the first round, or in the second, or not.
fn packed_descriptor(input: &mut Unstructured<'_>, index: u16) -> Result<PackedDescriptor> {
    let Descriptor { addr, len, flags, next } = descriptor(input, index)?;
    let available = match input.arbitrary::<u8>()? {
        0..=0x9f => AVAIL,
        0xa0..=0xcf => USED,
        0xd0..=0xef => 0,
        _ => AVAIL | USED,
    };
    Ok(PackedDescriptor { addr, len, id: next, flags: flags | available })
}

/// Entries of the ring that changes.
const SIZE: u16 = 16;

/// A ring of either format, whose driver writes at any moment: after so many reads of the device's.
#[derive(Default)]
struct Restless {
    descriptors: [Descriptor; SIZE as usize],
    avail: [u16; SIZE as usize],
    avail_idx: u16,
    used_event: u16,
    avail_flags: u16,
    used_idx: u16,
    packed: [PackedDescriptor; SIZE as usize],
    driver_event: u32,
    /// How many of the device's reads are left until the change.
    pending: Vec<(u8, Change)>,
    descriptor_reads: u32,
}

impl Restless {
    /// Filled as by a driver that has much to do: chains of three, and one descriptor for itself.
    fn new() -> Self {
        let mut ring = Restless::default();
        for index in 0..SIZE {
            let (at, last) = (usize::from(index), index % 3 == 2 || index == SIZE - 1);
            let (addr, flags) = (0x1_0000 + 0x100 * u64::from(index), if last { WRITE } else { NEXT });
            ring.avail[at] = index * 3 % SIZE;
            ring.descriptors[at] = Descriptor { addr, len: 64, flags, next: index + 1 };
            ring.packed[at] = PackedDescriptor { addr, len: 64, id: index, flags: flags | AVAIL };
        }
        ring
    }

    fn apply(&mut self, change: Change) {
        match change {
            Change::Descriptor(index, descriptor) => self.descriptors[usize::from(index % SIZE)] = descriptor,
            Change::Avail { slot, head } => self.avail[usize::from(slot % SIZE)] = head,
            Change::AvailIdx(idx) => self.avail_idx = idx,
            Change::UsedEvent(idx) => self.used_event = idx,
            Change::AvailFlags(flags) => self.avail_flags = flags,
            Change::PackedDescriptor(index, descriptor) => self.packed[usize::from(index % SIZE)] = descriptor,
            Change::DriverEvent(word) => self.driver_event = word,
        }
    }

    /// The device has read.
    fn tick(&mut self) {
        for (left, change) in std::mem::take(&mut self.pending) {
            match left.checked_sub(1) {
                Some(left) => self.pending.push((left, change)),
                None => self.apply(change),
            }
        }
    }
}

/// The device's view of it.
struct Ring<'a>(&'a RefCell<Restless>);

impl RingMemory for Ring<'_> {
    fn size(&self) -> u16 {
        SIZE
    }

    fn load(&self, field: Field, _: Ordering) -> u16 {
        let mut ring = self.0.borrow_mut();
        let value = match field {
            Field::AvailFlags => ring.avail_flags,
            Field::AvailIdx => ring.avail_idx,
            Field::AvailRing(slot) => ring.avail[usize::from(slot % SIZE)],
            Field::UsedEvent => ring.used_event,
            Field::UsedIdx => ring.used_idx,
            Field::UsedFlags | Field::AvailEvent => 0,
        };
        ring.tick();
        value
    }

    fn store(&self, field: Field, value: u16, _: Ordering) {
        match field {
            Field::UsedIdx => self.0.borrow_mut().used_idx = value,
            Field::UsedFlags | Field::AvailEvent => {}
            field => panic!("the device writes {field:?}, which is the driver's"),
        }
    }

    fn read_descriptor(&self, index: u16) -> Descriptor {
        let mut ring = self.0.borrow_mut();
        let descriptor = ring.descriptors[usize::from(index % SIZE)];
        ring.descriptor_reads += 1;
        ring.tick();
        descriptor
    }

    fn write_used_element(&self, _: u16, _: u16, _: u32) {}

    fn fence(&self, _: Ordering) {}
}

impl PackedRingMemory for Ring<'_> {
    fn size(&self) -> u16 {
        SIZE
    }

    fn load_flags(&self, index: u16, _: Ordering) -> u16 {
        let mut ring = self.0.borrow_mut();
        let flags = ring.packed[usize::from(index)].flags;
        ring.tick();
        flags
    }

    fn read_descriptor(&self, index: u16, flags: u16) -> PackedDescriptor {
        let mut ring = self.0.borrow_mut();
        let descriptor = ring.packed[usize::from(index)];
        ring.descriptor_reads += 1;
        ring.tick();
        PackedDescriptor { flags, ..descriptor }
    }

    fn write_used(&self, index: u16, UsedDescriptor { len, id, flags }: UsedDescriptor, _: Ordering) {
        let place = &mut self.0.borrow_mut().packed[usize::from(index)];
        *place = PackedDescriptor { addr: place.addr, len, id, flags };
    }

    fn driver_event(&self) -> EventSuppression {
        let mut ring = self.0.borrow_mut();
        let event = EventSuppression::from_word(ring.driver_event);
        ring.tick();
        event
    }

    fn set_device_event(&self, event: EventSuppression) {
        if let EventSuppression::Descriptor(position) = event {
            assert!(Position::index(position) < SIZE, "a kick is asked for beyond the ring");
        }
    }

    fn fence(&self, _: Ordering) {}
}

/// A ring that changes between any two reads: the rules hold all the same. Where `ids_are_heads`, no two requests in flight
/// have the same; elsewhere they are the driver's, who may call two alike.
fn history<'a, Q>(
    input: &mut Unstructured<'_>,
    ring: &'a RefCell<Restless>,
    state: QueueState,
    ids_are_heads: bool,
) -> Result<()>
where
    Q: Virtqueue<Memory = Ring<'a>>,
{
    let mut memory = GuestMemory::new(Arc::clone(&WORLD.ours));
    for table in TABLES {
        for index in 0..ENTRIES {
            let flags = if index == ENTRIES - 1 { WRITE } else { NEXT };
            let (addr, next) = (0x1_0000 + 0x100 * u64::from(index), index + 1);
            let _end_of_memory =
                memory.write(table + 16 * u64::from(index), &bytes(&Descriptor { addr, len: 32, flags, next }));
        }
    }
    let features =
        RingFeatures { event_idx: input.arbitrary()?, indirect_desc: input.ratio(7, 8)?, in_order: input.ratio(1, 4)? };
    let mut queue = Q::new(Ring(ring), features, state);
    let mut in_flight: Vec<Head> = Vec::new();
    let mut unpublished = 0;
    let mut buffers = PinnedBuffers::default();
    while !input.is_empty() {
        match Step::arbitrary(input)? {
            Step::Pop => {
                ring.borrow_mut().descriptor_reads = 0;
                let before = queue.state().next_avail;
                buffers.recycle(&memory);
                let result = queue.pop(&mut memory, &mut buffers);
                // One more shows that there are too many.
                let reads = ring.borrow().descriptor_reads;
                assert!(reads <= u32::from(SIZE) + 1, "{reads} reads of {SIZE} descriptors");
                match result {
                    Ok(Some(head)) => {
                        assert_ne!(queue.state().next_avail, before, "the same is taken again");
                        if queue.resolve(&head, &mut memory, &mut buffers).is_err() {
                            break;
                        }
                        check(&buffers, SIZE);
                        let twice = in_flight.iter().any(|other| other.id() == head.id());
                        assert!(!ids_are_heads || head.id() < SIZE && !twice, "{head:?} twice");
                        in_flight.push(head);
                        assert!(in_flight.len() <= usize::from(SIZE), "more in flight than there are entries");
                    }
                    Ok(None) => assert_eq!(queue.state().next_avail, before),
                    // The queue is of no use from now on; what is in flight can be given back.
                    Err(_) => break,
                }
            }
            Step::Complete { which, written } if !in_flight.is_empty() => {
                // As the contract says: no more than a queue's size without a look.
                if unpublished >= SIZE {
                    let _signal = queue.publish();
                    unpublished = 0;
                }
                let head = in_flight.swap_remove(usize::from(which) % in_flight.len());
                queue.complete(head, written);
                unpublished += 1;
            }
            Step::Complete { .. } => {}
            Step::Publish => {
                let idle = queue.publish() == Signal::Idle;
                assert!(features.in_order || idle == (unpublished == 0));
                unpublished = 0;
            }
            Step::Arm => {
                let _armed: Armed = queue.arm();
            }
            Step::Table { table, index, descriptor } => {
                let table = TABLES.get(usize::from(table) % TABLES.len()).copied().unwrap_or_default();
                let _end_of_memory = memory.write(table + 16 * u64::from(index), &bytes(&descriptor));
            }
            Step::Remap => queue = Q::resume(queue.park(), Ring(ring)),
            Step::Change(change) => {
                let left: u8 = input.arbitrary()?;
                if left < 0x80 {
                    ring.borrow_mut().apply(change);
                } else if ring.borrow().pending.len() < 8 {
                    ring.borrow_mut().pending.push((left & 0xf, change));
                }
            }
        }
    }
    let used = queue.state().next_used;
    let given_back = in_flight.len();
    for head in in_flight {
        queue.complete(head, 0u32);
    }
    let _signal = queue.publish();
    assert!(given_back == 0 || queue.state().next_used != used || features.in_order, "nothing was given back");
    Ok(())
}
