//! Things that wait for their time, and whose wait can be ended.

use std::io;
use std::time::{Duration, Instant};

use crate::backend::timer::Asleep;
use crate::backend::uring::{Client, Uring};

/// Nothing sleeps longer in one go: so soon what is in a hurry is over, and so soon a timer is gone whose owner is.
const STEP: Duration = Duration::from_millis(100);

/// Things of one queue that wait.
pub(crate) struct Timers<T: 'static> {
    asleep: Client<Asleep<(T, Instant)>>,
    /// Whether nothing is to wait any longer.
    hurry: bool,
}

impl<T: 'static> Timers<T> {
    /// None yet.
    ///
    /// # Errors
    /// If there is no ring.
    pub(crate) fn new(ring: &Uring) -> io::Result<Self> {
        Ok(Self { asleep: Client::new(ring, ())?, hurry: false })
    }

    /// Has something wait, once the ring is told to start; gives it back if there is no room for it.
    pub(crate) fn start(&mut self, what: T, wait: Duration) -> Result<(), T> {
        let now = Instant::now();
        self.sleep(what, now.checked_add(wait).unwrap_or(now), wait)
    }

    fn sleep(&mut self, what: T, until: Instant, left: Duration) -> Result<(), T> {
        self.asleep.start(Asleep::new((what, until), left.min(STEP))).map_err(|asleep| asleep.wake().0)
    }

    /// Gives out what has waited.
    pub(crate) fn reap(&mut self, mut done: impl FnMut(T)) {
        let mut woken = Vec::new();
        self.asleep.reap(|asleep| woken.push(asleep.wake()));
        let mut again = false;
        for (what, until) in woken {
            let left = until.saturating_duration_since(Instant::now());
            if self.hurry || left.is_zero() {
                done(what);
                continue;
            }
            match self.sleep(what, until, left) {
                Ok(()) => again = true,
                // Where there is no room for it any more it is early.
                Err(what) => done(what),
            }
        }
        if again {
            self.asleep.commit();
        }
    }

    /// What waits.
    pub(crate) fn in_flight(&self) -> usize {
        self.asleep.in_flight()
    }

    /// Has nothing wait much longer.
    pub(crate) fn hurry(&mut self) {
        self.hurry = true;
    }
}
