//! How the device interrupts the driver (virtio 1.3, section 4.1.5): an MSI-X vector that the driver
//! chose, or a bit of the ISR status and INTx.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use pci::{Interrupt, Interrupts, Irq};

/// VIRTIO_MSI_NO_VECTOR: the event has no vector, and interrupts nobody.
pub(super) const NO_VECTOR: u16 = 0xffff;

/// The ISR status bits (section 4.1.4.5): a queue has used buffers, the configuration changed.
pub(super) const ISR_QUEUE: u8 = 1;
pub(super) const ISR_CONFIG: u8 = 2;

/// One source of interrupts: a queue, or the configuration. The ISR status register is the set of
/// causes of INTx, so that its bits and the level can't disagree.
pub(super) struct Source {
    interrupts: Arc<Interrupts>,
    isr: u8,
    vector: AtomicU16,
}

impl Source {
    pub(super) fn new(interrupts: &Arc<Interrupts>, isr: u8) -> Arc<Source> {
        let vector = AtomicU16::new(NO_VECTOR);
        Arc::new(Source { interrupts: interrupts.clone(), isr, vector })
    }

    /// The vector that the driver chose: config_msix_vector or queue_msix_vector.
    pub(super) fn vector(&self) -> u16 {
        self.vector.load(Ordering::Acquire)
    }

    /// Sets the vector; one that the function does not have becomes NO_VECTOR, by which the driver
    /// learns of the failure (section 4.1.5.1.2.1).
    pub(super) fn set_vector(&self, vector: u16) {
        let exists = u32::from(vector) < self.interrupts.count(Irq::Msix);
        self.vector.store(if exists { vector } else { NO_VECTOR }, Ordering::Release);
    }
}

impl Interrupt for Source {
    fn signal(&self) {
        if self.interrupts.msix_in_use() {
            // NO_VECTOR is no vector of the function, which ignores it.
            self.interrupts.signal(self.vector());
        } else {
            self.interrupts.assert_intx(self.isr);
        }
    }
}
