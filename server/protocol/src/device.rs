//! What the device is: DEVICE_GET_INFO.

use nix::errno::Errno;

use crate::fields::{Fields, put_u32s};

/// The reply to DEVICE_GET_INFO (section "VFIO_USER_DEVICE_GET_INFO").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceInfo {
    /// `VFIO_DEVICE_FLAGS_RESET`, `VFIO_DEVICE_FLAGS_PCI`.
    pub flags: u32,
    /// How many regions the device has; 8 or 9 for a PCI device.
    pub num_regions: u32,
    /// How many interrupt indexes the device has; 3 to 5 for a PCI device.
    pub num_irqs: u32,
}

impl DeviceInfo {
    /// The size of request and reply.
    pub(crate) const SIZE: u32 = 16;

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        put_u32s(out, &[DeviceInfo::SIZE, self.flags, self.num_regions, self.num_irqs]);
    }

    /// Reads the payload of a reply.
    ///
    /// # Errors
    /// EINVAL when it is too short.
    pub fn decode(payload: &[u8]) -> Result<DeviceInfo, Errno> {
        let mut fields = Fields::new(payload);
        fields.argsz(DeviceInfo::SIZE)?;
        Ok(DeviceInfo { flags: fields.u32()?, num_regions: fields.u32()?, num_irqs: fields.u32()? })
    }
}
