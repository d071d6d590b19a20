//! Which requests are in flight.

use crate::queue::Head;

/// A request that the store is working on.
#[derive(Debug)]
pub struct Pending {
    /// Its place in the queue.
    pub head: Head,
    /// Bytes to report as written if it succeeds; if it fails, [`written_on_error`](Self::written_on_error).
    pub written: u32,
    /// The same if it fails: the status alone, or nothing when data that was not written comes before it.
    pub written_on_error: u32,
}

/// The requests of one queue that are in flight, by the index of their head.
#[derive(Debug)]
pub struct InFlight {
    slots: Box<[Option<Pending>]>,
    len: usize,
}

impl InFlight {
    /// For a queue of `size` entries.
    pub fn new(size: u16) -> Self {
        Self { slots: (0..size).map(|_| None).collect(), len: 0 }
    }

    /// Notes a request and gives it a token: its head's index, which no other request in flight has.
    pub fn insert(&mut self, pending: Pending) -> u16 {
        let token = pending.head.index();
        if let Some(slot) = self.slots.get_mut(usize::from(token)) {
            *slot = Some(pending);
            self.len += 1;
        }
        token
    }

    /// Takes the request with this token; `None` if there is none, so that nothing completes twice.
    pub fn remove(&mut self, token: u16) -> Option<Pending> {
        let pending = self.slots.get_mut(usize::from(token))?.take()?;
        self.len -= 1;
        Some(pending)
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
