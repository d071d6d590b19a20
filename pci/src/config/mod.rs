//! The configuration space of a conventional PCI function: the type 0 header, BARs and capabilities.
//!
//! Section numbers are those of the PCI Local Bus Specification 3.0, chapter 6.

mod builder;
mod registers;

use std::sync::Arc;

pub use self::builder::{BuildError, Capability, ConfigSpaceBuilder, Identity};
use self::registers::{Registers, SIZE};
use crate::interrupts::Interrupts;
use crate::region::{AccessError, Region};
use crate::state::{FunctionState, ImportError};

const COMMAND: usize = 0x04;
const COMMAND_MEMORY_SPACE: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;

const STATUS: usize = 0x06;
const STATUS_INTERRUPT: u8 = 1 << 3;
const STATUS_CAPABILITY_LIST: u16 = 1 << 4;
/// Parity errors, aborts and system errors (6.2.3).
const STATUS_ERRORS: u16 = 0xf900;

/// The MSI-X capability comes first; its message control follows its header (6.8.2.3).
const MSIX_CAPABILITY: usize = 0x40;
const MSIX_CONTROL: usize = MSIX_CAPABILITY + 2;
const MSIX_FUNCTION_MASK: u16 = 1 << 14;
const MSIX_ENABLE: u16 = 1 << 15;

/// The configuration space of one function, which governs its [`Interrupts`].
pub struct ConfigSpace {
    registers: Registers,
    /// The size of each BAR in bytes, 0 if absent.
    bars: [u32; 6],
    interrupts: Arc<Interrupts>,
}

impl ConfigSpace {
    /// Starts a configuration space for a function with these interrupts.
    pub fn builder(identity: &Identity, interrupts: Arc<Interrupts>) -> ConfigSpaceBuilder {
        ConfigSpaceBuilder::new(identity, interrupts)
    }

    /// The size in bytes of every region, by index.
    pub fn regions(&self) -> [u64; Region::COUNT] {
        Region::ALL.map(|region| match region {
            Region::Config => SIZE as u64,
            bar => self.bars.get(bar.index()).copied().unwrap_or(0).into(),
        })
    }

    /// Reads `data.len()` bytes at `offset`.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        let range = Region::Config.range(SIZE as u64, offset, data.len())?;
        let status = STATUS.checked_sub(range.start);
        data.copy_from_slice(self.registers.bytes(range));
        if let Some(status) = status.and_then(|at| data.get_mut(at))
            && self.interrupts.intx_asserted()
        {
            *status |= STATUS_INTERRUPT;
        }
        Ok(())
    }

    /// Writes `data` at `offset`; read-only bits keep their value.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        let range = Region::Config.range(SIZE as u64, offset, data.len())?;
        let before = (self.registers.u16(COMMAND), self.registers.u16(MSIX_CONTROL));
        self.registers.write(range.start, data);
        let after = (self.registers.u16(COMMAND), self.registers.u16(MSIX_CONTROL));
        if before != after {
            self.govern_interrupts();
        }
        Ok(())
    }

    /// Whether the function may read and write memory (Bus Master Enable).
    pub fn bus_master(&self) -> bool {
        self.registers.u16(COMMAND) & COMMAND_BUS_MASTER != 0
    }

    /// The bytes at `offset` as the client last left them, cut off at the end of the space. For a
    /// capability whose writable bytes its owner follows.
    pub fn load(&self, offset: usize, length: usize) -> &[u8] {
        self.registers.bytes(offset..offset.saturating_add(length))
    }

    /// Puts bytes at `offset`, writable or not. For the live bytes of a capability: the bits that
    /// change must be declared writable, for `import` to accept them.
    pub fn store(&mut self, offset: usize, data: &[u8]) {
        self.registers.store(offset, data);
    }

    /// Returns the registers and the interrupts to their reset values; installed lines stay.
    pub fn reset(&mut self) {
        self.registers.reset();
        self.interrupts.reset();
        self.govern_interrupts();
    }

    /// The function's registers, MSI-X table and pending interrupts.
    pub fn export(&self) -> FunctionState {
        let (intx_causes, msix_armed, msix_table) = self.interrupts.export();
        FunctionState {
            version: FunctionState::VERSION,
            config: self.registers.bytes(0..SIZE).to_vec(),
            intx_causes,
            msix_armed,
            msix_table,
        }
    }

    /// Takes over a state, whoever it comes from: one that is not this function's, or that no
    /// function could have, is refused and changes nothing. Delivers what is pending if a line is
    /// installed. Nobody signals meanwhile.
    pub fn import(&mut self, state: &FunctionState) -> Result<(), ImportError> {
        let config = self.check(state)?;
        self.registers = config;
        self.govern_interrupts();
        self.interrupts.import(state);
        Ok(())
    }

    /// Whether `import` would accept a state.
    pub fn check_import(&self, state: &FunctionState) -> Result<(), ImportError> {
        self.check(state).map(drop)
    }

    fn check(&self, state: &FunctionState) -> Result<Registers, ImportError> {
        if state.version != FunctionState::VERSION {
            return Err(ImportError::Version { got: state.version });
        }
        let bytes = <&[u8; SIZE]>::try_from(state.config.as_slice())
            .map_err(|_| ImportError::ConfigLength { got: state.config.len() })?;
        let mut registers = self.registers.clone();
        registers.import(bytes).map_err(|offset| ImportError::ReadOnly { offset })?;
        self.interrupts.check_import(state)?;
        Ok(registers)
    }

    fn govern_interrupts(&self) {
        let command = self.registers.u16(COMMAND);
        self.interrupts.set_intx_disabled(command & COMMAND_INTX_DISABLE != 0);
        let control = self.registers.u16(MSIX_CONTROL);
        self.interrupts.set_msix_control(control & MSIX_ENABLE != 0, control & MSIX_FUNCTION_MASK != 0);
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests;
