//! The windows through configuration space.

use super::*;

fn aim(pci: &mut VirtioPci, bar: u8, offset: u64, length: usize) {
    let mut field = |at: u64, data: &[u8]| assert_eq!(pci.write(Region::Config, PCI_CFG + at, data), Ok(Effect::None));
    field(4, &[bar]);
    field(8, &(offset as u32).to_le_bytes());
    field(12, &(length as u32).to_le_bytes());
}

fn read_pci_cfg(pci: &mut VirtioPci) -> u64 {
    let mut data = [0; 4];
    pci.read(Region::Config, PCI_CFG + 16, &mut data).unwrap();
    u32::from_le_bytes(data).into()
}

#[test]
fn pci_cfg_reads_what_the_windows_read() {
    let (mut pci, _) = running();
    let (mut direct, _) = running();
    for length in [1, 2, 4] {
        let offsets = (0..0x40).chain(0x2000..0x2010).chain(0x3000..0x3008).step_by(length);
        for offset in offsets {
            aim(&mut pci, 2, offset, length);
            let mask = (1 << (8 * length)) - 1;
            assert_eq!(read_pci_cfg(&mut pci) & mask, read(&mut direct, offset, length), "{offset:#x}");
        }
    }
    aim(&mut pci, 0, 12, 4);
    assert_eq!(read_pci_cfg(&mut pci), 1, "the vector control in the MSI-X table");
}

#[test]
fn pci_cfg_writes_have_the_effect_of_the_windows() {
    let (mut pci, _) = running();
    let mut through = |offset: u64, data: &[u8]| {
        aim(&mut pci, 2, offset, data.len());
        pci.write(Region::Config, PCI_CFG + 16, data).unwrap()
    };
    assert_eq!(through(NOTIFY + 4, &[1, 0]), Effect::Kick(1));
    assert_eq!(through(NOTIFY + 4, &[1, 0, 0, 0]), Effect::Kick(1));
    assert_eq!(through(QUEUE_SELECT, &[1, 0]), Effect::None);
    assert_eq!(through(QUEUE_RESET, &[1, 0]), Effect::StopQueue(1));
    assert_eq!(through(QUEUE_SELECT, &[2, 0]), Effect::None);
    assert_eq!(through(QUEUE_DESC, &[1, 2, 3, 4]), Effect::None);
    assert_eq!(through(QUEUE_ENABLE, &[1, 0]), Effect::StartQueue(2));
    assert_eq!(through(DEVICE_STATUS, &[0]), Effect::Reset);
    assert_eq!(pci.queue(2).unwrap().desc, 0x0403_0201);
}

#[test]
fn pci_cfg_aimed_at_nothing_does_nothing() {
    let (mut pci, _) = running();
    pci.interrupts().assert_intx(3);
    let table = [(2, 0x1000, 0), (2, 0x1000, 3), (2, 0x1000, 8), (2, 0x1001, 2), (2, 0x4000, 4), (1, 0, 4), (6, 0, 1)]
        .into_iter()
        .chain([(7, 0, 4), (255, 0, 1), (2, u32::MAX.into(), 1)]);
    for (bar, offset, length) in table {
        aim(&mut pci, bar, offset, length);
        assert_eq!(read_pci_cfg(&mut pci), 0, "{bar} {offset:#x} {length}");
        assert_eq!(pci.write(Region::Config, PCI_CFG + 16, &[0; 4]), Ok(Effect::None));
    }
    // Copying configuration space is no access to the window; reading one byte of it is.
    aim(&mut pci, 2, ISR, 1);
    pci.read(Region::Config, 0, &mut [0; 256]).unwrap();
    pci.read(Region::Config, PCI_CFG + 12, &mut [0; 4]).unwrap();
    let mut isr = [0];
    pci.read(Region::Config, PCI_CFG + 16, &mut isr).unwrap();
    assert_eq!(isr, [3]);
}
