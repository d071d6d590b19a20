//! A packed virtqueue: where the device stands in it, and which requests it has taken.

use super::chain::{List, Walk};
use super::in_order::{InOrder, Written};
use super::ring::{Armed, PackedRing, PackedRingMemory, Position, Signal};
use super::virtqueue::{Head, QueueError, QueueState, RingFeatures, Virtqueue};
use crate::memory::{GuestMemory, PinnedBuffers};

/// The device's side of a packed virtqueue (virtio 1.3 §2.8).
#[derive(Debug)]
pub struct PackedQueue<M> {
    ring: PackedRing<M>,
    walk: Walk,
    next_avail: Position,
    next_used: Position,
    /// Descriptors of the ring that were taken and not given back.
    in_flight: u16,
    /// The first request that was given back since the last publication. Its descriptor is written last.
    first: Option<Used>,
    armed: bool,
    /// With `VIRTIO_F_IN_ORDER`.
    order: Option<InOrder>,
}

/// A request to give back, and in which descriptor.
#[derive(Clone, Copy, Debug)]
struct Used {
    position: Position,
    id: u16,
    written: u32,
}

impl<M> PackedQueue<M> {
    /// The same queue over other memory, or none.
    fn with_memory<N>(self, memory: N) -> PackedQueue<N> {
        PackedQueue {
            ring: self.ring.with_memory(memory),
            walk: self.walk,
            next_avail: self.next_avail,
            next_used: self.next_used,
            in_flight: self.in_flight,
            first: self.first,
            armed: self.armed,
            order: self.order,
        }
    }

    fn position(&self) -> QueueState {
        QueueState { next_avail: self.next_avail.bits(), next_used: self.next_used.bits() }
    }
}

impl<M: PackedRingMemory> PackedQueue<M> {
    /// Gives back `descriptors` of the ring, all by the first of them.
    #[inline]
    fn give_back(&mut self, id: u16, written: u32, descriptors: u16) {
        let position = self.next_used;
        self.next_used = position.after(descriptors, self.ring.size());
        self.in_flight = self.in_flight.saturating_sub(descriptors);
        if self.first.is_none() {
            self.first = Some(Used { position, id, written });
        } else {
            self.ring.write_used(position, id, written);
        }
    }
}

impl<M: PackedRingMemory> Virtqueue for PackedQueue<M> {
    type Memory = M;
    type Parked = PackedQueue<()>;

    const START: QueueState = QueueState { next_avail: Position::START.bits(), next_used: Position::START.bits() };

    fn new(memory: M, features: RingFeatures, state: QueueState) -> Self {
        let size = memory.size();
        Self {
            ring: PackedRing::new(memory, features.event_idx),
            walk: Walk::new(features.indirect_desc),
            next_avail: Position::from_bits(state.next_avail),
            next_used: Position::from_bits(state.next_used),
            in_flight: 0,
            first: None,
            // As a driver finds a new queue: it kicks until told otherwise.
            armed: true,
            order: features.in_order.then(|| InOrder::new(size)),
        }
    }

    fn memory(&self) -> &M {
        self.ring.memory()
    }

    fn park(self) -> PackedQueue<()> {
        self.with_memory(())
    }

    fn resume(parked: PackedQueue<()>, memory: M) -> Self {
        parked.with_memory(memory)
    }

    fn parked_state(parked: &PackedQueue<()>) -> QueueState {
        parked.position()
    }

    fn state(&self) -> QueueState {
        self.position()
    }

    #[inline]
    fn pop(&mut self, memory: &mut GuestMemory, buffers: &mut PinnedBuffers) -> Result<Option<Head>, QueueError> {
        let position = self.next_avail;
        let Some(flags) = self.ring.available(position) else {
            return Ok(None);
        };
        let (head, free) = (position.index(), self.ring.size().saturating_sub(self.in_flight));
        if free == 0 {
            return Err(QueueError::DescriptorInFlight(head));
        }
        let List { id, len: descriptors } = self
            .walk
            .start_packed(&self.ring, position, flags, free, memory, buffers)
            .map_err(|source| QueueError::Chain { head, source })?;
        let slot = self.order.as_mut().map_or(0, |order| order.take(id, descriptors));
        self.in_flight = self.in_flight.saturating_add(descriptors);
        self.next_avail = position.after(descriptors, self.ring.size());
        if self.armed {
            self.armed = false;
            self.ring.disarm();
        }
        Ok(Some(Head::new(id, descriptors, slot)))
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
        self.walk.finish_packed(table, memory, buffers).map_err(|source| QueueError::Chain { head, source })
    }

    #[inline]
    fn complete(&mut self, head: Head, written: impl Into<Written>) {
        match &mut self.order {
            None => self.give_back(head.id(), written.into().bytes(), head.descriptors()),
            Some(order) => order.complete(head.slot(), written.into()),
        }
    }

    #[inline]
    fn publish(&mut self) -> Signal {
        while let Some(batch) = self.order.as_mut().and_then(InOrder::next_batch) {
            self.give_back(batch.id, batch.written, batch.descriptors);
        }
        match self.first.take() {
            Some(Used { position, id, written }) => self.ring.publish(position, id, written, self.next_used),
            None => Signal::Idle,
        }
    }

    #[inline]
    fn arm(&mut self) -> Armed {
        self.armed = true;
        self.ring.arm(self.next_avail)
    }
}

#[cfg(test)]
mod tests;
