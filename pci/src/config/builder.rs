//! Declares a configuration space: who the function is, its BARs and its capabilities.

use std::sync::Arc;

use thiserror::Error;

use super::registers::{Registers, SIZE};
use super::{
    COMMAND, COMMAND_BUS_MASTER, COMMAND_INTX_DISABLE, COMMAND_MEMORY_SPACE, ConfigSpace, MSIX_CAPABILITY,
    MSIX_CONTROL, MSIX_ENABLE, MSIX_FUNCTION_MASK, STATUS, STATUS_CAPABILITY_LIST, STATUS_ERRORS,
};
use crate::interrupts::{Interrupts, Irq, MSIX_BAR, MSIX_BAR_SIZE, MSIX_PBA, MSIX_TABLE};
use crate::region::Region;

const VENDOR_ID: usize = 0x00;
const DEVICE_ID: usize = 0x02;
const REVISION_ID: usize = 0x08;
const CACHE_LINE_SIZE: usize = 0x0c;
const LATENCY_TIMER: usize = 0x0d;
const BARS: usize = 0x10;
const SUBSYSTEM_VENDOR_ID: usize = 0x2c;
const SUBSYSTEM_ID: usize = 0x2e;
const CAPABILITIES_POINTER: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
const INTERRUPT_PIN_INTA: u8 = 1;

const CAPABILITY_ID_MSIX: u8 = 0x11;
const MSIX_CAPABILITY_LENGTH: usize = 12;

/// The smallest memory BAR in bytes (6.2.5.1).
const MIN_BAR_SIZE: u32 = 16;

/// Who a function is: the identification registers of the header (6.2.1, 6.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor_id: u16,
    /// Device ID.
    pub device_id: u16,
    /// Revision ID.
    pub revision_id: u8,
    /// Base class, sub-class and programming interface, most significant of three bytes first.
    pub class_code: u32,
    /// Subsystem Vendor ID.
    pub subsystem_vendor_id: u16,
    /// Subsystem ID.
    pub subsystem_id: u16,
}

/// A capability: what follows its ID and its pointer to the next one.
#[derive(Clone, Copy, Debug)]
pub struct Capability<'a> {
    /// Capability ID.
    pub id: u8,
    /// The bytes from offset 2 on.
    pub body: &'a [u8],
    /// Which bits of `body` a client may write; missing bytes are read-only.
    pub writable: &'a [u8],
}

/// Why a configuration space can't be built. A mistake of whoever declares the function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum BuildError {
    /// The BAR index.
    #[error("{0:?} can't be declared: it is no BAR, or has been declared before")]
    Bar(Region),
    /// The BAR size.
    #[error("{bar:?} can't have {size:#x} bytes: memory BARs have a power of two of at least 16")]
    BarSize {
        /// The BAR.
        bar: Region,
        /// The size in bytes.
        size: u32,
    },
    /// The capability list.
    #[error("capability {id:#x} of {length} bytes does not fit behind {offset:#x}")]
    CapabilitySpace {
        /// The capability ID.
        id: u8,
        /// Its length in bytes.
        length: usize,
        /// The first free offset.
        offset: usize,
    },
}

/// A configuration space under construction. Has BAR 0 and the MSI-X capability from the start.
pub struct ConfigSpaceBuilder {
    space: ConfigSpace,
    /// Where the pointer to the next capability goes.
    link: usize,
    /// The first free byte.
    free: usize,
}

impl ConfigSpaceBuilder {
    pub(super) fn new(identity: &Identity, interrupts: Arc<Interrupts>) -> ConfigSpaceBuilder {
        let mut registers = Registers::new();
        let mut declare = |offset, value: &[u8], writable: &[u8]| {
            registers.declare(offset, value);
            registers.declare_writable(offset, writable);
        };
        let command = COMMAND_MEMORY_SPACE | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
        let [_, class, sub_class, interface] = identity.class_code.to_be_bytes();
        declare(VENDOR_ID, &identity.vendor_id.to_le_bytes(), &[]);
        declare(DEVICE_ID, &identity.device_id.to_le_bytes(), &[]);
        declare(COMMAND, &[0, 0], &command.to_le_bytes());
        declare(STATUS, &STATUS_CAPABILITY_LIST.to_le_bytes(), &[]);
        declare(REVISION_ID, &[identity.revision_id, interface, sub_class, class], &[]);
        declare(CACHE_LINE_SIZE, &[0], &[0xff]);
        declare(LATENCY_TIMER, &[0], &[0xff]);
        declare(SUBSYSTEM_VENDOR_ID, &identity.subsystem_vendor_id.to_le_bytes(), &[]);
        declare(SUBSYSTEM_ID, &identity.subsystem_id.to_le_bytes(), &[]);
        declare(CAPABILITIES_POINTER, &[MSIX_CAPABILITY as u8], &[]);
        declare(INTERRUPT_LINE, &[0], &[0xff]);
        declare(INTERRUPT_PIN, &[INTERRUPT_PIN_INTA], &[]);

        // Table offset and PBA offset carry the BAR in their low three bits.
        let bar = MSIX_BAR.index() as u32;
        let last_vector = interrupts.count(Irq::Msix).saturating_sub(1) as u16;
        declare(MSIX_CAPABILITY, &[CAPABILITY_ID_MSIX, 0], &[]);
        declare(MSIX_CONTROL, &last_vector.to_le_bytes(), &(MSIX_ENABLE | MSIX_FUNCTION_MASK).to_le_bytes());
        declare(MSIX_CAPABILITY + 4, &(MSIX_TABLE | bar).to_le_bytes(), &[]);
        declare(MSIX_CAPABILITY + 8, &(MSIX_PBA | bar).to_le_bytes(), &[]);
        registers.declare_write_one_to_clear(STATUS, &STATUS_ERRORS.to_le_bytes());

        let mut builder = ConfigSpaceBuilder {
            space: ConfigSpace { registers, bars: [0; 6], interrupts },
            link: MSIX_CAPABILITY + 1,
            free: MSIX_CAPABILITY + MSIX_CAPABILITY_LENGTH,
        };
        builder.declare_bar(MSIX_BAR.index(), MSIX_BAR_SIZE);
        builder
    }

    /// Declares a 32-bit memory BAR of `size` bytes, not prefetchable. A driver finds the size by
    /// writing ones and reading which of them stick (6.2.5.1).
    pub fn bar(&mut self, bar: Region, size: u32) -> Result<(), BuildError> {
        match self.space.bars.get(bar.index()) {
            Some(0) => {}
            _ => return Err(BuildError::Bar(bar)),
        }
        if !size.is_power_of_two() || size < MIN_BAR_SIZE {
            return Err(BuildError::BarSize { bar, size });
        }
        self.declare_bar(bar.index(), size);
        Ok(())
    }

    /// Appends a capability to the list and returns its offset.
    pub fn capability(&mut self, capability: Capability<'_>) -> Result<usize, BuildError> {
        let Capability { id, body, writable } = capability;
        let offset = self.free;
        let (link, start) = (offset.saturating_add(1), offset.saturating_add(2));
        // Capabilities start at multiples of 4 (6.7).
        let end = start.saturating_add(body.len()).checked_next_multiple_of(4);
        let Some(end) = end.filter(|end| *end <= SIZE) else {
            return Err(BuildError::CapabilitySpace { id, length: body.len().saturating_add(2), offset });
        };
        let registers = &mut self.space.registers;
        registers.declare(offset, &[id, 0]);
        registers.declare(start, body);
        registers.declare_writable(start, writable.get(..body.len()).unwrap_or(writable));
        registers.declare(self.link, &[offset as u8]);
        self.link = link;
        self.free = end;
        Ok(offset)
    }

    /// The configuration space, out of reset.
    pub fn build(self) -> ConfigSpace {
        self.space
    }

    fn declare_bar(&mut self, bar: usize, size: u32) {
        let registers = (BARS..).step_by(4);
        if let Some((slot, register)) = self.space.bars.iter_mut().zip(registers).nth(bar) {
            *slot = size;
            let writable = !size.wrapping_sub(1);
            self.space.registers.declare_writable(register, &writable.to_le_bytes());
        }
    }
}
