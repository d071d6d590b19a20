//! Feature negotiation, the device status, and what follows from them.

use super::*;

/// What Linux writes, in its order, with what each register reads in between.
#[test]
fn bring_up() {
    let (mut pci, log) = function();
    assert_eq!(set_bus_master(&mut pci, true), Effect::None);
    assert_eq!(write(&mut pci, DEVICE_STATUS, 0u8), Effect::None);
    assert_eq!(status(&mut pci), 0);
    for (bits, reads) in [(1u8, 1), (3, 3)] {
        assert_eq!(write(&mut pci, DEVICE_STATUS, bits), Effect::None);
        assert_eq!(status(&mut pci), reads);
    }
    let mut offered = 0;
    for select in [0u32, 1] {
        let _ = write(&mut pci, DEVICE_FEATURE_SELECT, select);
        offered |= read(&mut pci, DEVICE_FEATURE, 4) << (32 * select);
    }
    assert_eq!(offered, VERSION_1 | RING_RESET | 1 << 28 | 1 << 29 | FLUSH);
    for select in [2u32, 3, 4, u32::MAX] {
        let _ = write(&mut pci, DEVICE_FEATURE_SELECT, select);
        assert_eq!(read(&mut pci, DEVICE_FEATURE, 4), 0);
    }
    accept(&mut pci, VERSION_1 | FLUSH);
    assert_eq!(pci.driver_features(), 0);
    assert_eq!(write(&mut pci, DEVICE_STATUS, 11u8), Effect::None);
    assert_eq!(status(&mut pci), 11);
    assert_eq!(pci.driver_features(), VERSION_1 | FLUSH);
    assert_eq!(log.lock().unwrap().acked, [VERSION_1 | FLUSH]);
    // Setting the bits again does not negotiate again.
    assert_eq!(write(&mut pci, DEVICE_STATUS, 11u8), Effect::None);
    assert_eq!(log.lock().unwrap().acked.len(), 1);

    assert_eq!(read(&mut pci, NUM_QUEUES, 2), u64::from(QUEUES));
    assert_eq!(write(&mut pci, CONFIG_MSIX_VECTOR, 0u16), Effect::None);
    assert_eq!(read(&mut pci, CONFIG_MSIX_VECTOR, 2), 0);
    for queue in 0..QUEUES {
        let _ = write(&mut pci, QUEUE_SELECT, queue);
        assert_eq!(read(&mut pci, QUEUE_SIZE, 2), 256);
        assert_eq!(read(&mut pci, QUEUE_ENABLE, 2), 0);
        assert_eq!(read(&mut pci, QUEUE_NOTIFY_OFF, 2), u64::from(queue));
        assert_eq!(read(&mut pci, QUEUE_MSIX_VECTOR, 2), 0xffff);
        assert_eq!(set_up(&mut pci, queue), Effect::None);
        assert_eq!(read(&mut pci, QUEUE_MSIX_VECTOR, 2), u64::from(queue) + 1);
        assert_eq!(read(&mut pci, QUEUE_ENABLE, 2), 1);
        let setup = QueueSetup { size: 128, desc: 0x1_0001_0000, driver: 0x2_0000, device: 0x3_0000, enabled: true };
        assert_eq!(pci.queue(queue), Some(setup));
        assert_eq!(write(&mut pci, NOTIFY + 4 * u64::from(queue), queue), Effect::None);
    }
    assert_eq!(pci.queue(QUEUES), None);
    assert!(!pci.is_running());
    assert_eq!(write(&mut pci, DEVICE_STATUS, 15u8), Effect::Start);
    assert!(pci.is_running());
    assert_eq!(write(&mut pci, DEVICE_STATUS, 15u8), Effect::None);
    assert_eq!(write(&mut pci, NOTIFY + 4, 1u16), Effect::Kick(1));
}

#[test]
fn features_that_are_refused() {
    let table = [
        ("without VERSION_1", FLUSH, 0u32, false),
        ("VERSION_1 alone", VERSION_1, 0, true),
        ("not offered by the device", VERSION_1 | 1 << 3, 0, false),
        ("not offered by the transport", VERSION_1 | 1 << 34, 0, false),
        ("beyond 64 bits", VERSION_1, 1, false),
    ];
    for (name, features, beyond, accepted) in table {
        let (mut pci, log) = function();
        let _ = set_bus_master(&mut pci, true);
        let _ = write(&mut pci, DEVICE_STATUS, 3u8);
        accept(&mut pci, features);
        let _ = write(&mut pci, DRIVER_FEATURE_SELECT, 2u32);
        let _ = write(&mut pci, DRIVER_FEATURE, beyond);
        assert_eq!(write(&mut pci, DEVICE_STATUS, 11u8), Effect::None);
        assert_eq!(status(&mut pci), if accepted { 11 } else { 3 }, "{name}");
        assert_eq!(log.lock().unwrap().acked.len(), usize::from(accepted), "{name}");
        // A driver that goes on regardless gets no queue and never starts.
        let _ = set_up(&mut pci, 0);
        assert_eq!(pci.queue(0).unwrap().enabled, accepted, "{name}");
        let effect = write(&mut pci, DEVICE_STATUS, 7u8);
        assert_eq!(effect, if accepted { Effect::Start } else { Effect::None }, "{name}");
        assert_eq!(status(&mut pci), if accepted { 15 } else { 3 }, "{name}");
        // It may think better of it.
        if !accepted {
            let _ = write(&mut pci, DRIVER_FEATURE, 0u32);
            accept(&mut pci, VERSION_1);
            assert_eq!(write(&mut pci, DEVICE_STATUS, 15u8), Effect::Start, "{name}");
        }
    }
}

#[test]
fn nothing_changes_until_a_reset_is_done() {
    let (mut pci, log) = running();
    let line = lines(&pci, Irq::Intx).remove(0);
    pci.interrupts().assert_intx(1);
    pci.interrupts().signal(2);
    assert_eq!(write(&mut pci, DEVICE_STATUS, 0u8), Effect::Reset);
    let ignored: [(u64, &[u8]); 6] = [
        (DEVICE_STATUS, &[0]),
        (DEVICE_STATUS, &[1]),
        (QUEUE_SELECT, &[0, 0]),
        (QUEUE_RESET, &[1, 0]),
        (NOTIFY, &[0, 0]),
        (DEVICE, &[9]),
    ];
    for (offset, data) in ignored {
        assert_eq!(pci.write(Region::Bar2, offset, data), Ok(Effect::None), "{offset:#x}");
        assert_eq!(status(&mut pci), 15);
    }
    for on in [false, true] {
        assert_eq!(set_bus_master(&mut pci, on), Effect::None);
    }
    assert!(!pci.is_running());
    assert_eq!(log.lock().unwrap().resets, 0);

    pci.reset_done();
    assert_eq!((log.lock().unwrap().resets, line.count()), (1, 1));
    assert_eq!(status(&mut pci), 0);
    assert_eq!(read(&mut pci, ISR, 1), 0);
    assert_eq!(pci.driver_features(), 0);
    for queue in 0..QUEUES {
        let fresh = QueueSetup { size: 256, desc: 0, driver: 0, device: 0, enabled: false };
        assert_eq!(pci.queue(queue), Some(fresh));
        let _ = write(&mut pci, QUEUE_SELECT, queue);
        assert_eq!(read(&mut pci, QUEUE_MSIX_VECTOR, 2), 0xffff);
    }
    let mut pba = [0xff];
    pci.read(Region::Bar0, 0x1000, &mut pba).unwrap();
    assert_eq!(pba, [0]);
    assert_eq!(log.lock().unwrap().config[0], 0);

    // Without a reset that was asked for there is nothing to be done.
    negotiate(&mut pci, VERSION_1);
    pci.reset_done();
    assert_eq!((status(&mut pci), log.lock().unwrap().resets), (11, 1));
}

#[test]
fn a_conventional_reset_returns_everything() {
    let (mut pci, log) = running();
    let (mut fresh, _) = function();
    pci.reset();
    assert_eq!(pci.export(), fresh.export());
    assert_eq!(status(&mut pci), status(&mut fresh));
    assert_eq!(log.lock().unwrap().resets, 1);
}

#[test]
fn bus_mastering_pauses_the_queues() {
    let (mut pci, _) = function();
    negotiate(&mut pci, VERSION_1 | RING_RESET);
    let _ = set_up(&mut pci, 0);
    assert_eq!(write(&mut pci, DEVICE_STATUS, 15u8), Effect::None);
    assert_eq!(status(&mut pci), 15);
    assert_eq!(write(&mut pci, NOTIFY, 0u16), Effect::None);
    assert_eq!(set_up(&mut pci, 1), Effect::None);
    assert_eq!(set_bus_master(&mut pci, true), Effect::Start);
    assert_eq!(set_bus_master(&mut pci, true), Effect::None);
    assert_eq!(write(&mut pci, NOTIFY, 0u16), Effect::Kick(0));
    assert_eq!(set_bus_master(&mut pci, false), Effect::Stop);
    assert_eq!(set_bus_master(&mut pci, false), Effect::None);
    assert_eq!(write(&mut pci, NOTIFY, 0u16), Effect::None);
    assert_eq!(write(&mut pci, QUEUE_RESET, 1u16), Effect::StopQueue(1));
}

#[test]
fn needs_reset_is_latched_and_told_once() {
    let (mut pci, _) = running();
    let lines = lines(&pci, Irq::Msix);
    let _ = write(&mut pci, CONFIG_MSIX_VECTOR, 0u16);
    for _ in 0..2 {
        pci.set_needs_reset();
        assert_eq!((status(&mut pci), lines[0].count()), (0x4f, 1));
        assert_eq!(write(&mut pci, DEVICE_STATUS, 15u8), Effect::None);
    }
    assert!(!pci.is_running());
    assert_eq!(write(&mut pci, NOTIFY, 0u16), Effect::Kick(0), "the queues that kept to the rules go on");
    assert_eq!(set_bus_master(&mut pci, false), Effect::Stop);
    assert_eq!(write(&mut pci, NOTIFY, 0u16), Effect::None);
    assert_eq!(set_bus_master(&mut pci, true), Effect::None);
    assert_eq!(write(&mut pci, DEVICE_STATUS, 0u8), Effect::Reset);
    pci.reset_done();
    pci.set_needs_reset();
    assert_eq!((status(&mut pci), lines[0].count()), (0, 1), "without a driver there is nobody to tell");
}

#[test]
fn a_changed_configuration_has_a_new_generation() {
    let (mut pci, _) = function();
    let line = lines(&pci, Irq::Intx).remove(0);
    pci.config_changed();
    assert_eq!((read(&mut pci, CONFIG_GENERATION, 1), line.count()), (1, 0));
    let (mut pci, _) = running();
    let line = lines(&pci, Irq::Intx).remove(0);
    pci.config_changed();
    assert_eq!((read(&mut pci, CONFIG_GENERATION, 1), line.count()), (1, 1));
    assert_eq!(read(&mut pci, ISR, 1), 2);
    for _ in 0..255 {
        pci.config_changed();
    }
    assert_eq!(read(&mut pci, CONFIG_GENERATION, 1), 0);
}
