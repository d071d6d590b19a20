//! Where an interrupt line is installed: one pointer that is swapped while others load it.

use std::sync::Arc;

use arc_swap::ArcSwapOption;

use super::Interrupt;

/// A line as it was installed. Each installation is an allocation of its own, so that two
/// installations are told apart by address even if they carry the same line.
pub(crate) struct Line(Arc<dyn Interrupt>);

impl Line {
    pub(crate) fn new(line: Arc<dyn Interrupt>) -> Arc<Line> {
        Arc::new(Line(line))
    }

    pub(crate) fn signal(&self) {
        self.0.signal();
    }
}

/// Whether two loads of a slot saw the same installation.
pub(crate) fn same(a: &Option<Arc<Line>>, b: &Option<Arc<Line>>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        (None, None) => true,
        _ => false,
    }
}

/// The pointer. It promises what `arc-swap` documents and no more: `load` is an Acquire load,
/// `store` an AcqRel swap. `loom` does not know `arc-swap`, so the models bring a slot of their own.
pub(crate) trait Slot: Default {
    fn load(&self) -> Option<Arc<Line>>;
    fn store(&self, line: Option<Arc<Line>>);
}

impl Slot for ArcSwapOption<Line> {
    fn load(&self) -> Option<Arc<Line>> {
        self.load_full()
    }

    fn store(&self, line: Option<Arc<Line>>) {
        drop(self.swap(line));
    }
}

/// What the models install: counters, and a slot with the weakest orderings that [`Slot`] allows.
#[cfg(test)]
#[cfg(loom)]
pub(crate) mod model {
    use std::sync::Mutex;

    use loom::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// A line that counts its signals.
    #[derive(Default)]
    pub(crate) struct Counter(AtomicUsize);

    impl Counter {
        pub(crate) fn count(&self) -> usize {
            self.0.load(Ordering::Relaxed)
        }
    }

    impl Interrupt for Counter {
        fn signal(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A slot that holds an index into the lines it has ever seen. The mutex is the standard
    /// library's: loom neither sees it nor takes an ordering from it.
    pub(crate) struct ModelSlot {
        lines: Mutex<Vec<Arc<Line>>>,
        installed: AtomicUsize,
    }

    impl Default for ModelSlot {
        fn default() -> Self {
            ModelSlot { lines: Mutex::default(), installed: AtomicUsize::new(0) }
        }
    }

    impl Slot for ModelSlot {
        fn load(&self) -> Option<Arc<Line>> {
            let installed = self.installed.load(Ordering::Acquire);
            let lines = self.lines.lock().unwrap();
            installed.checked_sub(1).map(|index| lines[index].clone())
        }

        fn store(&self, line: Option<Arc<Line>>) {
            let installed = match line {
                None => 0,
                Some(line) => {
                    let mut lines = self.lines.lock().unwrap();
                    lines.push(line);
                    lines.len()
                }
            };
            self.installed.swap(installed, Ordering::AcqRel);
        }
    }
}
