//! Interrupts: DEVICE_GET_IRQ_INFO and DEVICE_SET_IRQS.

use nix::errno::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_TYPE_MASK, VFIO_IRQ_SET_ACTION_UNMASK,
    VFIO_IRQ_SET_DATA_BOOL, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE, VFIO_IRQ_SET_DATA_TYPE_MASK,
};

use crate::fields::{Fields, length, put_u32s};

/// The reply to DEVICE_GET_IRQ_INFO (section "VFIO_USER_DEVICE_GET_IRQ_INFO").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IrqInfo {
    /// `VFIO_IRQ_INFO_EVENTFD`, `_MASKABLE`, `_AUTOMASKED`, `_NORESIZE`.
    pub flags: u32,
    /// The interrupt index, `VFIO_PCI_*_IRQ_INDEX`.
    pub index: u32,
    /// How many interrupts the index has.
    pub count: u32,
}

impl IrqInfo {
    /// The size of request and reply.
    pub(crate) const SIZE: u32 = 16;

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        put_u32s(out, &[IrqInfo::SIZE, self.flags, self.index, self.count]);
    }

    /// Reads the payload of a reply.
    ///
    /// # Errors
    /// EINVAL when it is too short.
    pub fn decode(payload: &[u8]) -> Result<IrqInfo, Errno> {
        let mut fields = Fields::new(payload);
        fields.argsz(IrqInfo::SIZE)?;
        Ok(IrqInfo { flags: fields.u32()?, index: fields.u32()?, count: fields.u32()? })
    }
}

/// What DEVICE_SET_IRQS does to interrupts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IrqAction {
    /// Mask, or say which eventfd tells of a mask.
    Mask,
    /// Unmask, or say which eventfd unmasks.
    Unmask,
    /// Trigger, or say which eventfd a trigger signals.
    Trigger,
}

/// To which interrupts of the range DEVICE_SET_IRQS applies, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IrqData<'a> {
    /// To all of them, now. With [`IrqAction::Trigger`] and a range of none: disable the index.
    None,
    /// Now, to those whose byte is not 0; as many bytes as the range has interrupts.
    Bool(&'a [u8]),
    /// The eventfds that came with the message are attached, one an interrupt; none at all detaches
    /// those of the range. Whether their number is right is for the receiver of the message to check.
    EventFd,
}

/// The request DEVICE_SET_IRQS (section "VFIO_USER_DEVICE_SET_IRQS").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SetIrqs<'a> {
    /// What to do.
    pub action: IrqAction,
    /// With what.
    pub data: IrqData<'a>,
    /// The interrupt index, `VFIO_PCI_*_IRQ_INDEX`.
    pub index: u32,
    /// The first interrupt of the range.
    pub start: u32,
    /// How many interrupts the range has. `start + count` does not overflow.
    pub count: u32,
}

impl<'a> SetIrqs<'a> {
    const SIZE: u32 = 20;

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let action = match self.action {
            IrqAction::Mask => VFIO_IRQ_SET_ACTION_MASK,
            IrqAction::Unmask => VFIO_IRQ_SET_ACTION_UNMASK,
            IrqAction::Trigger => VFIO_IRQ_SET_ACTION_TRIGGER,
        };
        let (data, bools): (u32, &[u8]) = match self.data {
            IrqData::None => (VFIO_IRQ_SET_DATA_NONE, &[]),
            IrqData::Bool(bools) => (VFIO_IRQ_SET_DATA_BOOL, bools),
            IrqData::EventFd => (VFIO_IRQ_SET_DATA_EVENTFD, &[]),
        };
        let argsz = SetIrqs::SIZE.saturating_add(length(bools.len()));
        put_u32s(out, &[argsz, action | data, self.index, self.start, self.count]);
        out.extend_from_slice(bools);
    }

    pub(crate) fn decode(payload: &'a [u8]) -> Result<SetIrqs<'a>, Errno> {
        let mut fields = Fields::new(payload);
        fields.argsz(SetIrqs::SIZE)?;
        let flags = fields.u32()?;
        let (index, start, count) = (fields.u32()?, fields.u32()?, fields.u32()?);
        start.checked_add(count).ok_or(Errno::EINVAL)?;

        if flags & !(VFIO_IRQ_SET_ACTION_TYPE_MASK | VFIO_IRQ_SET_DATA_TYPE_MASK) != 0 {
            return Err(Errno::EINVAL);
        }
        let action = match flags & VFIO_IRQ_SET_ACTION_TYPE_MASK {
            VFIO_IRQ_SET_ACTION_MASK => IrqAction::Mask,
            VFIO_IRQ_SET_ACTION_UNMASK => IrqAction::Unmask,
            VFIO_IRQ_SET_ACTION_TRIGGER => IrqAction::Trigger,
            _ => return Err(Errno::EINVAL),
        };
        let data = match flags & VFIO_IRQ_SET_DATA_TYPE_MASK {
            VFIO_IRQ_SET_DATA_NONE => IrqData::None,
            VFIO_IRQ_SET_DATA_BOOL => {
                let count = usize::try_from(count).map_err(|_| Errno::EINVAL)?;
                IrqData::Bool(fields.bytes(count)?)
            }
            VFIO_IRQ_SET_DATA_EVENTFD => IrqData::EventFd,
            _ => return Err(Errno::EINVAL),
        };
        Ok(SetIrqs { action, data, index, start, count })
    }
}
