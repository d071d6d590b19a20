//! A user-space vfio-user server that presents a virtio-blk PCI function to QEMU's `vfio-user-pci` device and to any
//! other client of the protocol.
//!
//! [`Server`] opens the devices of a [`config::ServerConfig`] and serves them until it is told to stop. ARCHITECTURE.md,
//! beside the sources, follows one request from the doorbell to the interrupt.

pub mod backend;
mod block;
pub mod config;
pub mod control;
mod device;
mod devices;
mod diagnosis;
mod doorbell_page;
mod faults;
mod growing;
mod inherited;
mod listener;
mod metrics;
mod sandbox;
mod server;
mod session;
mod status;
mod store;
mod worker;

pub use inherited::{InheritedError, InheritedSockets};
pub use listener::ListenError;
pub use sandbox::{Sandbox, SandboxError};
pub use server::{OpenError, ServeError, Server, StopHandle};
pub use store::{StoreError, describe};
pub use worker::PoolError;
