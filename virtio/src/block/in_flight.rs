//! Which requests are in flight.

use crate::queue::Head;

/// A request that the store is working on.
#[derive(Debug)]
pub struct Pending {
    /// Its place in the queue.
    pub head: Head,
    /// Bytes to report as written if it succeeds.
    pub written: u32,
    /// When it was taken, by a clock of the owner's.
    pub since: u64,
}

/// The requests of one queue that are in flight, by tokens that their owner gives out.
#[derive(Debug)]
pub struct InFlight {
    slots: Box<[Slot]>,
    len: usize,
}

/// A place for a [`Pending`], which is there if its head is.
#[derive(Debug, Default)]
struct Slot {
    head: Option<Head>,
    written: u32,
    since: u64,
}

impl InFlight {
    /// For a queue of `size` entries, and tokens below that.
    pub fn new(size: u16) -> Self {
        Self { slots: (0..size).map(|_| Slot::default()).collect(), len: 0 }
    }

    /// Notes a request by a token that no other request in flight has.
    #[inline]
    pub fn insert(&mut self, token: u16, pending: Pending) {
        if let Some(slot) = self.slots.get_mut(usize::from(token)) {
            debug_assert!(slot.head.is_none());
            let Pending { head, written, since } = pending;
            *slot = Slot { head: Some(head), written, since };
            self.len = self.len.wrapping_add(1);
        }
    }

    /// Takes the request with this token; `None` if there is none, so that nothing completes twice.
    #[inline]
    pub fn remove(&mut self, token: u16) -> Option<Pending> {
        let slot = self.slots.get_mut(usize::from(token))?;
        let head = slot.head.take()?;
        self.len = self.len.wrapping_sub(1);
        Some(Pending { head, written: slot.written, since: slot.since })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}
