//! Telling the device that a queue has new chains.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use nix::errno::Errno;

use crate::{Client, Error, SharedSlice};

/// How a queue notification goes to the device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum NotifyMethod {
    /// REGION_WRITE without reply: what QEMU does for a device that has no mappable region.
    #[default]
    Posted,
    /// REGION_WRITE with reply.
    Message,
    /// An eventfd of DEVICE_GET_REGION_IO_FDS: what a VMM does that hands ioeventfds to KVM.
    IoEventFd,
    /// A store to the mapped doorbell.
    Mapped,
}

/// The doorbell of one queue.
pub struct Doorbell {
    queue: u16,
    way: Way,
}

enum Way {
    Message { client: Arc<Client>, region: u32, offset: u64, wait: bool },
    EventFd(File),
    Mapped(SharedSlice<AtomicU16>),
}

impl Doorbell {
    pub(crate) fn message(client: Arc<Client>, region: u32, offset: u64, wait: bool, queue: u16) -> Doorbell {
        Doorbell { queue, way: Way::Message { client, region, offset, wait } }
    }

    pub(crate) fn eventfd(fd: OwnedFd, queue: u16) -> Doorbell {
        Doorbell { queue, way: Way::EventFd(File::from(fd)) }
    }

    pub(crate) fn mapped(field: SharedSlice<AtomicU16>, queue: u16) -> Doorbell {
        Doorbell { queue, way: Way::Mapped(field) }
    }

    /// Rings: the device will look at the queue.
    ///
    /// # Errors
    /// Those of the connection, or [`Error::System`] for an eventfd.
    pub fn ring(&self) -> Result<(), Error> {
        let value = self.queue.to_le();
        match &self.way {
            Way::Message { client, region, offset, wait: false } => {
                client.region_post(*region, *offset, &value.to_ne_bytes())
            }
            Way::Message { client, region, offset, wait: true } => {
                client.region_write(*region, *offset, &value.to_ne_bytes())
            }
            Way::EventFd(eventfd) => match (&mut &*eventfd).write_all(&1u64.to_ne_bytes()) {
                // The counter is at its largest: the device has plenty to wake up for.
                Err(error) if error.kind() != ErrorKind::WouldBlock => {
                    let source = Errno::from_raw(error.raw_os_error().unwrap_or_default());
                    Err(Error::System { action: "signal an ioeventfd", source })
                }
                _ => Ok(()),
            },
            Way::Mapped(field) => {
                // Release: who sees the doorbell sees the chains.
                field.iter().for_each(|field| field.store(value, Ordering::Release));
                Ok(())
            }
        }
    }
}
