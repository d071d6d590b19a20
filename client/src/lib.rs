//! A vfio-user client and a virtio-blk driver in user space.
//!
//! What a VMM and a guest do to a device, without either, for tests, benchmarks and programs that
//! want a block device of a vfio-user server. The crate knows the specifications (vfio-user,
//! virtio 1.3) and no server. From the socket up:
//!
//! - [`Client`]: one call for each command of the protocol, and messages byte by byte for tests.
//! - [`GuestMemory`]: memory shared with the device, and [`Buffer`]s in it.
//! - [`PciCapabilities`] and [`VirtioPci`]: the windows of a virtio PCI function, its registers and
//!   its life cycle.
//! - [`SplitDriver`] and [`PackedDriver`]: the driver's side of a virtqueue; [`Ring`]: one of them.
//! - [`BlockDriver`] and [`BlockQueue`]: a block device, one queue a thread.
//!
//! ```no_run
//! use std::sync::Arc;
//! use client::{BlockDriver, BlockOptions, Client, GuestMemory};
//!
//! # fn main() -> Result<(), client::Error> {
//! let client = Arc::new(Client::connect("blk0.sock".as_ref())?);
//! let memory = GuestMemory::new(16 << 20, 0x1_0000_0000)?;
//! client.dma_map(&memory.dma_map(), Some(memory.fd()))?;
//! let (_driver, mut queues) = BlockDriver::start(client, &memory, &BlockOptions::default())?;
//! let mut sector = [0; 512];
//! if let Some(queue) = queues.first_mut() {
//!     queue.read(0, &mut sector)?;
//! }
//! # Ok(())
//! # }
//! ```

#![deny(unsafe_code)]

mod block;
mod capabilities;
mod client;
mod doorbell;
mod error;
mod in_flight;
mod indirect;
mod mapping;
mod memory;
mod packed;
mod registers;
mod ring;
mod split;
mod transport;

pub use block::{
    BlockConfig, BlockDriver, BlockOptions, BlockQueue, BlockRequest, Completion, EraseLimits, RequestType, Tag,
    Topology,
};
pub use capabilities::{MsixCapability, PciCapabilities, Window};
pub use client::{Client, RawMessage};
pub use doorbell::{Doorbell, NotifyMethod};
pub use error::Error;
pub use in_flight::Used;
pub use mapping::{Atomic, SharedSlice};
pub use memory::{Buffer, GuestMemory};
pub use packed::{EventSuppression, PackedDescriptor, PackedDriver, PackedMemory};
pub use registers::CommonRegister;
pub use ring::Ring;
pub use split::{Descriptor, Segment, SplitDriver, SplitMemory};
pub use transport::{NO_VECTOR, VirtioPci};
