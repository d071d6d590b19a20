//! A function with a device that does nothing, and the steps that tests share.

mod any_access;
mod interrupts;
mod pci_cfg;
mod registers;
mod state;
mod status;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use pci::{AccessError, Effect, PciFunction};

use super::*;

const VERSION_1: u64 = 1 << 32;
const RING_RESET: u64 = 1 << 40;
/// A feature of the device's own.
const FLUSH: u64 = 1 << 9;

const COMMAND: u64 = 0x04;
const MEMORY_AND_BUS_MASTER: u16 = 6;

// Registers of the common configuration, by their offset in the BAR.
const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_MSIX_VECTOR: u64 = 0x10;
const NUM_QUEUES: u64 = 0x12;
const DEVICE_STATUS: u64 = 0x14;
const CONFIG_GENERATION: u64 = 0x15;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_MSIX_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFF: u64 = 0x1e;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;
const QUEUE_RESET: u64 = 0x3a;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;

const QUEUES: u16 = 3;
const CONFIG_LEN: usize = 10;

/// What the transport did to the device.
#[derive(Default)]
struct Log {
    config: [u8; CONFIG_LEN],
    acked: Vec<u64>,
    resets: usize,
}

struct Device(Arc<Mutex<Log>>);

impl VirtioDevice for Device {
    fn device_id(&self) -> u16 {
        2
    }
    fn class_code(&self) -> u32 {
        0x01_00_00
    }
    fn features(&self) -> u64 {
        // The bits of the transport are not the device's to offer.
        FLUSH | 1 << 34 | 1 << 41
    }
    fn num_queues(&self) -> u16 {
        QUEUES
    }
    fn max_queue_size(&self) -> u16 {
        256
    }
    fn config_len(&self) -> usize {
        CONFIG_LEN
    }
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        data.copy_from_slice(&self.0.lock().unwrap().config[offset..offset + data.len()]);
    }
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.0.lock().unwrap().config[offset..offset + data.len()].copy_from_slice(data);
    }
    fn features_acked(&mut self, features: u64) {
        self.0.lock().unwrap().acked.push(features);
    }
    fn reset(&mut self) {
        self.0.lock().unwrap().resets += 1;
    }
}

#[derive(Default)]
struct Counter(AtomicUsize);

impl Interrupt for Counter {
    fn signal(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl Counter {
    fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

fn function() -> (VirtioPci, Arc<Mutex<Log>>) {
    let log = Arc::<Mutex<Log>>::default();
    let device = Box::new(Device(log.clone()));
    let options = Options::for_device(device.as_ref());
    (VirtioPci::new(device, &options).unwrap(), log)
}

/// Writes a register in its width: that of `value`.
fn write(pci: &mut VirtioPci, offset: u64, value: impl Bytes) -> Effect {
    pci.write(Region::Bar2, offset, &value.bytes()).unwrap()
}

fn read(pci: &mut VirtioPci, offset: u64, length: usize) -> u64 {
    let mut data = [0; 8];
    pci.read(Region::Bar2, offset, &mut data[..length]).unwrap();
    u64::from_le_bytes(data)
}

fn status(pci: &mut VirtioPci) -> u64 {
    read(pci, DEVICE_STATUS, 1)
}

trait Bytes {
    fn bytes(&self) -> Vec<u8>;
}

macro_rules! bytes {
    ($($int:ty)*) => { $(impl Bytes for $int { fn bytes(&self) -> Vec<u8> { self.to_le_bytes().to_vec() } })* };
}
bytes!(u8 u16 u32 u64);

fn set_bus_master(pci: &mut VirtioPci, on: bool) -> Effect {
    let command = if on { MEMORY_AND_BUS_MASTER } else { 2 };
    pci.write(Region::Config, COMMAND, &command.to_le_bytes()).unwrap()
}

fn accept(pci: &mut VirtioPci, features: u64) {
    for (select, word) in [(0u32, features as u32), (1, (features >> 32) as u32)] {
        assert_eq!(write(pci, DRIVER_FEATURE_SELECT, select), Effect::None);
        assert_eq!(write(pci, DRIVER_FEATURE, word), Effect::None);
    }
}

fn negotiate(pci: &mut VirtioPci, features: u64) {
    for bits in [1u8, 3] {
        assert_eq!(write(pci, DEVICE_STATUS, bits), Effect::None);
    }
    accept(pci, features);
    assert_eq!(write(pci, DEVICE_STATUS, 11u8), Effect::None);
    assert_eq!(status(pci), 11);
}

fn set_up(pci: &mut VirtioPci, queue: u16) -> Effect {
    let _ = write(pci, QUEUE_SELECT, queue);
    let _ = write(pci, QUEUE_SIZE, 128u16);
    let _ = write(pci, QUEUE_DESC, 0x1_0000u32);
    let _ = write(pci, QUEUE_DESC + 4, 0x1u32);
    let _ = write(pci, QUEUE_DRIVER, 0x2_0000u32);
    let _ = write(pci, QUEUE_DEVICE, 0x3_0000u64);
    let _ = write(pci, QUEUE_MSIX_VECTOR, queue + 1);
    write(pci, QUEUE_ENABLE, 1u16)
}

/// A function as a driver has it in use, with all queues but the last enabled.
fn running() -> (VirtioPci, Arc<Mutex<Log>>) {
    let (mut pci, log) = function();
    assert_eq!(set_bus_master(&mut pci, true), Effect::None);
    negotiate(&mut pci, VERSION_1 | RING_RESET | FLUSH);
    for queue in 0..QUEUES - 1 {
        assert_eq!(set_up(&mut pci, queue), Effect::None);
    }
    assert_eq!(write(&mut pci, DEVICE_STATUS, 15u8), Effect::Start);
    (pci, log)
}

fn lines(pci: &VirtioPci, irq: Irq) -> Vec<Arc<Counter>> {
    let interrupts = pci.interrupts();
    let install = |vector| {
        let line = Arc::<Counter>::default();
        interrupts.set_line(irq, vector, Some(line.clone())).unwrap();
        line
    };
    (0..interrupts.count(irq)).map(install).collect()
}

fn counts(lines: &[Arc<Counter>]) -> Vec<usize> {
    lines.iter().map(|line| line.count()).collect()
}

/// The offset of the PCI_CFG capability.
const PCI_CFG: u64 = 0x40 + 12 + 3 * 16 + 20;
