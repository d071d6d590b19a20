//! The legacy interrupt: a level with the reasons that hold it, and VFIO's automask.
//!
//! The level is asserted while any *cause* bit is set. The function sets causes, and the driver takes
//! them all at once by reading the function's status register. A delivered interrupt is masked
//! until the client unmasks it (its end of interrupt); if the level still stands then, it is
//! delivered again.
//!
//! Why nothing is lost: causes and everything that blocks delivery are bits of one word, changed
//! by read-modify-write only, so all changes have one order and each sees the one before it. The
//! change that leaves a cause without a blocker, whichever side makes it, sets AUTOMASKED in the same step and
//! owes the delivery. It then loads the slot. The session stores a line before the change that
//! unblocks it, so a change ordered after that one sees the line (Release, Acquire). A change ordered
//! before it may have delivered to the previous line or found none; but installing a line clears
//! AUTOMASKED, so that the standing level is delivered again, to the new line.

use std::sync::Arc;

use arc_swap::ArcSwapOption;

use super::slot::{Line, Slot};
use crate::sync::{AtomicU32, Ordering};

const CAUSES: u32 = 0xff;
/// Delivered, and not unmasked since.
const AUTOMASKED: u32 = 1 << 8;
/// Masked by the client.
const MASKED: u32 = 1 << 9;
/// INTx Disable in the command register.
const DISABLED: u32 = 1 << 10;
/// No line is installed.
const ABSENT: u32 = 1 << 11;
const BLOCKED: u32 = AUTOMASKED | MASKED | DISABLED | ABSENT;

pub(crate) struct Intx<S = ArcSwapOption<Line>> {
    state: AtomicU32,
    slot: S,
}

impl<S: Slot> Intx<S> {
    pub(crate) fn new() -> Self {
        Intx { state: AtomicU32::new(ABSENT), slot: S::default() }
    }

    /// Sets causes.
    pub(crate) fn assert(&self, causes: u8) {
        self.change(|state| state | u32::from(causes));
    }

    /// Takes all causes, which deasserts the level.
    pub(crate) fn acknowledge(&self) -> u8 {
        causes(self.change(|state| state & !CAUSES))
    }

    /// The causes, left as they are.
    pub(crate) fn causes(&self) -> u8 {
        causes(self.state.load(Ordering::Acquire))
    }

    pub(crate) fn set_disabled(&self, disabled: bool) {
        self.change(|state| if disabled { state | DISABLED } else { state & !DISABLED });
    }

    pub(crate) fn mask(&self) {
        self.change(|state| state | MASKED);
    }

    pub(crate) fn unmask(&self) {
        self.change(|state| state & !(MASKED | AUTOMASKED));
    }

    /// Puts a line in, not masked automatically, or takes it out. Calls must not overlap.
    pub(crate) fn install(&self, line: Option<Arc<Line>>) {
        if line.is_some() {
            self.slot.store(line);
            self.change(|state| state & !(AUTOMASKED | ABSENT));
        } else {
            self.change(|state| state | ABSENT);
            self.slot.store(None);
        }
    }

    /// Signals the line whatever the level and the masks.
    pub(crate) fn trigger(&self) {
        if let Some(line) = self.slot.load() {
            line.signal();
        }
    }

    /// Applies a change, delivers if it leaves a cause that nothing blocks, and returns the state
    /// before it.
    fn change(&self, change: impl Fn(u32) -> u32) -> u32 {
        let mut before = self.state.load(Ordering::Acquire);
        loop {
            let mut after = change(before);
            let delivers = after & CAUSES != 0 && after & BLOCKED == 0;
            if delivers {
                after |= AUTOMASKED;
            }
            // AcqRel: a read-modify-write even where the bits stay the same. It publishes what was
            // written before it to whoever changes the state next.
            match self.state.compare_exchange_weak(before, after, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    if delivers {
                        self.trigger();
                    }
                    return before;
                }
                Err(state) => before = state,
            }
        }
    }
}

fn causes(state: u32) -> u8 {
    (state & CAUSES) as u8
}

#[cfg(test)]
#[cfg(loom)]
mod model {
    use loom::thread;

    use super::*;
    use crate::interrupts::slot::model::{Counter, ModelSlot};

    fn line() -> (Arc<Counter>, Arc<Line>) {
        let counter = Arc::new(Counter::default());
        (counter.clone(), Line::new(counter))
    }

    fn asserter(intx: &Arc<Intx<ModelSlot>>) -> thread::JoinHandle<()> {
        let intx = intx.clone();
        thread::spawn(move || intx.assert(1))
    }

    #[test]
    fn a_line_is_installed_while_asserted() {
        loom::model(|| {
            let intx = Arc::new(Intx::<ModelSlot>::new());
            let (counter, line) = line();
            let asserter = asserter(&intx);
            intx.install(Some(line));
            asserter.join().unwrap();
            assert!(counter.count() > 0, "lost");
        });
    }

    #[test]
    fn a_line_is_swapped_while_asserted() {
        loom::model(|| {
            let intx = Arc::new(Intx::<ModelSlot>::new());
            let (old, old_line) = line();
            let (new, new_line) = line();
            intx.install(Some(old_line));
            let asserter = asserter(&intx);
            intx.install(Some(new_line));
            let seen = old.count();
            asserter.join().unwrap();
            assert!(seen + new.count() > 0, "lost");
        });
    }

    #[test]
    fn a_line_is_removed_and_another_installed_while_asserted() {
        loom::model(|| {
            let intx = Arc::new(Intx::<ModelSlot>::new());
            let (old, old_line) = line();
            let (new, new_line) = line();
            intx.install(Some(old_line));
            let asserter = asserter(&intx);
            intx.install(None);
            let seen = old.count();
            intx.install(Some(new_line));
            asserter.join().unwrap();
            assert!(seen + new.count() > 0, "lost");
        });
    }

    /// The driver's end of an interrupt against the next one: it sees the new cause when it
    /// acknowledges, or it is interrupted again.
    #[test]
    fn a_cause_is_asserted_while_the_driver_acknowledges() {
        loom::model(|| {
            let intx = Arc::new(Intx::<ModelSlot>::new());
            let (counter, line) = line();
            intx.install(Some(line));
            intx.assert(2);
            let asserter = asserter(&intx);
            let taken = intx.acknowledge();
            intx.unmask();
            asserter.join().unwrap();
            assert_eq!(taken & 2, 2);
            assert!(taken & 1 != 0 || counter.count() > 1, "lost");
        });
    }

    #[test]
    fn two_causes_are_asserted_at_once() {
        loom::model(|| {
            let intx = Arc::new(Intx::<ModelSlot>::new());
            let (counter, line) = line();
            intx.install(Some(line));
            let asserter = asserter(&intx);
            intx.assert(2);
            asserter.join().unwrap();
            assert_eq!((counter.count(), intx.acknowledge()), (1, 3));
        });
    }

    #[test]
    fn intx_disable_is_cleared_while_asserted() {
        loom::model(|| {
            let intx = Arc::new(Intx::<ModelSlot>::new());
            let (counter, line) = line();
            intx.install(Some(line));
            intx.set_disabled(true);
            let asserter = asserter(&intx);
            intx.set_disabled(false);
            asserter.join().unwrap();
            assert_eq!(counter.count(), 1);
        });
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use crate::interrupts::testing::Counter;

    /// Each step, and how often the line has been signalled after it.
    #[test]
    fn automask() {
        let intx: Intx = Intx::new();
        let counter = Counter::new();
        let line = || Some(Line::new(counter.clone()));
        let steps: &[(&str, &dyn Fn(), usize)] = &[
            ("a cause without a line", &|| intx.assert(1), 0),
            ("the line finds the level", &|| intx.install(line()), 1),
            ("masked: another cause", &|| intx.assert(2), 1),
            ("unmasked, level stands", &|| intx.unmask(), 2),
            ("acknowledged", &|| assert_eq!(intx.acknowledge(), 3), 2),
            ("unmasked, no level", &|| intx.unmask(), 2),
            ("unmasked: a cause", &|| intx.assert(1), 3),
            ("acknowledged", &|| assert_eq!(intx.acknowledge(), 1), 3),
            ("a cause before the unmask", &|| intx.assert(1), 3),
            ("masked by the client", &|| intx.mask(), 3),
            ("unmasked, level stands", &|| intx.unmask(), 4),
            ("acknowledged", &|| assert_eq!(intx.acknowledge(), 1), 4),
            ("unmasked", &|| intx.unmask(), 4),
            ("INTx disabled", &|| intx.set_disabled(true), 4),
            ("disabled: a cause", &|| intx.assert(1), 4),
            ("disabled: unmask", &|| intx.unmask(), 4),
            ("enabled, level stands", &|| intx.set_disabled(false), 5),
            ("triggered whatever the level", &|| intx.trigger(), 6),
            ("swapped, level stands", &|| intx.install(line()), 7),
            ("removed", &|| intx.install(None), 7),
            ("removed: unmask", &|| intx.unmask(), 7),
            ("masked while removed", &|| intx.mask(), 7),
            ("installed while masked", &|| intx.install(line()), 7),
            ("unmasked", &|| intx.unmask(), 8),
        ];
        for (step, act, count) in steps {
            act();
            assert_eq!(counter.count(), *count, "{step}");
        }
    }
}
