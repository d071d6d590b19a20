//! From a chain of descriptors to a request (virtio 1.3 §5.2.6).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::{SECTOR, config::SERIAL_LEN};
use crate::memory::PinnedBuffers;

/// One range of a discard or a write-zeroes request: sector, number of sectors, flags.
const RANGE_LEN: usize = 16;

/// The byte that ends every request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = VIRTIO_BLK_S_OK as u8,
    /// Failed, or out of bounds.
    IoErr = VIRTIO_BLK_S_IOERR as u8,
    /// The device does not do such a thing.
    Unsupp = VIRTIO_BLK_S_UNSUPP as u8,
}

/// What is to be done with the store. Sectors and their numbers are within the capacity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// `VIRTIO_BLK_T_IN`
    Read {
        /// First sector.
        sector: u64,
    },
    /// `VIRTIO_BLK_T_OUT`
    Write {
        /// First sector.
        sector: u64,
    },
    /// `VIRTIO_BLK_T_FLUSH`
    Flush,
    /// `VIRTIO_BLK_T_DISCARD`
    Discard {
        /// First sector.
        sector: u64,
        /// How many.
        sectors: u32,
    },
    /// `VIRTIO_BLK_T_WRITE_ZEROES`
    WriteZeroes {
        /// First sector.
        sector: u64,
        /// How many.
        sectors: u32,
        /// The store may free them.
        unmap: bool,
    },
}

/// A request that makes sense to the device, or one that is answered without the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// For the store.
    Store {
        /// What to do.
        operation: Operation,
        /// Bytes of the chain's writable part that are written if it succeeds, the status included.
        written: u32,
    },
    /// Nothing is left to do but to write this status.
    Done {
        /// The status.
        status: Status,
        /// Bytes of the writable part that have been written, counted from its first and with the status.
        written: u32,
    },
}

/// The bounds that requests are checked against.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Sectors of the device.
    pub capacity: u64,
    /// `VIRTIO_BLK_F_RO` is offered.
    pub read_only: bool,
    /// The most sectors of one discard range; 0 if discards are not negotiated.
    pub max_discard_sectors: u32,
    /// The most sectors of one write-zeroes range; 0 if these are not negotiated.
    pub max_write_zeroes_sectors: u32,
    /// What GET_ID answers, padded with zeroes.
    pub serial: [u8; SERIAL_LEN],
}

/// A chain that cannot even be answered: the driver's fault, for which the device needs a reset.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// Fewer than 16 readable bytes.
    #[error("a block request without a whole header")]
    NoHeader,
    /// No writable byte.
    #[error("a block request without room for its status")]
    NoStatus,
}

/// Understands a chain by its buffers, and leaves in them the data to be moved and the place of the status. Header and
/// ranges are copied out once and then checked. How header, data and status are cut into descriptors does not
/// matter (§5.2.6.4 with `VIRTIO_F_VERSION_1`).
///
/// # Errors
/// If there is no header or no place for a status.
#[inline(always)]
pub fn parse(buffers: &mut PinnedBuffers, limits: &Limits) -> Result<Request, RequestError> {
    let frame = buffers.take_frame();
    let [kind, sector] = match frame {
        Some((header, _)) => header,
        None => unframe(buffers)?,
    };
    // The upper half is reserved.
    Ok(match kind as u32 {
        VIRTIO_BLK_T_IN => {
            if !matches!(frame, Some((_, true))) {
                buffers.select_writable();
            }
            match buffers.len() {
                // A read that fails has not written its buffers from the first byte on, so it has written nothing.
                len if !fits(len, sector, limits) => Request::Done { status: Status::IoErr, written: 0 },
                0 => DONE(Status::Ok),
                len => Request::Store { operation: Operation::Read { sector }, written: (len as u32).wrapping_add(1) },
            }
        }
        VIRTIO_BLK_T_OUT if !limits.read_only => {
            if !matches!(frame, Some((_, false))) {
                buffers.select_readable();
            }
            match buffers.len() {
                len if !fits(len, sector, limits) => DONE(Status::IoErr),
                0 => DONE(Status::Ok),
                _ => Request::Store { operation: Operation::Write { sector }, written: 1 },
            }
        }
        kind => parse_other(kind, buffers, limits),
    })
}

/// The header of a request that is made otherwise than of three pieces, with the place of its status set apart.
fn unframe(buffers: &mut PinnedBuffers) -> Result<[u64; 2], RequestError> {
    let header = buffers.take_header().ok_or(RequestError::NoHeader)?;
    if buffers.take_trailer() { Ok(header) } else { Err(RequestError::NoStatus) }
}

const DONE: fn(Status) -> Request = |status| Request::Done { status, written: 1 };

/// Requests that move no data of the store's.
#[cold]
fn parse_other(kind: u32, buffers: &mut PinnedBuffers, limits: &Limits) -> Request {
    match kind {
        VIRTIO_BLK_T_FLUSH => {
            buffers.select_none();
            Request::Store { operation: Operation::Flush, written: 1 }
        }
        VIRTIO_BLK_T_OUT => DONE(Status::IoErr),
        VIRTIO_BLK_T_GET_ID => {
            buffers.select_writable();
            let len = buffers.copy_from_slice(0, &limits.serial) as u32;
            let whole = buffers.len() == u64::from(len);
            // Bytes beyond the serial stay as they are, so the status, which follows them, does not count then.
            Request::Done { status: Status::Ok, written: len.saturating_add(whole.into()) }
        }
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            buffers.select_readable();
            let mut range = [0; RANGE_LEN];
            if buffers.len() != RANGE_LEN as u64 {
                // None, a broken one, or more than max_discard_seg and max_write_zeroes_seg, which are 1.
                return DONE(Status::IoErr);
            }
            buffers.copy_to_slice(0, &mut range);
            buffers.select_none();
            match check_range(kind, words(range), limits) {
                Ok(None) => DONE(Status::Ok),
                Ok(Some(operation)) => Request::Store { operation, written: 1 },
                Err(status) => DONE(status),
            }
        }
        _ => DONE(Status::Unsupp),
    }
}

/// Whether a read or a write of `len` bytes is one of whole sectors within the capacity. The bytes and one more, the status,
/// must be expressible in a used element.
#[inline(always)]
fn fits(len: u64, sector: u64, limits: &Limits) -> bool {
    // In sectors; what is not one of whole sectors becomes more than any store has.
    let sectors = len.rotate_right(SECTOR.trailing_zeros());
    limits.capacity.checked_sub(sector).is_some_and(|room| sectors <= room) && len < u64::from(u32::MAX)
}

/// The one range of a discard or a write-zeroes request (§5.2.6.2); `None` if it is empty.
fn check_range(kind: u32, [sector, rest]: [u64; 2], limits: &Limits) -> Result<Option<Operation>, Status> {
    let (sectors, flags) = (rest as u32, (rest >> 32) as u32);
    let discard = kind == VIRTIO_BLK_T_DISCARD;
    let (most, known_flags) = if discard {
        (limits.max_discard_sectors, 0)
    } else {
        (limits.max_write_zeroes_sectors, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)
    };
    if limits.read_only {
        return Err(Status::IoErr);
    }
    if most == 0 || flags & !known_flags != 0 {
        return Err(Status::Unsupp);
    }
    let fits = sector.checked_add(u64::from(sectors)).is_some_and(|end| end <= limits.capacity);
    if sectors > most || !fits {
        return Err(Status::IoErr);
    }
    Ok((sectors > 0).then_some(if discard {
        Operation::Discard { sector, sectors }
    } else {
        Operation::WriteZeroes { sector, sectors, unmap: flags != 0 }
    }))
}

/// The two little-endian words that 16 bytes are.
fn words(bytes: [u8; 16]) -> [u64; 2] {
    let both = u128::from_le_bytes(bytes);
    [both as u64, (both >> 64) as u64]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{GuestMemory, MappedRing, RingAddresses, testing::guest_memory};
    use crate::queue::{QueueState, RingFeatures, SplitQueue, Virtqueue};

    const BASE: u64 = 0x10_0000;
    const RING: RingAddresses = RingAddresses { desc: BASE, driver: BASE + 0x1000, device: BASE + 0x2000 };
    const HEADER: u64 = BASE + 0x3000;
    /// The header once more.
    const ELSEWHERE: u64 = BASE + 0x3400;
    const DATA: u64 = BASE + 0x4000;
    const STATUS: u64 = BASE + 0x3800;
    const SERIAL: [u8; SERIAL_LEN] = *b"0123456789abcdefghij";
    const LIMITS: Limits = Limits {
        capacity: 1000,
        read_only: false,
        max_discard_sectors: 100,
        max_write_zeroes_sectors: 200,
        serial: SERIAL,
    };

    /// Parses a request with this header whose buffers are `(iova, len, device-writable)`.
    fn parse_buffers(
        header: [u8; 16],
        buffers: &[(u64, u32, bool)],
        limits: &Limits,
    ) -> (Result<Request, RequestError>, PinnedBuffers, GuestMemory) {
        let mut memory = guest_memory(BASE, 0x10_0000);
        memory.write(HEADER, &header).unwrap();
        memory.write(ELSEWHERE, &header).unwrap();
        // A chain is only ever made by a walk over descriptors.
        for (index, (iova, len, writable)) in (0u16..).zip(buffers) {
            let more = usize::from(index) + 1 < buffers.len();
            let flags = u16::from(more) | u16::from(*writable) << 1;
            let mut descriptor = iova.to_le_bytes().to_vec();
            descriptor.extend(len.to_le_bytes());
            descriptor.extend(flags.to_le_bytes());
            descriptor.extend((index + 1).to_le_bytes());
            memory.write(RING.desc + 16 * u64::from(index), &descriptor).unwrap();
        }
        memory.write(RING.driver + 2, &1u16.to_le_bytes()).unwrap();
        let ring = MappedRing::new(&mut memory, RING, 16).unwrap();
        let mut queue = SplitQueue::new(ring, RingFeatures::default(), QueueState::default());
        let mut pinned = PinnedBuffers::default();
        let _popped = queue.pop(&mut memory, &mut pinned).unwrap().unwrap();
        let request = parse(&mut pinned, limits);
        (request, pinned, memory)
    }

    fn header(kind: u32, sector: u64) -> [u8; 16] {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        header
    }

    fn parse_plain(kind: u32, sector: u64, len: u32, writable: bool) -> Request {
        let buffers = [(HEADER, 16, false), (DATA, len, writable), (STATUS, 1, true)];
        parse_buffers(header(kind, sector), &buffers, &LIMITS).0.unwrap()
    }

    const fn done(status: Status, written: u32) -> Request {
        Request::Done { status, written }
    }

    const fn store(operation: Operation, written: u32) -> Request {
        Request::Store { operation, written }
    }

    #[test]
    fn transfers_keep_to_the_capacity_and_to_whole_sectors() {
        use Operation::{Read, Write};
        for (sector, len, fits) in [
            (0, 512, true),
            (999, 512, true),
            (992, 4096, true),
            (993, 4096, false),
            (1000, 512, false),
            (u64::MAX, 512, false),
            (u64::MAX - 7, 4096, false),
            (0, 511, false),
            (0, 513, false),
        ] {
            let read = if fits { store(Read { sector }, len + 1) } else { done(Status::IoErr, 0) };
            let write = if fits { store(Write { sector }, 1) } else { done(Status::IoErr, 1) };
            assert_eq!(parse_plain(VIRTIO_BLK_T_IN, sector, len, true), read, "{sector} {len}");
            assert_eq!(parse_plain(VIRTIO_BLK_T_OUT, sector, len, false), write, "{sector} {len}");
        }
        assert_eq!(parse_plain(VIRTIO_BLK_T_IN, 5, 0, true), done(Status::Ok, 1));
        assert_eq!(parse_plain(VIRTIO_BLK_T_OUT, 5, 0, false), done(Status::Ok, 1));
        assert_eq!(parse_plain(VIRTIO_BLK_T_FLUSH, 0, 0, false), store(Operation::Flush, 1));
        for unknown in [2, 3, 5, 9, 10, 12, 14, 16, 0x8000_0001, u32::MAX] {
            assert_eq!(parse_plain(unknown, 0, 512, true), done(Status::Unsupp, 1));
        }
    }

    #[test]
    fn a_read_only_device_is_not_written() {
        let limits = Limits { read_only: true, ..LIMITS };
        for kind in [VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            let len = if kind == VIRTIO_BLK_T_OUT { 512 } else { 16 };
            let buffers = [(HEADER, 16, false), (DATA, len, false), (STATUS, 1, true)];
            let (request, _, _) = parse_buffers(header(kind, 0), &buffers, &limits);
            assert_eq!(request, Ok(done(Status::IoErr, 1)));
        }
    }

    /// The data is found wherever header, data and status are cut.
    #[test]
    fn framing_does_not_matter() {
        // Header and data in one; header in three, neighbours or not; data and status in one; zero-length pieces between.
        let write: [&[(u64, u32, bool)]; 4] = [
            &[(HEADER, 16 + 1024, false), (STATUS, 1, true)],
            &[(HEADER, 3, false), (HEADER + 3, 12, false), (HEADER + 15, 1025, false), (STATUS, 1, true)],
            &[(HEADER, 3, false), (ELSEWHERE + 3, 12, false), (HEADER + 15, 1025, false), (STATUS, 1, true)],
            &[(HEADER, 0, false), (HEADER, 20, false), (HEADER + 20, 1020, false), (STATUS, 1, true), (DATA, 0, true)],
        ];
        for buffers in write {
            let (request, pinned, mut memory) = parse_buffers(header(VIRTIO_BLK_T_OUT, 7), buffers, &LIMITS);
            assert_eq!(request, Ok(store(Operation::Write { sector: 7 }, 1)));
            let data: Vec<u8> = (0..1024).map(|byte| byte as u8).collect();
            memory.write(HEADER + 16, &data).unwrap();
            let mut seen = vec![0; 1024];
            assert_eq!(pinned.copy_to_slice(0, &mut seen), 1024);
            assert_eq!(seen, data);
        }
        let read: [&[(u64, u32, bool)]; 2] = [
            &[(HEADER, 16, false), (DATA, 513, true)],
            &[(HEADER, 16, false), (DATA, 100, true), (DATA + 100, 412, true), (DATA + 512, 1, true)],
        ];
        for buffers in read {
            let (request, pinned, mut memory) = parse_buffers(header(VIRTIO_BLK_T_IN, 7), buffers, &LIMITS);
            assert_eq!(request, Ok(store(Operation::Read { sector: 7 }, 513)));
            assert_eq!(pinned.len(), 512);
            pinned.fill(0xaa);
            pinned.write_trailer(0x55);
            let mut bytes = [0; 514];
            memory.read(DATA, &mut bytes).unwrap();
            assert!(bytes[..512].iter().all(|byte| *byte == 0xaa));
            assert_eq!(bytes[512..], [0x55, 0]);
        }
    }

    #[test]
    fn a_chain_without_header_or_status_is_the_drivers_fault() {
        let result = |buffers: &[(u64, u32, bool)]| parse_buffers(header(0, 0), buffers, &LIMITS).0;
        assert_eq!(result(&[(HEADER, 15, false), (DATA, 513, true)]), Err(RequestError::NoHeader));
        assert_eq!(result(&[(DATA, 513, true)]), Err(RequestError::NoHeader));
        assert_eq!(result(&[(HEADER, 16, false)]), Err(RequestError::NoStatus));
        assert_eq!(result(&[(HEADER, 16, false), (DATA, 0, true)]), Err(RequestError::NoStatus));
    }

    #[test]
    fn the_serial_is_cut_to_the_buffer() {
        for (len, written) in [(20, 21), (8, 9), (0, 1), (24, 20)] {
            let buffers = [(HEADER, 16, false), (DATA, len, true), (STATUS, 1, true)];
            let (request, _, mut memory) = parse_buffers(header(VIRTIO_BLK_T_GET_ID, 0), &buffers, &LIMITS);
            assert_eq!(request, Ok(done(Status::Ok, written)), "{len}");
            let mut id = [0; 20];
            memory.read(DATA, &mut id).unwrap();
            let copied = len.min(20) as usize;
            assert_eq!(id[..copied], SERIAL[..copied]);
            assert!(id[copied..].iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn ranges_are_checked() {
        let parse_range = |kind, sector: u64, sectors: u32, flags: u32, len: u32, limits: &Limits| {
            // Header and range lie one behind the other, in one descriptor.
            let mut memory_header = header(kind, 0).to_vec();
            memory_header.extend(sector.to_le_bytes());
            memory_header.extend(sectors.to_le_bytes());
            memory_header.extend(flags.to_le_bytes());
            let mut memory = guest_memory(BASE, 0x10_0000);
            memory.write(HEADER, &memory_header).unwrap();
            memory.write(RING.desc, &HEADER.to_le_bytes()).unwrap();
            memory.write(RING.desc + 8, &[(16 + len) as u8, 0, 0, 0, 1, 0, 1, 0]).unwrap();
            memory.write(RING.desc + 16, &STATUS.to_le_bytes()).unwrap();
            memory.write(RING.desc + 24, &[1, 0, 0, 0, 2, 0, 0, 0]).unwrap();
            memory.write(RING.driver + 2, &[1, 0]).unwrap();
            let ring = MappedRing::new(&mut memory, RING, 16).unwrap();
            let mut queue = SplitQueue::new(ring, RingFeatures::default(), QueueState::default());
            let mut pinned = PinnedBuffers::default();
            let _popped = queue.pop(&mut memory, &mut pinned).unwrap().unwrap();
            parse(&mut pinned, limits).unwrap()
        };
        let (discard, zeroes) = (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES);
        let ok_discard = store(Operation::Discard { sector: 900, sectors: 100 }, 1);
        let ok_zeroes = |unmap| store(Operation::WriteZeroes { sector: 800, sectors: 200, unmap }, 1);
        let (failed, unsupported) = (done(Status::IoErr, 1), done(Status::Unsupp, 1));
        for (kind, sector, sectors, flags, len, expected) in [
            (discard, 900, 100, 0, 16, ok_discard),
            (discard, 1000, 0, 0, 16, done(Status::Ok, 1)),
            (discard, 900, 101, 0, 16, failed),
            (discard, 901, 100, 0, 16, failed),
            (discard, u64::MAX, 1, 0, 16, failed),
            (discard, 900, 100, 1, 16, unsupported),
            (discard, 900, 100, 0, 15, failed),
            (discard, 900, 100, 0, 0, failed),
            (discard, 900, 100, 0, 32, failed),
            (zeroes, 800, 200, 0, 16, ok_zeroes(false)),
            (zeroes, 800, 200, 1, 16, ok_zeroes(true)),
            (zeroes, 800, 200, 2, 16, unsupported),
            (zeroes, 800, 201, 0, 16, failed),
        ] {
            assert_eq!(parse_range(kind, sector, sectors, flags, len, &LIMITS), expected, "{sector} {sectors} {flags}");
        }
        let without = Limits { max_discard_sectors: 0, max_write_zeroes_sectors: 0, ..LIMITS };
        assert_eq!(parse_range(discard, 0, 1, 0, 16, &without), unsupported);
        assert_eq!(parse_range(zeroes, 0, 1, 0, 16, &without), unsupported);
    }
}
