//! What waits for time to pass: in the kernel, which wakes the worker for it as for anything else that completes.

use std::time::Duration;

use io_uring::types::Timespec;
use io_uring::{opcode, squeue};

use super::uring::{FixedBuffers, Lane, Operation, Step};

/// Something that sleeps for a while. A `Client` of these gives it back when the while is over; nothing ends it before.
pub(super) struct Asleep<T> {
    what: T,
    until: Box<Timespec>,
}

impl<T> Asleep<T> {
    /// `what` is to sleep for so long, from when the ring is told of it.
    pub(super) fn new(what: T, so_long: Duration) -> Self {
        let until = Timespec::new().sec(so_long.as_secs()).nsec(so_long.subsec_nanos());
        Self { what, until: Box::new(until) }
    }

    /// What has slept.
    pub(super) fn wake(self) -> T {
        self.what
    }
}

// SAFETY: the entry leads to `until`, which lies on the heap and is changed by nobody.
unsafe impl<T: 'static> Operation for Asleep<T> {
    type Context = ();

    fn lane(&self, (): &()) -> Lane {
        Lane::Interrupt
    }

    fn entry(&mut self, (): &(), _: &mut FixedBuffers<'_>) -> squeue::Entry {
        opcode::Timeout::new(&raw const *self.until).build()
    }

    /// Whatever the kernel says: if it has no timers, what waits is early.
    fn landed(&mut self, (): &(), _: i32) -> Step {
        Step::Over
    }
}
