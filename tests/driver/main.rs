//! A served device, driven without a VM: what a client and a guest's driver may do to it, and what comes of that.
//!
//! Most tests start a server in this process ([`rig`]); where the process itself matters, its log, its descriptors, its
//! exit, they run the binary ([`binary`]). Nothing here waits for time to pass: each test waits for what must happen, and
//! a generous limit only keeps a defect from hanging it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failure is the result of a test")]

mod binary;
mod block_devices;
mod control;
mod crash;
mod disconnect;
mod dma;
mod doctor;
mod fabric;
mod faults;
mod hostile;
mod images;
mod interrupts;
mod io;
mod limits;
mod live;
mod live_faults;
mod metrics;
mod nbd;
#[cfg(feature = "psk")]
mod nbd_psk;
mod notifications;
mod on_error;
mod overlay;
mod pci;
mod peer;
mod power_cut;
mod process;
mod protocol;
mod requests;
mod resize;
mod rig;
mod sandbox;
mod scale;
mod service;
mod storage_faults;
mod top;
mod transport;
mod waiting;
mod words;
mod workers;
mod workload;
