//! The capability list of a virtio PCI function (virtio 1.3 section 4.1.4).

use crate::Error;

const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const CAPABILITIES_POINTER: usize = 0x34;
const CAP_ID_VENDOR: u8 = 0x09;
const CAP_ID_MSIX: u8 = 0x11;
/// As many capabilities as fit behind the header: a longer list is a loop.
const MAX_CAPABILITIES: usize = (256 - 64) / 4;

const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;

/// A part of a BAR that holds one of the virtio structures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// The BAR, 0 to 5: also the index of the vfio region.
    pub bar: u8,
    /// Where the structure starts in the BAR.
    pub offset: u32,
    /// Its size.
    pub length: u32,
}

/// The MSI-X capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsixCapability {
    /// Where the capability lies in the configuration space.
    pub capability: u8,
    /// How many vectors there are, 1 to 2048.
    pub table_size: u16,
    /// The BAR of the table.
    pub table_bar: u8,
    /// Where the table starts in its BAR.
    pub table_offset: u32,
    /// The BAR of the pending bit array.
    pub pba_bar: u8,
    /// Where the pending bit array starts in its BAR.
    pub pba_offset: u32,
}

/// What the capability list of a virtio function says. Of several capabilities of one type the first
/// counts, as the specification wants it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PciCapabilities {
    /// The common configuration.
    pub common: Window,
    /// The notification structure.
    pub notify: Window,
    /// The distance of two doorbells: `queue_notify_off` counts in it.
    pub notify_off_multiplier: u32,
    /// The ISR status.
    pub isr: Window,
    /// The device configuration.
    pub device: Window,
    /// Where the PCI configuration access capability lies in the configuration space.
    pub pci_cfg: u8,
    /// MSI-X, when the function has it.
    pub msix: Option<MsixCapability>,
}

impl PciCapabilities {
    /// Walks the capability list of a configuration space.
    ///
    /// # Errors
    /// [`Error::Device`] when the list is broken, or lacks one of the five virtio structures.
    pub fn parse(config: &[u8; 256]) -> Result<PciCapabilities, Error> {
        if config[STATUS] & STATUS_CAPABILITIES == 0 {
            return Err(Error::Device("the function has no capability list"));
        }
        let mut windows: [Option<Window>; 5] = [None; 5];
        let mut notify_off_multiplier = 0;
        let mut pci_cfg = None;
        let mut msix = None;

        let mut next = config[CAPABILITIES_POINTER] & !3;
        for _ in 0..MAX_CAPABILITIES {
            if next == 0 {
                return PciCapabilities::assemble(windows, notify_off_multiplier, pci_cfg, msix);
            }
            let capability = Capability { config, start: next };
            match capability.u8(0)? {
                CAP_ID_VENDOR => {
                    let cfg_type = capability.u8(3)?;
                    let slot = usize::from(cfg_type).checked_sub(1);
                    if let Some(window @ None) = slot.and_then(|slot| windows.get_mut(slot)) {
                        *window = Some(capability.window()?);
                        match cfg_type {
                            NOTIFY_CFG => notify_off_multiplier = capability.u32(16)?,
                            PCI_CFG => pci_cfg = Some(next),
                            _ => {}
                        }
                    }
                }
                CAP_ID_MSIX if msix.is_none() => msix = Some(capability.msix()?),
                _ => {}
            }
            next = capability.u8(1)? & !3;
        }
        Err(Error::Device("the capability list is a loop"))
    }

    fn assemble(
        windows: [Option<Window>; 5],
        notify_off_multiplier: u32,
        pci_cfg: Option<u8>,
        msix: Option<MsixCapability>,
    ) -> Result<PciCapabilities, Error> {
        let window = |cfg_type: u8, what: &'static str| {
            let window = windows.get(usize::from(cfg_type) - 1).copied().flatten();
            let window = window.filter(|window| window.bar <= 5);
            window.ok_or(Error::Device(what))
        };
        Ok(PciCapabilities {
            common: window(COMMON_CFG, "it has no common configuration structure")?,
            notify: window(NOTIFY_CFG, "it has no notification structure")?,
            notify_off_multiplier,
            isr: window(ISR_CFG, "it has no ISR status structure")?,
            device: window(DEVICE_CFG, "it has no device configuration structure")?,
            pci_cfg: pci_cfg.ok_or(Error::Device("it has no PCI configuration access"))?,
            msix,
        })
    }
}

/// One capability in the configuration space.
struct Capability<'a> {
    config: &'a [u8; 256],
    start: u8,
}

impl Capability<'_> {
    fn bytes<const N: usize>(&self, offset: usize) -> Result<[u8; N], Error> {
        let start = usize::from(self.start) + offset;
        let bytes = self.config.get(start..).and_then(|bytes| bytes.first_chunk());
        bytes.copied().ok_or(Error::Device("a capability reaches beyond the configuration space"))
    }

    fn u8(&self, offset: usize) -> Result<u8, Error> {
        self.bytes(offset).map(u8::from_le_bytes)
    }

    fn u32(&self, offset: usize) -> Result<u32, Error> {
        self.bytes(offset).map(u32::from_le_bytes)
    }

    fn window(&self) -> Result<Window, Error> {
        Ok(Window { bar: self.u8(4)?, offset: self.u32(8)?, length: self.u32(12)? })
    }

    fn msix(&self) -> Result<MsixCapability, Error> {
        let control = u16::from_le_bytes(self.bytes(2)?);
        let (table, pba) = (self.u32(4)?, self.u32(8)?);
        // The low three bits name the BAR.
        let split = |field: u32| ((field & 7) as u8, field & !7);
        let ((table_bar, table_offset), (pba_bar, pba_offset)) = (split(table), split(pba));
        Ok(MsixCapability {
            capability: self.start,
            table_size: (control & 0x7ff) + 1,
            table_bar,
            table_offset,
            pba_bar,
            pba_offset,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A configuration space whose capabilities follow each other from 0x40.
    fn config(capabilities: &[&[u8]]) -> [u8; 256] {
        let mut config = [0; 256];
        config[STATUS] = STATUS_CAPABILITIES;
        let mut link = CAPABILITIES_POINTER;
        let mut at = 0x40;
        for capability in capabilities {
            config[link] = at as u8;
            config[at..at + capability.len()].copy_from_slice(capability);
            link = at + 1;
            at += capability.len().next_multiple_of(4);
        }
        config[link] = 0;
        config
    }

    fn virtio(cfg_type: u8, bar: u8, offset: u32, length: u32, tail: &[u8]) -> Vec<u8> {
        let mut bytes = vec![CAP_ID_VENDOR, 0, 16 + tail.len() as u8, cfg_type, bar, 0, 0, 0];
        bytes.extend(offset.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(tail);
        bytes
    }

    fn msix() -> Vec<u8> {
        let mut bytes = vec![CAP_ID_MSIX, 0, 0x10, 0x80];
        bytes.extend(0x0000_0001u32.to_le_bytes());
        bytes.extend(0x0000_0802u32.to_le_bytes());
        bytes
    }

    fn all() -> Vec<Vec<u8>> {
        vec![
            virtio(COMMON_CFG, 4, 0, 0x38, &[]),
            msix(),
            virtio(NOTIFY_CFG, 4, 0x3000, 0x1000, &4u32.to_le_bytes()),
            virtio(ISR_CFG, 4, 0x1000, 1, &[]),
            virtio(DEVICE_CFG, 4, 0x2000, 0x40, &[]),
            virtio(PCI_CFG, 0, 0, 0, &[0; 4]),
        ]
    }

    fn parse(capabilities: &[Vec<u8>]) -> Result<PciCapabilities, Error> {
        let slices: Vec<&[u8]> = capabilities.iter().map(Vec::as_slice).collect();
        PciCapabilities::parse(&config(&slices))
    }

    #[test]
    fn all_structures_are_found() {
        let found = parse(&all()).unwrap();
        assert_eq!(found.common, Window { bar: 4, offset: 0, length: 0x38 });
        assert_eq!(found.notify, Window { bar: 4, offset: 0x3000, length: 0x1000 });
        assert_eq!(found.notify_off_multiplier, 4);
        assert_eq!(found.isr, Window { bar: 4, offset: 0x1000, length: 1 });
        assert_eq!(found.device, Window { bar: 4, offset: 0x2000, length: 0x40 });
        let expected = MsixCapability {
            capability: 0x50,
            table_size: 17,
            table_bar: 1,
            table_offset: 0,
            pba_bar: 2,
            pba_offset: 0x800,
        };
        assert_eq!(found.msix, Some(expected));
    }

    #[test]
    fn the_first_of_a_type_counts_and_unknown_ones_are_skipped() {
        let mut capabilities = all();
        capabilities.insert(0, virtio(9, 0, 0, 0, &[]));
        capabilities.insert(0, virtio(0, 0, 0, 0, &[]));
        capabilities.push(virtio(ISR_CFG, 0, 0, 1, &[]));
        assert_eq!(parse(&capabilities).unwrap().isr.offset, 0x1000);
    }

    #[test]
    fn a_missing_structure_is_an_error_and_missing_msix_is_not() {
        for (index, capability) in all().iter().enumerate() {
            let mut capabilities = all();
            capabilities.remove(index);
            let found = parse(&capabilities);
            assert_eq!(found.is_ok(), capability[0] == CAP_ID_MSIX, "{index}");
        }
    }

    #[test]
    fn loops_and_overlong_capabilities_end() {
        let mut config = config(&[&[0x42, 0x40]]);
        config[0x41] = 0x40;
        assert!(PciCapabilities::parse(&config).is_err());
        config[CAPABILITIES_POINTER] = 0xfc;
        config[0xfc] = CAP_ID_VENDOR;
        config[0xff] = COMMON_CFG;
        assert!(PciCapabilities::parse(&config).is_err());
        config[STATUS] = 0;
        assert!(PciCapabilities::parse(&config).is_err());
    }

    proptest! {
        #[test]
        fn any_configuration_space_is_survived(bytes in proptest::collection::vec(any::<u8>(), 256)) {
            let mut config: [u8; 256] = bytes.try_into().unwrap();
            config[STATUS] |= STATUS_CAPABILITIES;
            let _ = PciCapabilities::parse(&config);
        }
    }
}
