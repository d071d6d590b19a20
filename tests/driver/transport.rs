//! Negotiation, the device status, the queues' registers, and resets (virtio 1.3 sections 2.1, 2.2, 3.1 and 4.1.4.3).

use std::sync::Arc;

use client::CommonRegister::*;
use client::{BlockOptions, BlockRequest, GuestMemory, NO_VECTOR, NotifyMethod, RequestType, VirtioPci};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO};
use virtio_bindings::virtio_config::*;

use crate::rig::{IOVA, Machine, OK, RINGS, Rig, count, exercise, map, until};

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const RING_RESET: u64 = 1 << VIRTIO_F_RING_RESET;

fn transport(rig: &Rig) -> VirtioPci {
    VirtioPci::new(rig.client()).unwrap()
}

#[test]
fn what_is_offered_is_what_is_meant() {
    let rig = Rig::ram();
    let offered = transport(&rig).device_features().unwrap();
    let choices = BlockOptions::PACKED | BlockOptions::IN_ORDER;
    let rest = offered & !BlockOptions::FEATURES & !VERSION_1;
    assert_eq!(rest, 1 << VIRTIO_F_IOMMU_PLATFORM | choices, "{offered:#x}");
    for feature in [VIRTIO_F_VERSION_1, VIRTIO_F_RING_RESET, VIRTIO_BLK_F_MQ, 28, 29] {
        assert_ne!(offered >> feature & 1, 0, "feature {feature}");
    }
    assert_eq!(offered >> VIRTIO_BLK_F_RO & 1, 0);
    let rig = Rig::with(|device| {
        device.num_queues = Some(1);
        (device.packed, device.in_order) = (Some(false), Some(false));
    });
    assert_eq!(transport(&rig).device_features().unwrap() & (1 << VIRTIO_BLK_F_MQ | choices), 0);
}

#[test]
fn features_that_are_not_offered_are_refused() {
    let rig = Rig::ram();
    let transport = transport(&rig);
    let offered = transport.device_features().unwrap();
    let unoffered = (0..64).filter(|bit| offered >> bit & 1 == 0).map(|bit| VERSION_1 | 1 << bit);
    for features in unoffered.chain([0, offered & !VERSION_1]) {
        transport.reset().unwrap();
        transport.add_status(ACKNOWLEDGE).unwrap();
        transport.add_status(DRIVER).unwrap();
        transport.set_driver_features(features).unwrap();
        transport.add_status(FEATURES_OK).unwrap();
        assert_eq!(transport.status().unwrap(), ACKNOWLEDGE | DRIVER, "{features:#x}");
        // A driver that goes on nevertheless gets nowhere.
        transport.driver_ok().unwrap();
        assert_eq!(transport.status().unwrap() & DRIVER_OK, 0);
    }
    // Bits beyond the 64 that are known.
    transport.reset().unwrap();
    transport.set_driver_features(VERSION_1).unwrap();
    transport.write_common(DriverFeatureSelect, 2).unwrap();
    transport.write_common(DriverFeature, 1).unwrap();
    transport.add_status(ACKNOWLEDGE | DRIVER | FEATURES_OK).unwrap();
    assert_eq!(transport.status().unwrap() & FEATURES_OK, 0);
    // And a refusal is no end: with other features it works.
    transport.write_common(DriverFeature, 0).unwrap();
    transport.add_status(FEATURES_OK).unwrap();
    assert_ne!(transport.status().unwrap() & FEATURES_OK, 0);
    // From then on they are fixed.
    transport.set_driver_features(VERSION_1 | RING_RESET).unwrap();
    transport.write_common(DriverFeatureSelect, 1).unwrap();
    assert_eq!(transport.read_common(DriverFeature).unwrap(), VERSION_1 >> 32);
}

#[test]
fn status_bits_are_only_ever_added() {
    let rig = Rig::ram();
    let transport = transport(&rig);
    transport.negotiate(!(1 << VIRTIO_F_IOMMU_PLATFORM)).unwrap();
    let status = ACKNOWLEDGE | DRIVER | FEATURES_OK;
    transport.write_common(DeviceStatus, ACKNOWLEDGE.into()).unwrap();
    assert_eq!(transport.status().unwrap(), status);
    transport.write_common(DeviceStatus, (status | VIRTIO_CONFIG_S_NEEDS_RESET).into()).unwrap();
    assert_eq!(transport.status().unwrap(), status, "that one is the device's");
    transport.driver_ok().unwrap();
    transport.write_common(DeviceStatus, VIRTIO_CONFIG_S_FAILED.into()).unwrap();
    assert_eq!(transport.status().unwrap(), status | DRIVER_OK | VIRTIO_CONFIG_S_FAILED);
    transport.reset().unwrap();
    assert_eq!(transport.status().unwrap(), 0);
}

#[test]
fn a_reset_brings_every_register_back() {
    let rig = Rig::ram();
    let mut machine = rig.boot();
    exercise(&mut machine.queues);
    let transport = machine.driver.transport();
    transport.reset().unwrap();
    assert_eq!(transport.read_common(NumQueues).unwrap(), 4);
    assert_eq!(transport.read_common(ConfigMsixVector).unwrap(), u64::from(NO_VECTOR));
    for queue in 0..4 {
        assert_eq!(transport.max_queue_size(queue).unwrap(), 256);
        for register in [QueueEnable, QueueDesc, QueueDriver, QueueDevice, QueueReset] {
            assert_eq!(transport.read_common(register).unwrap(), 0, "{register:?} of {queue}");
        }
        assert_eq!(transport.read_common(QueueMsixVector).unwrap(), u64::from(NO_VECTOR));
        assert_eq!(transport.read_common(QueueNotifyOff).unwrap(), u64::from(queue));
    }
    transport.write_common(DriverFeatureSelect, 0).unwrap();
    assert_eq!(transport.read_common(DriverFeature).unwrap(), 0);
    machine.reboot(&BlockOptions::default());
    exercise(&mut machine.queues);
}

#[test]
fn queues_have_the_sizes_that_they_can_have() {
    let rig = Rig::with(|device| device.queue_size = Some(512));
    let transport = transport(&rig);
    transport.negotiate(0).unwrap();
    for queue in [4, 5, 64, u16::MAX] {
        assert_eq!(transport.max_queue_size(queue).unwrap(), 0, "there is no queue {queue}");
        transport.write_common(QueueEnable, 1).unwrap();
        assert_eq!(transport.read_common(QueueEnable).unwrap(), 0);
    }
    assert_eq!(transport.max_queue_size(3).unwrap(), 512);
    for (size, expected) in [(256, 256), (1, 1), (3, 1), (0, 1), (1024, 1), (u64::from(u16::MAX), 1), (512, 512)] {
        transport.write_common(QueueSize, size).unwrap();
        assert_eq!(transport.read_common(QueueSize).unwrap(), expected, "{size}");
    }
    for vector in [0, 4] {
        transport.write_common(QueueMsixVector, vector).unwrap();
        assert_eq!(transport.read_common(QueueMsixVector).unwrap(), vector);
    }
    for vector in [5, 2048, 0xfffe] {
        transport.write_common(QueueMsixVector, vector).unwrap();
        assert_eq!(
            transport.read_common(QueueMsixVector).unwrap(),
            u64::from(NO_VECTOR),
            "there is no vector {vector}"
        );
    }
}

#[test]
fn an_enabled_queue_keeps_its_place() {
    let rig = Rig::ram();
    let machine = rig.boot();
    let transport = machine.driver.transport();
    transport.write_common(QueueSelect, 0).unwrap();
    let place = |register| transport.read_common(register).unwrap();
    let before = [QueueSize, QueueDesc, QueueDriver, QueueDevice].map(place);
    for register in [QueueSize, QueueDesc, QueueDriver, QueueDevice] {
        transport.write_common(register, 64).unwrap();
    }
    transport.write_common(QueueEnable, 0).unwrap();
    assert_eq!([QueueSize, QueueDesc, QueueDriver, QueueDevice].map(place), before);
    assert_eq!(place(QueueEnable), 1);
}

/// Section 4.1.4.3.1: the driver may notify and use a queue that it enables after DRIVER_OK.
#[test]
fn a_queue_may_be_enabled_late() {
    let rig = Rig::ram();
    let mut machine = rig.boot_with(&BlockOptions { queues: 1, interrupts: false, ..BlockOptions::default() });
    let mut ring = client::SplitDriver::new(&machine.memory, 8, true, 0).unwrap();
    let transport = machine.driver.transport();
    transport.enable_queue(2, ring.memory().size(), ring.memory().areas(), NO_VECTOR).unwrap();
    let bell = transport.doorbell(2, NotifyMethod::Message).unwrap();
    let request = machine.memory.allocate(17, 16).unwrap();
    request.write(0, &4u32.to_le_bytes()).unwrap(); // VIRTIO_BLK_T_FLUSH
    request.write(16, &[0xff]).unwrap();
    let head = ring.add(&[request.segment(0, 16).unwrap()], &[request.segment(16, 1).unwrap()]).unwrap();
    assert!(ring.publish());
    bell.ring().unwrap();
    until("the late queue is served", || ring.has_used());
    assert_eq!(ring.take().unwrap().unwrap().head, head);
    assert_eq!(request.to_vec()[16], OK);
    exercise(&mut machine.queues);
}

#[test]
fn a_kick_before_driver_ok_is_not_lost_on_the_requests() {
    let rig = Rig::ram();
    let client = rig.client();
    let memory = GuestMemory::new(1 << 20, IOVA).unwrap();
    map(&client, &memory);
    let transport = VirtioPci::new(Arc::clone(&client)).unwrap();
    transport.reset().unwrap();
    transport.negotiate(0).unwrap();
    let mut ring = client::SplitDriver::new(&memory, 8, false, 0).unwrap();
    transport.enable_queue(0, ring.memory().size(), ring.memory().areas(), NO_VECTOR).unwrap();
    let request = memory.allocate(17, 16).unwrap();
    request.write(0, &4u32.to_le_bytes()).unwrap();
    request.write(16, &[0xff]).unwrap();
    ring.add(&[request.segment(0, 16).unwrap()], &[request.segment(16, 1).unwrap()]).unwrap();
    assert!(ring.publish());
    transport.doorbell(0, NotifyMethod::Message).unwrap().ring().unwrap();
    assert!(!ring.has_used(), "the device must not look before DRIVER_OK (section 3.1.1)");
    transport.driver_ok().unwrap();
    until("it is served now", || ring.has_used());
}

#[test]
fn a_queue_may_be_reset_alone() {
    let posted = RINGS.map(|rings| (NotifyMethod::Posted, rings));
    for (notify, rings) in posted.into_iter().chain([(NotifyMethod::IoEventFd, 0)]) {
        let rig = Rig::ram();
        let features = BlockOptions::FEATURES | rings;
        let mut machine = rig.boot_with(&BlockOptions { features, notify, ..BlockOptions::default() });
        assert!(machine.driver.has_feature(VIRTIO_F_RING_RESET));
        let data = [machine.memory.allocate(4096, 4096).unwrap().segment(0, 4096).unwrap()];
        for _ in 0..50 {
            exercise(&mut machine.queues);
            // With requests in flight, which the reset ends one way or the other.
            for _ in 0..20 {
                let read = BlockRequest { kind: RequestType::Read, sector: 0, data: &data };
                machine.queues[1].submit(&read).unwrap();
            }
            machine.queues[1].publish().unwrap();
            machine.driver.restart_queue(1, &mut machine.queues[1]).unwrap();
            exercise(&mut machine.queues);
        }
    }
}

/// After its reset a queue has its first state: it may be given another size and place.
#[test]
fn a_queue_that_was_reset_may_come_back_elsewhere() {
    let rig = Rig::ram();
    let mut machine = rig.boot();
    exercise(&mut machine.queues);
    let transport = machine.driver.transport();
    transport.reset_queue(3).unwrap();
    assert_eq!(transport.read_common(QueueEnable).unwrap(), 0);
    assert_eq!(transport.read_common(QueueSize).unwrap(), 256);
    let mut ring = client::SplitDriver::new(&machine.memory, 2, true, 4).unwrap();
    transport.enable_queue(3, ring.memory().size(), ring.memory().areas(), NO_VECTOR).unwrap();
    let request = machine.memory.allocate(17, 16).unwrap();
    request.write(0, &4u32.to_le_bytes()).unwrap();
    let bell = transport.doorbell(3, NotifyMethod::Message).unwrap();
    for _ in 0..5 {
        request.write(16, &[0xff]).unwrap();
        ring.add(&[request.segment(0, 16).unwrap()], &[request.segment(16, 1).unwrap()]).unwrap();
        if ring.publish() {
            bell.ring().unwrap();
        }
        until("it is served", || ring.has_used());
        ring.take().unwrap();
        assert_eq!(request.to_vec()[16], OK);
    }
    exercise(&mut machine.queues[..3]);
}

/// Without the feature the register does nothing.
#[test]
fn queue_reset_is_a_feature() {
    let rig = Rig::ram();
    let features = BlockOptions::FEATURES & !RING_RESET;
    let mut machine = rig.boot_with(&BlockOptions { features, ..BlockOptions::default() });
    let transport = machine.driver.transport();
    transport.write_common(QueueSelect, 0).unwrap();
    transport.write_common(QueueReset, 1).unwrap();
    assert_eq!(transport.read_common(QueueReset).unwrap(), 0);
    assert_eq!(transport.read_common(QueueEnable).unwrap(), 1);
    exercise(&mut machine.queues);
}

#[test]
fn the_configuration_tells_what_the_disk_is() {
    let rig = Rig::with(|device| device.num_queues = Some(3));
    let machine = rig.boot();
    let config = machine.driver.config().unwrap();
    assert_eq!(config.capacity, crate::rig::DISK / 512);
    assert_eq!((config.num_queues, config.seg_max), (Some(3), Some(254)));
    assert_eq!((config.blk_size, config.writeback), (Some(512), Some(true)));
    let (discard, zeroes) = (config.discard.unwrap(), config.write_zeroes.unwrap());
    assert!(discard.max_sectors > 0 && discard.max_seg == 1);
    assert!(zeroes.max_sectors > 0 && zeroes.max_seg == 1);
    let transport = machine.driver.transport();
    let generation = transport.read_common(ConfigGeneration).unwrap();
    assert_eq!(transport.read_common(ConfigGeneration).unwrap(), generation, "nothing has changed");
    // Fields that a driver may not write stay.
    transport.write_device_config(0, &[0xff; 32]).unwrap();
    transport.write_device_config(34, &[0xff; 24]).unwrap();
    assert_eq!(machine.driver.config().unwrap(), config);
    assert_eq!(count(machine.driver.config_interrupt().unwrap()), 0);
}

/// Two drivers one after the other, with other features, sizes and notifications each.
#[test]
fn drivers_follow_each_other() {
    let rig = Rig::ram();
    let client = rig.client();
    let memory = GuestMemory::new(64 << 20, IOVA).unwrap();
    let mut machine = Machine::with_memory(client, memory, &BlockOptions::default());
    for round in 0..24u32 {
        exercise(&mut machine.queues);
        if round % 3 == 0 {
            machine.client.reset().unwrap();
        }
        machine.reboot(&BlockOptions {
            features: if round % 2 == 0 { BlockOptions::FEATURES } else { RING_RESET | 1 << VIRTIO_BLK_F_MQ },
            queues: 1 + round as u16 % 4,
            queue_size: 2 << (round % 8).max(1),
            notify: [NotifyMethod::Posted, NotifyMethod::Message, NotifyMethod::IoEventFd][round as usize % 3],
            interrupts: round % 5 != 0,
            indirect_entries: 8 * (round as u16 % 2),
            bounce_size: 64 << 10,
        });
    }
}
