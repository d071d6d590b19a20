//! What a guest finds: the function's identity, its BARs and capabilities, and the window through configuration space.

use std::sync::Arc;

use client::{BlockOptions, BlockRequest, Client, CommonRegister, PciCapabilities, RequestType, VirtioPci};
use vfio_bindings::bindings::vfio::VFIO_PCI_CONFIG_REGION_INDEX;

use crate::rig::{Machine, OK, Rig, completion, exercise};

const CONFIG: u32 = VFIO_PCI_CONFIG_REGION_INDEX;

fn config(client: &Client) -> [u8; 256] {
    let mut bytes = [0; 256];
    client.region_read(CONFIG, 0, &mut bytes).unwrap();
    bytes
}

fn read<const N: usize>(client: &Client, offset: u64) -> [u8; N] {
    let mut bytes = [0; N];
    client.region_read(CONFIG, offset, &mut bytes).unwrap();
    bytes
}

fn write(client: &Client, offset: u64, bytes: &[u8]) {
    client.region_write(CONFIG, offset, bytes).unwrap();
}

#[test]
fn it_is_a_modern_virtio_block_device() {
    let rig = Rig::ram();
    let config = config(&rig.client());
    let word = |at: usize| u16::from_le_bytes([config[at], config[at + 1]]);
    assert_eq!((word(0), word(2)), (0x1af4, 0x1042), "vendor and device");
    assert!(config[8] >= 1, "revision of a non-transitional device");
    assert_eq!(config[9..12], [0x00, 0x00, 0x01], "mass storage, SCSI");
    assert_eq!(config[14] & 0x7f, 0, "header type 0");
    assert_eq!(word(0x2c), 0x1af4, "subsystem vendor");
    assert!(word(0x2e) >= 0x40, "subsystem of a non-transitional device");
    assert_eq!(config[0x3d], 1, "INTA, which makes QEMU wire INTx");
    assert_ne!(word(6) & 0x10, 0, "there is a capability list");
}

/// Virtio 1.3 section 4.1.4: all five structures; each that is memory on a page of its own.
#[test]
fn the_capabilities_lead_to_windows_on_pages_of_their_own() {
    for num_queues in [1, 4, 64] {
        let rig = Rig::with(|device| device.num_queues = Some(num_queues));
        let client = rig.client();
        let found = PciCapabilities::parse(&config(&client)).unwrap();
        let windows = [found.common, found.notify, found.isr, found.device];
        let mut pages: Vec<_> = windows.iter().map(|window| (window.bar, window.offset / 0x1000)).collect();
        pages.sort();
        pages.dedup();
        assert_eq!(pages.len(), 4, "{windows:?}");
        for window in windows {
            let size = client.region_info(window.bar.into()).unwrap().0.size;
            assert!(u64::from(window.offset) + u64::from(window.length) <= size, "{window:?}");
            assert!(window.offset % 0x1000 + window.length <= 0x1000, "{window:?}");
        }
        assert!(found.common.length >= 64 && found.device.length >= 60 && found.isr.length == 1);
        assert!(found.notify.length >= u32::from(num_queues) * found.notify_off_multiplier);
        let msix = found.msix.expect("MSI-X");
        assert_eq!(msix.table_size, num_queues + 1, "a vector for each queue and the configuration");
        let size = client.region_info(msix.table_bar.into()).unwrap().0.size;
        assert!(u64::from(msix.table_offset) + 16 * u64::from(msix.table_size) <= size);
        assert!(u64::from(msix.pba_offset) + u64::from(msix.table_size).div_ceil(64) * 8 <= size);
        assert_ne!(msix.table_offset / 0x1000, msix.pba_offset / 0x1000, "table and PBA have a page each");
        // The chain ends, and each capability's own length holds.
        let bytes = config(&client);
        let mut next = bytes[0x34];
        let mut types = Vec::new();
        while next != 0 {
            let capability = &bytes[usize::from(next)..];
            if capability[0] == 9 {
                assert!(capability[2] >= 16 + [0, 0, 4, 0, 0, 4][usize::from(capability[3])]);
                types.push(capability[3]);
            }
            next = capability[1];
        }
        types.sort();
        assert_eq!(types, [1, 2, 3, 4, 5]);
    }
}

/// As firmware does it: all ones, and what reads back is the size.
#[test]
fn bars_tell_their_size() {
    let rig = Rig::ram();
    let client = rig.client();
    for bar in 0..6u64 {
        let at = 0x10 + 4 * bar;
        let size = client.region_info(bar as u32).unwrap().0.size as u32;
        write(&client, at, &[0xff; 4]);
        let sized = u32::from_le_bytes(read(&client, at));
        if size == 0 {
            assert_eq!(sized, 0, "BAR {bar}");
            continue;
        }
        assert_eq!(sized & !0xf, !(size - 1), "BAR {bar}");
        assert_eq!(sized & 0x7, 0, "BAR {bar}: 32-bit memory");
        let address = 0xfe00_0000u32 + (bar as u32) * 0x10_0000;
        write(&client, at, &address.to_le_bytes());
        assert_eq!(u32::from_le_bytes(read(&client, at)) & !0xf, address);
    }
    write(&client, 0x30, &[0xff; 4]);
    assert_eq!(read(&client, 0x30), [0; 4], "there is no expansion ROM");
}

#[test]
fn what_is_read_only_stays_as_it_is() {
    let rig = Rig::ram();
    let client = rig.client();
    let before = config(&client);
    for at in (0..256).filter(|at| !(4..6).contains(at)) {
        write(&client, at, &[!before[at as usize]]);
    }
    let after = config(&client);
    let unchanged = [0..4, 6..12, 14..16, 0x2c..0x30, 0x34..0x3c, 0x3d..0x40];
    for range in unchanged {
        assert_eq!(after[range.clone()], before[range.clone()], "{range:?}");
    }
    PciCapabilities::parse(&after).unwrap();
    client.reset().unwrap();
    assert_eq!(config(&client), before, "a reset brings everything back");
}

/// Section 4.1.4.9: the windows through configuration space, for firmware without memory accesses.
#[test]
fn a_driver_may_go_through_the_pci_cfg_window() {
    let rig = Rig::ram();
    let client = rig.client();
    let transport = VirtioPci::new(Arc::clone(&client)).unwrap();
    let PciCapabilities { common, notify, pci_cfg, .. } = *transport.capabilities();
    let aim = |bar: u8, offset: u32, length: u32| {
        let at = u64::from(pci_cfg);
        write(&client, at + 4, &[bar]);
        write(&client, at + 8, &offset.to_le_bytes());
        write(&client, at + 12, &length.to_le_bytes());
    };
    let data = u64::from(pci_cfg) + 16;
    let (place, width) = CommonRegister::NumQueues.place();
    aim(common.bar, common.offset + place as u32, width as u32);
    assert_eq!(u16::from_le_bytes(read(&client, data)), 4);
    let (place, width) = CommonRegister::QueueSelect.place();
    aim(common.bar, common.offset + place as u32, width as u32);
    write(&client, data, &2u16.to_le_bytes());
    assert_eq!(transport.read_common(CommonRegister::QueueSelect).unwrap(), 2);
    let (place, width) = CommonRegister::DeviceFeatureSelect.place();
    aim(common.bar, common.offset + place as u32, width as u32);
    write(&client, data, &1u32.to_le_bytes());
    let (place, width) = CommonRegister::DeviceFeature.place();
    aim(common.bar, common.offset + place as u32, width as u32);
    let high = u32::from_le_bytes(read(&client, data));
    assert_eq!(u64::from(high), transport.device_features().unwrap() >> 32);
    // Aimed at nothing, it does nothing.
    for (bar, offset, length) in [(common.bar, 0x4000, 4), (5, 0, 4), (7, 0, 4), (common.bar, 2, 4), (common.bar, 0, 8)]
    {
        aim(bar, offset, length);
        write(&client, data, &[0xff; 4]);
        let _whatever: [u8; 4] = read(&client, data);
    }
    // A bulk read of the space, as QEMU's first, touches no register behind the window.
    aim(common.bar, common.offset + 22, 2);
    assert_eq!(transport.read_common(CommonRegister::QueueSelect).unwrap(), 2);
    config(&client);
    // A doorbell rung by this way.
    let mut machine = Machine::new(client.clone(), &BlockOptions::default());
    aim(notify.bar, notify.offset, 2);
    let buffer = machine.memory.allocate(512, 512).unwrap();
    let segment = [buffer.segment(0, 512).unwrap()];
    let queue = &mut machine.queues[0];
    let read_request = BlockRequest { kind: RequestType::Read, sector: 0, data: &segment };
    queue.submit(&read_request).unwrap();
    assert!(queue.ring_mut().publish());
    write(&client, data, &0u16.to_le_bytes());
    assert_eq!(completion(queue).status, OK);
    exercise(&mut machine.queues);
}
