//! The flag by which a worker and those who want something of it agree on who wakes whom.

use std::sync::atomic::{AtomicBool, Ordering, fence};

/// Whether a worker sleeps.
///
/// Whoever leaves something for the worker calls [`must_wake`](Self::must_wake) afterwards; the worker calls
/// [`fall_asleep`](Self::fall_asleep) before it sleeps. Both store first and then look at what the other stores: the
/// store-buffer pattern again, and again the full barrier is inside.
#[derive(Debug, Default)]
pub(super) struct Awake {
    asleep: AtomicBool,
}

impl Awake {
    /// Whether the worker must be woken for what was left for it just before. Of several who ask, one is told so.
    pub(super) fn must_wake(&self) -> bool {
        // ORDERING: our store is what was left for the worker, our load is `asleep`. The worker's pair, in
        // `fall_asleep`: it stores `asleep`, has a full barrier, and looks at what was left. Without ours the load may
        // be done before the store is seen: we find the worker awake, it finds nothing, and it sleeps on what we left.
        fence(Ordering::SeqCst);
        self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::Relaxed)
    }

    /// Says that the worker is about to sleep, unless `anything_left` then finds something.
    pub(super) fn fall_asleep(&self, anything_left: impl FnOnce() -> bool) -> bool {
        self.asleep.store(true, Ordering::Relaxed);
        // ORDERING: our store is `asleep`, our load is what others leave for us: the other half of `must_wake`.
        // Without it we may find nothing while whoever just left something still finds us awake.
        fence(Ordering::SeqCst);
        let sleep = !anything_left();
        if !sleep {
            self.woke_up();
        }
        sleep
    }

    /// Says that the worker is awake.
    pub(super) fn woke_up(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }
}
