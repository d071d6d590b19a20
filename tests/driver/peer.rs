//! Another implementation of the protocol, rust-vmm's `vfio_user`, as the client.
//!
//! It sends VERSION 0.1 with capabilities of its own, each message without waiting for more than its reply, and it reads
//! replies by their fixed sizes: a server that answers a byte too many or too few leaves it out of step.

use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;

use client::{GuestMemory, PciCapabilities, SplitDriver};
use rust_vmm_vfio_user::Client;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE, VFIO_PCI_CONFIG_REGION_INDEX,
    VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
};

use crate::rig::{IOVA, OK, Rig, count, eventfd, signalled, until};

const CONFIG: u32 = VFIO_PCI_CONFIG_REGION_INDEX;
const EVENTFDS: u32 = VFIO_IRQ_SET_ACTION_TRIGGER | VFIO_IRQ_SET_DATA_EVENTFD;
const VENDOR: [u8; 2] = 0x1af4u16.to_le_bytes();

fn connect(socket: &Path) -> Client {
    Client::new(socket).unwrap()
}

fn in_step(client: &mut Client) {
    let mut vendor = [0; 2];
    client.region_read(CONFIG, 0, &mut vendor).unwrap();
    assert_eq!(vendor, VENDOR);
}

#[test]
fn it_finds_the_device() {
    let rig = Rig::ram();
    let mut client = connect(rig.socket(0));
    for (index, size) in [(0, 0x2000), (1, 0), (2, 0x4000), (3, 0), (6, 0), (CONFIG, 256)] {
        let region = client.region(index).unwrap();
        assert_eq!((region.index, region.size), (index, size));
        assert!(region.sparse_areas.is_empty() && region.file_offset.is_none());
    }
    let intx = client.get_irq_info(VFIO_PCI_INTX_IRQ_INDEX).unwrap();
    let msix = client.get_irq_info(VFIO_PCI_MSIX_IRQ_INDEX).unwrap();
    assert_eq!((intx.index, intx.count, msix.index, msix.count), (0, 1, 2, 5));
    let mut config = [0; 256];
    client.region_read(CONFIG, 0, &mut config).unwrap();
    PciCapabilities::parse(&config).unwrap();
    client.region_write(CONFIG, 4, &[6, 0]).unwrap();
    client.region_read(CONFIG, 4, &mut config[..2]).unwrap();
    assert_eq!(config[..2], [6, 0]);
    client.reset().unwrap();
    client.region_read(CONFIG, 4, &mut config[..2]).unwrap();
    assert_eq!(config[..2], [0, 0]);
    client.shutdown().unwrap();
    drop(client);
    in_step(&mut connect(rig.socket(0)));
}

#[test]
fn it_maps_memory_and_unmaps_it() {
    let rig = Rig::ram();
    let mut client = connect(rig.socket(0));
    let memory = GuestMemory::new(1 << 20, IOVA).unwrap();
    let fd = memory.fd().as_raw_fd();
    for _ in 0..10 {
        client.dma_map(0, IOVA, 1 << 20, fd).unwrap();
        in_step(&mut client);
        // It reads a reply as long as its request, which is what the specification says of a success.
        client.dma_unmap(IOVA, 1 << 20).unwrap();
        in_step(&mut client);
    }
}

/// A request from the doorbell to the interrupt, by this client's messages alone.
#[test]
fn it_drives_the_device() {
    let rig = Rig::ram();
    let mut client = connect(rig.socket(0));
    let memory = GuestMemory::new(1 << 20, IOVA).unwrap();
    client.dma_map(0, IOVA, 1 << 20, memory.fd().as_raw_fd()).unwrap();
    let mut config = [0; 256];
    client.region_read(CONFIG, 0, &mut config).unwrap();
    let found = PciCapabilities::parse(&config).unwrap();
    client.region_write(CONFIG, 4, &[6, 0]).unwrap();
    let bar = u32::from(found.common.bar);
    let at = |offset: u64| u64::from(found.common.offset) + offset;
    // Reset, ACKNOWLEDGE, DRIVER, VERSION_1 and no more, FEATURES_OK.
    for status in [0u8, 1, 3] {
        client.region_write(bar, at(20), &[status]).unwrap();
    }
    for (select, features) in [(0u32, 0u32), (1, 1)] {
        client.region_write(bar, at(8), &select.to_le_bytes()).unwrap();
        client.region_write(bar, at(12), &features.to_le_bytes()).unwrap();
    }
    client.region_write(bar, at(20), &[11]).unwrap();
    let mut status = [0];
    client.region_read(bar, at(20), &mut status).unwrap();
    assert_eq!(status, [11]);
    let mut ring = SplitDriver::new(&memory, 16, false, 0).unwrap();
    client.region_write(bar, at(22), &[0, 0]).unwrap();
    client.region_write(bar, at(24), &16u16.to_le_bytes()).unwrap();
    for (offset, area) in [32, 40, 48].into_iter().zip(ring.memory().areas()) {
        client.region_write(bar, at(offset), &area.to_le_bytes()).unwrap();
    }
    let lines = [eventfd(), eventfd()];
    let fds: Vec<RawFd> = lines.iter().map(AsRawFd::as_raw_fd).collect();
    client.set_irqs(VFIO_PCI_MSIX_IRQ_INDEX, EVENTFDS, 0, 2, &fds).unwrap();
    client.region_write(bar, at(26), &1u16.to_le_bytes()).unwrap();
    client.region_write(bar, at(28), &1u16.to_le_bytes()).unwrap();
    client.region_write(bar, at(20), &[15]).unwrap();
    let request = memory.allocate(64, 16).unwrap();
    request.write(0, &8u32.to_le_bytes()).unwrap(); // VIRTIO_BLK_T_GET_ID
    request.write(20, &[0xff; 21]).unwrap();
    for _ in 0..100 {
        let readable = [request.segment(0, 16).unwrap()];
        assert!(ring.add(&readable, &[request.segment(20, 21).unwrap()]).is_some());
        if ring.publish() {
            client.region_write(found.notify.bar.into(), found.notify.offset.into(), &[0, 0]).unwrap();
        }
        signalled(&lines[1]);
        until("a completion", || ring.has_used());
        assert_eq!(ring.take().unwrap().unwrap().written, 21);
        assert_eq!(request.to_vec()[40], OK);
    }
    assert_eq!(count(&lines[0]), 0, "the configuration has not changed");
    client.set_irqs(VFIO_PCI_MSIX_IRQ_INDEX, VFIO_IRQ_SET_ACTION_TRIGGER | VFIO_IRQ_SET_DATA_NONE, 0, 0, &[]).unwrap();
    client.reset().unwrap();
    client.dma_unmap(IOVA, 1 << 20).unwrap();
    in_step(&mut client);
}
