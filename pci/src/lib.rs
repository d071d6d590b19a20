//! A PCI function as a pure state machine: config space, BARs, capabilities, MSI-X and INTx.
//!
//! A function is a set of [`Region`]s that a client reads and writes. What a write asks of whoever
//! drives the function comes back as an [`Effect`]: data, not a callback, so that a test can be a
//! table. The interrupts are the one part that other threads touch: [`Interrupts`] is shared by
//! `Arc` with the data path, which signals, while the session that serves the client installs,
//! masks and removes the lines.
//!
//! The crate knows no file descriptor, no thread and no virtio.

#![forbid(unsafe_code)]
// What comes from outside must not be able to panic or to overflow.
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::string_slice,
        clippy::todo,
        clippy::unimplemented,
        clippy::unreachable,
        clippy::unwrap_used
    )
)]

mod config;
mod interrupts;
mod region;
mod state;
mod sync;

pub use config::{BuildError, Capability, ConfigSpace, ConfigSpaceBuilder, Identity};
pub use interrupts::{Interrupt, Interrupts, Irq, MSIX_BAR, NoSuchInterrupt};
pub use region::{AccessError, Region};
pub use state::{FunctionState, ImportError, MsixEntryState};

/// A PCI function as its client sees it: regions that are read and written.
///
/// Offsets and lengths come from outside and may be anything: unaligned, across registers, a whole
/// region at once. An access that does not lie within its region is an [`AccessError`] and changes
/// nothing; reserved space reads as zero and ignores writes.
pub trait PciFunction {
    /// The size in bytes of every region, by [`Region`] index; 0 means that there is no such region.
    fn regions(&self) -> [u64; Region::COUNT];

    /// Reads `data.len()` bytes at `offset` of `region`. A read may have the side effects that the
    /// register's specification gives it.
    fn read(&mut self, region: Region, offset: u64, data: &mut [u8]) -> Result<(), AccessError>;

    /// Writes `data` at `offset` of `region` and says what the write asks for.
    fn write(&mut self, region: Region, offset: u64, data: &[u8]) -> Result<Effect, AccessError>;

    /// Returns every register to its reset value, as a conventional reset does. The caller has
    /// stopped the function's queues before. Installed interrupt lines stay installed: they belong
    /// to the client, not to the function.
    fn reset(&mut self);
}

/// What a write to a function asks of whoever drives it. A write gives at most one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "an effect that nobody acts on is a kick or a reset that the driver waits for"]
pub enum Effect {
    /// Nothing beyond the registers.
    None,
    /// The driver made buffers available in this queue.
    Kick(u16),
    /// The function may run its enabled queues from now on.
    Start,
    /// The function must pause all its queues: it may no longer touch memory.
    Stop,
    /// This queue became ready while the function runs.
    StartQueue(u16),
    /// The driver asked for a reset of this queue alone: stop it, then report it stopped.
    StopQueue(u16),
    /// The driver asked for a reset of the device: stop everything, then report it done.
    Reset,
}
