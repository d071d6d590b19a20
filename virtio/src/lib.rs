//! What the virtio 1.3 specification says, and no more: guest memory, virtqueues, the PCI transport and the
//! block device. Knows no socket, no thread and no store.

pub mod block;
pub mod device;
pub mod memory;
pub mod queue;
pub mod transport;
