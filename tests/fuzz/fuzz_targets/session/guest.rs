//! The client and its guest: what each step sends, and what it writes to guest memory.
//!
//! Guest memory is 64 pages. The rings of queue `q` have pages `4 q` (descriptors), `4 q + 1` (available) and `4 q + 2` (used),
//! page 8 is the indirect table, headers and status bytes are in page 12, and data is from page 16 on.

use nix::unistd::write;
use vfio_user::{
    Capabilities, DmaMap, DmaUnmap, IrqAction, IrqData, Migration, RegionData, RegionSpan, RegionWrites, Request,
    SetIrqs, Version,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::peer::Peer;
use super::step::{Place, Step};
use super::world::{BASE, LEN, PAGE, QUEUE_SIZE, QUEUES, World};

/// BAR 2: common configuration and doorbells.
const BAR: u32 = 2;
const NOTIFY: u64 = 0x3000;
const CONFIG: u32 = 7;

const INDIRECT_TABLE: usize = 8 * PAGE;
const HEADERS: usize = 12 * PAGE;
const DATA: usize = 16 * PAGE;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// The driver's side of a queue.
#[derive(Clone, Copy)]
struct Queue {
    size: u16,
    avail_idx: u16,
    next_descriptor: u16,
}

/// A session's guest.
pub struct Guest {
    features: u64,
    msix_capability: u64,
    queues: [Queue; QUEUES as usize],
    requests: usize,
}

#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

impl Guest {
    pub fn new(features: u64, msix_capability: u64) -> Guest {
        let queue = Queue { size: QUEUE_SIZE, avail_idx: 0, next_descriptor: 0 };
        Guest { features, msix_capability, queues: [queue; QUEUES as usize], requests: 0 }
    }

    /// Does a step.
    pub fn take(&mut self, step: &Step, peer: &mut Peer, world: &mut World) {
        match step {
            Step::Boot { features, queue_size, layout, flags } => {
                self.boot(peer, world, *features, *queue_size, *layout, *flags);
            }
            Step::Request { queue, kind, sector, len, shape, fault } => {
                self.request(world, *queue, *kind, (*sector).into(), bytes(*len), *shape, *fault);
            }
            Step::Kick { queue, how } => kick(peer, u16::from(*queue) % (QUEUES + 1), *how),
            Step::Settle => {
                // Kicks that wait for no answer have arrived too.
                peer.in_step();
                world.settle();
            }
            Step::Descriptor { queue, index, address: at, len, flags, next } => {
                let descriptor = Descriptor {
                    address: address(*at),
                    len: bytes(*len),
                    flags: (*flags & 7).into(),
                    next: u16::from(*next) % (QUEUE_SIZE + 2),
                };
                let table = match queue % 3 {
                    2 => INDIRECT_TABLE,
                    queue => 4 * PAGE * usize::from(queue),
                };
                world.memory.write(table + 16 * usize::from(index % 32), &descriptor.bytes());
            }
            Step::Avail { queue, head, ahead } => {
                let queue = usize::from(queue % 2);
                let head = u16::from(*head) % (QUEUE_SIZE + 2);
                self.show(world, queue, head);
                // Mostly it is the one head that is shown.
                let ahead = if *ahead < 0xe0 { 0 } else { u16::from(*ahead & 0x1f) };
                self.queues[queue].avail_idx = self.queues[queue].avail_idx.wrapping_add(ahead);
                self.publish(world, queue);
            }
            Step::Poke { address, value } => world.memory.write(usize::from(*address) * 4, &value.to_le_bytes()),
            Step::Events { queue, used_event, flags } => {
                let avail = self.avail(usize::from(queue % 2));
                let size = usize::from(self.queues[usize::from(queue % 2)].size);
                world.memory.write(avail, &u16::from(*flags & 3).to_le_bytes());
                world.memory.write(avail + 4 + 2 * size, &used_event.to_le_bytes());
            }
            Step::Write { place, len, value, wait } => {
                let value = value.to_le_bytes();
                let data = &value[..width(*len)];
                let write = RegionData { offset: place.offset, region: place.region, data };
                peer.request(&Request::RegionWrite(write), *wait, &[]);
            }
            Step::Read { place: Place { region, offset }, count } => {
                let count = if *count < 0xff00 { *count % 300 } else { *count };
                let span = RegionSpan { offset: *offset, region: *region, count: count.into() };
                peer.ask(&Request::RegionRead(span), &[]);
            }
            Step::WriteMulti { writes, count, wait } => {
                let values = writes.map(|(_, _, value)| value.to_le_bytes());
                let writes: Vec<_> = writes
                    .iter()
                    .zip(&values)
                    .map(|((place, len, _), value)| RegionData {
                        offset: place.offset,
                        region: place.region,
                        data: &value[..width(*len)],
                    })
                    .cycle()
                    .take((*count % 8).into())
                    .collect();
                let mut buffer = Vec::new();
                if let Ok(writes) = RegionWrites::new(&writes, &mut buffer) {
                    peer.request(&Request::RegionWriteMulti(writes), *wait, &[]);
                }
            }
            Step::Map { page, pages, offset, access, file } => {
                let map = DmaMap {
                    readable: access & 1 == 0,
                    writeable: access & 2 == 0,
                    offset: length(*offset) & !(u64::from(access & 4) << 9),
                    address: place(*page),
                    size: length(*pages).max(1),
                };
                peer.ask(&Request::DmaMap(map), &world.files.choose(&world.memory, *file));
            }
            Step::Unmap { all: true, .. } => peer.ask(&Request::DmaUnmap(DmaUnmap::All), &[]),
            Step::Unmap { page, pages, all: false } => {
                let range = DmaUnmap::Range { address: place(*page), size: length(*pages) };
                peer.ask(&Request::DmaUnmap(range), &[]);
            }
            Step::SetIrqs { index, flags, start, count, files } => {
                let bools = [*flags; 32];
                let count = count % 20;
                let set = SetIrqs {
                    action: [IrqAction::Trigger, IrqAction::Mask, IrqAction::Unmask][usize::from(flags % 3)],
                    data: match flags / 3 % 3 {
                        0 => IrqData::EventFd,
                        1 => IrqData::None,
                        _ => IrqData::Bool(&bools[..count.into()]),
                    },
                    index: u32::from(*index) % 6,
                    start: u32::from(*start) % 5,
                    count: count.into(),
                };
                let fds = match files {
                    0..=0x7f if set.data == IrqData::EventFd => world.files.eventfds(count.into()),
                    0..=0xbf => Vec::new(),
                    _ => world.files.choose(&world.memory, files << 2),
                };
                peer.ask(&Request::DeviceSetIrqs(set), &fds);
            }
            Step::Ask { what, index, argsz } => {
                let (index, argsz) = (u32::from(*index) % 10, u32::from(*argsz));
                let request = match what % 4 {
                    0 => Request::DeviceGetInfo,
                    1 => Request::DeviceGetRegionInfo { argsz, index },
                    2 => Request::DeviceGetIrqInfo { index },
                    _ => Request::DeviceGetRegionIoFds { argsz, index },
                };
                peer.ask(&request, &[]);
                if what % 4 == 3 {
                    let doorbells = peer.take_answers().map_or_else(Vec::new, |answer| answer.fds);
                    peer.doorbells.extend(doorbells);
                    peer.doorbells.truncate(4);
                }
            }
            Step::Reset => {
                peer.ask(&Request::DeviceReset, &[]);
                self.queues = Guest::new(0, 0).queues;
            }
            Step::Version { major, minor, text } => version(peer, *major, *minor, *text),
            Step::Message { command, flags, payload, files } => {
                let fds = if *files < 0x60 { Vec::new() } else { world.files.choose(&world.memory, *files) };
                peer.message(u16::from(*command) % 20, u32::from(*flags) & 0x3f, payload, &fds);
            }
        }
    }

    /// Brings the device up as a driver does, whatever it is up to.
    fn boot(&mut self, peer: &mut Peer, world: &World, features: u8, queue_size: u8, layout: u8, flags: u8) {
        map(peer, world, layout);
        if flags & 1 == 0 {
            let set = SetIrqs { action: IrqAction::Trigger, data: IrqData::EventFd, index: 2, start: 0, count: 3 };
            peer.ask(&Request::DeviceSetIrqs(set), &world.files.eventfds(3));
        }
        // One bit each of those that change what the device does.
        let bits = [28, 29, 9, 11, 13, 14, 12, 40];
        let declined = (0..8).filter(|bit| features >> bit & 1 == 1).fold(0, |all, bit| all | 1u64 << bits[bit]);
        let accepted = self.features & !declined | 1 << VIRTIO_F_VERSION_1;
        // A power of two, from 2 on; now and then another number.
        let size = if queue_size < 0xe0 { QUEUE_SIZE >> (queue_size % 4) } else { u16::from(queue_size) };
        let mut writes: Vec<(u32, u64, u32, usize)> =
            vec![(CONFIG, 4, 6, 2), (CONFIG, self.msix_capability + 2, 0x8000, 2)];
        let mut common = |offset, value: u32, width| writes.push((BAR, offset, value, width));
        for status in [0, 1, 3] {
            common(0x14, status, 1);
        }
        for word in 0..2 {
            common(0x8, word, 4);
            common(0xc, (accepted >> (32 * word)) as u32, 4);
        }
        common(0x14, 0xb, 1);
        common(0x10, 0, 2);
        for queue in 0..QUEUES {
            common(0x16, queue.into(), 2);
            common(0x18, size.into(), 2);
            common(0x1a, u32::from(queue) + 1, 2);
            let [desc, avail, used] = self.rings(queue.into());
            for (offset, ring) in [(0x20, desc), (0x28, avail), (0x30, used)] {
                let address = BASE + ring as u64;
                common(offset, address as u32, 4);
                common(offset + 4, (address >> 32) as u32, 4);
            }
            common(0x1c, 1, 2);
        }
        common(0x14, 0xf, 1);
        let data: Vec<_> = writes.iter().map(|(_, _, value, _)| value.to_le_bytes()).collect();
        let writes: Vec<_> = writes
            .iter()
            .zip(&data)
            .map(|((region, offset, _, width), data)| RegionData {
                offset: *offset,
                region: *region,
                data: &data[..*width],
            })
            .collect();
        if flags & 2 == 0 {
            let mut buffer = Vec::new();
            let writes = RegionWrites::new(&writes, &mut buffer).expect("few and short");
            peer.request(&Request::RegionWriteMulti(writes), flags & 4 == 0, &[]);
        } else {
            for write in writes {
                peer.request(&Request::RegionWrite(write), flags & 4 == 0, &[]);
            }
        }
        self.queues = [Queue { size, avail_idx: 0, next_descriptor: 0 }; QUEUES as usize];
        for queue in 0..QUEUES {
            let [_, avail, used] = self.rings(queue.into());
            world.memory.write(avail, &[0; 2 * QUEUE_SIZE as usize + 6]);
            world.memory.write(used, &[0; 8 * QUEUE_SIZE as usize + 6]);
        }
    }

    /// Descriptor table, available ring and used ring of a queue, from the start of memory.
    fn rings(&self, queue: usize) -> [usize; 3] {
        [0, 1, 2].map(|area| PAGE * (4 * queue + area))
    }

    fn avail(&self, queue: usize) -> usize {
        self.rings(queue)[1]
    }

    /// Adds a block request as a driver would, with one thing broken if `fault` says so.
    #[expect(clippy::too_many_arguments, reason = "the fields of a step")]
    fn request(&mut self, world: &World, queue: u8, kind: u8, sector: u64, len: u32, shape: u8, fault: u8) {
        const KINDS: [u32; 8] = [0, 1, 4, 8, 11, 13, 0, 1];
        let queue = usize::from(queue % 2);
        let size = self.queues[queue].size.clamp(1, QUEUE_SIZE);
        let kind = if kind < 0xf0 { KINDS[usize::from(kind) % KINDS.len()] } else { u32::from(kind) };
        self.requests = (self.requests + 1) % 64;
        let header = HEADERS + 64 * self.requests;
        let status = header + 48;
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&(sector | u64::from(fault == 0xff) << 63).to_le_bytes());
        world.memory.write(header, &bytes);

        let buffer = |address: usize, len, flags| Descriptor { address: BASE + address as u64, len, flags, next: 0 };
        let to_device = matches!(kind, 1 | 11 | 13);
        let data_flags = if to_device { 0 } else { WRITE };
        let mut chain = vec![buffer(header, 16, 0)];
        if matches!(kind, 11 | 13) {
            // The one range: right behind the header.
            let mut range = [0; 16];
            range[..8].copy_from_slice(&sector.to_le_bytes());
            range[8..12].copy_from_slice(&(len / 512).to_le_bytes());
            range[12] = shape >> 7;
            world.memory.write(header + 16, &range);
            chain.push(buffer(header + 16, 16, 0));
        } else if kind != 4 {
            let pieces = u32::from(shape & 3) + 1;
            for piece in 0..pieces {
                // Every other page, so that the pieces are apart.
                let len = if piece + 1 == pieces { len - len / pieces * piece } else { len / pieces };
                chain.push(buffer(DATA + 2 * PAGE * piece as usize, len, data_flags));
            }
        }
        chain.push(buffer(status, 1, WRITE));
        let first = self.queues[queue].next_descriptor;
        let indirect = shape & 4 != 0;
        let at = |index: usize| if indirect { index as u16 } else { (first + index as u16) % size };
        let last = chain.len() - 1;
        for index in 0..last {
            chain[index].flags |= NEXT;
            chain[index].next = at(index + 1);
        }
        let broken = usize::from(shape >> 3 & 7) % chain.len();
        match fault {
            // Most are as they should be.
            0..=0xdf | 0xff => {}
            0xe0 => chain[broken].len = 0,
            0xe1 => chain[broken].len = u32::MAX,
            0xe2 => chain[broken].len += 1,
            0xe3 => chain[broken].len = chain[broken].len.saturating_sub(1),
            0xe4 => chain[broken].flags ^= WRITE,
            0xe5 => chain[broken].flags ^= INDIRECT,
            0xe6 => chain[broken].flags ^= NEXT,
            0xe7 => chain[broken].next = at(0),
            0xe8 => chain[broken].next = u16::MAX,
            0xe9 => chain[broken].address = 0,
            0xea => chain[broken].address = u64::MAX,
            0xeb => chain[broken].address = BASE + LEN as u64 - 1,
            0xec => chain[broken].address += 1,
            0xed => drop(chain.remove(broken)),
            0xee => chain[broken] = chain[0],
            // A ring as a buffer: the device writes, or reads, what it is told by.
            fault => {
                let rings = self.rings(queue);
                chain[broken].address = BASE + rings[usize::from(fault) % rings.len()] as u64;
            }
        }
        let table = if indirect { INDIRECT_TABLE } else { self.rings(queue)[0] };
        for (index, descriptor) in chain.iter().enumerate() {
            world.memory.write(table + 16 * usize::from(at(index)), &descriptor.bytes());
        }
        let taken = if indirect {
            let len = 16 * chain.len() as u32;
            let table = Descriptor { flags: INDIRECT, ..buffer(INDIRECT_TABLE, len, 0) };
            world.memory.write(self.rings(queue)[0] + 16 * usize::from(first), &table.bytes());
            1
        } else {
            chain.len() as u16
        };
        self.queues[queue].next_descriptor = (first + taken) % size;
        self.show(world, queue, first);
        self.publish(world, queue);
    }

    /// Puts a head into the available ring.
    fn show(&mut self, world: &World, queue: usize, head: u16) {
        let avail = self.avail(queue);
        let Queue { size, avail_idx, .. } = &mut self.queues[queue];
        world.memory.write(avail + 4 + 2 * usize::from(*avail_idx % (*size).max(1)), &head.to_le_bytes());
        *avail_idx = avail_idx.wrapping_add(1);
    }

    fn publish(&self, world: &World, queue: usize) {
        world.memory.write(self.avail(queue) + 2, &self.queues[queue].avail_idx.to_le_bytes());
    }

    /// Whatever has happened, a reset and new mappings make a working device of it.
    pub fn recover(&mut self, peer: &mut Peer, world: &mut World) {
        peer.ask(&Request::DeviceReset, &[]);
        assert!(peer.succeeds(), "DEVICE_RESET");
        peer.ask(&Request::DmaUnmap(DmaUnmap::All), &[]);
        assert!(peer.succeeds(), "DMA_UNMAP of everything");
        world.memory.clear();
        self.boot(peer, world, 0, 0, 0, 0);
        assert!(peer.succeeds(), "the registers");
        for queue in 0..QUEUES {
            self.request(world, queue as u8, 0, 0, 512, 0, 0);
            kick(peer, queue, 0);
        }
        peer.in_step();
        world.settle();
        for queue in 0..QUEUES {
            let used_idx = world.memory.read_u16(self.rings(queue.into())[2] + 2);
            assert_eq!(used_idx, 1, "queue {queue} does not come back: device status {:?}", peer.status());
        }
        assert_eq!(peer.status(), Some(0xf), "the device status after a reset and a new start");
    }

    /// Makes the file of guest memory shorter, under requests that are to be done.
    pub fn pull_the_rug(&mut self, peer: &mut Peer, world: &mut World) {
        for queue in 0..QUEUES {
            self.request(world, queue as u8, queue as u8, 0, 512, 0, 0);
        }
        peer.may_end();
        world.memory.shrink();
        for queue in 0..QUEUES {
            kick(peer, queue, 0);
        }
        peer.ask(&Request::DeviceReset, &[]);
    }
}

/// Gives the device all memory: as one range, as pages, or as pages whose order in the file is another.
fn map(peer: &mut Peer, world: &World, layout: u8) {
    let (readable, writeable) = (true, true);
    let pages = LEN / PAGE;
    let pieces = if layout < 0xc0 { 1 } else { pages };
    for piece in 0..pieces {
        let from = if layout & 1 == 0 { piece } else { pieces - 1 - piece };
        let size = (LEN / pieces) as u64;
        let (offset, address) = (from as u64 * size, BASE + piece as u64 * size);
        let map = DmaMap { readable, writeable, offset, address, size };
        peer.ask(&Request::DmaMap(map), &[world.memory.fd()]);
    }
}

fn kick(peer: &mut Peer, queue: u16, how: u8) {
    if let (3, Some(doorbell)) = (how % 4, peer.doorbells.get(usize::from(queue))) {
        let _full = write(doorbell, &1u64.to_ne_bytes());
        return;
    }
    let data = queue.to_le_bytes();
    let doorbell = RegionData { offset: NOTIFY + 4 * u64::from(queue), region: BAR, data: &data };
    peer.request(&Request::RegionWrite(doorbell), how % 4 == 1, &[]);
}

fn version(peer: &mut Peer, major: u8, minor: u8, text: u8) {
    const TEXTS: [&[u8]; 6] = [
        b"{}",
        b"{\"capabilities\":{}}\0",
        b"{\"capabilities\":{\"max_msg_fds\":0}}\0",
        b"{\"capabilities\":{\"max_data_xfer_size\":1,\"max_dma_maps\":1,\"pgsizes\":65536}}\0",
        b"{\"capabilities\":{\"max_msg_fds\":18446744073709551615}}\0",
        b"{\"capabilities\":{\"max_msg_fds\":-1}}\0",
    ];
    if let Some(text) = TEXTS.get(usize::from(text)) {
        let mut payload = u16::from(major).to_ne_bytes().to_vec();
        payload.extend(u16::from(minor).to_ne_bytes());
        payload.extend(*text);
        return peer.message(1, 0, &payload, &[]);
    }
    let migration = (text & 8 != 0).then_some(Migration { pgsize: Some(4096), max_bitmap_size: None });
    let number = |bit: u8| (text >> bit & 1 != 0).then_some(u64::from(text));
    let capabilities = Capabilities {
        max_msg_fds: number(4),
        max_data_xfer_size: number(5),
        max_dma_maps: number(6),
        pgsizes: number(7),
        write_multiple: Some(text & 1 != 0),
        migration,
    };
    peer.version(&Version { major: u16::from(major) / 128, minor: minor.into(), capabilities });
}

/// Where a descriptor points: mostly into guest memory, any 4 bytes of it.
fn address(coded: u16) -> u64 {
    match coded {
        0xfff0 => 0,
        0xfff1 => u64::MAX,
        0xfff2 => u64::MAX - 15,
        0xfff3 => BASE - 1,
        0xfff4 => BASE + LEN as u64 - 1,
        0xfff5 => BASE + LEN as u64,
        coded => BASE + 4 * u64::from(coded),
    }
}

/// A length: bytes, sectors, or a lot.
fn bytes(coded: u16) -> u32 {
    let number = u32::from(coded & 0x3fff);
    match coded >> 14 {
        0 => number % 64 * 512,
        1 => number,
        2 => number % 16 * 512 + 1,
        _ => number << 18,
    }
}

/// Where a range starts: a page of guest memory, one beyond it, or an odd place.
fn place(coded: u8) -> u64 {
    match coded {
        0xf0 => 0,
        0xf1 => u64::MAX - 0xfff,
        0xf2 => BASE + 1,
        0xf3 => u64::MAX,
        0xf4 => 1 << 63,
        coded => BASE + u64::from(coded) * PAGE as u64,
    }
}

/// How long a range is: pages, or an odd number of bytes.
fn length(coded: u8) -> u64 {
    match coded {
        0xf0 => u64::MAX,
        0xf1 => u64::MAX - 0xfff,
        0xf2 => 1,
        0xf3 => 1 << 63,
        0xf4 => PAGE as u64 + 512,
        coded => u64::from(coded % 80) * PAGE as u64,
    }
}

/// How many bytes of a value are written: mostly a register's width.
fn width(coded: u8) -> usize {
    match coded % 8 {
        0 => 1,
        1 | 2 => 2,
        3..=5 => 4,
        6 => 8,
        _ => usize::from(coded / 8) % 9,
    }
}
