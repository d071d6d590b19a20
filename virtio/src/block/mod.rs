//! The block device (virtio 1.3 §5.2): its configuration and its requests.

mod config;
mod request;

pub use config::{BlockConfig, BlockDevice, Discard, SERIAL_LEN, SharedConfig, WriteZeroes};
pub use request::{Limits, Operation, Request, RequestError, Status, parse};

/// Bytes of a sector, the unit of addresses and lengths, whatever the block size.
pub const SECTOR: u64 = 512;
