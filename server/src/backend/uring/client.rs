//! One backend's operations on a ring.

use std::cell::RefCell;
use std::rc::Rc;
use std::{io, mem};

use io_uring::squeue;

use super::Uring;
use super::accounts::Landing;
use super::lane::{FixedBuffers, Lane};
use super::ring::Ring;

/// What comes after an entry's completion.
pub(in crate::backend) enum Step {
    /// Another entry.
    Again,
    /// Nothing.
    Over,
}

/// Something that takes one entry, or several one after the other.
///
/// # Safety
/// Memory and descriptors that an entry leads to must be owned or kept alive by the operation or by its context, or be
/// static; they must not move when either is moved, and must bear to be read and written by the kernel until
/// [`landed`](Self::landed) is called or both are dropped. Nothing else may touch them through the operation.
pub(in crate::backend) unsafe trait Operation: 'static {
    /// What all operations of a client share.
    type Context: Clone + 'static;

    /// Where the next entry goes.
    fn lane(&self, context: &Self::Context) -> Lane;

    /// The next entry, for that lane, whose fixed buffers it may use.
    fn entry(&mut self, context: &Self::Context, fixed: &mut FixedBuffers<'_>) -> squeue::Entry;

    /// Takes the result of the last entry: not negative, or an error number, negated.
    fn landed(&mut self, context: &Self::Context, result: i32) -> Step;
}

/// One backend's place on a ring.
pub(in crate::backend) struct Client<T: Operation> {
    ring: Rc<RefCell<Ring>>,
    number: u32,
    context: T::Context,
    /// Changed by `start`, and by `reap` for slots that have landed: never while the kernel is at work there.
    slots: Vec<Option<T>>,
    free: Vec<u16>,
    landed: Vec<Landing>,
}

impl<T: Operation> Client<T> {
    /// Operations in flight on one client, at most: four times what QEMU gives a queue by default.
    pub(in crate::backend) const SLOTS: usize = 1024;

    /// A place on the ring.
    ///
    /// # Errors
    /// If there is no ring.
    pub(in crate::backend) fn new(uring: &Uring, context: T::Context) -> io::Result<Self> {
        let Some(ring) = &uring.ring else {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this store needs io_uring, which is not available",
            ));
        };
        let number = ring.borrow_mut().accounts().open();
        let ring = Rc::clone(ring);
        Ok(Self { ring, number, context, slots: Vec::new(), free: Vec::new(), landed: Vec::new() })
    }

    /// What the operations share.
    pub(in crate::backend) fn context(&self) -> &T::Context {
        &self.context
    }

    /// Operations that were started and are not over.
    pub(in crate::backend) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Queues an operation's first entry; gives the operation back if there is no room for it.
    pub(in crate::backend) fn start(&mut self, operation: T) -> Result<(), T> {
        if self.in_flight() == Self::SLOTS {
            return Err(operation);
        }
        let mut ring = self.ring.borrow_mut();
        if !ring.accounts().begin() {
            return Err(operation);
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            (self.slots.len() - 1) as u16
        });
        if let Some(place) = self.slots.get_mut(usize::from(slot)) {
            let operation = place.insert(operation);
            let lane = operation.lane(&self.context);
            let entry = operation.entry(&self.context, &mut ring.fixed_buffers(lane));
            // SAFETY: the operation lies in its slot until it has landed, or in what `drop` leaves to the ring. Until
            // then nothing but moves happens to it, which an `Operation` allows.
            unsafe { ring.push(lane, self.number, slot, entry) };
        }
        Ok(())
    }

    /// Starts what was queued, where the worker's next call may be too late.
    pub(in crate::backend) fn commit(&self) {
        // What breaks a ring is told to the worker too, when it waits.
        if let Err(error) = self.ring.borrow_mut().submit() {
            log::error!("io_uring: {error}");
        }
    }

    /// Gives out the operations that are over.
    pub(in crate::backend) fn reap(&mut self, mut done: impl FnMut(T)) {
        let mut ring = self.ring.borrow_mut();
        let over = ring.reap().unwrap_or_else(|error| {
            log::error!("io_uring: {error}");
            Vec::new()
        });
        ring.accounts().take(self.number, &mut self.landed);
        let mut again = false;
        for Landing { slot, result } in self.landed.drain(..) {
            let Some(place) = self.slots.get_mut(usize::from(slot)) else { continue };
            let Some(operation) = place else { continue };
            match operation.landed(&self.context, result) {
                Step::Again => {
                    let lane = operation.lane(&self.context);
                    let entry = operation.entry(&self.context, &mut ring.fixed_buffers(lane));
                    // SAFETY: as in `start`; its last entry has just landed.
                    unsafe { ring.push(lane, self.number, slot, entry) };
                    again = true;
                }
                Step::Over => {
                    ring.accounts().end();
                    self.free.push(slot);
                    place.take().into_iter().for_each(&mut done);
                }
            }
        }
        drop(ring);
        drop(over);
        if again {
            self.commit();
        }
    }
}

impl<T: Operation> Drop for Client<T> {
    fn drop(&mut self) {
        let operations = self.in_flight() as u32;
        let held = Box::new((mem::take(&mut self.slots), self.context.clone()));
        let _over = self.ring.borrow_mut().accounts().close(self.number, operations, held);
        // Not all may have been submitted: they must end too.
        self.commit();
    }
}
