//! The block device (virtio 1.3 §5.2): its configuration, its requests, and which of them are in flight.

mod config;
mod in_flight;
mod request;

pub use config::{BlockConfig, BlockDevice, Discard, SERIAL_LEN, SharedConfig, WriteZeroes};
pub use in_flight::{InFlight, Pending};
pub use request::{Limits, Operation, Request, RequestError, Status, parse};

/// Bytes of a sector, the unit of addresses and lengths, whatever the block size.
pub const SECTOR: u64 = 512;
