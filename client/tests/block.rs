//! The block driver against a small device in the test: it knows one client and one memory, and does
//! at once what a doorbell asks for.

#![allow(clippy::unwrap_used, reason = "a failure is the result of a test")]

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use client::{
    BlockDriver, BlockOptions, BlockQueue, BlockRequest, Client, CommonRegister, Error, GuestMemory, NotifyMethod,
    RequestType, SplitDriver,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vfio_user::{
    Capabilities, Connection, IoEventFd, Limits, Received, RegionData, RegionInfo, RegionIoFds, Reply, ReplyTo,
    Request, Sender, SparseMmapArea, Version,
};

const IOVA: u64 = 0x8000_0000;
const SECTORS: u64 = 2048;
const NOTIFY: u64 = 0x3000;
/// VERSION_1, RING_RESET, EVENT_IDX, INDIRECT_DESC; MQ, CONFIG_WCE, FLUSH, SEG_MAX.
const FEATURES: u64 = 1 << 32 | 1 << 40 | 1 << 29 | 1 << 28 | 1 << 12 | 1 << 11 | 1 << 9 | 1 << 2;

/// A request type that the device completes without a status.
const FORGETS_STATUS: u8 = 99;

struct Device {
    memory: Option<File>,
    disk: Vec<u8>,
    config: [u8; 256],
    common: [u8; 64],
    queues: [[u8; 64]; 2],
    positions: [u16; 2],
    device_config: [u8; 64],
    interrupts: Vec<Option<File>>,
    eventfd: EventFd,
    doorbells: File,
    features: u64,
}

impl Device {
    fn new(features: u64) -> Device {
        let mut config = [0; 256];
        config[6] = 0x10;
        config[0x34] = 0x40;
        let window = |cfg_type, offset: u32, length: u32, tail: &[u8], next| {
            let mut bytes = vec![9, next, 16 + tail.len() as u8, cfg_type, 0, 0, 0, 0];
            bytes.extend([offset.to_le_bytes(), length.to_le_bytes()].concat());
            bytes.extend(tail);
            bytes
        };
        let msix = vec![0x11, 0, 2, 0, 1, 0, 0, 0, 1, 8, 0, 0];
        for (at, bytes) in [
            (0x40, window(1, 0, 64, &[], 0x50)),
            (0x50, window(2, NOTIFY as u32, 0x1000, &4u32.to_le_bytes(), 0x64)),
            (0x64, window(3, 0x1000, 1, &[], 0x74)),
            (0x74, window(4, 0x2000, 64, &[], 0x84)),
            (0x84, window(5, 0, 0, &[0; 4], 0x98)),
            (0x98, msix),
        ] {
            config[at..at + bytes.len()].copy_from_slice(&bytes);
        }
        let mut device_config = [0; 64];
        device_config[..8].copy_from_slice(&SECTORS.to_le_bytes());
        device_config[12] = 4; // seg_max
        device_config[32] = 1; // writeback
        device_config[34] = 2; // num_queues
        let doorbells = File::from(memfd_create(c"doorbells", MFdFlags::empty()).unwrap());
        doorbells.set_len(0x5000).unwrap();
        let eventfd = EventFd::new().unwrap();
        Device {
            memory: None,
            disk: vec![0; 512 * SECTORS as usize],
            config,
            common: [0; 64],
            queues: [[0; 64]; 2],
            positions: [0; 2],
            device_config,
            interrupts: vec![None, None, None],
            eventfd,
            doorbells,
            features,
        }
    }

    fn answer(&mut self, sender: &mut Sender, to: ReplyTo, request: Request<'_>, fds: Vec<OwnedFd>) {
        match request {
            Request::Version(_) => {
                let capabilities = Capabilities { max_msg_fds: Some(2), ..Capabilities::default() };
                sender.reply(to, &Reply::Version(&Version { capabilities, ..Version::default() })).unwrap();
            }
            Request::DmaMap(map) => {
                assert_eq!(map.address, IOVA);
                self.memory = fds.into_iter().next().map(File::from);
                sender.reply(to, &Reply::Done).unwrap();
            }
            Request::DeviceSetIrqs(set) => {
                for (fd, vector) in fds.into_iter().zip(set.start..) {
                    self.interrupts[vector as usize] = Some(File::from(fd));
                }
                sender.reply(to, &Reply::Done).unwrap();
            }
            Request::DeviceGetRegionInfo { argsz, index } => {
                let sparse_mmap = vec![SparseMmapArea { offset: NOTIFY, size: 0x1000 }];
                let info = RegionInfo { flags: 7, index, size: 0x4000, offset: 0x1000, sparse_mmap };
                sender
                    .reply_with_fds(to, &Reply::RegionInfo { info: &info, argsz }, &[self.doorbells.as_fd()])
                    .unwrap();
            }
            Request::DeviceGetRegionIoFds { argsz, index } => {
                let sub = |offset| IoEventFd { offset, size: 2, fd_index: 0, flags: 0, datamatch: 0 };
                let io_fds = RegionIoFds { index, sub_regions: vec![sub(NOTIFY), sub(NOTIFY + 4)] };
                let reply = Reply::RegionIoFds { io_fds: &io_fds, argsz };
                sender.reply_with_fds(to, &reply, &[self.eventfd.as_fd()]).unwrap();
            }
            Request::RegionRead(span) => {
                self.prepare();
                let bytes = self.bytes(span.region, span.offset);
                let data = &bytes[..span.count as usize];
                sender
                    .reply(to, &Reply::RegionRead(RegionData { offset: span.offset, region: span.region, data }))
                    .unwrap();
            }
            Request::RegionWrite(write) => {
                if write.region == 0 && write.offset >= NOTIFY {
                    let queue = usize::from(u16::from_le_bytes(write.data.try_into().unwrap()));
                    assert_eq!(write.offset, NOTIFY + 4 * queue as u64);
                    self.run(queue);
                } else {
                    self.bytes(write.region, write.offset)[..write.data.len()].copy_from_slice(write.data);
                    self.written(write.region, write.offset);
                }
                sender.reply(to, &Reply::RegionWrite(write.span())).unwrap();
            }
            _ => panic!("{request:?}"),
        }
    }

    fn selected(&self) -> usize {
        usize::from(self.common[22])
    }

    /// Puts what the select registers select where it is read.
    fn prepare(&mut self) {
        let offered = (self.features >> (32 * self.common[0])) as u32;
        self.common[4..8].copy_from_slice(&offered.to_le_bytes());
        let queue = self.queues[self.selected()];
        self.common[24..64].copy_from_slice(&queue[24..]);
        if self.common[24] == 0 {
            self.common[24] = 16;
        }
        self.common[30] = self.selected() as u8;
    }

    fn bytes(&mut self, region: u32, offset: u64) -> &mut [u8] {
        let (window, start): (&mut [u8], u64) = match (region, offset) {
            (7, _) => (&mut self.config, 0),
            (0, 0x2000..0x2040) => (&mut self.device_config, 0x2000),
            (0, 0..64) => (&mut self.common, 0),
            _ => panic!("region {region} offset {offset:#x}"),
        };
        &mut window[(offset - start) as usize..]
    }

    fn written(&mut self, region: u32, offset: u64) {
        match (region, offset) {
            (0, 20) if self.common[20] == 0 => self.queues = [[0; 64]; 2],
            (0, 24..64) => {
                let queue = self.selected();
                self.queues[queue][24..].copy_from_slice(&self.common[24..]);
                if offset == 58 {
                    self.queues[queue] = [0; 64];
                }
                if offset == 28 {
                    self.positions[queue] = 0;
                }
            }
            _ => {}
        }
    }

    fn read<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.as_ref().unwrap().read_exact_at(&mut bytes, address - IOVA).unwrap();
        bytes
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.as_ref().unwrap().write_all_at(bytes, address - IOVA).unwrap();
    }

    fn run(&mut self, queue: usize) {
        let registers = self.queues[queue];
        let address = |at: usize| u64::from_le_bytes(registers[at..at + 8].try_into().unwrap());
        let [table, avail, used] = [32, 40, 48].map(address);
        let size = u64::from(u16::from_le_bytes([registers[24], registers[25]]));
        assert_eq!(registers[28], 1, "the queue is enabled");
        while u16::from_le_bytes(self.read(avail + 2)) != self.positions[queue] {
            let slot = u64::from(self.positions[queue]) % size;
            let head = u16::from_le_bytes(self.read(avail + 4 + 2 * slot));
            let written = self.execute(table, head);
            self.write(used + 4 + 8 * slot, &[u32::from(head).to_le_bytes(), written.to_le_bytes()].concat());
            self.positions[queue] = self.positions[queue].wrapping_add(1);
            let position = self.positions[queue].to_le_bytes();
            self.write(used + 2, &position);
            self.write(used + 4 + 8 * size, &position);
        }
        let vector = usize::from(u16::from_le_bytes([registers[26], registers[27]]));
        if let Some(Some(interrupt)) = self.interrupts.get(vector) {
            std::io::Write::write_all(&mut &*interrupt, &1u64.to_ne_bytes()).unwrap();
        }
    }

    fn execute(&mut self, table: u64, head: u16) -> u32 {
        let descriptor = |table: u64, index: u16| {
            let bytes: [u8; 16] = self.read(table + 16 * u64::from(index));
            let field = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
            let len = u32::from(field(8)) | u32::from(field(10)) << 16;
            (u64::from_le_bytes(bytes[..8].try_into().unwrap()), len, field(12), field(14))
        };
        let (mut table, mut index) = (table, head);
        let (address, _, flags, _) = descriptor(table, head);
        if flags & 4 != 0 {
            (table, index) = (address, 0);
        }
        let mut chain = Vec::new();
        loop {
            let (address, len, flags, next) = descriptor(table, index);
            chain.push((address, len as usize, flags & 2 != 0));
            if flags & 1 == 0 {
                break;
            }
            index = next;
        }
        let (status, _, _) = chain.pop().unwrap();
        let header: [u8; 16] = self.read(chain.remove(0).0);
        let mut at = 512 * u64::from_le_bytes(header[8..].try_into().unwrap()) as usize;
        let mut written = 1;
        let mut result = 0;
        for (address, len, device_writes) in chain {
            match header[0] {
                0 if at + len <= self.disk.len() => self.write(address, &self.disk[at..at + len]),
                1 if at + len <= self.disk.len() => {
                    let memory = self.memory.as_ref().unwrap();
                    memory.read_exact_at(&mut self.disk[at..at + len], address - IOVA).unwrap();
                }
                8 => self.write(address, b"a serial of 20 bytes"),
                0 | 1 => result = 1,
                _ => result = 2,
            }
            at += len;
            written += if device_writes { len as u32 } else { 0 };
        }
        if header[0] != FORGETS_STATUS {
            self.write(status, &[if header[0] > 8 { 2 } else { result }]);
        }
        written
    }
}

/// A device, and a client that has agreed with it and mapped memory for it.
fn device(features: u64) -> (Arc<Client>, GuestMemory, JoinHandle<()>) {
    let (near, far) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let mut device = Device::new(features);
        let mut connection = Connection::new(far, Limits::default()).unwrap();
        loop {
            match connection.receiver.receive() {
                Ok(Received::Command { command, reply_to, payload, fds }) => {
                    let request = Request::decode(command, payload).unwrap();
                    device.answer(&mut connection.sender, reply_to, request, fds);
                }
                Ok(Received::WouldBlock) => {
                    poll(&mut [PollFd::new(connection.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE).unwrap();
                }
                _ => return,
            }
        }
    });
    let client = Arc::new(Client::from_stream(near).unwrap());
    client.version(&Client::proposal()).unwrap();
    let memory = GuestMemory::new(4 << 20, IOVA).unwrap();
    client.dma_map(&memory.dma_map(), Some(memory.fd())).unwrap();
    (client, memory, thread)
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i / 512) as u8 ^ (i as u8).wrapping_add(seed)).collect()
}

#[test]
fn data_comes_back_in_every_mode() {
    for (features, interrupts, notify, indirect_entries) in [
        (FEATURES, true, NotifyMethod::Posted, 8),
        (FEATURES, false, NotifyMethod::Message, 3),
        (FEATURES & !(1 << 29), true, NotifyMethod::Message, 0),
        (FEATURES & !(1 << 28 | 1 << 12 | 1 << 2), false, NotifyMethod::Posted, 8),
    ] {
        let (client, memory, thread) = device(features);
        let bounce_size = 10 << 10;
        let options = BlockOptions { interrupts, notify, indirect_entries, bounce_size, ..BlockOptions::default() };
        let (driver, mut queues) = BlockDriver::start(client, &memory, &options).unwrap();
        assert_eq!(driver.features(), features & BlockOptions::FEATURES | 1 << 32);
        assert_eq!(driver.config().unwrap().capacity, SECTORS);
        assert_eq!(queues.len(), if driver.has_feature(12) { 2 } else { 1 });
        for (index, queue) in queues.iter_mut().enumerate() {
            // More than the memory to copy through holds, and not a multiple of it.
            let data = pattern(512 * 70, index as u8);
            let sector = 100 * index as u64;
            queue.write(sector, &data).unwrap();
            queue.flush().unwrap();
            let mut back = vec![0; data.len()];
            queue.read(sector, &mut back).unwrap();
            assert!(back == data);
            assert_eq!(&queue.get_id().unwrap(), b"a serial of 20 bytes");
            assert!(matches!(queue.read(SECTORS, &mut [0; 512]), Err(Error::Status(1))));
            assert!(matches!(queue.discard(0, 1), Err(Error::Status(2))));
            assert!(queue.kicks() > 0);
        }
        driver.stop().unwrap();
        drop(queues);
        thread.join().unwrap();
    }
}

#[test]
fn many_requests_in_flight_complete_with_their_tags() {
    let (client, memory, _thread) = device(FEATURES);
    let (_driver, mut queues) = BlockDriver::start(client, &memory, &BlockOptions::default()).unwrap();
    let queue = &mut queues[1];
    let size = usize::from(queue.ring().size());
    let data = memory.allocate(512 * size, 512).unwrap();
    let mut sector_of = vec![None; size];
    for round in 0..5000u64 {
        let mut submitted = 0;
        loop {
            let segment = data.segment(512 * submitted % (512 * size), 512).unwrap();
            let sector = (round + submitted as u64) % SECTORS;
            let request = BlockRequest { kind: RequestType::Read, sector, data: &[segment] };
            match queue.submit(&request) {
                Ok(tag) => assert!(sector_of[tag.index()].replace(sector).is_none()),
                Err(error) => break assert!(matches!(error, Error::QueueFull)),
            }
            submitted += 1;
        }
        assert_eq!(submitted, size);
        queue.publish().unwrap();
        while submitted > 0 {
            assert!(queue.wait(Duration::from_secs(30)).unwrap());
            while let Some(completion) = queue.poll().unwrap() {
                assert_eq!((completion.status, completion.written), (0, 513));
                assert!(sector_of[completion.tag.index()].take().is_some());
                submitted -= 1;
            }
        }
    }
}

#[test]
fn a_call_that_waits_wants_the_queue_to_itself() {
    let (client, memory, _thread) = device(FEATURES);
    let (_driver, mut queues) = BlockDriver::start(client, &memory, &BlockOptions::default()).unwrap();
    let flush = BlockRequest { kind: RequestType::Flush, sector: 0, data: &[] };
    queues[0].submit(&flush).unwrap();
    assert!(matches!(queues[0].flush(), Err(Error::Busy(1))));
    assert!(!queues[0].wait(Duration::ZERO).unwrap());
}

#[test]
fn a_status_that_the_device_does_not_write_is_none_of_the_specification() {
    let (client, memory, _thread) = device(FEATURES);
    let (_driver, mut queues) = BlockDriver::start(client, &memory, &BlockOptions::default()).unwrap();
    let kind = RequestType::Raw { value: FORGETS_STATUS.into(), device_writes: false };
    for _ in 0..2 {
        queues[0].flush().unwrap();
        let completion = queues[0].execute(&BlockRequest { kind, sector: 0, data: &[] }).unwrap();
        assert_eq!(completion.status, 0xff);
    }
}

#[test]
fn a_queue_restarts_alone() {
    let (client, memory, _thread) = device(FEATURES);
    let (driver, mut queues) = BlockDriver::start(client, &memory, &BlockOptions::default()).unwrap();
    let data = pattern(1024, 1);
    queues[0].write(0, &data).unwrap();
    queues[1].write(7, &data).unwrap();
    let flush = BlockRequest { kind: RequestType::Flush, sector: 0, data: &[] };
    queues[1].submit(&flush).unwrap();
    driver.restart_queue(1, &mut queues[1]).unwrap();
    for (queue, sector) in queues.iter_mut().zip([0, 7]) {
        let mut back = vec![0; 1024];
        queue.read(sector, &mut back).unwrap();
        assert_eq!(back, data);
    }
    driver.set_writeback(false).unwrap();
    assert_eq!(driver.config().unwrap().writeback, Some(false));
}

#[test]
fn queues_belong_to_threads() {
    let (client, memory, _thread) = device(FEATURES);
    let (_driver, queues) = BlockDriver::start(client, &memory, &BlockOptions::default()).unwrap();
    let work = |(index, mut queue): (usize, BlockQueue)| {
        std::thread::spawn(move || {
            for round in 0..50 {
                let data = pattern(4096, round ^ index as u8);
                queue.write(1000 * index as u64, &data).unwrap();
                let mut back = vec![0; 4096];
                queue.read(1000 * index as u64, &mut back).unwrap();
                assert!(back == data);
            }
        })
    };
    let threads: Vec<_> = queues.into_iter().enumerate().map(work).collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn doorbells_of_every_kind_ring() {
    let (client, memory, _thread) = device(FEATURES);
    let (driver, mut queues) = BlockDriver::start(Arc::clone(&client), &memory, &BlockOptions::default()).unwrap();

    let (_, fds) = client.region_io_fds(0).unwrap();
    driver.transport().doorbell(1, NotifyMethod::IoEventFd).unwrap().ring().unwrap();
    let mut count = [0; 8];
    nix::unistd::read(&fds[0], &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 1);

    let (_, fd) = client.region_info(0).unwrap();
    let doorbells = File::from(fd.unwrap());
    driver.transport().doorbell(1, NotifyMethod::Mapped).unwrap().ring().unwrap();
    let mut value = [0; 2];
    doorbells.read_exact_at(&mut value, 0x1000 + NOTIFY + 4).unwrap();
    assert_eq!(u16::from_le_bytes(value), 1);

    // Chains that nobody was told of, until someone rings.
    let queue = &mut queues[0];
    queue.ring_mut().add(&[], &[]);
    let flush = BlockRequest { kind: RequestType::Flush, sector: 0, data: &[] };
    queue.submit(&flush).unwrap();
    let _ = queue.ring_mut().publish();
    assert!(queue.poll().unwrap().is_none());
    queue.doorbell().ring().unwrap();
    assert!(queue.wait(Duration::from_secs(30)).unwrap());
}

#[test]
fn registers_are_open_to_tests() {
    let (client, memory, _thread) = device(FEATURES);
    let (driver, _queues) = BlockDriver::start(client, &memory, &BlockOptions::default()).unwrap();
    let transport = driver.transport();
    assert_eq!(transport.status().unwrap(), 0xf);
    transport.write_common(CommonRegister::QueueSelect, 1).unwrap();
    transport.write_common(CommonRegister::QueueDriver, 0x1122_3344_5566_7788).unwrap();
    assert_eq!(transport.read_common(CommonRegister::QueueDriver).unwrap(), 0x1122_3344_5566_7788);
    let beyond = transport.read_device_config(60, &mut [0; 8]);
    assert!(matches!(beyond, Err(Error::OutOfRange { .. })));
}

#[test]
fn a_device_without_version_1_is_not_driven() {
    let (client, memory, _thread) = device(FEATURES & !(1 << 32));
    let result = BlockDriver::start(client, &memory, &BlockOptions::default());
    assert!(matches!(result, Err(Error::Device(_))));
}

#[test]
fn a_queue_has_a_power_of_two_of_entries() {
    let memory = GuestMemory::new(1 << 20, 0).unwrap();
    for size in [0, 3, 24, u16::MAX] {
        assert!(matches!(SplitDriver::new(&memory, size, false, 0), Err(Error::Device(_))));
    }
}
