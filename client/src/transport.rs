//! The driver's side of virtio over PCI (virtio 1.3 section 4.1).

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use nix::sys::eventfd::EventFd;
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_REGION_INFO_FLAG_MMAP,
};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_F_VERSION_1,
};

use crate::mapping::Mapping;
use crate::registers::CommonRegister::{self, *};
use crate::{Client, Doorbell, Error, NotifyMethod, PciCapabilities, Window};

/// No interrupt for this event (`VIRTIO_MSI_NO_VECTOR`).
pub const NO_VECTOR: u16 = 0xffff;

const PCI_COMMAND: u64 = 0x04;
const PCI_COMMAND_MEMORY_AND_BUS_MASTER: u16 = 0x6;
const MSIX_CONTROL: u64 = 2;
const MSIX_CONTROL_ENABLE: u16 = 1 << 15;

/// A virtio device behind a PCI function, driven over a vfio-user connection.
pub struct VirtioPci {
    client: Arc<Client>,
    capabilities: PciCapabilities,
}

impl VirtioPci {
    /// Finds the virtio structures, and lets the function decode memory accesses and do DMA.
    ///
    /// # Errors
    /// [`Error::Device`] for a function that is not a modern virtio device, and those of the
    /// connection.
    pub fn new(client: Arc<Client>) -> Result<VirtioPci, Error> {
        let mut config = [0; 256];
        client.region_read(VFIO_PCI_CONFIG_REGION_INDEX, 0, &mut config)?;
        let capabilities = PciCapabilities::parse(&config)?;
        let transport = VirtioPci { client, capabilities };
        transport.update_config_u16(PCI_COMMAND, |command| command | PCI_COMMAND_MEMORY_AND_BUS_MASTER)?;
        Ok(transport)
    }

    /// The connection.
    pub fn client(&self) -> &Arc<Client> {
        &self.client
    }

    /// Where the structures lie.
    pub fn capabilities(&self) -> &PciCapabilities {
        &self.capabilities
    }

    /// Reads a common configuration register.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn read_common(&self, register: CommonRegister) -> Result<u64, Error> {
        let (offset, width) = register.place();
        let mut bytes = [0; 8];
        let field = bytes.get_mut(..width).unwrap_or_default();
        self.read_window(self.capabilities.common, offset, field)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Writes a common configuration register; 64-bit ones in two halves, the low one first, like
    /// Linux.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn write_common(&self, register: CommonRegister, value: u64) -> Result<(), Error> {
        let (offset, width) = register.place();
        let bytes = value.to_le_bytes();
        let field = bytes.get(..width).unwrap_or_default();
        for (half, offset) in field.chunks(4).zip([offset, offset + 4]) {
            self.write_window(self.capabilities.common, offset, half)?;
        }
        Ok(())
    }

    /// Resets the device and waits until it says that it is done (section 4.1.4.3.2).
    ///
    /// # Errors
    /// [`Error::Timeout`], and those of the connection.
    pub fn reset(&self) -> Result<(), Error> {
        self.write_common(DeviceStatus, 0)?;
        self.until_zero(DeviceStatus, "end of the device reset")
    }

    /// Takes the device from reset to `FEATURES_OK`: accepts those of `features` that it offers, and
    /// VERSION_1 (section 3.1.1). Gives what was negotiated.
    ///
    /// # Errors
    /// [`Error::Device`] when the device is not of version 1 or refuses the choice, and those of the
    /// connection.
    pub fn negotiate(&self, features: u64) -> Result<u64, Error> {
        const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
        self.add_status(VIRTIO_CONFIG_S_ACKNOWLEDGE)?;
        self.add_status(VIRTIO_CONFIG_S_DRIVER)?;
        let offered = self.device_features()?;
        if offered & VERSION_1 == 0 {
            return Err(Error::Device("it does not offer VIRTIO_F_VERSION_1"));
        }
        let accepted = offered & features | VERSION_1;
        self.set_driver_features(accepted)?;
        self.add_status(VIRTIO_CONFIG_S_FEATURES_OK)?;
        if self.status()? & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            return Err(Error::Device("it refuses the features"));
        }
        Ok(accepted)
    }

    /// What the device offers.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn device_features(&self) -> Result<u64, Error> {
        let mut features = 0;
        for half in [0, 1] {
            self.write_common(DeviceFeatureSelect, half)?;
            features |= self.read_common(DeviceFeature)? << (32 * half);
        }
        Ok(features)
    }

    /// Writes what the driver accepts.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn set_driver_features(&self, features: u64) -> Result<(), Error> {
        for half in [0, 1] {
            self.write_common(DriverFeatureSelect, half)?;
            self.write_common(DriverFeature, features >> (32 * half) & 0xffff_ffff)?;
        }
        Ok(())
    }

    /// Reads `device_status`, `VIRTIO_CONFIG_S_*`.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn status(&self) -> Result<u32, Error> {
        // The register has one byte.
        self.read_common(DeviceStatus).map(|status| status as u32)
    }

    /// Sets further bits of `device_status`.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn add_status(&self, bits: u32) -> Result<(), Error> {
        let status = self.status()?;
        self.write_common(DeviceStatus, u64::from(status | bits))
    }

    /// Sets `DRIVER_OK`: the device may use its queues.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn driver_ok(&self) -> Result<(), Error> {
        self.add_status(VIRTIO_CONFIG_S_DRIVER_OK)
    }

    /// The most entries that a queue may have; 0 when the device has no such queue.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn max_queue_size(&self, queue: u16) -> Result<u16, Error> {
        self.write_common(QueueSelect, queue.into())?;
        // The register has two bytes.
        self.read_common(QueueSize).map(|size| size as u16)
    }

    /// Sets up a queue of `size` entries and enables it (section 4.1.5.1.3). `areas` are the addresses for `queue_desc`,
    /// `queue_driver` and `queue_device`, `vector` its MSI-X vector or [`NO_VECTOR`].
    ///
    /// # Errors
    /// [`Error::Device`] when the device has no such vector, and those of the connection.
    pub fn enable_queue(&self, queue: u16, size: u16, areas: [u64; 3], vector: u16) -> Result<(), Error> {
        self.write_common(QueueSelect, queue.into())?;
        self.write_common(QueueSize, size.into())?;
        let [descriptors, driver, device] = areas;
        self.write_common(QueueDesc, descriptors)?;
        self.write_common(QueueDriver, driver)?;
        self.write_common(QueueDevice, device)?;
        self.write_vector(QueueMsixVector, vector)?;
        self.write_common(QueueEnable, 1)
    }

    /// Resets a queue and waits until that is done (`VIRTIO_F_RING_RESET`, section 4.1.4.3.2). Its
    /// memory may be used for other things then; the queue can be enabled again.
    ///
    /// # Errors
    /// [`Error::Timeout`], and those of the connection.
    pub fn reset_queue(&self, queue: u16) -> Result<(), Error> {
        self.write_common(QueueSelect, queue.into())?;
        self.write_common(QueueReset, 1)?;
        self.until_zero(QueueReset, "end of the queue reset")
    }

    /// Sets the vector for configuration changes, or [`NO_VECTOR`].
    ///
    /// # Errors
    /// As [`enable_queue`](VirtioPci::enable_queue).
    pub fn set_config_vector(&self, vector: u16) -> Result<(), Error> {
        self.write_vector(ConfigMsixVector, vector)
    }

    /// Attaches eventfds to the MSI-X vectors from 0 on and enables MSI-X. Like QEMU, this writes no
    /// entry of the MSI-X table: a vector counts as unmasked once it has an eventfd.
    ///
    /// # Errors
    /// [`Error::Device`] without MSI-X, and those of the connection.
    pub fn enable_msix(&self, eventfds: &[EventFd]) -> Result<(), Error> {
        let msix = self.capabilities.msix.ok_or(Error::Device("it has no MSI-X"))?;
        let fds: Vec<BorrowedFd<'_>> = eventfds.iter().map(AsFd::as_fd).collect();
        self.client.set_irq_eventfds(VFIO_PCI_MSIX_IRQ_INDEX, 0, &fds)?;
        self.update_config_u16(u64::from(msix.capability) + MSIX_CONTROL, |control| control | MSIX_CONTROL_ENABLE)
    }

    /// Disables MSI-X and detaches all its eventfds.
    ///
    /// # Errors
    /// [`Error::Device`] without MSI-X, and those of the connection.
    pub fn disable_msix(&self) -> Result<(), Error> {
        let msix = self.capabilities.msix.ok_or(Error::Device("it has no MSI-X"))?;
        self.update_config_u16(u64::from(msix.capability) + MSIX_CONTROL, |control| control & !MSIX_CONTROL_ENABLE)?;
        self.client.disable_irqs(VFIO_PCI_MSIX_IRQ_INDEX)
    }

    /// Reads the ISR status, which clears it (section 4.1.4.5).
    ///
    /// # Errors
    /// Those of the connection.
    pub fn read_isr(&self) -> Result<u8, Error> {
        let mut isr = [0];
        self.read_window(self.capabilities.isr, 0, &mut isr)?;
        Ok(u8::from_le_bytes(isr))
    }

    /// Reads device configuration that does not change meanwhile (section 2.5.1).
    ///
    /// # Errors
    /// [`Error::Timeout`] when it changes all the time, [`Error::OutOfRange`], and those of the
    /// connection.
    pub fn read_device_config(&self, offset: u64, out: &mut [u8]) -> Result<(), Error> {
        let limit = self.client.timeout();
        let deadline = Instant::now() + limit;
        let mut generation = self.read_common(ConfigGeneration)?;
        loop {
            self.read_window(self.capabilities.device, offset, out)?;
            let after = self.read_common(ConfigGeneration)?;
            if after == generation {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Error::Timeout { what: "stable configuration", limit });
            }
            generation = after;
        }
    }

    /// Writes device configuration.
    ///
    /// # Errors
    /// [`Error::OutOfRange`], and those of the connection.
    pub fn write_device_config(&self, offset: u64, data: &[u8]) -> Result<(), Error> {
        self.write_window(self.capabilities.device, offset, data)
    }

    /// How the doorbell of a queue is rung (section 4.1.4.4).
    ///
    /// # Errors
    /// [`Error::Device`] when the server does not offer the method, and those of the connection.
    pub fn doorbell(&self, queue: u16, method: NotifyMethod) -> Result<Doorbell, Error> {
        let PciCapabilities { notify, notify_off_multiplier, .. } = self.capabilities;
        self.write_common(QueueSelect, queue.into())?;
        let queue_notify_off = self.read_common(QueueNotifyOff)?;
        let offset = queue_notify_off.saturating_mul(notify_off_multiplier.into());
        if offset.saturating_add(2) > notify.length.into() {
            return Err(Error::Device("a doorbell lies outside of the notification structure"));
        }
        let offset = u64::from(notify.offset) + offset;
        let region = u32::from(notify.bar);
        match method {
            NotifyMethod::Posted | NotifyMethod::Message => {
                let wait = method == NotifyMethod::Message;
                Ok(Doorbell::message(Arc::clone(&self.client), region, offset, wait, queue))
            }
            NotifyMethod::IoEventFd => self.eventfd_doorbell(region, offset, queue),
            NotifyMethod::Mapped => self.mapped_doorbell(region, offset, queue),
        }
    }

    fn eventfd_doorbell(&self, region: u32, offset: u64, queue: u16) -> Result<Doorbell, Error> {
        let (io_fds, mut fds) = self.client.region_io_fds(region)?;
        let sub = io_fds.sub_regions.iter().find(|sub| sub.offset == offset);
        let sub = sub.ok_or(Error::Device("it has no ioeventfd for the queue"))?;
        let index = sub.fd_index as usize;
        if index >= fds.len() {
            return Err(Error::Protocol("an ioeventfd without its file descriptor"));
        }
        Ok(Doorbell::eventfd(fds.swap_remove(index), queue))
    }

    fn mapped_doorbell(&self, region: u32, offset: u64, queue: u16) -> Result<Doorbell, Error> {
        const PAGE: u64 = 4096;
        let (info, fd) = self.client.region_info(region)?;
        let all = vfio_user::SparseMmapArea { offset: 0, size: info.size };
        let areas = if info.sparse_mmap.is_empty() { vec![all] } else { info.sparse_mmap };
        let holds = |area: &&vfio_user::SparseMmapArea| {
            let inside = offset.checked_sub(area.offset);
            inside.is_some_and(|inside| inside.saturating_add(2) <= area.size)
        };
        let mappable = info.flags & VFIO_REGION_INFO_FLAG_MMAP != 0 && areas.iter().any(|area| holds(&area));
        let fd = fd.filter(|_| mappable).ok_or(Error::Device("its doorbells cannot be mapped"))?;
        let page = offset - offset % PAGE;
        let mapping = Mapping::new(fd.as_fd(), info.offset.saturating_add(page), PAGE as usize)?;
        Ok(Doorbell::mapped(mapping.slice((offset - page) as usize, 1)?, queue))
    }

    fn write_vector(&self, register: CommonRegister, vector: u16) -> Result<(), Error> {
        self.write_common(register, vector.into())?;
        if self.read_common(register)? != u64::from(vector) {
            return Err(Error::Device("it has no resources for an interrupt vector"));
        }
        Ok(())
    }

    fn until_zero(&self, register: CommonRegister, what: &'static str) -> Result<(), Error> {
        let limit = self.client.timeout();
        let deadline = Instant::now() + limit;
        while self.read_common(register)? != 0 {
            if Instant::now() >= deadline {
                return Err(Error::Timeout { what, limit });
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    fn update_config_u16(&self, offset: u64, update: impl Fn(u16) -> u16) -> Result<(), Error> {
        let mut bytes = [0; 2];
        self.client.region_read(VFIO_PCI_CONFIG_REGION_INDEX, offset, &mut bytes)?;
        let bytes = update(u16::from_le_bytes(bytes)).to_le_bytes();
        self.client.region_write(VFIO_PCI_CONFIG_REGION_INDEX, offset, &bytes)
    }

    fn read_window(&self, window: Window, offset: u64, out: &mut [u8]) -> Result<(), Error> {
        let offset = within(window, offset, out.len())?;
        self.client.region_read(window.bar.into(), offset, out)
    }

    fn write_window(&self, window: Window, offset: u64, data: &[u8]) -> Result<(), Error> {
        let offset = within(window, offset, data.len())?;
        self.client.region_write(window.bar.into(), offset, data)
    }
}

/// Where an access to a structure lies in its BAR.
fn within(window: Window, offset: u64, len: usize) -> Result<u64, Error> {
    let size = u64::from(window.length);
    if offset.checked_add(len as u64).is_none_or(|end| end > size) {
        let (offset, size) = (offset as usize, size as usize);
        return Err(Error::OutOfRange { offset, len, size });
    }
    Ok(u64::from(window.offset) + offset)
}
