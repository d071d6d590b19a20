//! The parser of block requests: any chain over any memory is a request within the device's bounds, or an answer, or the
//! driver's fault; and nothing is written but what the driver gave to be written.

#![no_main]

use std::fs::File;
use std::ops::RangeInclusive;
use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock};

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use nix::sys::memfd::{MFdFlags, memfd_create};
use virtio::block::{Limits, Operation, Request, RequestError, SERIAL_LEN, Status, parse};
use virtio::memory::{Access, GuestMemory, Mapping, MemoryFile, PinnedBuffers, SharedTable};
use virtio::queue::{Descriptor, Field, QueueState, RingFeatures, RingMemory, SplitQueue, Virtqueue};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

const PAGE: u64 = 4096;
const SECTOR: u64 = 512;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Guest memory: first address, pages, what the device may do. All lie in one file, in this order, so that the second is
/// the first one's neighbour in our address space too, and the third is not.
const RANGES: [(u64, u64, Access); 6] = [
    (0x1_0000, 12, Access::READ_WRITE),
    (0x1_c000, 4, Access::READ_WRITE),
    (0x4_0000, 2, Access::READ),
    (0x4_2000, 2, Access::WRITE),
    (0x4_4000, 2, Access::READ_WRITE),
    (u64::MAX - (PAGE - 1), 1, Access::READ_WRITE),
];
/// A range that the client gave no file for.
const UNREACHABLE: u64 = 0x4_6000;

/// The same memory twice: as the device may use it, and as its owner does.
struct World {
    device: Arc<SharedTable>,
    owner: Arc<SharedTable>,
}

static WORLD: LazyLock<World> = LazyLock::new(|| {
    let file = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).expect("a file in memory"));
    file.set_len(32 * PAGE).expect("its length");
    let file = Arc::new(MemoryFile::map(file).expect("its mapping"));
    let (device, owner) = (Arc::new(SharedTable::default()), Arc::new(SharedTable::default()));
    let mut offset = 0;
    for (iova, pages, access) in RANGES {
        for (table, access) in [(&device, access), (&owner, Access::READ_WRITE)] {
            let mapping = Mapping::of_file(iova, pages * PAGE, access, Arc::clone(&file), offset).expect("in the file");
            table.map(mapping).expect("apart");
        }
        offset += pages * PAGE;
    }
    device.map(Mapping::unreachable(UNREACHABLE, PAGE, Access::READ_WRITE).expect("aligned")).expect("apart");
    World { device, owner }
});

fuzz_target!(|data: &[u8]| {
    // An input that ends early has done all it can.
    let _ended = run(&mut Unstructured::new(data));
});

fn run(input: &mut Unstructured<'_>) -> Result<()> {
    let mut owner = GuestMemory::new(Arc::clone(&WORLD.owner));
    let mut device = GuestMemory::new(Arc::clone(&WORLD.device));
    for (at, (iova, pages, _)) in RANGES.into_iter().enumerate() {
        owner.write(iova, &vec![at as u8 + 1; (pages * PAGE) as usize]).expect("the owner's");
    }

    let limits = Limits {
        capacity: u64::from(input.arbitrary::<u8>()?) * 4,
        read_only: input.ratio(1, 8)?,
        max_discard_sectors: input.arbitrary::<u8>()?.into(),
        max_write_zeroes_sectors: input.arbitrary::<u8>()?.into(),
        serial: *b"0123456789abcdefghij",
    };
    let descriptors = descriptors(input)?;
    // Header and range are written after the chain is known, where it says that they are.
    let mut head = Vec::new();
    head.extend(kind(input)?.to_le_bytes());
    head.extend([0; 4]);
    head.extend(sector(input)?.to_le_bytes());
    head.extend(sector(input)?.to_le_bytes());
    head.extend(u32::from(input.arbitrary::<u8>()?).to_le_bytes());
    head.extend((u32::from(input.arbitrary::<u8>()?) >> 6).to_le_bytes());
    let mut rest = head.as_slice();
    for descriptor in descriptors.iter().filter(|descriptor| descriptor.flags & WRITE == 0) {
        let (piece, tail) = rest.split_at(rest.len().min(descriptor.len as usize));
        let _not_there = owner.write(descriptor.addr, piece);
        rest = tail;
    }
    let before = contents(&mut owner);

    let model = Model::new(&descriptors);
    // Before an answer is written, perhaps over it.
    let header = model.header(&mut owner);
    let mut queue = SplitQueue::new(Ring(&descriptors), RingFeatures::default(), QueueState::default());
    let mut buffers = PinnedBuffers::default();
    let Ok(Some(_head)) = queue.pop(&mut device, &mut buffers) else {
        assert!(descriptors.is_empty() || !model.is_reachable(), "all of it is mapped");
        return Ok(());
    };
    assert!(model.is_reachable(), "some of it is not mapped");
    match parse(&mut buffers, &limits) {
        Ok(request) => {
            let (kind, sector) = header.expect("a header");
            model.check(kind, sector, request, &buffers, &limits);
            if let Request::Store { operation: Operation::Write { .. }, .. } = request {
                model.check_data(&mut owner, &buffers);
            }
            if let Request::Store { operation: Operation::Read { .. }, .. } = request {
                buffers.fill(0xaa);
            }
            buffers.write_trailer(0x55);
            let mut status = [0];
            owner.read(model.status(), &mut status).expect("the status");
            assert_eq!(status, [0x55], "the status is the last byte");
        }
        Err(RequestError::NoHeader) => assert!(model.bytes_to_read() < 16),
        Err(RequestError::NoStatus) => assert!(model.writable.is_empty()),
        Err(error) => panic!("{error}"),
    }
    let written: Vec<_> = model.writable.iter().map(span).collect();
    for ((iova, before), (_, after)) in before.iter().zip(contents(&mut owner)) {
        if *before == after {
            continue;
        }
        for at in (0..PAGE).filter(|at| before[*at as usize] != after[*at as usize]).map(|at| iova + at) {
            assert!(written.iter().any(|span| span.contains(&at)), "{at:#x} was written");
        }
    }
    Ok(())
}

/// The chain of a request that is right: header, data and status, cut anywhere. Now and then one piece is not.
fn descriptors(input: &mut Unstructured<'_>) -> Result<Vec<Descriptor>> {
    let sectors = u32::from(input.arbitrary::<u8>()? % 12);
    let (readable, writable) = match input.arbitrary::<u8>()? {
        0..=0x5f => (16 + 512 * sectors, 1),
        0x60..=0xbf => (16, 512 * sectors + 1),
        0xc0..=0xef => (32, 1),
        coded => (u32::from(coded & 7) * 5, sectors),
    };
    let mut descriptors = Vec::new();
    for (len, flags) in [(readable, 0), (writable, WRITE)] {
        cut(input, len, flags, &mut descriptors)?;
    }
    if input.ratio(1, 8)? && !descriptors.is_empty() {
        let broken = input.choose_index(descriptors.len())?;
        if let Some(descriptor) = descriptors.get_mut(broken) {
            match input.arbitrary::<u8>()? % 6 {
                0 => descriptor.addr = u64::MAX - u64::from(input.arbitrary::<u8>()?),
                1 => descriptor.addr = u64::from(input.arbitrary::<u8>()?) << 12,
                2 => descriptor.len = u32::MAX - u32::from(input.arbitrary::<u8>()?),
                3 => descriptor.len = input.arbitrary::<u16>()?.into(),
                4 => descriptor.len = 0,
                _ => descriptor.addr = UNREACHABLE,
            }
        }
    }
    let last = descriptors.len().saturating_sub(1);
    for (index, descriptor) in descriptors.iter_mut().enumerate() {
        descriptor.next = index as u16 + 1;
        descriptor.flags |= if index < last { NEXT } else { 0 };
    }
    Ok(descriptors)
}

/// Cuts `len` bytes into pieces, neighbours or not.
fn cut(input: &mut Unstructured<'_>, len: u32, flags: u16, descriptors: &mut Vec<Descriptor>) -> Result<()> {
    let (mut left, mut next) = (len, None);
    for piece in (0..6).rev() {
        if left == 0 {
            break;
        }
        let coded = u32::from(input.arbitrary::<u8>()?);
        let len = match coded {
            _ if piece == 0 => left,
            0..=0x5f => left,
            0x60..=0x7f => 16,
            0x80..=0xbf => coded & 0x3f,
            _ => 512 + (coded & 0x3f) * 8,
        };
        let len = len.min(left);
        let place: u8 = input.arbitrary()?;
        let addr = match next {
            Some(next) if place < 0x60 => next,
            // Where the device may do this, in most cases.
            _ => match place >> 5 {
                7 => 0x4_2000 - u64::from(place & 0x1f),
                6 if flags == 0 => 0x4_0000 + 64 * u64::from(place & 0x1f),
                6 => 0x4_2000 + 64 * u64::from(place & 0x1f),
                _ => 0x1_0000 + 0x200 * u64::from(place & 0x7f),
            },
        };
        descriptors.push(Descriptor { addr, len, flags, next: 0 });
        next = addr.checked_add(len.into());
        left -= len;
    }
    Ok(())
}

fn kind(input: &mut Unstructured<'_>) -> Result<u32> {
    const KINDS: [u32; 6] = [
        VIRTIO_BLK_T_IN,
        VIRTIO_BLK_T_OUT,
        VIRTIO_BLK_T_FLUSH,
        VIRTIO_BLK_T_GET_ID,
        VIRTIO_BLK_T_DISCARD,
        VIRTIO_BLK_T_WRITE_ZEROES,
    ];
    let coded: u8 = input.arbitrary()?;
    Ok(KINDS.get(usize::from(coded % 8)).copied().unwrap_or(coded.into()))
}

fn sector(input: &mut Unstructured<'_>) -> Result<u64> {
    let coded: u8 = input.arbitrary()?;
    Ok(if coded < 0xf0 { (coded % 64).into() } else { u64::MAX - u64::from(coded & 0xf) })
}

/// What a request is by its descriptors alone.
struct Model {
    readable: Vec<Descriptor>,
    writable: Vec<Descriptor>,
}

impl Model {
    fn new(descriptors: &[Descriptor]) -> Self {
        let pieces = descriptors.iter().copied().filter(|descriptor| descriptor.len > 0);
        let (writable, readable) = pieces.partition(|descriptor| descriptor.flags & WRITE != 0);
        Model { readable, writable }
    }

    fn bytes_to_read(&self) -> u64 {
        self.readable.iter().map(|piece| u64::from(piece.len)).sum()
    }

    fn bytes_to_write(&self) -> u64 {
        self.writable.iter().map(|piece| u64::from(piece.len)).sum()
    }

    /// The readable bytes from the first on, as many as are wanted and there.
    fn bytes(&self, owner: &mut GuestMemory, wanted: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for piece in &self.readable {
            let start = bytes.len();
            bytes.resize(start + (piece.len as usize).min(wanted - start), 0);
            if owner.read(piece.addr, &mut bytes[start..]).is_err() {
                bytes.truncate(start);
                break;
            }
        }
        bytes
    }

    /// Type and sector.
    fn header(&self, owner: &mut GuestMemory) -> Option<(u32, u64)> {
        let bytes = self.bytes(owner, 16);
        let (kind, rest) = bytes.split_first_chunk()?;
        Some((u32::from_le_bytes(*kind), u64::from_le_bytes(*rest.last_chunk()?)))
    }

    /// Whether the device may use all of it as it would have to.
    fn is_reachable(&self) -> bool {
        let all = |pieces: &[Descriptor], wanted: fn(Access) -> bool| {
            pieces.iter().all(|piece| {
                let span = span(piece);
                let mut at = *span.start();
                loop {
                    let holds = |(iova, pages, access): &&(u64, u64, Access)| {
                        wanted(*access) && at >= *iova && at - iova < pages * PAGE
                    };
                    let Some((iova, pages, _)) = RANGES.iter().find(holds) else { return false };
                    let last = iova + (pages * PAGE - 1);
                    if last >= *span.end() {
                        return span.start() <= span.end();
                    }
                    let Some(next) = last.checked_add(1) else { return false };
                    at = next;
                }
            })
        };
        all(&self.readable, |access| access.read) && all(&self.writable, |access| access.write)
    }

    fn status(&self) -> u64 {
        self.writable.last().map_or(0, |last| *span(last).end())
    }

    fn check(&self, kind: u32, sector: u64, request: Request, buffers: &PinnedBuffers, limits: &Limits) {
        let fits = |sectors: u64| sector.checked_add(sectors).is_some_and(|end| end <= limits.capacity);
        let Request::Store { operation, written } = request else {
            let Request::Done { status, written } = request else { panic!("{request:?}") };
            assert!(u64::from(written) <= self.bytes_to_write());
            let known = [
                VIRTIO_BLK_T_IN,
                VIRTIO_BLK_T_OUT,
                VIRTIO_BLK_T_FLUSH,
                VIRTIO_BLK_T_GET_ID,
                VIRTIO_BLK_T_DISCARD,
                VIRTIO_BLK_T_WRITE_ZEROES,
            ];
            assert!(status == Status::Unsupp || known.contains(&kind));
            return;
        };
        let expected = match operation {
            Operation::Read { sector: at } => {
                assert_eq!((at, buffers.len()), (sector, self.bytes_to_write() - 1));
                assert!(fits(buffers.len() / SECTOR) && buffers.len().is_multiple_of(SECTOR));
                assert_eq!(u64::from(written), self.bytes_to_write());
                VIRTIO_BLK_T_IN
            }
            Operation::Write { sector: at } => {
                assert_eq!((at, buffers.len()), (sector, self.bytes_to_read() - 16));
                assert!(fits(buffers.len() / SECTOR) && buffers.len().is_multiple_of(SECTOR));
                assert!(!limits.read_only);
                VIRTIO_BLK_T_OUT
            }
            Operation::Flush => VIRTIO_BLK_T_FLUSH,
            Operation::Discard { sector, sectors } => {
                self.check_range(sector, sectors, limits.max_discard_sectors, limits);
                VIRTIO_BLK_T_DISCARD
            }
            Operation::WriteZeroes { sector, sectors, .. } => {
                self.check_range(sector, sectors, limits.max_write_zeroes_sectors, limits);
                VIRTIO_BLK_T_WRITE_ZEROES
            }
        };
        assert_eq!(kind, expected);
        assert!(!matches!(operation, Operation::Read { .. } | Operation::Write { .. }) || !buffers.is_empty());
    }

    fn check_range(&self, sector: u64, sectors: u32, most: u32, limits: &Limits) {
        assert_eq!(self.bytes_to_read(), 32, "one range");
        assert!(!limits.read_only && (1..=most).contains(&sectors));
        assert!(sector.checked_add(sectors.into()).is_some_and(|end| end <= limits.capacity));
    }

    /// A write takes what follows the header.
    fn check_data(&self, owner: &mut GuestMemory, buffers: &PinnedBuffers) {
        let bytes = self.bytes(owner, self.bytes_to_read() as usize);
        let mut seen = vec![0; bytes.len() - 16];
        assert_eq!(buffers.copy_to_slice(0, &mut seen), seen.len());
        assert_eq!(seen, bytes[16..]);
    }
}

/// First and last address; the last before the first if it wraps.
fn span(piece: &Descriptor) -> RangeInclusive<u64> {
    piece.addr..=piece.addr.wrapping_add(u64::from(piece.len) - 1)
}

/// All that is in memory, page by page.
fn contents(owner: &mut GuestMemory) -> Vec<(u64, [u8; PAGE as usize])> {
    let pages = RANGES.into_iter().flat_map(|(iova, pages, _)| (0..pages).map(move |page| iova + page * PAGE));
    let read = |iova| {
        let mut page = [0; PAGE as usize];
        owner.read(iova, &mut page).expect("the owner's");
        (iova, page)
    };
    pages.map(read).collect()
}

/// A ring that shows one chain, from descriptor 0 on.
struct Ring<'a>(&'a [Descriptor]);

impl RingMemory for Ring<'_> {
    fn size(&self) -> u16 {
        16
    }

    fn load(&self, field: Field, _: Ordering) -> u16 {
        u16::from(field == Field::AvailIdx)
    }

    fn store(&self, _: Field, _: u16, _: Ordering) {}

    fn read_descriptor(&self, index: u16) -> Descriptor {
        self.0.get(usize::from(index)).copied().unwrap_or_default()
    }

    fn write_used_element(&self, _: u16, _: u16, _: u32) {}

    fn fence(&self, _: Ordering) {}
}

const _: () = assert!(SERIAL_LEN == 20);
