//! The vfio-user protocol: what goes over the socket between a VMM (the client) and a device in
//! another process (the server).
//!
//! The crate knows the wire and nothing of what stands behind it. It has two layers:
//!
//! - **Layouts.** [`Header`], [`Request`] and [`Reply`] translate between bytes and types. Decoding
//!   is total: any bytes give a value or the errno to answer with.
//! - **Framing.** A [`Connection`] cuts the byte stream of a non-blocking socket into messages,
//!   gives each message exactly the file descriptors that came with it, and stays in step with the
//!   peer whatever the peer sends.
//!
//! All integers are in the byte order of the host, all sizes are in bytes. The names and the section
//! titles cited here are those of the vfio-user specification (`docs/interop/vfio-user.rst` in QEMU).

#![deny(unsafe_code)]
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

mod command;
mod connection;
mod device;
mod dma;
mod fds;
mod fields;
mod header;
mod irq;
mod receive;
mod region;
mod reply;
mod request;
mod send;
mod version;

pub use command::Command;
pub use connection::{Connection, ConnectionError, Limits};
pub use device::DeviceInfo;
pub use dma::{DmaMap, DmaUnmap};
pub use header::{Header, MessageType, ReplyTo};
pub use irq::{IrqAction, IrqData, IrqInfo, SetIrqs};
pub use nix::errno::Errno;
pub use receive::{Received, Receiver};
pub use region::{IoEventFd, RegionData, RegionInfo, RegionIoFds, RegionSpan, RegionWrites, SparseMmapArea};
pub use reply::Reply;
pub use request::Request;
pub use send::Sender;
pub use version::{Capabilities, Migration, Version};

/// The largest `count` of a data transfer message when VERSION names no other
/// (section "VFIO_USER_VERSION", `max_data_xfer_size`).
pub const DEFAULT_MAX_DATA_XFER_SIZE: u32 = 1 << 20;
