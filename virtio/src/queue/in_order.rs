//! Giving back in the order in which the driver made available: `VIRTIO_F_IN_ORDER` (virtio 1.3 §2.7.9, §2.8.8).

/// How much of what a request lets the device write it has written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// All of it: so many bytes.
    All(u32),
    /// So many bytes, from the first one on.
    First(u32),
}

impl Written {
    /// How many bytes.
    #[inline(always)]
    pub fn bytes(self) -> u32 {
        let (Self::All(bytes) | Self::First(bytes)) = self;
        bytes
    }
}

impl From<u32> for Written {
    /// So many bytes, with no word about others.
    #[inline(always)]
    fn from(bytes: u32) -> Self {
        Self::First(bytes)
    }
}

/// The requests of a queue that have been taken, in that order, until those before them have all been completed.
#[derive(Debug)]
pub(super) struct InOrder {
    /// A ring. As many as the queue has descriptors, so that there is room for all requests in flight.
    slots: Box<[Slot]>,
    /// The oldest request.
    front: u16,
    /// Where the next one goes.
    back: u16,
}

#[derive(Clone, Copy, Debug)]
enum Slot {
    Free,
    Taken { id: u16, descriptors: u16 },
    Completed { id: u16, descriptors: u16, written: Written },
}

/// Requests that follow each other and are given back together, by the name of the last one. All others were used
/// completely.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Batch {
    /// The last one's head, or buffer ID.
    pub(super) id: u16,
    /// How many bytes were written into the last one.
    pub(super) written: u32,
    /// How many requests there are.
    pub(super) requests: u16,
    /// How many descriptors of the ring they have in all.
    pub(super) descriptors: u16,
}

impl InOrder {
    /// For a queue of `size` descriptors.
    pub(super) fn new(size: u16) -> Self {
        Self { slots: vec![Slot::Free; size.into()].into(), front: 0, back: 0 }
    }

    /// Notes a request, and returns its slot: a number below the queue's size. There are no more than that in flight.
    #[inline]
    pub(super) fn take(&mut self, id: u16, descriptors: u16) -> u16 {
        let slot = self.back;
        if let Some(free) = self.slots.get_mut(usize::from(slot)) {
            *free = Slot::Taken { id, descriptors };
        }
        self.back = self.after(slot);
        slot
    }

    /// Notes that the request in `slot` is done.
    #[inline]
    pub(super) fn complete(&mut self, slot: u16, written: Written) {
        if let Some(slot) = self.slots.get_mut(usize::from(slot))
            && let Slot::Taken { id, descriptors } = *slot
        {
            *slot = Slot::Completed { id, descriptors, written };
        }
    }

    /// The next requests that can be given back together.
    #[inline]
    pub(super) fn next_batch(&mut self) -> Option<Batch> {
        let mut batch: Option<Batch> = None;
        while let Some(slot) = self.slots.get_mut(usize::from(self.front))
            && let Slot::Completed { id, descriptors, written } = *slot
        {
            *slot = Slot::Free;
            self.front = self.after(self.front);
            let before = batch.map_or((0, 0), |batch| (batch.requests, batch.descriptors));
            // No more than the queue has.
            let (requests, descriptors) = (before.0.saturating_add(1), before.1.saturating_add(descriptors));
            batch = Some(Batch { id, written: written.bytes(), requests, descriptors });
            if let Written::First(_) = written {
                // What it has written must be said.
                break;
            }
        }
        batch
    }

    #[inline(always)]
    fn after(&self, slot: u16) -> u16 {
        let next = slot.wrapping_add(1);
        if usize::from(next) < self.slots.len() { next } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batches(order: &mut InOrder) -> Vec<(u16, u32, u16, u16)> {
        let next = || order.next_batch().map(|b| (b.id, b.written, b.requests, b.descriptors));
        std::iter::from_fn(next).collect()
    }

    #[test]
    fn who_is_done_waits_for_those_before() {
        let mut order = InOrder::new(3);
        let slots: Vec<u16> = (0..3).map(|n| order.take(70 + n, 1)).collect();
        order.complete(slots[2], Written::All(5));
        order.complete(slots[1], Written::All(4));
        assert_eq!(batches(&mut order), []);
        order.complete(slots[0], Written::All(3));
        assert_eq!(batches(&mut order), [(72, 5, 3, 3)]);
        assert_eq!(batches(&mut order), []);
    }

    /// Only who was used completely is passed over, since the driver takes it for that.
    #[test]
    fn a_batch_ends_with_a_request_that_was_not_used_completely() {
        let mut order = InOrder::new(8);
        let written = [Written::All(1), Written::First(2), Written::First(3), Written::All(4), Written::All(5)];
        for (n, written) in (0u16..).zip(written) {
            let slot = order.take(n, n + 1);
            order.complete(slot, written);
        }
        assert_eq!(batches(&mut order), [(1, 2, 2, 3), (2, 3, 1, 3), (4, 5, 2, 9)]);
    }

    /// Slots are not shared by requests in flight, however often the ring of them turns.
    #[test]
    fn slots_go_round() {
        let mut order = InOrder::new(3);
        let mut taken: std::collections::VecDeque<_> = (0..3).map(|n| (n, order.take(n, 1))).collect();
        for n in 3..100 {
            let (first, slot) = taken.pop_front().unwrap();
            order.complete(slot, Written::First(u32::from(first)));
            assert_eq!(batches(&mut order), [(first, u32::from(first), 1, 1)]);
            let slot = order.take(n, 1);
            assert!(taken.iter().all(|(_, other)| *other != slot));
            taken.push_back((n, slot));
        }
    }
}
