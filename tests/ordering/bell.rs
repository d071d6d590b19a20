//! What wakes a side: an eventfd, and when to give up on it.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// How many milliseconds a sleeping side waits before it looks whether the other has given up.
const NAP_MS: u8 = 100;

/// How long both sides wait, and whether one of them has given up.
pub(crate) struct Patience {
    /// With news and without a wakeup for so long, the wakeup is lost.
    limit: Duration,
    exhausted: AtomicBool,
}

/// Why a side does not go on.
#[derive(Debug)]
pub(crate) enum GaveUp {
    /// There is something for it and it was not woken.
    LostWakeup,
    /// There is nothing for it, for far too long.
    Stalled,
    /// Because the other side has.
    Too,
}

impl Patience {
    pub(crate) fn new(limit: Duration) -> Self {
        Patience { limit, exhausted: AtomicBool::new(false) }
    }

    /// Whether to go on: the other side has not given up.
    pub(crate) fn check(&self) -> Result<(), GaveUp> {
        if self.exhausted.load(Ordering::Relaxed) { Err(GaveUp::Too) } else { Ok(()) }
    }

    fn give_up<T>(&self, why: GaveUp) -> Result<T, GaveUp> {
        self.exhausted.store(true, Ordering::Relaxed);
        Err(why)
    }
}

pub(crate) struct Bell(EventFd);

impl Bell {
    pub(crate) fn new() -> Self {
        Bell(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap())
    }

    pub(crate) fn ring(&self) {
        self.0.write(1).unwrap();
    }

    /// Returns when it was rung, and how often since it was last heard; `news` tells whether it should have been. It is
    /// asked `looks` times before the thread sleeps in earnest.
    pub(crate) fn sleep(&self, looks: u32, patience: &Patience, news: impl Fn() -> bool) -> Result<u64, GaveUp> {
        for _ in 0..looks {
            if let Ok(rings) = self.0.read() {
                return Ok(rings);
            }
        }
        let since = Instant::now();
        loop {
            poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], NAP_MS).unwrap();
            if let Ok(rings) = self.0.read() {
                return Ok(rings);
            }
            patience.check()?;
            let asleep = since.elapsed();
            if asleep > patience.limit && news() {
                return patience.give_up(GaveUp::LostWakeup);
            }
            if asleep > 20 * patience.limit {
                return patience.give_up(GaveUp::Stalled);
            }
        }
    }
}
