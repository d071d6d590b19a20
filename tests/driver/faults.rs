//! Drivers that break the rules: the device says so once, stops that queue, and comes back after a reset.

use std::os::fd::AsFd;

use client::{
    BlockOptions, BlockRequest, Descriptor, GuestMemory, NotifyMethod, PackedDescriptor, PackedMemory, RequestType,
    Ring, SplitMemory,
};
use nix::sys::memfd::{MFdFlags, memfd_create};
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;

use crate::binary::{Served, disk};
use crate::rig::{IOVA, MEMORY, Machine, Rig, completion, count, exercise, given_back, ram, signalled, until};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Breaks a queue: `memory` is its rings, `page` a page that is mapped.
type Break = fn(memory: &SplitMemory, page: u64);

fn offer(memory: &SplitMemory, head: u16) {
    let idx = memory.avail_idx();
    memory.set_avail_entry(idx, head);
    memory.set_avail_idx(idx.wrapping_add(1));
}

fn chain(memory: &SplitMemory, descriptors: &[(u64, u32, u16, u16)]) {
    for (index, &(addr, len, flags, next)) in (0..).zip(descriptors) {
        memory.set_descriptor(index, Descriptor { addr, len, flags, next });
    }
    offer(memory, 0);
}

const FAULTS: [(&str, Break); 20] = [
    ("avail.idx is too far ahead", |memory, _| memory.set_avail_idx(memory.avail_idx().wrapping_add(257))),
    ("avail.idx goes back", |memory, _| memory.set_avail_idx(memory.avail_idx().wrapping_sub(1))),
    ("a head beyond the table", |memory, _| offer(memory, 256)),
    ("a head far beyond the table", |memory, _| offer(memory, u16::MAX)),
    ("a chain that is a loop", |memory, page| chain(memory, &[(page, 16, NEXT, 1), (page, 16, NEXT, 0)])),
    ("a chain that leads to itself", |memory, page| chain(memory, &[(page, 16, NEXT, 0)])),
    ("a next beyond the table", |memory, page| chain(memory, &[(page, 16, NEXT, 256)])),
    ("a header nowhere", |memory, page| chain(memory, &[(0x1000, 16, NEXT, 1), (page, 1, WRITE, 0)])),
    ("data nowhere", |memory, page| {
        chain(memory, &[(page, 16, NEXT, 1), (0x1000, 512, NEXT | WRITE, 2), (page, 1, WRITE, 0)])
    }),
    ("data that leaves its mapping", |memory, page| {
        chain(memory, &[(page, 16, NEXT, 1), (IOVA + MEMORY - 512, 1024, NEXT | WRITE, 2), (page, 1, WRITE, 0)])
    }),
    ("data that wraps", |memory, page| {
        chain(memory, &[(page, 16, NEXT, 1), (u64::MAX - 255, 512, NEXT | WRITE, 2), (page, 1, WRITE, 0)])
    }),
    ("a status nowhere", |memory, page| chain(memory, &[(page, 16, NEXT, 1), (u64::MAX, 1, WRITE, 0)])),
    ("no status", |memory, page| chain(memory, &[(page, 16, 0, 0)])),
    ("a status of no bytes", |memory, page| chain(memory, &[(page, 16, NEXT, 1), (page, 0, WRITE, 0)])),
    ("no header", |memory, page| chain(memory, &[(page, 513, WRITE, 0)])),
    ("half a header", |memory, page| chain(memory, &[(page, 15, NEXT, 1), (page, 1, WRITE, 0)])),
    ("a readable piece after a writable one", |memory, page| {
        chain(memory, &[(page, 16, NEXT, 1), (page, 1, WRITE | NEXT, 2), (page, 512, 0, 0)])
    }),
    ("a table nowhere", |memory, _| chain(memory, &[(0x1000, 48, INDIRECT, 0)])),
    ("a table of half a descriptor", |memory, page| chain(memory, &[(page, 40, INDIRECT, 0)])),
    ("a table within a table", |memory, page| chain(memory, &[(page + 64, 16, INDIRECT, 0)])),
];

/// As [`Break`], for packed rings, each of which stands at its first descriptor.
type BreakPacked = fn(memory: &PackedMemory, page: u64);

const AVAIL: u16 = 1 << 7;

/// Makes a list available at the first descriptor.
fn list(memory: &PackedMemory, descriptors: &[(u64, u32, u16)]) {
    for (index, &(addr, len, flags)) in descriptors.iter().enumerate().rev() {
        let index = index as u16;
        memory.set_descriptor(index, PackedDescriptor { addr, len, id: index, flags: flags | AVAIL });
    }
}

const PACKED_FAULTS: [(&str, BreakPacked); 13] = [
    ("a list as long as the ring and longer", |memory, page| list(memory, &[(page, 16, NEXT); 256])),
    ("a header nowhere", |memory, page| list(memory, &[(0x1000, 16, NEXT), (page, 1, WRITE)])),
    ("data nowhere", |memory, page| list(memory, &[(page, 16, NEXT), (0x1000, 512, NEXT | WRITE), (page, 1, WRITE)])),
    ("data that wraps", |memory, page| {
        list(memory, &[(page, 16, NEXT), (u64::MAX - 255, 512, NEXT | WRITE), (page, 1, WRITE)])
    }),
    ("a status nowhere", |memory, page| list(memory, &[(page, 16, NEXT), (u64::MAX, 1, WRITE)])),
    ("no status", |memory, page| list(memory, &[(page, 16, 0)])),
    ("no header", |memory, page| list(memory, &[(page, 513, WRITE)])),
    ("a readable piece after a writable one", |memory, page| {
        list(memory, &[(page, 16, NEXT), (page, 1, WRITE | NEXT), (page, 512, 0)])
    }),
    ("a table nowhere", |memory, _| list(memory, &[(0x1000, 48, INDIRECT)])),
    ("a table of half a descriptor", |memory, page| list(memory, &[(page, 40, INDIRECT)])),
    ("a table of nothing", |memory, page| list(memory, &[(page, 0, INDIRECT)])),
    ("a table in a list", |memory, page| list(memory, &[(page, 16, NEXT), (page, 48, INDIRECT)])),
    ("a list behind a table", |memory, page| list(memory, &[(page, 48, INDIRECT | NEXT), (page, 1, WRITE)])),
];

/// A page whose first bytes are a header for a read of sector 0, and at 64 a descriptor of a table in a table.
fn page(memory: &GuestMemory) -> u64 {
    let page = memory.allocate(4096, 4096).unwrap();
    page.write(64, &page.iova().to_le_bytes()).unwrap();
    page.write(72, &16u32.to_le_bytes()).unwrap();
    page.write(76, &INDIRECT.to_le_bytes()).unwrap();
    page.iova()
}

fn needs_reset(machine: &Machine) -> bool {
    machine.status() & VIRTIO_CONFIG_S_NEEDS_RESET != 0
}

#[test]
fn a_broken_queue_needs_a_reset_and_nothing_else_suffers() {
    each_fault(BlockOptions::FEATURES, &FAULTS, |fault, ring, page| fault(ring.split().unwrap(), page));
}

#[test]
fn a_broken_packed_queue_needs_a_reset_and_nothing_else_suffers() {
    for features in [BlockOptions::PACKED, BlockOptions::PACKED | BlockOptions::IN_ORDER] {
        each_fault(BlockOptions::FEATURES | features, &PACKED_FAULTS, |fault, ring, page| {
            fault(ring.packed().unwrap(), page);
        });
    }
}

fn each_fault<F: Copy>(features: u64, faults: &[(&str, F)], commit: fn(F, &Ring, u64)) {
    for notify in [NotifyMethod::Posted, NotifyMethod::IoEventFd] {
        let rig = Rig::devices(|folder| vec![ram(&folder.join("a.sock")), ram(&folder.join("b.sock"))]);
        let mut other = Machine::new(rig.client_of(1), &BlockOptions::default());
        let options = BlockOptions { features, notify, bounce_size: 16 << 10, ..BlockOptions::default() };
        let mut machine = rig.boot_with(&options);
        let page = page(&machine.memory);
        for &(what, fault) in faults {
            let others = if features & BlockOptions::PACKED == 0 { 4 } else { 2 };
            exercise(&mut machine.queues[..others]);
            let config_interrupt = machine.driver.config_interrupt().unwrap();
            assert_eq!((needs_reset(&machine), count(config_interrupt)), (false, 0));
            let broken = &machine.queues[2];
            commit(fault, broken.ring(), page);
            machine.queues[2].doorbell().ring().unwrap();
            assert_eq!(signalled(config_interrupt), 1, "{what}");
            assert!(needs_reset(&machine), "{what}");
            // Again, as drivers do that do not notice: nothing more is said, and nothing is done there.
            let used = given_back(broken);
            for _ in 0..3 {
                commit(fault, broken.ring(), page);
                machine.queues[2].doorbell().ring().unwrap();
            }
            machine.queues.swap(2, 3);
            exercise(&mut machine.queues[..3]);
            machine.queues.swap(2, 3);
            exercise(&mut other.queues);
            assert_eq!(given_back(&machine.queues[2]), used, "{what}: the queue rests");
            assert_eq!(count(machine.driver.config_interrupt().unwrap()), 0, "{what}: said once");
            machine.reboot(&options);
        }
        assert!(!needs_reset(&other));
        exercise(&mut machine.queues);
    }
}

/// What the driver had in flight on the broken queue is still given back.
#[test]
fn requests_before_the_fault_complete() {
    let rig = Rig::file(vfio_user_blk::config::Cache::None);
    let mut machine = rig.boot_with(&BlockOptions { indirect_entries: 0, ..BlockOptions::default() });
    let data = machine.memory.allocate(64 << 10, 4096).unwrap();
    let segment = [data.segment(0, 64 << 10).unwrap()];
    let queue = &mut machine.queues[0];
    for slot in 0..30 {
        queue.submit(&BlockRequest { kind: RequestType::Read, sector: 128 * slot, data: &segment }).unwrap();
    }
    queue.publish().unwrap();
    offer(queue.ring().split().unwrap(), 999);
    queue.doorbell().ring().unwrap();
    for _ in 0..30 {
        assert_eq!(completion(queue).status, crate::rig::OK);
    }
    until("it needs a reset", || needs_reset(&machine));
}

/// A queue breaks while messages wait that reset the device and start it anew: what it says then is nobody's business.
#[test]
fn what_broke_before_a_reset_is_forgotten() {
    use vfio_user::{RegionData, RegionWrites, Request};
    let rig = Rig::null();
    let machine = rig.boot_with(&BlockOptions { queues: 1, ..BlockOptions::default() });
    let capabilities = machine.driver.transport().capabilities();
    let size = machine.queues[0].ring().split().unwrap().size();
    let rings = [(); 2].map(|()| SplitMemory::allocate(&machine.memory, size).unwrap());
    let features = machine.driver.features();
    let write = |window: client::Window, at: u32, value: u64, width: usize| {
        (u32::from(window.bar), u64::from(window.offset + at), value.to_le_bytes(), width)
    };
    let (common, notify) = (capabilities.common, capabilities.notify);
    // Offsets of struct virtio_pci_common_cfg.
    let start = |ring: &SplitMemory| {
        let mut writes = vec![(7, 4, 6u64.to_le_bytes(), 2)];
        writes.extend([0, 1, 3].map(|status| write(common, 0x14, status, 1)));
        for word in [0, 1] {
            writes.extend([write(common, 0x8, word as u64, 4), write(common, 0xc, features >> (32 * word), 4)]);
        }
        writes.extend([write(common, 0x14, 0xb, 1), write(common, 0x16, 0, 2)]);
        let [desc, driver, device] = ring.areas();
        writes.extend([(0x20, desc), (0x28, driver), (0x30, device)].map(|(at, area)| write(common, at, area, 8)));
        writes.extend([write(common, 0x1c, 1, 2), write(common, 0x14, 0xf, 1)]);
        writes
    };
    let kick = [write(notify, 0, 0, 2)];
    // Something to do for the session, so that it comes to nothing else while the queue breaks.
    let busy = [write(common, 0x16, 0, 2); 200];
    let posted = |writes: &[(u32, u64, [u8; 8], usize)]| {
        let writes: Vec<_> = writes
            .iter()
            .map(|(region, offset, value, width)| RegionData {
                offset: *offset,
                region: *region,
                data: &value[..*width],
            })
            .collect();
        let mut buffer = Vec::new();
        let mut payload = Vec::new();
        Request::RegionWriteMulti(RegionWrites::new(&writes, &mut buffer).unwrap()).encode(&mut payload);
        crate::protocol::message(0, 15, 0x10, &payload)
    };
    machine.client.send_raw(&posted(&start(&rings[0])), &[]).unwrap();
    for round in 0..20 {
        let (broken, next) = (&rings[round % 2], &rings[(round + 1) % 2]);
        broken.set_avail_idx(999);
        next.clear();
        let mut messages = posted(&kick);
        messages.extend((0..50).flat_map(|_| posted(&busy)));
        messages.extend(crate::protocol::message(0, 13, 0x10, &[]));
        messages.extend(posted(&start(next)));
        machine.client.send_raw(&messages, &[]).unwrap();
        // The first answer may come before the session has looked at what the workers say.
        for _ in 0..2 {
            assert_eq!(machine.status(), 0xf, "round {round}");
        }
    }
}

#[test]
fn a_head_may_not_be_given_twice() {
    let rig = Rig::null();
    let machine = rig.boot_with(&BlockOptions { queues: 1, ..BlockOptions::default() });
    // Many of the same at once, so that some are in flight together.
    let page = page(&machine.memory);
    let memory = machine.queues[0].ring().split().unwrap();
    for (index, descriptor) in [(page, 16, NEXT, 1), (page + 512, 1, WRITE, 0)].into_iter().enumerate() {
        let (addr, len, flags, next) = descriptor;
        memory.set_descriptor(index as u16, Descriptor { addr, len, flags, next });
    }
    for at in 0..200 {
        memory.set_avail_entry(at, 0);
    }
    memory.set_avail_idx(200);
    machine.queues[0].doorbell().ring().unwrap();
    until("it needs a reset, or all were served one after the other", || {
        needs_reset(&machine) || machine.queues[0].ring().split().unwrap().used_idx() == 200
    });
}

/// Rings that lie nowhere, or where no ring can be: found when the device starts.
#[test]
fn a_ring_in_the_wrong_place_needs_a_reset() {
    use client::CommonRegister::{QueueDesc, QueueDevice, QueueDriver, QueueSelect};
    let rig = Rig::ram();
    let client = rig.client();
    let memory = GuestMemory::new(16 << 20, IOVA).unwrap();
    crate::rig::map(&client, &memory);
    for (register, address) in [
        (QueueDesc, 0),
        (QueueDesc, IOVA + 8),
        (QueueDesc, IOVA + (16 << 20) - 64),
        (QueueDriver, IOVA + 1),
        (QueueDriver, u64::MAX),
        (QueueDevice, IOVA + 2),
        (QueueDevice, u64::MAX - 3),
    ] {
        let transport = client::VirtioPci::new(client.clone()).unwrap();
        transport.reset().unwrap();
        transport.negotiate(BlockOptions::FEATURES).unwrap();
        let config = crate::rig::eventfd();
        let config_copy = config.as_fd().try_clone_to_owned().unwrap();
        transport.enable_msix(&[config]).unwrap();
        transport.set_config_vector(0).unwrap();
        let ring = SplitMemory::allocate(&memory, 64).unwrap();
        transport.write_common(QueueSelect, 0).unwrap();
        transport.write_common(client::CommonRegister::QueueSize, 64).unwrap();
        let [desc, driver, device] = ring.areas();
        for (own, value) in [(QueueDesc, desc), (QueueDriver, driver), (QueueDevice, device)] {
            transport.write_common(own, if own == register { address } else { value }).unwrap();
        }
        transport.write_common(client::CommonRegister::QueueEnable, 1).unwrap();
        transport.driver_ok().unwrap();
        let status = transport.status().unwrap();
        assert_ne!(status & VIRTIO_CONFIG_S_NEEDS_RESET, 0, "{register:?} at {address:#x}");
        assert!(crate::rig::readable(config_copy.as_fd(), crate::rig::LIMIT));
    }
    let (driver, mut queues) = client::BlockDriver::start(client, &memory, &BlockOptions::default()).unwrap();
    exercise(&mut queues);
    driver.stop().unwrap();
}

/// QEMU without share=on: the descriptor that comes with a map leads to pages that the guest never writes.
#[test]
fn private_memory_is_noticed() {
    let server = Served::start(|folder| disk(&folder.join("blk.sock")));
    let client = server.client();
    let memory = GuestMemory::new(1 << 20, IOVA).unwrap();
    let never_written = std::fs::File::from(memfd_create(c"private", MFdFlags::MFD_CLOEXEC).unwrap());
    never_written.set_len(1 << 20).unwrap();
    client.dma_map(&memory.dma_map(), Some(never_written.as_fd())).unwrap();
    let options = BlockOptions { queue_size: 16, bounce_size: 4096, ..BlockOptions::default() };
    let (_driver, mut queues) = client::BlockDriver::start(client, &memory, &options).unwrap();
    for queue in &mut queues {
        queue.submit(&BlockRequest { kind: RequestType::Flush, sector: 0, data: &[] }).unwrap();
        queue.publish().unwrap();
        queue.doorbell().ring().unwrap();
        queue.doorbell().ring().unwrap();
    }
    server.wait_for("share=on");
    until("each queue has said so", || server.log().matches("share=on").count() > 4);
    server.stop();
}

/// QEMU without a memory backend at all: maps come without descriptors.
#[test]
fn memory_without_a_descriptor_is_noticed() {
    let server = Served::start(|folder| disk(&folder.join("blk.sock")));
    let client = server.client();
    let memory = GuestMemory::new(1 << 20, IOVA).unwrap();
    client.dma_map(&memory.dma_map(), None).unwrap();
    let options = BlockOptions { queue_size: 16, bounce_size: 4096, ..BlockOptions::default() };
    let (driver, _queues) = client::BlockDriver::start(client, &memory, &options).unwrap();
    server.wait_for("share=on (-object");
    assert_ne!(driver.transport().status().unwrap() & VIRTIO_CONFIG_S_NEEDS_RESET, 0);
    server.stop();
}
