use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::interrupts::testing::Counter;
use crate::interrupts::{Irq, MSIX_BAR};

const IDENTITY: Identity = Identity {
    vendor_id: 0x1af4,
    device_id: 0x1042,
    revision_id: 1,
    class_code: 0x01_02_03,
    subsystem_vendor_id: 0x1af4,
    subsystem_id: 0x1100,
};

fn function() -> (ConfigSpace, Arc<Interrupts>) {
    let interrupts = Arc::new(Interrupts::new(65));
    let mut builder = ConfigSpace::builder(&IDENTITY, interrupts.clone());
    builder.bar(Region::Bar2, 0x4000).unwrap();
    let first = Capability { id: 9, body: &[5, 0xaa, 0xbb], writable: &[] };
    assert_eq!(builder.capability(first), Ok(0x4c));
    let second = Capability { id: 9, body: &[6, 0, 0xc0, 0], writable: &[0, 0, 0x0f, 0xff] };
    assert_eq!(builder.capability(second), Ok(0x54));
    (builder.build(), interrupts)
}

fn read<const N: usize>(config: &ConfigSpace, offset: u64) -> [u8; N] {
    let mut data = [0; N];
    config.read(offset, &mut data).unwrap();
    data
}

fn read_u32(config: &ConfigSpace, offset: u64) -> u32 {
    u32::from_le_bytes(read(config, offset))
}

#[test]
fn header_out_of_reset() {
    let (config, _) = function();
    let table: [(u64, u32); 16] = [
        (0x00, 0x1042_1af4),
        (0x04, 0x0010_0000),
        (0x08, 0x0102_0301),
        (0x0c, 0),
        (0x10, 0),
        (0x14, 0),
        (0x18, 0),
        (0x1c, 0),
        (0x20, 0),
        (0x24, 0),
        (0x28, 0),
        (0x2c, 0x1100_1af4),
        (0x30, 0),
        (0x34, 0x40),
        (0x38, 0),
        (0x3c, 0x0000_0100),
    ];
    for (offset, expected) in table {
        assert_eq!(read_u32(&config, offset), expected, "{offset:#x}");
    }
}

/// What every double word of the space reads after ones, and then zeros, were written to it.
#[test]
fn writable_bits_of_every_register() {
    let writable: &[(u64, u32)] = &[
        (0x04, 0x0000_0406),
        (0x0c, 0x0000_ffff),
        (0x10, 0xffff_e000),
        (0x18, 0xffff_c000),
        (0x3c, 0x0000_00ff),
        (0x40, 0xc000_0000),
        (0x58, 0x0000_ff0f),
    ];
    // The second capability's body starts at 0x56: its writable bytes are 0x58 and 0x59.
    let (mut config, _) = function();
    for offset in (0..SIZE as u64).step_by(4) {
        let mask = writable.iter().find(|(at, _)| *at == offset).map_or(0, |(_, mask)| *mask);
        let before = read_u32(&config, offset);
        config.write(offset, &[0xff; 4]).unwrap();
        assert_eq!(read_u32(&config, offset), before | mask, "{offset:#x}");
        config.write(offset, &[0; 4]).unwrap();
        assert_eq!(read_u32(&config, offset), before & !mask, "{offset:#x}");
    }
}

#[test]
fn bar_sizing() {
    let (mut config, _) = function();
    let sizes = config.regions();
    assert_eq!(sizes, [0x2000, 0, 0x4000, 0, 0, 0, 0, 256]);
    for (bar, size) in sizes[..6].iter().enumerate() {
        let offset = 0x10 + 4 * bar as u64;
        config.write(offset, &u32::MAX.to_le_bytes()).unwrap();
        let mask = read_u32(&config, offset);
        assert_eq!(u64::from(mask.wrapping_neg()), *size, "BAR {bar}");
        assert_eq!(mask & 0xf, 0, "BAR {bar} is a 32-bit memory BAR, not prefetchable");
        config.write(offset, &0xfe80_0000u32.to_le_bytes()).unwrap();
        let address = if *size == 0 { 0 } else { 0xfe80_0000 };
        assert_eq!(read_u32(&config, offset), address, "BAR {bar}");
    }
}

#[test]
fn capability_list() {
    let (config, _) = function();
    let mut found = Vec::new();
    let [mut at] = read::<1>(&config, 0x34);
    while at != 0 {
        let [id, next] = read::<2>(&config, at.into());
        found.push((at, id));
        at = next;
    }
    assert_eq!(found, [(0x40, 0x11), (0x4c, 9), (0x54, 9)]);
    // MSI-X: 65 vectors, the table and the PBA on pages of their own in BAR 0.
    assert_eq!(read_u32(&config, 0x40), 64 << 16 | 0x4c << 8 | 0x11);
    assert_eq!(read_u32(&config, 0x44), 0);
    assert_eq!(read_u32(&config, 0x48), 0x1000);
    assert_eq!(read::<5>(&config, 0x4c), [9, 0x54, 5, 0xaa, 0xbb]);
}

#[test]
fn what_cannot_be_declared() {
    let mut builder = ConfigSpace::builder(&IDENTITY, Arc::new(Interrupts::new(1)));
    for bar in [MSIX_BAR, Region::Rom, Region::Config] {
        assert_eq!(builder.bar(bar, 4096), Err(BuildError::Bar(bar)));
    }
    let bar = Region::Bar5;
    for size in [0, 1, 8, 24, 4097] {
        assert_eq!(builder.bar(bar, size), Err(BuildError::BarSize { bar, size }));
    }
    assert_eq!(builder.bar(bar, 16), Ok(()));
    let fill = Capability { id: 9, body: &[0; 256 - 0x4c - 2], writable: &[] };
    let long = Capability { body: &[0; 256 - 0x4c - 1], ..fill };
    assert!(matches!(builder.capability(long), Err(BuildError::CapabilitySpace { .. })));
    assert_eq!(builder.capability(fill), Ok(0x4c));
    let none = Capability { body: &[], ..fill };
    assert!(matches!(builder.capability(none), Err(BuildError::CapabilitySpace { .. })));
}

#[test]
fn the_interrupt_status_bit_is_live_and_intx_disable_governs() {
    let (mut config, interrupts) = function();
    let line = Counter::new();
    interrupts.set_line(Irq::Intx, 0, Some(line.clone())).unwrap();
    config.write(0x04, &0x400u16.to_le_bytes()).unwrap();
    interrupts.assert_intx(1);
    assert_eq!(line.count(), 0);
    assert_eq!(read::<2>(&config, 0x06), [0x18, 0]);
    assert_eq!(read::<1>(&config, 0x06), [0x18]);
    assert_eq!(read::<256>(&config, 0)[6], 0x18);
    config.write(0x04, &[0, 0]).unwrap();
    assert_eq!(line.count(), 1);
    assert_eq!(interrupts.acknowledge_intx(), 1);
    assert_eq!(read::<2>(&config, 0x06), [0x10, 0]);
}

#[test]
fn msix_control_governs() {
    let (mut config, interrupts) = function();
    let line = Counter::new();
    config.write(0x42, &0xc000u16.to_le_bytes()).unwrap();
    interrupts.set_line(Irq::Msix, 1, Some(line.clone())).unwrap();
    interrupts.signal(1);
    assert_eq!(line.count(), 0);
    config.write(0x43, &[0x80]).unwrap();
    assert_eq!(line.count(), 1);
    config.write(0x43, &[0]).unwrap();
    assert!(!interrupts.msix_in_use());
}

#[test]
fn reset_returns_every_byte_but_keeps_lines() {
    let (mut config, interrupts) = function();
    let before = read::<256>(&config, 0);
    let line = Counter::new();
    interrupts.set_line(Irq::Msix, 0, Some(line.clone())).unwrap();
    config.write(0, &[0xff; 256]).unwrap();
    interrupts.assert_intx(1);
    interrupts.signal(2);
    assert_ne!(read::<256>(&config, 0), before);
    config.reset();
    assert_eq!(read::<256>(&config, 0), before);
    let mut pba = [0xff];
    interrupts.read_msix(0x1000, &mut pba).unwrap();
    assert_eq!(pba, [0]);
    interrupts.signal(0);
    assert_eq!(line.count(), 1);
}

#[test]
fn state_survives_export_and_import() {
    let (mut config, interrupts) = function();
    config.write(0x04, &0x0406u16.to_le_bytes()).unwrap();
    config.write(0x10, &0xfe80_0000u32.to_le_bytes()).unwrap();
    config.write(0x42, &0x8000u16.to_le_bytes()).unwrap();
    interrupts.write_msix(0x10, &[0xff; 16]).unwrap();
    interrupts.signal(1);
    interrupts.assert_intx(3);
    let text = serde_json::to_string(&config.export()).unwrap();

    let (mut other, other_interrupts) = function();
    let line = Counter::new();
    other.import(&serde_json::from_str(&text).unwrap()).unwrap();
    assert_eq!(other.export(), config.export());
    assert_eq!(read::<256>(&other, 0), read::<256>(&config, 0));
    assert!(other.bus_master() && other_interrupts.msix_in_use());
    other_interrupts.set_line(Irq::Msix, 1, Some(line.clone())).unwrap();
    assert_eq!(line.count(), 0, "the table entry is masked");
    other_interrupts.write_msix(0x1c, &[0]).unwrap();
    assert_eq!(line.count(), 1);
    assert_eq!(other_interrupts.acknowledge_intx(), 3);
}

#[test]
fn foreign_states_are_refused_whole() {
    type Break = fn(&mut FunctionState);
    let table: [(Break, ImportError); 8] = [
        (|state| state.version = 2, ImportError::Version { got: 2 }),
        (|state| state.config.truncate(255), ImportError::ConfigLength { got: 255 }),
        (|state| state.config.push(0), ImportError::ConfigLength { got: 257 }),
        (|state| state.config[2] = 0, ImportError::ReadOnly { offset: 2 }),
        (|state| state.config[0x11] = 1, ImportError::ReadOnly { offset: 0x11 }),
        (|state| state.config[7] = 0x80, ImportError::ReadOnly { offset: 7 }),
        (|state| state.msix_table.truncate(64), ImportError::Vectors { got: 64, expected: 65 }),
        (|state| state.msix_table[3].registers[12] = 2, ImportError::ReservedEntryBits { vector: 3 }),
    ];
    let (mut config, _) = function();
    let before = config.export();
    for (break_it, error) in table {
        let mut state = before.clone();
        state.config[4] = 4;
        break_it(&mut state);
        assert_eq!(config.import(&state), Err(error));
        assert_eq!(config.export(), before, "{error}");
    }
}

proptest! {
    /// Whatever is read and written: no panic, an error exactly when out of bounds, no read-only bit
    /// ever changes, and pieces read like the whole.
    #[test]
    fn any_access(accesses in prop::collection::vec(
        (0u64..300, prop::collection::vec(any::<u8>(), 0..280)), 1..20,
    )) {
        let (mut config, _) = function();
        let fresh = read::<256>(&config, 0);
        let mut ones = function().0;
        ones.write(0, &[0xff; 256]).unwrap();
        let ones = read::<256>(&ones, 0);
        for (offset, data) in accesses {
            let within = offset + data.len() as u64 <= 256;
            prop_assert_eq!(config.write(offset, &data).is_ok(), within);
            let whole = read::<256>(&config, 0);
            for (at, byte) in whole.iter().enumerate() {
                let writable = ones[at] ^ fresh[at];
                prop_assert_eq!((byte ^ fresh[at]) & !writable, 0, "{:#x}", at);
            }
            let mut piece = vec![0; data.len()];
            prop_assert_eq!(config.read(offset, &mut piece).is_ok(), within);
            if within {
                let start = offset as usize;
                prop_assert_eq!(&piece[..], &whole[start..start + piece.len()]);
            }
        }
    }
}
