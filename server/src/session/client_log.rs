//! What is logged of a client, which must not fill the disk by what it does.

use std::cell::RefCell;
use std::fmt::{Arguments, Display};
use std::time::{Duration, Instant};

use log::Level;

/// Where the lines come from, as far as readers of the log are concerned.
const TARGET: &str = "vfio_user_blk::session";
/// Lines that a client may cause at once.
const BURST: u32 = 1000;
/// How often it may cause one more after these.
const PAUSE: Duration = Duration::from_millis(100);

/// The log as far as it tells of one device's clients: so many lines, and what is beyond is only counted. It outlives the
/// clients, since to connect and go is also something that they can do without end.
pub(super) struct ClientLog {
    /// What each line begins with.
    device: String,
    quota: RefCell<Quota>,
}

struct Quota {
    left: u32,
    /// When lines were added to it last.
    refilled: Instant,
    left_out: u64,
}

impl ClientLog {
    pub(super) fn new(device: impl Display) -> Self {
        let quota = Quota { left: BURST, refilled: Instant::now(), left_out: 0 };
        Self { device: device.to_string(), quota: RefCell::new(quota) }
    }

    pub(super) fn error(&self, line: Arguments<'_>) {
        self.line(Level::Error, line);
    }

    pub(super) fn warn(&self, line: Arguments<'_>) {
        self.line(Level::Warn, line);
    }

    pub(super) fn info(&self, line: Arguments<'_>) {
        self.line(Level::Info, line);
    }

    /// For those who want to see everything, however much it is.
    pub(super) fn debug(&self, line: Arguments<'_>) {
        log::debug!(target: TARGET, "{}: {line}", self.device);
    }

    fn line(&self, level: Level, line: Arguments<'_>) {
        if !log::log_enabled!(target: TARGET, level) {
            return;
        }
        if let Some(left_out) = self.quota.borrow_mut().take(Instant::now()) {
            if left_out > 0 {
                log::warn!(target: TARGET, "{}: {left_out} lines about its clients were left out", self.device);
            }
            log::log!(target: TARGET, level, "{}: {line}", self.device);
        }
    }
}

impl Quota {
    /// Takes a line, and says how many were refused before it; `None` if this one is too.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let new = now.saturating_duration_since(self.refilled).as_nanos() / PAUSE.as_nanos();
        if new > 0 {
            self.left = u32::try_from(new).map_or(BURST, |new| self.left.saturating_add(new).min(BURST));
            self.refilled = now;
        }
        if let Some(left) = self.left.checked_sub(1) {
            self.left = left;
            Some(std::mem::take(&mut self.left_out))
        } else {
            self.left_out = self.left_out.saturating_add(1);
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_run_out_and_come_back() {
        let start = Instant::now();
        let mut quota = Quota { left: BURST, refilled: start, left_out: 0 };
        assert!((0..BURST).all(|_| quota.take(start) == Some(0)));
        assert!((0..7).all(|_| quota.take(start).is_none()));
        assert_eq!(quota.take(start + PAUSE / 2), None);
        assert_eq!(quota.take(start + PAUSE), Some(8));
        assert_eq!(quota.take(start + PAUSE), None);
        let later = start + PAUSE * BURST * 10;
        assert_eq!((0..2 * BURST).filter(|_| quota.take(later).is_some()).count(), BURST as usize);
    }
}
