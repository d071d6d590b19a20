//! A split virtqueue: where the device stands in it, and which requests it has taken.

use super::chain::Walk;
use super::in_order::{InOrder, Written};
use super::ring::{Armed, RingMemory, Signal, SplitRing};
use super::virtqueue::{Head, QueueError, QueueState, RingFeatures, Virtqueue};
use crate::memory::{GuestMemory, PinnedBuffers};

/// The device's side of a split virtqueue.
#[derive(Debug)]
pub struct SplitQueue<M> {
    ring: SplitRing<M>,
    walk: Walk,
    next_avail: u16,
    /// What the driver had published when we last looked: since the queue was armed, if that is not `next_avail`.
    avail_idx: u16,
    next_used: u16,
    /// `next_used` at the last decision about a signal.
    decided: u16,
    armed: bool,
    /// By descriptor: whether it is the head of a request in flight.
    in_flight: Box<[bool]>,
    /// With `VIRTIO_F_IN_ORDER`.
    order: Option<InOrder>,
}

impl<M> SplitQueue<M> {
    /// The same queue over other memory, or none.
    fn with_memory<N>(self, memory: N) -> SplitQueue<N> {
        SplitQueue {
            ring: self.ring.with_memory(memory),
            walk: self.walk,
            next_avail: self.next_avail,
            avail_idx: self.avail_idx,
            next_used: self.next_used,
            decided: self.decided,
            armed: self.armed,
            in_flight: self.in_flight,
            order: self.order,
        }
    }

    fn position(&self) -> QueueState {
        QueueState { next_avail: self.next_avail, next_used: self.next_used }
    }
}

impl<M: RingMemory> SplitQueue<M> {
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
            if self.armed {
                self.armed = false;
                self.ring.disarm();
            }
        }
        let head = self.ring.avail_head(self.next_avail);
        let Some(in_flight) = self.in_flight.get_mut(usize::from(head)) else {
            return Err(QueueError::Head { head, size: self.ring.size() });
        };
        if std::mem::replace(in_flight, true) {
            return Err(QueueError::HeadInFlight(head));
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        let slot = self.order.as_mut().map_or(0, |order| order.take(head, 1));
        Ok(Some(Head::new(head, 1, slot)))
    }

    /// Gives back so many requests, all by the entry of the first of them.
    #[inline]
    fn give_back(&mut self, id: u16, written: u32, requests: u16) {
        self.ring.write_used(self.next_used, id, written);
        self.next_used = self.next_used.wrapping_add(requests);
    }
}

impl<M: RingMemory> Virtqueue for SplitQueue<M> {
    type Memory = M;
    type Parked = SplitQueue<()>;

    const START: QueueState = QueueState { next_avail: 0, next_used: 0 };

    fn new(memory: M, features: RingFeatures, state: QueueState) -> Self {
        let size = memory.size();
        Self {
            ring: SplitRing::new(memory, features.event_idx),
            walk: Walk::new(features.indirect_desc),
            next_avail: state.next_avail,
            avail_idx: state.next_avail,
            next_used: state.next_used,
            decided: state.next_used,
            // As a driver finds a new queue: it kicks until told otherwise.
            armed: true,
            in_flight: vec![false; usize::from(size)].into(),
            order: features.in_order.then(|| InOrder::new(size)),
        }
    }

    fn memory(&self) -> &M {
        self.ring.memory()
    }

    fn park(self) -> SplitQueue<()> {
        self.with_memory(())
    }

    fn resume(parked: SplitQueue<()>, memory: M) -> Self {
        parked.with_memory(memory)
    }

    fn parked_state(parked: &SplitQueue<()>) -> QueueState {
        parked.position()
    }

    fn state(&self) -> QueueState {
        self.position()
    }

    #[inline]
    fn pop(&mut self, memory: &mut GuestMemory, buffers: &mut PinnedBuffers) -> Result<Option<Head>, QueueError> {
        let Some(head) = self.pop_head()? else {
            return Ok(None);
        };
        match self.walk.start(self.ring.memory(), head.id(), memory, buffers) {
            Ok(()) => Ok(Some(head)),
            Err(source) => Err(QueueError::Chain { head: head.id(), source }),
        }
    }

    #[inline]
    fn resolve(
        &mut self,
        head: &Head,
        memory: &mut GuestMemory,
        buffers: &mut PinnedBuffers,
    ) -> Result<(), QueueError> {
        let Some(table) = buffers.take_rest() else {
            buffers.prefetch();
            return Ok(());
        };
        let head = head.id();
        self.walk.finish(table, memory, buffers).map_err(|source| QueueError::Chain { head, source })
    }

    #[inline]
    fn complete(&mut self, head: Head, written: impl Into<Written>) {
        if let Some(in_flight) = self.in_flight.get_mut(usize::from(head.id())) {
            *in_flight = false;
        }
        match &mut self.order {
            None => self.give_back(head.id(), written.into().bytes(), 1),
            Some(order) => order.complete(head.slot(), written.into()),
        }
    }

    #[inline]
    fn publish(&mut self) -> Signal {
        while let Some(batch) = self.order.as_mut().and_then(InOrder::next_batch) {
            self.give_back(batch.id, batch.written, batch.requests);
        }
        if self.next_used == self.decided {
            return Signal::Idle;
        }
        let decided = std::mem::replace(&mut self.decided, self.next_used);
        self.ring.publish(self.next_used, decided)
    }

    #[inline]
    fn arm(&mut self) -> Armed {
        self.armed = true;
        self.avail_idx = self.next_avail;
        self.ring.arm(self.next_avail)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;
    use crate::memory::{Access, MappedRing, RingAddresses, testing::guest_memory};
    use crate::queue::{ChainError, Field, MAX_DESCRIPTORS, RingMemory};

    const BASE: u64 = 0x10_0000;
    const AT: RingAddresses = RingAddresses { desc: BASE, driver: BASE + 0x1000, device: BASE + 0x2000 };
    const TABLE: u64 = BASE + 0x8000;
    const EVENT_IDX: RingFeatures = RingFeatures { event_idx: true, indirect_desc: true, in_order: false };
    const PLAIN: RingFeatures = RingFeatures { event_idx: false, indirect_desc: false, in_order: false };
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
            // As they are after a request.
            let mut buffers = PinnedBuffers::default();
            memory.pin(BASE, 1, Access::READ, &mut buffers).unwrap();
            Self { memory, queue: SplitQueue::new(ring, features, QueueState::default()), buffers }
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
            self.buffers.recycle(&self.memory);
            let head = self.queue.pop(&mut self.memory, &mut self.buffers)?;
            if let Some(head) = &head {
                self.queue.resolve(head, &mut self.memory, &mut self.buffers)?;
            }
            Ok(head)
        }

        /// Address and length of the pieces that were popped last: to read, and to write.
        fn pieces(&self) -> [Vec<(u64, usize)>; 2] {
            let file = self.buffers.file().unwrap();
            let place = |piece: &libc::iovec| (BASE + file.offset_of(piece).unwrap(), piece.iov_len);

            self.buffers.pieces().map(|pieces| pieces.iter().map(place).collect())
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
        assert_eq!(head.id(), 5);
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
        let head = rig.pop().unwrap().unwrap();
        assert_eq!(rig.pieces(), [vec![(BASE, 16), (BASE + 0x200, 8)], vec![(BASE + 0x300, 9)]]);
        rig.queue.complete(head, 0);
        rig.describe(TABLE, 0, (BASE + 0x200, 8, NEXT, 1));
        rig.describe(TABLE, 1, (BASE + 0x280, 4, NEXT, 2));
        rig.offer(0);
        assert!(rig.pop().unwrap().is_some());
        assert_eq!(rig.pieces(), [vec![(BASE, 16), (BASE + 0x200, 8), (BASE + 0x280, 4)], vec![(BASE + 0x300, 9)]]);
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
        for len in [16, 48] {
            let mut plain = Rig::new(PLAIN);
            plain.describe(AT.desc, 0, (TABLE, len, INDIRECT, 0));
            assert_eq!(plain.chain_error(), MisplacedIndirect, "the feature was not negotiated");
        }
    }

    /// A table of three is read by a way of its own if it is made as nearly all are. Whatever it is made of, it is taken as by the
    /// other way, which one of four goes.
    #[test]
    fn a_table_of_three_is_taken_as_any_other() {
        let take_at = |table: u64, entries: u32, descriptors: [Fields; 3]| {
            let mut rig = Rig::new(EVENT_IDX);
            for (index, descriptor) in (0..).zip(descriptors) {
                rig.describe(table, index, descriptor);
            }
            rig.describe(AT.desc, 0, (table, 16 * entries, INDIRECT, 0));
            rig.offer(0);
            match rig.pop() {
                Ok(head) => Some((head.unwrap().id(), rig.pieces(), rig.buffers.take_frame().is_some())),
                Err(QueueError::Chain { .. }) => None,
                Err(other) => panic!("{other:?}"),
            }
        };
        let take = |entries, descriptors| take_at(TABLE, entries, descriptors).map(|(id, pieces, _)| (id, pieces));
        for data in [0, WRITE] {
            let frame = [(BASE, 16, NEXT, 1), (BASE + 0x300, 4096, NEXT | data, 2), (BASE + 0x200, 1, WRITE, 9)];
            let pieces = [vec![(BASE, 16)], vec![(BASE + 0x200, 1)]];
            let (_, mut taken, the_way_of_its_own) = take_at(TABLE, 3, frame).unwrap();
            assert!(the_way_of_its_own);
            // At the very end, where a fourth descriptor would not be in memory.
            assert!(take_at(BASE + 0x10_0000 - 48, 3, frame).unwrap().2);
            assert_eq!(taken[usize::from(data != 0)].remove(usize::from(data == 0)), (BASE + 0x300, 4096));
            assert_eq!(taken, pieces);
            let end = BASE + 0x10_0000;
            let changes = (0..3).flat_map(|index| {
                let (addr, len, flags, next) = frame[index];
                let last = end - u64::from(len);
                let addrs = [0, BASE - 1, end - 1, end - 4096, last, last + 1, end, u64::MAX];
                let lens = [0, 1, 17, 0x10_0000, u32::MAX];
                (addrs.map(|addr| (addr, len, flags, next)).into_iter())
                    .chain(lens.map(|len| (addr, len, flags, next)))
                    .chain((0..16).map(move |flags| (addr, len, flags, next)))
                    .chain([0, 1, 2, 7].map(|next| (addr, len, flags, next)))
                    .map(move |change| (index, change))
            });
            for (index, change) in changes {
                let mut descriptors = frame;
                descriptors[index] = change;
                assert_eq!(take(3, descriptors), take(4, descriptors), "{descriptors:?}");
            }
        }
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
            assert_eq!(taken.id(), head);
            rig.queue.complete(taken, round);
            let expected = if round % 3 == 0 { Signal::Suppressed } else { Signal::Needed };
            assert_eq!(rig.queue.publish(), expected, "round {round}");
            assert_eq!(rig.queue.publish(), Signal::Idle);
            assert_eq!(rig.get(Field::UsedIdx), (round as u16).wrapping_add(1));
            let mut element = [0; 8];
            rig.memory.read(AT.device + 4 + 8 * u64::from(round % 8), &mut element).unwrap();
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
        assert_eq!(rig.pop().unwrap().unwrap().id(), 6);
    }
}
