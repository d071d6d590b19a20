//! A split virtqueue: where the device stands in it, and which requests it has taken.

use std::num::NonZeroU16;

use super::chain::{ChainError, IndirectTable, Walk};
use super::ring::{Armed, RingMemory, Signal, SplitRing};
use crate::memory::{GuestMemory, PinnedBuffers};

/// The ring features that were negotiated (virtio 1.3 §6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingFeatures {
    /// `VIRTIO_F_EVENT_IDX`.
    pub event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC`.
    pub indirect_desc: bool,
}

/// What a guest did wrong in a queue. The queue is of no use until the device is reset.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// `avail.idx` runs ahead by more than there are entries.
    #[error("avail.idx is {avail_idx}, more than {size} entries beyond {next_avail}")]
    AvailIdx {
        /// What the driver published.
        avail_idx: u16,
        /// Where the device stands.
        next_avail: u16,
        /// Entries of the queue.
        size: u16,
    },
    /// A head beyond the descriptor table.
    #[error("the available ring names descriptor {head} of a table of {size}")]
    Head {
        /// The head.
        head: u16,
        /// Entries of the table.
        size: u16,
    },
    /// A head that the device has not given back yet.
    #[error("the available ring names descriptor {0} again before it was used")]
    HeadInFlight(u16),
    /// A chain that is not one.
    #[error("the chain at descriptor {head}: {source}")]
    Chain {
        /// Its head.
        head: u16,
        /// What is wrong with it.
        source: ChainError,
    },
}

/// A request that was taken off a queue, and the duty to give it back: by [`SplitQueue::complete`], exactly once.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a request must be completed"]
pub struct Head(u16);

impl Head {
    /// The index of the chain's first descriptor: less than the queue's size, and not shared by two requests in flight.
    pub fn index(&self) -> u16 {
        self.0
    }
}

/// A request that was taken off a queue, and whose buffers may not all be known until [`SplitQueue::resolve`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a request must be resolved and completed"]
pub struct Popped {
    head: Head,
    /// Where an [`IndirectTable`] is to be read, if there are entries.
    table: u64,
    entries: Option<NonZeroU16>,
}

impl Popped {
    /// The request, whose buffers are known; `None` if [`SplitQueue::resolve`] has not succeeded.
    #[inline]
    pub fn resolved(self) -> Option<Head> {
        self.entries.is_none().then_some(self.head)
    }
}

/// Where a device stands in a queue; with nothing in flight this is all there is to carry over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueState {
    /// Next entry of the available ring to be taken.
    pub next_avail: u16,
    /// Next entry of the used ring to be filled.
    pub next_used: u16,
}

/// The device's side of a split virtqueue.
#[derive(Debug)]
pub struct SplitQueue<M> {
    ring: SplitRing<M>,
    walk: Walk,
    next_avail: u16,
    /// What the driver had published when we last looked.
    avail_idx: u16,
    next_used: u16,
    /// `next_used` at the last decision about a signal.
    decided: u16,
    armed: bool,
    /// One bit a descriptor: the heads in flight.
    in_flight: Box<[u64]>,
}

impl<M> SplitQueue<M> {
    /// The same queue over other memory of the same size, or over none (`()`): where its areas have moved in our
    /// address space, or are gone from it for a while. Requests in flight stay so.
    pub fn with_memory<N>(self, memory: N) -> SplitQueue<N> {
        SplitQueue {
            ring: self.ring.with_memory(memory),
            walk: self.walk,
            next_avail: self.next_avail,
            avail_idx: self.avail_idx,
            next_used: self.next_used,
            decided: self.decided,
            armed: self.armed,
            in_flight: self.in_flight,
        }
    }

    /// Where the device stands.
    pub fn state(&self) -> QueueState {
        QueueState { next_avail: self.next_avail, next_used: self.next_used }
    }
}

impl<M: RingMemory> SplitQueue<M> {
    /// A queue over `memory`, which stands where `state` says.
    pub fn new(memory: M, features: RingFeatures, state: QueueState) -> Self {
        let words = usize::from(memory.size()).div_ceil(64);
        Self {
            ring: SplitRing::new(memory, features.event_idx),
            walk: Walk::new(features.indirect_desc),
            next_avail: state.next_avail,
            avail_idx: state.next_avail,
            next_used: state.next_used,
            decided: state.next_used,
            // As a driver finds a new queue: it kicks until told otherwise.
            armed: true,
            in_flight: vec![0; words].into(),
        }
    }

    /// The memory under the queue.
    pub fn memory(&self) -> &M {
        self.ring.memory()
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// Takes the next request, if there is one, and pins in `buffers`, which must be empty, what the ring itself says of its
    /// buffers. The rest may be elsewhere: [`resolve`](Self::resolve) finds it, and the processor has been asked for it.
    ///
    /// # Errors
    /// If the driver broke the queue's rules; whatever is in flight can still be completed.
    #[inline]
    pub fn pop(&mut self, memory: &mut GuestMemory, buffers: &mut PinnedBuffers) -> Result<Option<Popped>, QueueError> {
        let Some(head) = self.pop_head()? else {
            return Ok(None);
        };
        match self.walk.start(self.ring.memory(), head.0, memory, buffers) {
            Ok(None) => Ok(Some(Popped { head, table: 0, entries: None })),
            Ok(Some(IndirectTable { iova, entries })) => Ok(Some(Popped { head, table: iova, entries: Some(entries) })),
            Err(source) => Err(QueueError::Chain { head: head.0, source }),
        }
    }

    /// Pins the rest of a request's buffers. Indirect tables are read here and not before, so that those of several
    /// requests can be on their way at the same time.
    ///
    /// # Errors
    /// If the driver broke the rules.
    #[inline]
    pub fn resolve(
        &mut self,
        popped: &mut Popped,
        memory: &mut GuestMemory,
        buffers: &mut PinnedBuffers,
    ) -> Result<(), QueueError> {
        let Some(entries) = popped.entries else { return Ok(()) };
        let table = IndirectTable { iova: popped.table, entries };
        if let Err(source) = self.walk.finish(table, memory, buffers) {
            return Err(QueueError::Chain { head: popped.head.0, source });
        }
        popped.entries = None;
        Ok(())
    }

    /// Takes the next request, if there is one, without a look at its buffers.
    ///
    /// # Errors
    /// As [`pop`](Self::pop).
    #[inline]
    pub fn pop_head(&mut self) -> Result<Option<Head>, QueueError> {
        if self.next_avail == self.avail_idx {
            self.avail_idx = self.ring.avail_idx();
            let ahead = self.avail_idx.wrapping_sub(self.next_avail);
            if ahead == 0 {
                return Ok(None);
            }
            if ahead > self.ring.size() {
                let avail_idx = std::mem::replace(&mut self.avail_idx, self.next_avail);
                let (next_avail, size) = (self.next_avail, self.ring.size());
                return Err(QueueError::AvailIdx { avail_idx, next_avail, size });
            }
        }
        let head = self.ring.avail_head(self.next_avail);
        if head >= self.ring.size() {
            return Err(QueueError::Head { head, size: self.ring.size() });
        }
        let (word, bit) = (usize::from(head / 64), 1 << (head % 64));
        let Some(word) = self.in_flight.get_mut(word).filter(|word| **word & bit == 0) else {
            return Err(QueueError::HeadInFlight(head));
        };
        *word |= bit;
        self.next_avail = self.next_avail.wrapping_add(1);
        if self.armed {
            self.armed = false;
            self.ring.disarm();
        }
        Ok(Some(Head(head)))
    }

    /// Gives a request back, with `written` bytes of its buffers written from the first on. The driver sees it
    /// after the next [`publish`](Self::publish).
    #[inline]
    pub fn complete(&mut self, head: Head, written: u32) {
        if let Some(word) = self.in_flight.get_mut(usize::from(head.0 / 64)) {
            *word &= !(1 << (head.0 % 64));
        }
        self.ring.write_used(self.next_used, head.0, written);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Shows the driver all that was completed and says whether it wants an interrupt for it. Once a batch, and at
    /// least once a queue's size of completions.
    #[inline]
    pub fn publish(&mut self) -> Signal {
        if self.next_used == self.decided {
            return Signal::Idle;
        }
        let decided = std::mem::replace(&mut self.decided, self.next_used);
        self.ring.publish(self.next_used, decided)
    }

    /// Asks for a kick with the next entry and says whether the worker may sleep. The kicks end with the next
    /// [`pop`](Self::pop) that finds something.
    #[inline]
    pub fn arm(&mut self) -> Armed {
        self.armed = true;
        self.ring.arm(self.next_avail)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;
    use crate::memory::{MappedRing, RingAddresses, testing::guest_memory};
    use crate::queue::{Field, MAX_DESCRIPTORS, RingMemory};

    const BASE: u64 = 0x10_0000;
    const AT: RingAddresses = RingAddresses { desc: BASE, avail: BASE + 0x1000, used: BASE + 0x2000 };
    const TABLE: u64 = BASE + 0x8000;
    const EVENT_IDX: RingFeatures = RingFeatures { event_idx: true, indirect_desc: true };
    const PLAIN: RingFeatures = RingFeatures { event_idx: false, indirect_desc: false };
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;

    /// A descriptor as (addr, len, flags, next).
    type Fields = (u64, u32, u16, u16);

    /// A queue of 8 entries and the driver's hand on its memory.
    struct Rig {
        memory: GuestMemory,
        queue: SplitQueue<MappedRing>,
        buffers: PinnedBuffers,
    }

    impl Rig {
        fn new(features: RingFeatures) -> Self {
            let mut memory = guest_memory(BASE, 0x10_0000);
            let ring = MappedRing::new(&mut memory, AT, 8).unwrap();
            Self {
                memory,
                queue: SplitQueue::new(ring, features, QueueState::default()),
                buffers: PinnedBuffers::default(),
            }
        }

        fn set(&self, field: Field, value: u16) {
            self.queue.memory().store(field, value, Relaxed);
        }

        fn get(&self, field: Field) -> u16 {
            self.queue.memory().load(field, Relaxed)
        }

        fn describe(&mut self, table: u64, index: u64, (addr, len, flags, next): Fields) {
            let mut bytes = addr.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
            self.memory.write(table + 16 * index, &bytes).unwrap();
        }

        fn offer(&mut self, head: u16) {
            let idx = self.get(Field::AvailIdx);
            self.set(Field::AvailRing(idx), head);
            self.set(Field::AvailIdx, idx.wrapping_add(1));
        }

        fn pop(&mut self) -> Result<Option<Head>, QueueError> {
            self.buffers.clear();
            match self.queue.pop(&mut self.memory, &mut self.buffers)? {
                Some(mut popped) => {
                    self.queue.resolve(&mut popped, &mut self.memory, &mut self.buffers)?;
                    Ok(popped.resolved())
                }
                None => Ok(None),
            }
        }

        /// Address and length of the pieces that were popped last: to read, and to write.
        fn pieces(&self) -> [Vec<(u64, usize)>; 2] {
            let file = self.buffers.file().unwrap();
            let place = |piece: &libc::iovec| (BASE + file.offset_of(piece).unwrap(), piece.iov_len);
            let (readable, writable) = self.buffers.pieces();
            [readable, writable].map(|pieces| pieces.iter().map(place).collect())
        }

        /// What is wrong with the chain that starts at descriptor 0.
        fn chain_error(&mut self) -> ChainError {
            self.offer(0);
            match self.pop() {
                Err(QueueError::Chain { head: 0, source }) => source,
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn chains_are_walked_in_order() {
        let mut rig = Rig::new(EVENT_IDX);
        rig.describe(AT.desc, 5, (BASE, 16, NEXT, 2));
        rig.describe(AT.desc, 2, (BASE + 0x200, 0, NEXT, 7));
        rig.describe(AT.desc, 7, (BASE + 0x300, 32, NEXT | WRITE, 1));
        rig.describe(AT.desc, 1, (BASE + 0x400, 1, WRITE, 0));
        rig.offer(5);
        let head = rig.pop().unwrap().unwrap();
        assert_eq!(head.index(), 5);
        assert_eq!(rig.pieces(), [vec![(BASE, 16)], vec![(BASE + 0x300, 32), (BASE + 0x400, 1)]]);
        assert_eq!(rig.pop(), Ok(None));
    }

    /// §2.7.5.3.2: normal descriptors, then one that points to a table.
    #[test]
    fn a_table_may_follow_normal_descriptors() {
        let mut rig = Rig::new(EVENT_IDX);
        rig.describe(AT.desc, 0, (BASE, 16, NEXT, 3));
        rig.describe(AT.desc, 3, (TABLE, 48, INDIRECT | WRITE, 0));
        rig.describe(TABLE, 0, (BASE + 0x200, 8, NEXT, 2));
        rig.describe(TABLE, 2, (BASE + 0x300, 9, WRITE, 0));
        rig.offer(0);
        assert!(rig.pop().unwrap().is_some());
        assert_eq!(rig.pieces(), [vec![(BASE, 16), (BASE + 0x200, 8)], vec![(BASE + 0x300, 9)]]);
    }

    #[test]
    fn broken_chains_are_refused() {
        use ChainError::*;
        let bad = |descriptors: &[(u64, u64, Fields)]| {
            let mut rig = Rig::new(EVENT_IDX);
            for (table, index, descriptor) in descriptors {
                rig.describe(*table, *index, *descriptor);
            }
            rig.chain_error()
        };
        let table = |len| (AT.desc, 0, (TABLE, len, INDIRECT, 0));
        assert_eq!(bad(&[(AT.desc, 0, (BASE, 1, NEXT, 8))]), OutOfTable { index: 8, len: 8 });
        assert_eq!(bad(&[(AT.desc, 0, (BASE, 1, NEXT, 0))]), TooLong(8), "a loop of one");
        assert_eq!(bad(&[(AT.desc, 0, (BASE, 1, NEXT, 1)), (AT.desc, 1, (0, 0, NEXT, 0))]), TooLong(8));
        let after_write = [(AT.desc, 0, (BASE, 1, NEXT | WRITE, 1)), (AT.desc, 1, (0, 1, 0, 0))];
        assert_eq!(bad(&after_write), ReadableAfterWritable);
        assert_eq!(bad(&[(AT.desc, 0, (TABLE, 16, INDIRECT | NEXT, 1))]), MisplacedIndirect);
        assert_eq!(bad(&[table(16), (TABLE, 0, (TABLE, 16, INDIRECT, 0))]), MisplacedIndirect);
        assert_eq!(bad(&[table(32), (TABLE, 0, (BASE, 1, NEXT, 2))]), OutOfTable { index: 2, len: 2 });
        assert_eq!(bad(&[table(32), (TABLE, 0, (BASE, 1, NEXT, 0))]), TooLong(2));
        for len in [0, 8, 17, 16 * u32::from(MAX_DESCRIPTORS) + 16, u32::MAX - 15] {
            assert_eq!(bad(&[table(len)]), IndirectLength(len));
        }
        for unmapped in [(0, 16, INDIRECT, 0), (0, 1, 0, 0), (BASE + 0xf_ffff, 2, WRITE, 0), (u64::MAX, 1, 0, 0)] {
            assert!(matches!(bad(&[(AT.desc, 0, unmapped)]), Unmapped(_)));
        }
        let mut plain = Rig::new(PLAIN);
        plain.describe(AT.desc, 0, (TABLE, 16, INDIRECT, 0));
        assert_eq!(plain.chain_error(), MisplacedIndirect, "the feature was not negotiated");
    }

    #[test]
    fn broken_rings_are_refused() {
        let mut rig = Rig::new(PLAIN);
        rig.set(Field::AvailIdx, 9);
        assert_eq!(rig.pop(), Err(QueueError::AvailIdx { avail_idx: 9, next_avail: 0, size: 8 }));
        assert!(rig.pop().is_err(), "and stays refused");
        let mut rig = Rig::new(PLAIN);
        rig.offer(8);
        assert_eq!(rig.pop(), Err(QueueError::Head { head: 8, size: 8 }));
        let mut rig = Rig::new(PLAIN);
        rig.offer(3);
        rig.offer(3);
        let head = rig.pop().unwrap().unwrap();
        assert_eq!(rig.pop(), Err(QueueError::HeadInFlight(3)));
        rig.queue.complete(head, 0);
        assert!(rig.pop().unwrap().is_some(), "a head that was given back may come again");
    }

    /// All indices run over the 16-bit wrap; each completion carries its head and length.
    #[test]
    fn indices_wrap() {
        let mut rig = Rig::new(EVENT_IDX);
        for round in 0..70_000u32 {
            let head = (round % 8) as u16;
            rig.set(Field::UsedEvent, (round as u16).wrapping_sub(u16::from(round % 3 == 0)));
            rig.offer(head);
            let taken = rig.pop().unwrap().unwrap();
            assert_eq!(taken.index(), head);
            rig.queue.complete(taken, round);
            let expected = if round % 3 == 0 { Signal::Suppressed } else { Signal::Needed };
            assert_eq!(rig.queue.publish(), expected, "round {round}");
            assert_eq!(rig.queue.publish(), Signal::Idle);
            assert_eq!(rig.get(Field::UsedIdx), (round as u16).wrapping_add(1));
            let mut element = [0; 8];
            rig.memory.read(AT.used + 4 + 8 * u64::from(round % 8), &mut element).unwrap();
            assert_eq!(element[..4], u32::from(head).to_le_bytes());
            assert_eq!(element[4..], round.to_le_bytes());
        }
    }

    #[test]
    fn without_the_event_index_the_flags_decide() {
        let mut rig = Rig::new(PLAIN);
        for (flags, expected) in [(0, Signal::Needed), (1, Signal::Suppressed), (2, Signal::Needed)] {
            rig.set(Field::AvailFlags, flags);
            rig.offer(0);
            let head = rig.pop().unwrap().unwrap();
            rig.queue.complete(head, 1);
            assert_eq!(rig.queue.publish(), expected);
        }
    }

    #[test]
    fn a_batch_is_one_decision() {
        let mut rig = Rig::new(EVENT_IDX);
        rig.set(Field::UsedEvent, 2);
        for head in 0..5 {
            rig.offer(head);
        }
        let heads: Vec<Head> = (0..5).map(|_| rig.pop().unwrap().unwrap()).collect();
        for head in heads {
            rig.queue.complete(head, 1);
            assert_eq!(rig.get(Field::UsedIdx), 0, "not shown before it is published");
        }
        assert_eq!(rig.queue.publish(), Signal::Needed);
        assert_eq!(rig.get(Field::UsedIdx), 5);
    }

    #[test]
    fn arming_asks_for_the_next_entry_and_sees_what_is_there() {
        let mut rig = Rig::new(EVENT_IDX);
        assert_eq!(rig.queue.arm(), Armed::Sleep);
        rig.offer(0);
        assert_eq!(rig.queue.arm(), Armed::Work);
        let head = rig.pop().unwrap().unwrap();
        assert_eq!(rig.get(Field::AvailEvent), 0, "not moved while the worker is awake");
        assert_eq!(rig.queue.arm(), Armed::Sleep);
        assert_eq!(rig.get(Field::AvailEvent), 1);
        rig.queue.complete(head, 0);

        let mut rig = Rig::new(PLAIN);
        assert_eq!(rig.queue.arm(), Armed::Sleep);
        assert_eq!(rig.get(Field::UsedFlags), 0);
        rig.offer(0);
        let head = rig.pop().unwrap().unwrap();
        assert_eq!(rig.get(Field::UsedFlags), 1, "no kicks while the worker is awake");
        rig.queue.complete(head, 0);
        assert_eq!(rig.queue.arm(), Armed::Sleep);
        assert_eq!(rig.get(Field::UsedFlags), 0);
    }

    #[test]
    fn a_queue_goes_on_where_it_stood() {
        let mut rig = Rig::new(PLAIN);
        for head in 0..3 {
            rig.offer(head);
            let head = rig.pop().unwrap().unwrap();
            rig.queue.complete(head, 0);
        }
        let _ = rig.queue.publish();
        let state = rig.queue.state();
        let ring = MappedRing::new(&mut rig.memory, AT, 8).unwrap();
        rig.queue = SplitQueue::new(ring, PLAIN, state);
        assert_eq!(rig.pop(), Ok(None));
        rig.offer(6);
        assert_eq!(rig.pop().unwrap().unwrap().index(), 6);
    }
}
