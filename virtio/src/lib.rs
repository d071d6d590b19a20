//! What the virtio 1.3 specification says, and no more: guest memory, virtqueues, the PCI transport and the
//! block device. Knows no socket, no thread and no store.

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

pub mod block;
pub mod device;
pub mod memory;
pub mod queue;
pub mod transport;
