//! The chains that a device has.

use std::collections::VecDeque;

use crate::{Error, Segment};

/// What the device gave back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// The head of the chain; in a packed virtqueue its buffer ID.
    pub head: u16,
    /// How many bytes the device says it wrote.
    pub written: u32,
}

/// The chains of one queue that the device has and has not given back.
pub(crate) struct InFlight {
    /// For each head in flight, the descriptors of its chain; 0 for all others.
    chain_len: Vec<u16>,
    count: u16,
    order: Option<Order>,
}

/// With `VIRTIO_F_IN_ORDER`.
struct Order {
    /// The heads in flight, the oldest first, each with the bytes that the device may write.
    heads: VecDeque<(u16, u32)>,
    /// The end of the batch that is being taken: all before it are used too.
    last: Option<Used>,
}

impl InFlight {
    /// For heads below `size`.
    pub(crate) fn new(size: u16) -> InFlight {
        InFlight { chain_len: vec![0; size.into()], count: 0, order: None }
    }

    /// Has the device give back in order.
    pub(crate) fn in_order(&mut self) {
        let heads = VecDeque::with_capacity(self.chain_len.len());
        self.order = Some(Order { heads, last: None });
    }

    pub(crate) fn is_in_order(&self) -> bool {
        self.order.is_some()
    }

    pub(crate) fn clear(&mut self) {
        self.chain_len.fill(0);
        self.count = 0;
        if let Some(order) = &mut self.order {
            order.heads.clear();
            order.last = None;
        }
    }

    /// How many.
    pub(crate) fn count(&self) -> u16 {
        self.count
    }

    /// Notes a chain of `len` descriptors, at least 1.
    pub(crate) fn add(&mut self, head: u16, len: u16, writable: &[Segment]) {
        self.chain_len[usize::from(head)] = len;
        self.count += 1;
        if let Some(order) = &mut self.order {
            let bytes = writable.iter().fold(0u32, |bytes, segment| bytes.saturating_add(segment.len));
            order.heads.push_back((head, bytes));
        }
    }

    /// The next chain of a batch that is being taken, and its descriptors.
    pub(crate) fn next_of_batch(&mut self) -> Option<(Used, u16)> {
        let order = self.order.as_mut()?;
        let last = order.last?;
        let (head, written) = order.heads.pop_front()?;
        let used = if head == last.head {
            order.last = None;
            last
        } else {
            // What is passed over was used completely (sections 2.7.9 and 2.8.8).
            Used { head, written }
        };
        Some((used, self.release(head)))
    }

    /// Whether part of a batch is left to take.
    pub(crate) fn is_in_batch(&self) -> bool {
        self.order.as_ref().is_some_and(|order| order.last.is_some())
    }

    /// Takes what the device gave back by one entry or descriptor, and its descriptors: the first of a batch if it gives back
    /// in order.
    ///
    /// # Errors
    /// [`Error::Device`] when it does not have it.
    #[inline]
    pub(crate) fn take(&mut self, id: u32, written: u32) -> Result<(Used, u16), Error> {
        let head = u16::try_from(id)
            .ok()
            .filter(|head| self.chain_len.get(usize::from(*head)).is_some_and(|chain_len| *chain_len > 0));
        let head = head.ok_or(Error::Device("it gives back a chain that it does not have"))?;
        let used = Used { head, written };
        match &mut self.order {
            None => Ok((used, self.release(head))),
            Some(order) => {
                order.last = Some(used);
                self.next_of_batch().ok_or(Error::Device("it gives back a chain that it does not have"))
            }
        }
    }

    fn release(&mut self, head: u16) -> u16 {
        self.count -= 1;
        std::mem::take(&mut self.chain_len[usize::from(head)])
    }
}
