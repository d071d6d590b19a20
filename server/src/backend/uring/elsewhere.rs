//! Operations that other threads do, for backends of this ring's thread that are gone.

use std::cell::RefCell;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use super::ring::LAST_WAIT;

/// Operations of one backend. They own the memory that they work on.
pub(in crate::backend) trait Elsewhere {
    /// Whether the last one is over.
    fn is_over(&self) -> bool;

    /// Waits until the last one is over, but no longer than this; whether it is.
    fn wait_until(&self, deadline: Instant) -> bool;
}

/// What backends have left behind. A ring that is dropped waits for it for a while, as for the kernel.
#[derive(Default)]
pub(super) struct Left(RefCell<Vec<Arc<dyn Elsewhere>>>);

impl Left {
    pub(super) fn add(&self, work: Arc<dyn Elsewhere>) {
        self.0.borrow_mut().push(work);
    }

    /// Whether any is not over.
    pub(super) fn any(&self) -> bool {
        let mut all = self.0.borrow_mut();
        all.retain(|work| !work.is_over());
        !all.is_empty()
    }
}

impl Drop for Left {
    fn drop(&mut self) {
        let deadline = Instant::now() + LAST_WAIT;
        if !self.0.get_mut().drain(..).all(|work| work.wait_until(deadline)) {
            log::error!(
                "the storage has not answered for {LAST_WAIT:?}: its threads keep the memory of its last requests"
            );
        }
    }
}

impl fmt::Debug for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Left({})", self.0.borrow().len())
    }
}
