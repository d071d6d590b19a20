//! The packed queue against a driver that is written from the specification and keeps positions in its own way.

use std::collections::{HashMap, VecDeque};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use super::*;
use crate::memory::{Access, MappedPackedRing, RingAddresses, testing::guest_memory};
use crate::queue::{ChainError, MAX_DESCRIPTORS};

const BASE: u64 = 0x10_0000;
const LEN: u64 = 0x10_0000;
/// The descriptor ring has room for 32768 descriptors.
const AT: RingAddresses = RingAddresses { desc: BASE, driver: BASE + 0x8_0000, device: BASE + 0x8_0010 };
const TABLE: u64 = BASE + 0x8_1000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

const EVENT_IDX: RingFeatures = RingFeatures { event_idx: true, indirect_desc: true, in_order: false };
const PLAIN: RingFeatures = RingFeatures { event_idx: false, indirect_desc: false, in_order: false };
const IN_ORDER: RingFeatures = RingFeatures { event_idx: true, indirect_desc: true, in_order: true };

/// Address, length, flags without AVAIL and USED, buffer ID.
type Fields = (u64, u32, u16, u16);

/// An address and a length.
type Piece = (u64, usize);

/// Where a side stands: the index and the wrap counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place(u16, bool);

/// A queue and its driver.
struct Rig {
    memory: GuestMemory,
    queue: PackedQueue<MappedPackedRing>,
    buffers: PinnedBuffers,
    size: u16,
    avail: Place,
    used: Place,
}

impl Rig {
    fn new(size: u16, features: RingFeatures) -> Self {
        let mut memory = guest_memory(BASE, LEN);
        let ring = MappedPackedRing::new(&mut memory, AT, size).unwrap();
        let queue = PackedQueue::new(ring, features, PackedQueue::<MappedPackedRing>::START);
        let start = Place(0, true);
        // As they are after a request.
        let mut buffers = PinnedBuffers::default();
        memory.pin(BASE, 1, Access::READ, &mut buffers).unwrap();
        Self { memory, queue, buffers, size, avail: start, used: start }
    }

    fn step(&self, place: &mut Place) {
        place.0 += 1;
        if place.0 == self.size {
            *place = Place(0, !place.1);
        }
    }

    fn write(&mut self, table: u64, index: u16, (addr, len, flags, id): Fields) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&id.to_le_bytes());
        bytes[14..].copy_from_slice(&flags.to_le_bytes());
        self.memory.write(table + 16 * u64::from(index), &bytes).unwrap();
    }

    /// Makes descriptors available, one behind the other.
    fn offer(&mut self, descriptors: &[Fields]) {
        for &(addr, len, flags, id) in descriptors {
            let mine = if self.avail.1 { AVAIL } else { USED };
            self.write(AT.desc, self.avail.0, (addr, len, flags | mine, id));
            let mut next = self.avail;
            self.step(&mut next);
            self.avail = next;
        }
    }

    fn pop(&mut self) -> Result<Option<Head>, QueueError> {
        self.buffers.recycle(&self.memory);
        let head = self.queue.pop(&mut self.memory, &mut self.buffers)?;
        if let Some(head) = &head {
            self.queue.resolve(head, &mut self.memory, &mut self.buffers)?;
        }
        Ok(head)
    }

    fn take(&mut self) -> Head {
        self.pop().unwrap().unwrap()
    }

    /// Address and length of the pieces that were popped last: to read, and to write.
    fn pieces(&self) -> [Vec<Piece>; 2] {
        let file = self.buffers.file().unwrap();
        let place = |piece: &libc::iovec| (BASE + file.offset_of(piece).unwrap(), piece.iov_len);

        self.buffers.pieces().map(|pieces| pieces.iter().map(place).collect())
    }

    /// Buffer ID and length of the next used descriptor, if there is one: the driver does not move on.
    fn used(&mut self) -> Option<(u16, u32)> {
        let mut bytes = [0; 16];
        self.memory.read(AT.desc + 16 * u64::from(self.used.0), &mut bytes).unwrap();
        let flags = u16::from_le_bytes([bytes[14], bytes[15]]);
        let len = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
        let expected = if self.used.1 { AVAIL | USED } else { 0 };
        if flags & (AVAIL | USED) != expected {
            return None;
        }
        assert_eq!(
            flags & !(AVAIL | USED),
            if len > 0 { WRITE } else { 0 },
            "the write flag says whether there is a length"
        );
        Some((u16::from_le_bytes([bytes[12], bytes[13]]), len))
    }

    fn skip(&mut self, descriptors: u16) {
        for _ in 0..descriptors {
            let mut next = self.used;
            self.step(&mut next);
            self.used = next;
        }
    }

    fn set_driver_event(&mut self, place: u16, flags: u16) {
        self.memory.write(AT.driver, &place.to_le_bytes()).unwrap();
        self.memory.write(AT.driver + 2, &flags.to_le_bytes()).unwrap();
    }

    /// The device's event suppression: place and flags.
    fn device_event(&mut self) -> (u16, u16) {
        let mut bytes = [0; 4];
        self.memory.read(AT.device, &mut bytes).unwrap();
        (u16::from_le_bytes([bytes[0], bytes[1]]), u16::from_le_bytes([bytes[2], bytes[3]]))
    }

    /// What is wrong with this list.
    fn chain_error(&mut self, descriptors: &[Fields]) -> ChainError {
        self.offer(descriptors);
        match self.pop() {
            Err(QueueError::Chain { head: 0, source }) => source,
            other => panic!("{other:?}"),
        }
    }
}

/// A table of three is read by a way of its own if it is made as nearly all are. Whatever it is made of, it is taken as by the
/// other way, which one of four goes.
#[test]
fn a_table_of_three_is_taken_as_any_other() {
    let take = |entries: u32, descriptors: [Fields; 3]| {
        let mut rig = Rig::new(5, EVENT_IDX);
        for (index, descriptor) in (0..).zip(descriptors.into_iter().chain([(0, 0, WRITE, 0)])) {
            rig.write(TABLE, index, descriptor);
        }
        rig.offer(&[(TABLE, 16 * entries, INDIRECT, 7)]);
        match rig.pop() {
            Ok(head) => Some((head.unwrap().id(), rig.pieces())),
            Err(QueueError::Chain { .. }) => None,
            Err(other) => panic!("{other:?}"),
        }
    };
    let take_frame = |descriptors: [Fields; 3]| {
        let mut rig = Rig::new(5, EVENT_IDX);
        (0..).zip(descriptors).for_each(|(index, descriptor)| rig.write(TABLE, index, descriptor));
        rig.offer(&[(TABLE, 48, INDIRECT, 7)]);
        let _head = rig.take();
        rig.buffers.take_frame().is_some()
    };
    let end = BASE + 0x10_0000;
    for data in [0, WRITE] {
        let frame = [(BASE, 16, NEXT, 5), (BASE + 0x300, 4096, data, 6), (BASE + 0x200, 1, WRITE | INDIRECT, 9)];
        assert!(take_frame(frame));
        for index in 0..3 {
            let (addr, len, flags, id) = frame[index];
            let last = end - u64::from(len);
            let addrs = [addr, 0, BASE - 1, end - 1, end - 4096, last, last + 1, end, u64::MAX];
            let changes = (addrs.map(|addr| (addr, len, flags, id)).into_iter())
                .chain([0, 1, 17, 0x10_0000, u32::MAX].map(|len| (addr, len, flags, id)))
                .chain((0..16).map(|flags| (addr, len, flags, id)));
            for change in changes {
                let mut descriptors = frame;
                descriptors[index] = change;
                assert_eq!(take(3, descriptors), take(4, descriptors), "{descriptors:?}");
            }
        }
    }
}

#[test]
fn a_list_is_taken_in_order_and_has_the_id_of_its_last_descriptor() {
    let mut rig = Rig::new(5, EVENT_IDX);
    rig.offer(&[
        (BASE, 16, NEXT, 9),
        (0, 0, NEXT, 8),
        (BASE + 0x300, 32, NEXT | WRITE, 7),
        (BASE + 0x400, 1, WRITE, 6000),
    ]);
    let head = rig.take();
    assert_eq!((head.id(), head.descriptors()), (6000, 4));
    assert_eq!(rig.pieces(), [vec![(BASE, 16)], vec![(BASE + 0x300, 32), (BASE + 0x400, 1)]]);
    assert_eq!(rig.pop(), Ok(None));
    rig.queue.complete(head, 33);
    assert_eq!(rig.used(), None);
    assert_eq!(rig.queue.publish(), Signal::Needed);
    assert_eq!(rig.used(), Some((6000, 33)));
    // Over the end of the ring, where the wrap counter changes in the middle of the list.
    rig.offer(&[(BASE + 0x500, 16, NEXT, 0), (BASE + 0x600, 1, WRITE, 3)]);
    let head = rig.take();
    assert_eq!(rig.pieces(), [vec![(BASE + 0x500, 16)], vec![(BASE + 0x600, 1)]]);
    rig.queue.complete(head, 0);
    let _ = rig.queue.publish();
    rig.skip(4);
    assert_eq!(rig.used(), Some((3, 0)));
    rig.skip(2);
    assert_eq!((rig.used, rig.used()), (Place(1, false), None));
}

/// §2.8.7: the table has no order but its own, and no flags but WRITE.
#[test]
fn a_table_is_read_from_end_to_end() {
    let mut rig = Rig::new(4, EVENT_IDX);
    rig.write(TABLE, 0, (BASE + 0x100, 8, 0, 77));
    rig.write(TABLE, 1, (BASE + 0x200, 9, INDIRECT | AVAIL, 0));
    rig.write(TABLE, 2, (BASE + 0x300, 1, WRITE | NEXT | USED, 0));
    rig.offer(&[(TABLE, 48, INDIRECT | WRITE, 5)]);
    let head = rig.take();
    assert_eq!((head.id(), head.descriptors()), (5, 1));
    assert_eq!(rig.pieces(), [vec![(BASE + 0x100, 8), (BASE + 0x200, 9)], vec![(BASE + 0x300, 1)]]);
}

#[test]
fn broken_lists_are_refused() {
    use ChainError::*;
    let bad = |descriptors: &[Fields]| Rig::new(4, EVENT_IDX).chain_error(descriptors);
    assert_eq!(bad(&[(BASE, 1, NEXT, 0); 4]), TooLong(4));
    assert_eq!(bad(&[(BASE, 1, NEXT | WRITE, 0), (BASE, 1, 0, 0)]), ReadableAfterWritable);
    assert_eq!(bad(&[(TABLE, 16, INDIRECT | NEXT, 0), (BASE, 1, WRITE, 0)]), MisplacedIndirect);
    assert_eq!(bad(&[(BASE, 1, NEXT, 0), (TABLE, 16, INDIRECT, 0)]), MisplacedIndirect, "a list has one kind");
    for len in [0, 8, 17, 16 * u32::from(MAX_DESCRIPTORS) + 16, u32::MAX - 15] {
        assert_eq!(bad(&[(TABLE, len, INDIRECT, 0)]), IndirectLength(len));
    }
    for unmapped in [(0, 16, INDIRECT, 0), (0, 1, 0, 0), (BASE + LEN - 1, 2, WRITE, 0), (u64::MAX, 1, 0, 0)] {
        assert!(matches!(bad(&[unmapped]), Unmapped(_)));
    }
    let mut rig = Rig::new(4, EVENT_IDX);
    rig.write(TABLE, 0, (BASE, 8, WRITE, 0));
    rig.write(TABLE, 1, (BASE, 8, 0, 0));
    assert_eq!(rig.chain_error(&[(TABLE, 32, INDIRECT, 0)]), ReadableAfterWritable);
    let plain = Rig::new(4, PLAIN).chain_error(&[(TABLE, 16, INDIRECT, 0)]);
    assert_eq!(plain, MisplacedIndirect, "the feature was not negotiated");
    let long = vec![(BASE, 1, NEXT, 0); usize::from(MAX_DESCRIPTORS) + 1];
    assert_eq!(Rig::new(2000, EVENT_IDX).chain_error(&long), TooLong(MAX_DESCRIPTORS));
}

/// A driver that makes available what the device has not given back.
#[test]
fn descriptors_in_flight_are_not_taken_again() {
    let mut rig = Rig::new(4, EVENT_IDX);
    rig.offer(&[(BASE, 1, NEXT, 0), (BASE, 1, NEXT, 0), (BASE, 1, 0, 7)]);
    let head = rig.take();
    rig.offer(&[(BASE, 1, NEXT, 0), (BASE, 1, 0, 0)]);
    let error = QueueError::Chain { head: 3, source: ChainError::TooLong(1) };
    assert_eq!(rig.pop(), Err(error.clone()));
    assert_eq!(rig.pop(), Err(error), "and stays refused");
    rig.queue.complete(head, 1);
    assert_eq!(rig.queue.publish(), Signal::Needed, "what was in flight is given back");
    assert_eq!(rig.used(), Some((7, 1)));

    let mut rig = Rig::new(3, PLAIN);
    rig.offer(&[(BASE, 1, 0, 0); 3]);
    let heads: Vec<Head> = (0..3).map(|_| rig.take()).collect();
    assert_eq!(rig.pop(), Ok(None), "the whole ring is in flight, as it may be");
    rig.offer(&[(BASE, 1, 0, 0)]);
    assert_eq!(rig.pop(), Err(QueueError::DescriptorInFlight(0)));
    drop(heads);
}

/// Buffer IDs are as the driver likes, all the same even.
#[test]
fn buffer_ids_are_echoed_and_not_trusted() {
    for features in [EVENT_IDX, IN_ORDER] {
        let mut rig = Rig::new(4, features);
        for _ in 0..1000 {
            rig.offer(&[(BASE, 1, WRITE, u16::MAX); 4]);
            let heads: Vec<Head> = (0..4).map(|_| rig.take()).collect();
            for head in heads {
                rig.queue.complete(head, 1);
            }
            let _ = rig.queue.publish();
            for _ in 0..4 {
                assert_eq!(rig.used(), Some((u16::MAX, 1)));
                rig.skip(1);
            }
        }
    }
}

#[test]
fn a_batch_is_shown_at_once() {
    let mut rig = Rig::new(7, EVENT_IDX);
    rig.set_driver_event(2 | 1 << 15, 2);
    rig.offer(&(0..5).map(|id| (BASE, 1, WRITE, id)).collect::<Vec<_>>());
    let heads: Vec<Head> = (0..5).map(|_| rig.take()).collect();
    for head in heads {
        rig.queue.complete(head, 1);
        assert_eq!(rig.used(), None, "the first one is the last to be marked");
    }
    assert_eq!(rig.queue.publish(), Signal::Needed);
    assert_eq!(rig.queue.publish(), Signal::Idle);
    for id in 0..5 {
        assert_eq!(rig.used(), Some((id, 1)));
        rig.skip(1);
    }
}

/// Completions in another order stand in the ring in their own, each as long as its list.
#[test]
fn completions_may_change_places() {
    let mut rig = Rig::new(6, EVENT_IDX);
    rig.offer(&[
        (BASE, 1, NEXT, 0),
        (BASE, 1, NEXT, 0),
        (BASE, 1, 0, 30),
        (BASE, 1, 0, 10),
        (BASE, 1, NEXT, 0),
        (BASE, 1, 0, 20),
    ]);
    let [three, one, two] = [rig.take(), rig.take(), rig.take()];
    rig.queue.complete(two, 2);
    rig.queue.complete(three, 3);
    let _ = rig.queue.publish();
    assert_eq!(rig.used(), Some((20, 2)));
    rig.skip(2);
    assert_eq!(rig.used(), Some((30, 3)));
    rig.skip(3);
    assert_eq!(rig.used(), None);
    rig.queue.complete(one, 1);
    let _ = rig.queue.publish();
    assert_eq!(rig.used(), Some((10, 1)));
}

#[test]
fn the_driver_says_whether_it_wants_interrupts() {
    use Signal::{Needed, Suppressed};
    // Flags and place; then what becomes of the first completion, with and without the event index.
    let at = |index: u16| index | 1 << 15;
    for (place, flags, with, without) in [
        (0, 0, Needed, Needed),
        (at(0), 1, Suppressed, Suppressed),
        (at(0), 2, Needed, Needed),
        (at(1), 2, Suppressed, Needed),
        (0, 2, Suppressed, Needed),
        (at(0) | 3, 2, Suppressed, Needed),
        (at(0x7fff), 2, Suppressed, Needed),
        (at(1), 3, Needed, Needed),
        (at(1), 0xfffd, Suppressed, Suppressed),
    ] {
        for (features, expected) in [(EVENT_IDX, with), (PLAIN, without)] {
            let mut rig = Rig::new(3, features);
            rig.set_driver_event(place, flags);
            rig.offer(&[(BASE, 1, 0, 0)]);
            let head = rig.take();
            rig.queue.complete(head, 1);
            assert_eq!(rig.queue.publish(), expected, "{place:#x} {flags} {features:?}");
        }
    }
}

#[test]
fn arming_asks_for_the_next_descriptor_and_sees_what_is_there() {
    for (features, event) in [(EVENT_IDX, [(1 << 15, 2), (1 | 1 << 15, 2), (0, 2)]), (PLAIN, [(0, 0); 3])] {
        let mut rig = Rig::new(2, features);
        assert_eq!(rig.queue.arm(), Armed::Sleep);
        assert_eq!(rig.device_event(), event[0]);
        rig.offer(&[(BASE, 1, 0, 0)]);
        assert_eq!(rig.queue.arm(), Armed::Work);
        let head = rig.take();
        assert_eq!(rig.device_event().1, 1, "no kicks while the worker is awake");
        assert_eq!(rig.queue.arm(), Armed::Sleep);
        assert_eq!(rig.device_event(), event[1]);
        rig.queue.complete(head, 0);
        let _ = rig.queue.publish();
        assert_eq!(rig.queue.arm(), Armed::Sleep, "a used descriptor is no news");
        rig.offer(&[(BASE, 1, 0, 0)]);
        let head = rig.take();
        assert_eq!(rig.queue.arm(), Armed::Sleep);
        assert_eq!(rig.device_event(), event[2], "the wrap counter is told too");
        rig.queue.complete(head, 0);
    }
}

#[test]
fn a_queue_goes_on_where_it_stood() {
    let mut rig = Rig::new(3, PLAIN);
    for _ in 0..2 {
        rig.offer(&[(BASE, 1, NEXT, 0), (BASE, 1, 0, 0)]);
        let head = rig.take();
        rig.queue.complete(head, 0);
        let _ = rig.queue.publish();
        rig.skip(2);
    }
    let state = rig.queue.state();
    assert_eq!(state, QueueState { next_avail: 1, next_used: 1 });
    let ring = MappedPackedRing::new(&mut rig.memory, AT, 3).unwrap();
    rig.queue = PackedQueue::new(ring, PLAIN, state);
    assert_eq!(rig.pop(), Ok(None));
    rig.offer(&[(BASE, 1, 0, 8)]);
    let head = rig.take();
    rig.queue.complete(head, 4);
    let _ = rig.queue.publish();
    assert_eq!(rig.used(), Some((8, 4)));
}

/// A state from elsewhere may say anything.
#[test]
fn a_place_outside_the_ring_does_no_harm() {
    for place in [3, 0x7fff, 0x8003, 0xffff] {
        let mut rig = Rig::new(3, EVENT_IDX);
        let ring = MappedPackedRing::new(&mut rig.memory, AT, 3).unwrap();
        rig.queue = PackedQueue::new(ring, EVENT_IDX, QueueState { next_avail: place, next_used: place });
        for flags in [AVAIL, USED] {
            rig.write(AT.desc, 2, (BASE, 1, flags, 0));
            if let Ok(Some(head)) = rig.pop() {
                rig.queue.complete(head, 1);
                let _ = rig.queue.publish();
            }
            let _ = rig.queue.arm();
        }
    }
}

/// §2.8.8: one descriptor tells of all.
#[test]
fn in_order_one_descriptor_tells_of_a_batch() {
    let mut rig = Rig::new(6, IN_ORDER);
    rig.offer(&[
        (BASE, 1, NEXT, 0),
        (BASE, 1, WRITE, 1),
        (BASE, 1, WRITE, 2),
        (BASE, 1, NEXT, 0),
        (BASE, 2, WRITE, 3),
        (BASE, 1, WRITE, 4),
    ]);
    let [one, two, three, four] = std::array::from_fn(|_| rig.take());
    rig.queue.complete(two, Written::All(1));
    assert_eq!(rig.queue.publish(), Signal::Idle, "it waits for the one before");
    rig.queue.complete(three, Written::First(1));
    rig.queue.complete(one, Written::All(1));
    assert_eq!(rig.queue.publish(), Signal::Needed);
    assert_eq!(rig.used(), Some((3, 1)));
    rig.skip(5);
    assert_eq!(rig.used(), None);
    rig.queue.complete(four, Written::First(0));
    let _ = rig.queue.publish();
    assert_eq!(rig.used(), Some((4, 0)));
}

/// What the device or the driver does next.
#[derive(Clone, Debug)]
enum Step {
    /// The driver adds a list of so many descriptors to read and to write.
    Add(usize, usize),
    /// The device takes a list.
    Pop,
    /// The device completes one in flight, by lot, wholly or in part.
    Complete(Index, bool),
    Publish,
    /// The driver takes what was given back.
    Take,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0..3usize, 0..3usize).prop_map(|(readable, writable)| Step::Add(readable, writable)),
        3 => Just(Step::Pop),
        3 => (any::<Index>(), any::<bool>()).prop_map(|(which, wholly)| Step::Complete(which, wholly)),
        2 => Just(Step::Publish),
        2 => Just(Step::Take),
    ]
}

/// What the driver knows of a list.
#[derive(Clone, Debug)]
struct Known {
    descriptors: u16,
    pieces: [Vec<Piece>; 2],
}

/// Runs a history and checks every answer of the device.
struct History {
    rig: Rig,
    in_order: bool,
    /// Lists that the driver has made available and not got back, by buffer ID; and in their order.
    known: HashMap<u16, Known>,
    order: VecDeque<u16>,
    /// Those that the device has not taken.
    fresh: VecDeque<u16>,
    free: u16,
    tag: u64,
    popped: Vec<(u16, Head)>,
    /// What the device said of each that it completed.
    written: HashMap<u16, Written>,
}

impl History {
    fn new(size: u16, in_order: bool) -> Self {
        let features = RingFeatures { in_order, ..EVENT_IDX };
        let rig = Rig::new(size, features);
        Self {
            rig,
            in_order,
            known: HashMap::new(),
            order: VecDeque::new(),
            fresh: VecDeque::new(),
            free: size,
            tag: 0,
            popped: Vec::new(),
            written: HashMap::new(),
        }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Add(readable, writable) => self.add(*readable, *writable),
            Step::Pop => self.pop(),
            Step::Complete(which, wholly) if !self.popped.is_empty() => {
                let (id, head) = self.popped.swap_remove(which.index(self.popped.len()));
                let written = if *wholly { Written::All(u32::from(id)) } else { Written::First(u32::from(id)) };
                self.written.insert(id, written);
                self.rig.queue.complete(head, written);
            }
            Step::Complete(..) => {}
            Step::Publish => {
                let _ = self.rig.queue.publish();
            }
            Step::Take => while self.take() {},
        }
    }

    fn add(&mut self, readable: usize, writable: usize) {
        let count = readable + writable;
        if count == 0 || count > usize::from(self.free) {
            return;
        }
        // Far apart, so that none repeats while it is in flight.
        self.tag += 1;
        let id = (self.tag as u16).wrapping_mul(40503);
        let pieces: Vec<_> = (0..count).map(|n| (BASE + (16 * self.tag + 2 * n as u64) % 0xfff0, n + 1)).collect();
        let descriptors: Vec<Fields> = pieces
            .iter()
            .enumerate()
            .map(|(n, piece)| {
                let next = if n + 1 < count { NEXT } else { 0 };
                let write = if n < readable { 0 } else { WRITE };
                (piece.0, piece.1 as u32, next | write, if next == 0 { id } else { !id })
            })
            .collect();
        self.rig.offer(&descriptors);
        self.free -= count as u16;
        let (readable, writable) = pieces.split_at(readable);
        let known = Known { descriptors: count as u16, pieces: [readable.to_vec(), writable.to_vec()] };
        assert!(self.known.insert(id, known).is_none());
        self.order.push_back(id);
        self.fresh.push_back(id);
    }

    fn pop(&mut self) {
        let Some(id) = self.fresh.pop_front() else {
            assert_eq!(self.rig.pop(), Ok(None));
            return;
        };
        let head = self.rig.take();
        assert_eq!(head.id(), id);
        assert_eq!(self.rig.pieces(), self.known[&id].pieces);
        self.popped.push((id, head));
    }

    /// The driver takes one used descriptor, which with the feature may tell of several lists.
    fn take(&mut self) -> bool {
        let Some((last, len)) = self.rig.used() else { return false };
        assert_eq!(len, self.written[&last].bytes());
        let mut told = vec![last];
        if self.in_order {
            told = Vec::new();
            while told.last() != Some(&last) {
                told.push(self.order.pop_front().expect("it was made available"));
            }
        } else {
            self.order.retain(|id| *id != last);
        }
        let mut descriptors = 0;
        for id in told {
            let written = self.written.remove(&id).expect("it was completed");
            assert!(id == last || matches!(written, Written::All(_)), "passed over, and not used completely");
            descriptors += self.known.remove(&id).unwrap().descriptors;
        }
        self.rig.skip(descriptors);
        self.free += descriptors;
        true
    }

    /// All that was added comes back.
    fn end(&mut self) {
        while !self.fresh.is_empty() {
            self.pop();
        }
        while let Some((id, head)) = self.popped.pop() {
            self.written.insert(id, Written::All(u32::from(id)));
            self.rig.queue.complete(head, Written::All(u32::from(id)));
        }
        let _ = self.rig.queue.publish();
        while self.take() {}
        assert_eq!((self.known.len(), self.free), (0, self.rig.size));
        assert_eq!(self.rig.queue.state().next_avail, self.rig.queue.state().next_used);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    /// Lists of any shape arrive as they were made available and come back as they were completed, in rings of any size and
    /// however often these wrap.
    #[test]
    fn lists_survive_the_ring(
        size in prop_oneof![4 => 1..9u16, 1 => 1..=32768u16],
        in_order: bool,
        steps in vec(step(), 1..400),
    ) {
        let mut history = History::new(size, in_order);
        for step in &steps {
            history.step(step);
        }
        history.end();
    }
}

/// The largest ring, all of it in flight, more than once around.
#[test]
fn the_largest_ring_is_used_to_its_end() {
    let mut history = History::new(1 << 15, false);
    for _ in 0..3 {
        for _ in 0..1 << 15 {
            history.add(1, 0);
        }
        assert_eq!(history.free, 0);
        history.end();
    }
}
