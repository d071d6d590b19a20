//! The interrupts of a function: who signals, who masks, and where the signal goes.
//!
//! The data path calls [`Interrupts::signal`] and [`Interrupts::assert_intx`], both lock-free. The
//! session calls the rest, whose meaning is that of VFIO's `SET_IRQS`.

mod intx;
mod msix;
mod slot;
mod vector;

use std::ops::Range;
use std::sync::Arc;

use thiserror::Error;

use self::intx::Intx;
use self::msix::{ENTRY, ENTRY_WRITABLE, Msix};
use self::slot::Line;
use crate::region::{AccessError, Region};
use crate::state::{FunctionState, ImportError, MsixEntryState};

/// The BAR that holds the MSI-X table and the Pending Bit Array.
pub const MSIX_BAR: Region = Region::Bar0;

/// The table and the Pending Bit Array have a page each, as clients that map or trap pages like it.
pub(crate) const MSIX_TABLE: u32 = 0;
pub(crate) const MSIX_PBA: u32 = 0x1000;
pub(crate) const MSIX_BAR_SIZE: u32 = 0x2000;

/// Somebody's interrupt line: an eventfd, or a counter in a test.
///
/// `signal` is called from any thread, also in the middle of a call to [`Interrupts`], which it must
/// therefore not call itself. It must not block.
pub trait Interrupt: Send + Sync {
    /// Signals the line once.
    fn signal(&self);
}

/// A kind of interrupt, as VFIO numbers them (`VFIO_PCI_*_IRQ_INDEX`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Irq {
    /// The legacy interrupt pin, index 0: one line.
    Intx = 0,
    /// MSI-X, index 2: one line a vector.
    Msix = 2,
}

/// An interrupt that the function does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the function has no {irq:?} interrupt {vector}: it has {count}")]
pub struct NoSuchInterrupt {
    /// The kind.
    pub irq: Irq,
    /// The number asked for.
    pub vector: u32,
    /// How many there are, numbered from 0.
    pub count: u32,
}

/// The interrupts of one function.
pub struct Interrupts {
    msix: Msix,
    intx: Intx,
}

impl Interrupts {
    /// The largest number of MSI-X vectors, those whose table fills its page.
    pub const MAX_VECTORS: u16 = (MSIX_PBA - MSIX_TABLE) as u16 / ENTRY as u16;

    /// Interrupts with this many MSI-X vectors, brought into 1..=[`Interrupts::MAX_VECTORS`].
    pub fn new(vectors: u16) -> Interrupts {
        let vectors = vectors.clamp(1, Self::MAX_VECTORS);
        Interrupts { msix: Msix::new(vectors), intx: Intx::new() }
    }

    /// How many interrupts of a kind there are.
    pub fn count(&self, irq: Irq) -> u32 {
        match irq {
            Irq::Intx => 1,
            Irq::Msix => self.msix.count() as u32,
        }
    }

    /// Signals an MSI-X vector: its line if one is installed and nothing masks it, its pending bit
    /// otherwise. A vector that does not exist is ignored.
    pub fn signal(&self, vector: u16) {
        self.msix.signal(usize::from(vector));
    }

    /// Sets causes of the legacy interrupt, which is asserted while there are any.
    pub fn assert_intx(&self, causes: u8) {
        self.intx.assert(causes);
    }

    /// Takes all causes of the legacy interrupt, which deasserts it.
    pub fn acknowledge_intx(&self) -> u8 {
        self.intx.acknowledge()
    }

    /// Whether interrupts go by MSI-X rather than by INTx: the enable bit is set, or the client
    /// installed a line of a vector, which is all that a client with an MSI-X capability of its own
    /// does here.
    pub fn msix_in_use(&self) -> bool {
        self.msix.in_use()
    }

    /// Installs a line, replaces it or removes it. When this returns, the line that was there
    /// before carries no signal that its owner still needs to look for.
    pub fn set_line(&self, irq: Irq, vector: u32, line: Option<Arc<dyn Interrupt>>) -> Result<(), NoSuchInterrupt> {
        let number = self.check(irq, vector)?;
        let line = line.map(Line::new);
        match irq {
            Irq::Intx => self.intx.install(line),
            Irq::Msix => self.msix.install(number, line),
        }
        Ok(())
    }

    /// Whether a line of an MSI-X vector is installed, by which its signals arrive. A vector that does not exist has none.
    pub fn has_line(&self, vector: u16) -> bool {
        self.msix.has_line(usize::from(vector))
    }

    /// Masks an interrupt until it is unmasked or its kind disabled.
    pub fn mask(&self, irq: Irq, vector: u32) -> Result<(), NoSuchInterrupt> {
        let number = self.check(irq, vector)?;
        match irq {
            Irq::Intx => self.intx.mask(),
            Irq::Msix => self.msix.set_masked(number, true),
        }
        Ok(())
    }

    /// Unmasks an interrupt. Delivers what is pending, and signals INTx again if it is still
    /// asserted.
    pub fn unmask(&self, irq: Irq, vector: u32) -> Result<(), NoSuchInterrupt> {
        let number = self.check(irq, vector)?;
        match irq {
            Irq::Intx => self.intx.unmask(),
            Irq::Msix => self.msix.set_masked(number, false),
        }
        Ok(())
    }

    /// Signals an interrupt as if the function had, for a client that tests its lines.
    pub fn trigger(&self, irq: Irq, vector: u32) -> Result<(), NoSuchInterrupt> {
        let number = self.check(irq, vector)?;
        match irq {
            Irq::Intx => self.intx.trigger(),
            Irq::Msix => self.msix.signal(number),
        }
        Ok(())
    }

    /// Removes all lines of a kind and the client's masks.
    pub fn disable(&self, irq: Irq) {
        match irq {
            Irq::Intx => {
                self.intx.install(None);
                self.intx.unmask();
            }
            Irq::Msix => self.msix.remove_lines(false),
        }
    }

    /// Removes all lines and masks of a client that is gone. Which kind is in use stays as it was,
    /// so that what happens until the next client comes is kept for it.
    pub fn disconnect(&self) {
        self.disable(Irq::Intx);
        self.msix.remove_lines(true);
    }

    /// Forgets the interrupts that wait for delivery, as the reset of a device does. Nobody signals
    /// meanwhile.
    pub fn forget(&self) {
        self.msix.clear_pending();
        self.intx.acknowledge();
    }

    /// Reads from [`MSIX_BAR`].
    pub fn read_msix(&self, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        let range = MSIX_BAR.range(MSIX_BAR_SIZE.into(), offset, data.len())?;
        let (table, pba) = data.split_at_mut(in_table(&range));
        self.msix.read_table(range.start, table);
        self.msix.read_pba(range.start.saturating_sub(MSIX_PBA as usize), pba);
        Ok(())
    }

    /// Writes to [`MSIX_BAR`].
    pub fn write_msix(&self, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        let range = MSIX_BAR.range(MSIX_BAR_SIZE.into(), offset, data.len())?;
        let (table, _read_only) = data.split_at(in_table(&range));
        self.msix.write_table(range.start, table);
        Ok(())
    }

    pub(crate) fn intx_asserted(&self) -> bool {
        self.intx.causes() != 0
    }

    pub(crate) fn set_intx_disabled(&self, disabled: bool) {
        self.intx.set_disabled(disabled);
    }

    pub(crate) fn set_msix_control(&self, enabled: bool, function_mask: bool) {
        self.msix.set_control(enabled, function_mask);
    }

    /// Everything but the lines and masks of the client, which outlive a reset.
    pub(crate) fn reset(&self) {
        self.intx.acknowledge();
        self.msix.reset();
    }

    pub(crate) fn export(&self) -> (u8, bool, Vec<MsixEntryState>) {
        let (armed, entries) = self.msix.export();
        (self.intx.causes(), armed, entries)
    }

    pub(crate) fn check_import(&self, state: &FunctionState) -> Result<(), ImportError> {
        if state.msix_table.len() != self.msix.count() {
            return Err(ImportError::Vectors { got: state.msix_table.len(), expected: self.msix.count() });
        }
        for (vector, entry) in state.msix_table.iter().enumerate() {
            let mut bytes = entry.registers.iter().zip(ENTRY_WRITABLE);
            if bytes.any(|(byte, writable)| byte & !writable != 0) {
                return Err(ImportError::ReservedEntryBits { vector });
            }
        }
        Ok(())
    }

    /// Takes over a state that [`Interrupts::check_import`] accepted.
    pub(crate) fn import(&self, state: &FunctionState) {
        self.intx.acknowledge();
        self.intx.assert(state.intx_causes);
        self.msix.import(state.msix_armed, &state.msix_table);
    }

    fn check(&self, irq: Irq, vector: u32) -> Result<usize, NoSuchInterrupt> {
        let count = self.count(irq);
        usize::try_from(vector).ok().filter(|_| vector < count).ok_or(NoSuchInterrupt { irq, vector, count })
    }
}

/// How many bytes of a range in the BAR belong to the table's page.
fn in_table(range: &Range<usize>) -> usize {
    range.len().min((MSIX_PBA as usize).saturating_sub(range.start))
}

#[cfg(test)]
#[cfg(not(loom))]
pub(crate) mod testing {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::Interrupt;

    /// A line that counts its signals.
    #[derive(Default)]
    pub(crate) struct Counter(AtomicUsize);

    impl Counter {
        pub(crate) fn new() -> Arc<Counter> {
            Arc::default()
        }

        pub(crate) fn count(&self) -> usize {
            self.0.load(Ordering::SeqCst)
        }
    }

    impl Interrupt for Counter {
        fn signal(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests;
