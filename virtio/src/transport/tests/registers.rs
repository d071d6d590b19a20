//! Registers one by one: the effect of a write and what is read back.

use super::*;

#[test]
fn a_driver_finds_the_windows() {
    let (mut pci, _) = function();
    let mut config = [0; 256];
    pci.read(Region::Config, 0, &mut config).unwrap();
    assert_eq!(config[..4], [0xf4, 0x1a, 0x42, 0x10]);
    assert_eq!(config[8..12], [1, 0, 0, 1]);
    assert_eq!(config[0x2c..0x30], [0xf4, 0x1a, 0x00, 0x11]);
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    let mut found = Vec::new();
    let mut at = usize::from(config[0x34]);
    while at != 0 {
        if config[at] == 9 {
            let (length, kind, bar) = (config[at + 2], config[at + 3], config[at + 4]);
            found.push((kind, bar, length, word(at + 8), word(at + 12), word(at + 16) as u8));
        } else {
            assert_eq!((config[at], config[at + 2]), (0x11, 3), "one vector a queue, one for the configuration");
        }
        at = usize::from(config[at + 1]);
    }
    // type, BAR, length of the capability, offset, length, what the byte behind is: the next
    // capability's ID, the notify multiplier or pci_cfg_data
    assert_eq!(
        found,
        [
            (1, 2, 16, 0x0000, 64, 9),
            (3, 2, 16, 0x1000, 1, 9),
            (4, 2, 16, 0x2000, CONFIG_LEN as u32, 9),
            (2, 2, 20, 0x3000, 4 * u32::from(QUEUES), 4),
            (5, 0, 20, 0, 0, 0),
        ]
    );
    assert_eq!(pci.regions(), [0x2000, 0, 0x4000, 0, 0, 0, 0, 256]);
    assert_eq!(pci.notify_address(2), Some((Region::Bar2, NOTIFY + 8)));
    assert_eq!(pci.notify_address(QUEUES), None);
}

/// Writes to a running function: the effect, and what the register reads afterwards.
#[test]
fn writes_to_a_running_function() {
    type Table<'a> = &'a [(&'a str, u64, &'a [u8], Effect, u64)];
    let table: Table = &[
        ("bits of the status are never cleared", DEVICE_STATUS, &[1], Effect::None, 15),
        ("NEEDS_RESET is not the driver's", DEVICE_STATUS, &[0x4f], Effect::None, 15),
        ("unknown bits stay clear", DEVICE_STATUS, &[0x3f], Effect::None, 15),
        ("FAILED", DEVICE_STATUS, &[0x8f], Effect::None, 0x8f),
        ("reset: the status stays", DEVICE_STATUS, &[0], Effect::Reset, 15),
        ("features are frozen", DRIVER_FEATURE, &[0xff; 4], Effect::None, RING_RESET >> 32 | VERSION_1 >> 32),
        ("read-only: num_queues", NUM_QUEUES, &[9, 9], Effect::None, QUEUES as u64),
        ("read-only: generation", CONFIG_GENERATION, &[9], Effect::None, 0),
        ("read-only: notify_off", QUEUE_NOTIFY_OFF, &[9, 9], Effect::None, QUEUES as u64 - 1),
        ("read-only: device_feature", DEVICE_FEATURE, &[9; 4], Effect::None, FLUSH | 1 << 28 | 1 << 29),
        ("no such vector", CONFIG_MSIX_VECTOR, &[4, 0], Effect::None, 0xffff),
        ("the last vector", CONFIG_MSIX_VECTOR, &[3, 0], Effect::None, 3),
        ("no such vector", QUEUE_MSIX_VECTOR, &[4, 0], Effect::None, 0xffff),
        ("a larger size", QUEUE_SIZE, &[0, 2], Effect::None, 256),
        ("no power of 2", QUEUE_SIZE, &[100, 0], Effect::None, 256),
        ("no size", QUEUE_SIZE, &[0, 0], Effect::None, 256),
        ("a smaller size", QUEUE_SIZE, &[8, 0], Effect::None, 8),
        ("half an address", QUEUE_DESC + 4, &[5, 0, 0, 0], Effect::None, 5),
        ("a whole address", QUEUE_DRIVER, &[1, 2, 3, 4, 5, 6, 7, 8], Effect::None, 0x0807_0605_0403_0201),
        ("enable with another value", QUEUE_ENABLE, &[2, 0], Effect::None, 0),
        ("enable", QUEUE_ENABLE, &[1, 0], Effect::StartQueue(QUEUES - 1), 1),
        ("reset of a queue that is not enabled", QUEUE_RESET, &[1, 0], Effect::None, 0),
        ("size and vector at once", QUEUE_SIZE, &[16, 0, 2, 0], Effect::None, 0x0002_0010),
        ("reserved space", 0x40, &[0xff; 8], Effect::None, 0),
        ("the ISR is read-only", ISR, &[0xff], Effect::None, 0),
        ("device configuration", DEVICE + 2, &[7, 8], Effect::None, 0x0807),
        ("half beyond the device configuration", DEVICE + 9, &[7, 8], Effect::None, 7),
        ("notify", NOTIFY, &[0, 0], Effect::Kick(0), 0),
        ("notify in 4 bytes", NOTIFY + 4, &[1, 0, 0xee, 0xee], Effect::Kick(1), 0),
        ("notify a queue at another's address", NOTIFY, &[1, 0], Effect::None, 0),
        ("notify between addresses", NOTIFY + 2, &[0, 0], Effect::None, 0),
        ("notify a queue that is not enabled", NOTIFY + 8, &[2, 0], Effect::None, 0),
        ("notify a queue that does not exist", NOTIFY + 12, &[3, 0], Effect::None, 0),
        ("notify in 1 byte", NOTIFY, &[0], Effect::None, 0),
        ("notify in 8 bytes", NOTIFY, &[0; 8], Effect::None, 0),
    ];
    for (name, offset, data, effect, reads) in table {
        let (mut pci, _) = running();
        let _ = write(&mut pci, DEVICE_FEATURE_SELECT, 0u32);
        let _ = write(&mut pci, QUEUE_SELECT, QUEUES - 1);
        assert_eq!(pci.write(Region::Bar2, *offset, data), Ok(*effect), "{name}");
        assert_eq!(read(&mut pci, *offset, data.len()), *reads, "{name}");
    }
}

#[test]
fn an_enabled_queue_keeps_its_setup() {
    let (mut pci, _) = running();
    let before = pci.queue(0);
    let _ = write(&mut pci, QUEUE_SELECT, 0u16);
    for (offset, value) in [(QUEUE_SIZE, 8u64), (QUEUE_DESC, 8), (QUEUE_DRIVER, 8), (QUEUE_DEVICE, 8)] {
        let width = if offset == QUEUE_SIZE { 2 } else { 8 };
        assert_eq!(pci.write(Region::Bar2, offset, &value.to_le_bytes()[..width]), Ok(Effect::None));
    }
    for value in [0u16, 1] {
        assert_eq!(write(&mut pci, QUEUE_ENABLE, value), Effect::None);
    }
    assert_eq!(pci.queue(0), before);
}

#[test]
fn a_queue_that_does_not_exist_reads_zero() {
    let (mut pci, _) = running();
    let _ = write(&mut pci, QUEUE_SELECT, QUEUES);
    assert_eq!(set_up(&mut pci, QUEUES), Effect::None);
    for (offset, length) in [(QUEUE_SIZE, 2), (QUEUE_ENABLE, 4), (QUEUE_DESC, 8), (QUEUE_DEVICE, 8), (0x38, 8)] {
        assert_eq!(read(&mut pci, offset, length), 0, "{offset:#x}");
    }
    assert_eq!(read(&mut pci, QUEUE_MSIX_VECTOR, 2), 0xffff);
}

#[test]
fn queue_reset() {
    let (mut pci, _) = running();
    let _ = write(&mut pci, QUEUE_SELECT, 1u16);
    pci.queue_stopped(1);
    assert!(pci.queue(1).unwrap().enabled, "nobody asked for a stop");
    assert_eq!(write(&mut pci, QUEUE_RESET, 1u16), Effect::StopQueue(1));
    assert_eq!(read(&mut pci, QUEUE_RESET, 2), 1);
    assert_eq!(read(&mut pci, QUEUE_ENABLE, 2), 1);
    assert!(!pci.queue(1).unwrap().enabled);
    assert_eq!(write(&mut pci, QUEUE_RESET, 1u16), Effect::None);
    assert_eq!(write(&mut pci, QUEUE_ENABLE, 1u16), Effect::None);
    assert_eq!(write(&mut pci, NOTIFY + 4, 1u16), Effect::None);
    assert_eq!(write(&mut pci, NOTIFY, 0u16), Effect::Kick(0));
    pci.queue_stopped(0);
    assert!(pci.queue(0).unwrap().enabled);
    pci.queue_stopped(1);
    assert_eq!(read(&mut pci, QUEUE_RESET, 2), 0);
    assert_eq!(read(&mut pci, QUEUE_ENABLE, 2), 0);
    assert_eq!(read(&mut pci, QUEUE_SIZE, 2), 256);
    assert_eq!(set_up(&mut pci, 1), Effect::StartQueue(1));
    assert_eq!(write(&mut pci, NOTIFY + 4, 1u16), Effect::Kick(1));
}

#[test]
fn queue_reset_needs_its_feature_and_is_immediate_before_driver_ok() {
    for (features, resets) in [(VERSION_1, false), (VERSION_1 | RING_RESET, true)] {
        let (mut pci, _) = function();
        negotiate(&mut pci, features);
        let _ = set_up(&mut pci, 0);
        assert_eq!(write(&mut pci, QUEUE_RESET, 1u16), Effect::None);
        assert_eq!(read(&mut pci, QUEUE_RESET, 2), 0);
        assert_eq!(pci.queue(0).unwrap().enabled, !resets);
    }
}

#[test]
fn a_write_ends_with_its_first_effect() {
    let (mut pci, _) = running();
    // device_status, generation, queue_select, ... queue_enable: the reset comes first.
    assert_eq!(pci.write(Region::Bar2, DEVICE_STATUS, &[0, 0, 1, 0, 8, 0, 0, 0, 1, 0]), Ok(Effect::Reset));
    pci.reset_done();
    assert_eq!(read(&mut pci, QUEUE_SELECT, 2), 0);
}

#[test]
fn accesses_outside_of_a_region() {
    let (mut pci, _) = function();
    let table = [
        (Region::Bar0, 0x2000u64),
        (Region::Bar1, 0),
        (Region::Bar2, 0x4000),
        (Region::Bar5, 0),
        (Region::Rom, 0),
        (Region::Config, 256),
    ];
    for (region, size) in table {
        for (offset, length) in [(size, 1), (size.saturating_sub(1), 2), (u64::MAX, 1), (0, size as usize + 1)] {
            let error = AccessError { region, size, offset, length };
            assert_eq!(pci.read(region, offset, &mut vec![0; length]), Err(error));
            assert_eq!(pci.write(region, offset, &vec![0; length]), Err(error));
        }
        assert_eq!(pci.read(region, 0, &mut vec![0; size as usize]), Ok(()));
    }
}

/// A device that can't be a function, by what is wrong with it.
struct Odd(u16, u16, usize);

impl VirtioDevice for Odd {
    fn device_id(&self) -> u16 {
        2
    }
    fn class_code(&self) -> u32 {
        0
    }
    fn features(&self) -> u64 {
        0
    }
    fn num_queues(&self) -> u16 {
        self.0
    }
    fn max_queue_size(&self) -> u16 {
        self.1
    }
    fn config_len(&self) -> usize {
        self.2
    }
    fn read_config(&self, _: usize, _: &mut [u8]) {}
    fn write_config(&mut self, _: usize, _: &[u8]) {}
    fn features_acked(&mut self, _: u64) {}
    fn reset(&mut self) {}
}

#[test]
fn devices_that_cannot_be_a_function() {
    let build = |device: Odd| {
        let options = Options::for_device(&device);
        VirtioPci::new(Box::new(device), &options).map(drop)
    };
    assert_eq!(build(Odd(0, 8, 8)), Err(BuildError::Queues(0)));
    assert_eq!(build(Odd(1025, 8, 8)), Err(BuildError::Queues(1025)));
    assert_eq!(build(Odd(1024, 0, 8)), Err(BuildError::QueueSize(0)));
    assert_eq!(build(Odd(1024, 24, 8)), Err(BuildError::QueueSize(24)));
    assert_eq!(build(Odd(1024, 8, 4097)), Err(BuildError::ConfigLength(4097)));
    assert_eq!(build(Odd(1024, 32768, 4096)), Ok(()));
}
