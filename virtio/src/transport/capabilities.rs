//! Where the windows of the transport are, and the vendor-specific capabilities that tell a driver
//! (virtio 1.3, section 4.1.4).

use pci::{BuildError, Capability, ConfigSpaceBuilder, Region};

/// The BAR of the windows.
pub(super) const BAR: Region = Region::Bar2;
/// Every window has a page to itself, so that a client can map or trap it alone.
pub(super) const PAGE: usize = 0x1000;
pub(super) const BAR_SIZE: u32 = 4 * PAGE as u32;

/// The distance of two queues' notification addresses in bytes: queue `n` has `queue_notify_off` `n`.
pub(super) const NOTIFY_OFF_MULTIPLIER: usize = 4;

/// The length of struct virtio_pci_common_cfg.
pub(super) const COMMON_CFG_LENGTH: usize = 64;

const VENDOR_SPECIFIC: u8 = 0x09;

/// A window in the BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Window {
    Common,
    Isr,
    Device,
    Notify,
}

impl Window {
    const ALL: [Window; 4] = [Window::Common, Window::Isr, Window::Device, Window::Notify];

    /// The window that an offset in the BAR falls into, and the offset in the window.
    pub(super) fn at(offset: usize) -> Option<(Window, usize)> {
        Window::ALL.get(offset / PAGE).map(|window| (*window, offset % PAGE))
    }

    /// Where the window starts in the BAR.
    pub(super) fn offset(self) -> usize {
        (self as usize).saturating_mul(PAGE)
    }

    /// VIRTIO_PCI_CAP_*_CFG.
    fn cfg_type(self) -> u8 {
        match self {
            Window::Common => 1,
            Window::Notify => 2,
            Window::Isr => 3,
            Window::Device => 4,
        }
    }
}

/// VIRTIO_PCI_CAP_PCI_CFG: the windows through configuration space, for a driver that can't map
/// the BAR (section 4.1.4.9).
const PCI_CFG: u8 = 5;

/// The offsets in struct virtio_pci_cap that matter beyond its declaration.
const CAP_BAR: usize = 4;
const CAP_OFFSET: usize = 8;
const CAP_LENGTH: usize = 12;
const PCI_CFG_DATA: usize = 16;
const PCI_CFG_LENGTH: usize = 20;

/// The offset of the bytes of a capability that [`Capability`] leaves to us.
const BODY: usize = 2;

/// Declares the BAR and the capabilities. Returns where the PCI_CFG capability is.
pub(super) fn declare(
    builder: &mut ConfigSpaceBuilder,
    config_len: usize,
    num_queues: u16,
) -> Result<PciCfg, BuildError> {
    builder.bar(BAR, BAR_SIZE)?;
    let notify_length = usize::from(num_queues) * NOTIFY_OFF_MULTIPLIER;
    let multiplier = (NOTIFY_OFF_MULTIPLIER as u32).to_le_bytes();
    let windows: [(Window, usize, &[u8]); 4] = [
        (Window::Common, COMMON_CFG_LENGTH, &[]),
        (Window::Isr, 1, &[]),
        (Window::Device, config_len, &[]),
        (Window::Notify, notify_length, &multiplier),
    ];
    for (window, length, tail) in windows {
        let body = body(window.cfg_type(), BAR.index() as u8, window.offset(), length, tail);
        builder.capability(Capability { id: VENDOR_SPECIFIC, body: &body, writable: &[] })?;
    }

    let body = body(PCI_CFG, 0, 0, 0, &[0; PCI_CFG_LENGTH - PCI_CFG_DATA]);
    let mut writable = [0; PCI_CFG_LENGTH];
    writable[CAP_BAR] = 0xff;
    writable[CAP_OFFSET..].fill(0xff);
    let capability = Capability { id: VENDOR_SPECIFIC, body: &body, writable: &writable[BODY..] };
    Ok(PciCfg { offset: builder.capability(capability)? })
}

/// A struct virtio_pci_cap from cap_len on, with what follows it.
fn body(cfg_type: u8, bar: u8, offset: usize, length: usize, tail: &[u8]) -> Vec<u8> {
    let cap_len = PCI_CFG_DATA.saturating_add(tail.len()) as u8;
    let mut body = vec![cap_len, cfg_type, bar, 0, 0, 0];
    body.extend_from_slice(&(offset as u32).to_le_bytes());
    body.extend_from_slice(&(length as u32).to_le_bytes());
    body.extend_from_slice(tail);
    body
}

/// Where the PCI_CFG capability is in configuration space.
#[derive(Clone, Copy, Debug)]
pub(super) struct PciCfg {
    offset: usize,
}

impl PciCfg {
    pub(super) fn data(self) -> usize {
        self.offset.saturating_add(PCI_CFG_DATA)
    }

    /// Whether an access to configuration space is one to pci_cfg_data. A processor reaches
    /// configuration space by at most 4 bytes at once; a longer access is a client that copies the
    /// space, which must not have the side effects of a register behind the window.
    pub(super) fn is_accessed(self, offset: u64, length: usize) -> bool {
        let data = self.data() as u64;
        (1..=4).contains(&length) && offset < data.saturating_add(4) && offset.saturating_add(length as u64) > data
    }

    /// What the driver aimed the window at, if it is something: a BAR, an offset that is a multiple
    /// of the length, and a length of 1, 2 or 4 bytes.
    pub(super) fn target(self, config: &pci::ConfigSpace) -> Option<(Region, u64, usize)> {
        let cap: &[u8; PCI_CFG_LENGTH] = config.load(self.offset, PCI_CFG_LENGTH).try_into().ok()?;
        let word = |at: usize| cap.get(at..)?.first_chunk().copied().map(u32::from_le_bytes);
        let (bar, offset, length) = (cap[CAP_BAR], word(CAP_OFFSET)?, word(CAP_LENGTH)?);
        if bar > 5 || !matches!(length, 1 | 2 | 4) || !offset.is_multiple_of(length) {
            return None;
        }
        Some((Region::from_index(bar.into())?, offset.into(), length as usize))
    }
}
