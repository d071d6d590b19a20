//! Requests to a block device over one queue (virtio 1.3 section 5.2.6).

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::sys::eventfd::EventFd;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_SECURE_ERASE, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use crate::client::wait;
use crate::{Buffer, Doorbell, Error, GuestMemory, Ring, Segment, SharedSlice};

const SECTOR: usize = 512;
const HEADER_LEN: u32 = 16;
/// Header and status of a request, in a cache line of their own: neither side waits for one that belongs to another request.
const SLOT_SIZE: usize = 64;
const STATUS_OFFSET: usize = 16;
/// No status of the specification: a request that completes with it got none from the device.
const NO_STATUS: u8 = 0xff;

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestType {
    /// Reads from `sector` into the data segments.
    Read,
    /// Writes the data segments from `sector` on.
    Write,
    /// Makes writes that have completed durable; no data.
    Flush,
    /// Reads the serial number of 20 bytes into the data segments.
    GetId,
    /// Discards the ranges in the data segments, 16 bytes each.
    Discard,
    /// Zeroes the ranges in the data segments, 16 bytes each.
    WriteZeroes,
    /// Erases the ranges in the data segments, 16 bytes each.
    SecureErase,
    /// Any type, for tests.
    Raw {
        /// The type field.
        value: u32,
        /// Whether the device writes the data segments, or reads them.
        device_writes: bool,
    },
}

impl RequestType {
    fn value(self) -> u32 {
        match self {
            RequestType::Read => VIRTIO_BLK_T_IN,
            RequestType::Write => VIRTIO_BLK_T_OUT,
            RequestType::Flush => VIRTIO_BLK_T_FLUSH,
            RequestType::GetId => VIRTIO_BLK_T_GET_ID,
            RequestType::Discard => VIRTIO_BLK_T_DISCARD,
            RequestType::WriteZeroes => VIRTIO_BLK_T_WRITE_ZEROES,
            RequestType::SecureErase => VIRTIO_BLK_T_SECURE_ERASE,
            RequestType::Raw { value, .. } => value,
        }
    }

    fn device_writes(self) -> bool {
        match self {
            RequestType::Read | RequestType::GetId => true,
            RequestType::Raw { device_writes, .. } => device_writes,
            _ => false,
        }
    }
}

/// A request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockRequest<'a> {
    /// What to do.
    pub kind: RequestType,
    /// Where on the device, in units of 512 bytes.
    pub sector: u64,
    /// The memory to read or write.
    pub data: &'a [Segment],
}

/// Names a request in flight; a number below the queue size, free again when it completes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tag(u16);

impl Tag {
    /// The number, for tables of as many entries as the queue has.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// A request that the device is done with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// Which.
    pub tag: Tag,
    /// `VIRTIO_BLK_S_*`; 0xff when the device wrote no status.
    pub status: u8,
    /// How many bytes the device says it wrote, the status included.
    pub written: u32,
}

/// What binds the calls that wait.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// The most data segments of a request.
    pub(super) seg_max: Option<u32>,
    /// The largest data segment in bytes.
    pub(super) size_max: Option<u32>,
    /// How long a call waits.
    pub(super) timeout: Duration,
}

/// One queue of a block device. It depends on no other queue and may go to a thread of its own.
///
/// [`submit`](BlockQueue::submit) and [`poll`](BlockQueue::poll) allocate and lock nothing. Requests
/// become visible to the device with [`publish`](BlockQueue::publish), as many at once as were
/// submitted.
pub struct BlockQueue {
    ring: Ring,
    doorbell: Doorbell,
    interrupt: Option<EventFd>,
    slots_iova: u64,
    /// The headers: words 0 and 1 of each slot.
    headers: SharedSlice<AtomicU64>,
    /// The slots as bytes, for the status.
    slots: SharedSlice<AtomicU8>,
    /// The segments of the request being submitted.
    chain: Vec<Segment>,
    bounce: Buffer,
    limits: Limits,
    kicks: u64,
    interrupts: u64,
}

impl BlockQueue {
    pub(super) fn new(
        memory: &GuestMemory,
        mut ring: Ring,
        doorbell: Doorbell,
        interrupt: Option<EventFd>,
        bounce: Buffer,
        limits: Limits,
    ) -> Result<BlockQueue, Error> {
        let count = usize::from(ring.size());
        let slots = memory.allocate(count * SLOT_SIZE, 64)?;
        ring.disable_interrupts();
        Ok(BlockQueue {
            ring,
            doorbell,
            interrupt,
            slots_iova: slots.iova(),
            headers: slots.fields(0, count * SLOT_SIZE / 8)?,
            slots: slots.fields(0, count * SLOT_SIZE)?,
            chain: Vec::with_capacity(count + 2),
            bounce,
            limits,
            kicks: 0,
            interrupts: 0,
        })
    }

    /// A queue of a device that was set up by other means than a [`BlockDriver`](crate::BlockDriver), as a vhost-user
    /// front end does: the device is notified by `kick`, and signals `interrupt`, if there is one.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] when `memory` is too small.
    pub fn over_eventfds(
        memory: &GuestMemory,
        ring: impl Into<Ring>,
        kick: OwnedFd,
        interrupt: Option<EventFd>,
        timeout: Duration,
    ) -> Result<BlockQueue, Error> {
        let bounce = memory.allocate(4096, 4096)?;
        let limits = Limits { seg_max: None, size_max: None, timeout };
        BlockQueue::new(memory, ring.into(), Doorbell::eventfd(kick, 0), interrupt, bounce, limits)
    }

    /// The ring, for tests that look at it or break it.
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// The ring, to be driven by hand: chains added here are not of this queue's making, and
    /// [`poll`](BlockQueue::poll) gives their heads as tags.
    pub fn ring_mut(&mut self) -> &mut Ring {
        &mut self.ring
    }

    /// The doorbell.
    pub fn doorbell(&self) -> &Doorbell {
        &self.doorbell
    }

    /// Signalled by the device's interrupt; `None` when polling is all there is.
    pub fn interrupt(&self) -> Option<&EventFd> {
        self.interrupt.as_ref()
    }

    /// How often the doorbell was rung.
    pub fn kicks(&self) -> u64 {
        self.kicks
    }

    /// How many interrupts were seen; those that came while nobody waited count at the next wait.
    pub fn interrupts(&self) -> u64 {
        self.interrupts
    }

    /// Adds a request.
    ///
    /// # Errors
    /// [`Error::QueueFull`] until others complete.
    #[inline]
    pub fn submit(&mut self, request: &BlockRequest<'_>) -> Result<Tag, Error> {
        let head = self.ring.next_head().ok_or(Error::QueueFull)?;
        let slot = usize::from(head) * SLOT_SIZE;
        let iova = self.slots_iova + slot as u64;
        // struct virtio_blk_req: type, reserved, sector.
        let kind = u64::from(request.kind.value());
        self.headers[slot / 8].store(kind.to_le(), Ordering::Relaxed);
        self.headers[slot / 8 + 1].store(request.sector.to_le(), Ordering::Relaxed);
        self.slots[slot + STATUS_OFFSET].store(NO_STATUS, Ordering::Relaxed);

        let header = Segment { iova, len: HEADER_LEN };
        let status = Segment { iova: iova + STATUS_OFFSET as u64, len: 1 };
        let one_piece;
        let chain: &[Segment] = if let [data] = request.data {
            one_piece = [header, *data, status];
            &one_piece
        } else {
            self.chain.clear();
            self.chain.push(header);
            self.chain.extend_from_slice(request.data);
            self.chain.push(status);
            &self.chain
        };
        let readable = if request.kind.device_writes() { 1 } else { 1 + request.data.len() };
        let (readable, writable) = chain.split_at(readable);
        self.ring.add(readable, writable).map(Tag).ok_or(Error::QueueFull)
    }

    /// Shows the device what was submitted, and rings the doorbell if the device wants that.
    ///
    /// # Errors
    /// As [`Doorbell::ring`].
    #[inline]
    pub fn publish(&mut self) -> Result<(), Error> {
        if self.ring.publish() {
            self.kicks += 1;
            self.doorbell.ring()?;
        }
        Ok(())
    }

    /// Takes a completion, if there is one.
    ///
    /// # Errors
    /// [`Error::Device`] when the device breaks the ring.
    #[inline]
    pub fn poll(&mut self) -> Result<Option<Completion>, Error> {
        let Some(used) = self.ring.take()? else { return Ok(None) };
        let slot = usize::from(used.head) * SLOT_SIZE;
        // Ordered behind the device's store by the Acquire of used.idx, or of the descriptor's flags.
        let status = self.slots[slot + STATUS_OFFSET].load(Ordering::Relaxed);
        Ok(Some(Completion { tag: Tag(used.head), status, written: used.written }))
    }

    /// Sleeps until a completion can be taken: true. False when none comes in time. Without
    /// interrupts it spins instead.
    ///
    /// # Errors
    /// [`Error::System`] when the wait fails.
    pub fn wait(&mut self, timeout: Duration) -> Result<bool, Error> {
        let deadline = Instant::now() + timeout;
        let Some(interrupt) = &self.interrupt else {
            // Without interrupts this only looks: they are asked for by nobody.
            while !self.ring.has_used() {
                if Instant::now() >= deadline {
                    return Ok(false);
                }
                std::thread::yield_now();
            }
            return Ok(true);
        };
        let ready = loop {
            if self.ring.enable_interrupts() {
                break true;
            }
            if !wait(interrupt.as_fd(), PollFlags::POLLIN, deadline)? {
                break self.ring.has_used();
            }
            // Another thread's read is no loss: the counter only says that there was an interrupt.
            self.interrupts += interrupt.read().unwrap_or(0);
        };
        self.ring.disable_interrupts();
        Ok(ready)
    }

    /// Submits a request and waits until it is done.
    ///
    /// # Errors
    /// [`Error::Busy`] when others are in flight, [`Error::Timeout`], and those of the calls above.
    pub fn execute(&mut self, request: &BlockRequest<'_>) -> Result<Completion, Error> {
        let in_flight = self.ring.in_flight();
        if in_flight > 0 {
            return Err(Error::Busy(in_flight.into()));
        }
        self.submit(request)?;
        self.publish()?;
        let limit = self.limits.timeout;
        if !self.wait(limit)? {
            return Err(Error::Timeout { what: "completion", limit });
        }
        self.poll()?.ok_or(Error::Device("it announces a completion that is not there"))
    }

    /// Reads from the device. `out` is a multiple of 512 bytes.
    ///
    /// # Errors
    /// [`Error::Status`] when the device fails the request, and those of
    /// [`execute`](BlockQueue::execute).
    pub fn read(&mut self, sector: u64, out: &mut [u8]) -> Result<(), Error> {
        let bounce = self.bounce.clone();
        let mut sector = sector;
        for piece in out.chunks_mut(self.piece_size()?) {
            self.transfer(RequestType::Read, sector, piece.len())?;
            bounce.read(0, piece)?;
            sector = sector.wrapping_add((piece.len() / SECTOR) as u64);
        }
        Ok(())
    }

    /// Writes to the device. `data` is a multiple of 512 bytes.
    ///
    /// # Errors
    /// As [`read`](BlockQueue::read).
    pub fn write(&mut self, sector: u64, data: &[u8]) -> Result<(), Error> {
        let bounce = self.bounce.clone();
        let mut sector = sector;
        for piece in data.chunks(self.piece_size()?) {
            bounce.write(0, piece)?;
            self.transfer(RequestType::Write, sector, piece.len())?;
            sector = sector.wrapping_add((piece.len() / SECTOR) as u64);
        }
        Ok(())
    }

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// As [`read`](BlockQueue::read).
    pub fn flush(&mut self) -> Result<(), Error> {
        let request = BlockRequest { kind: RequestType::Flush, sector: 0, data: &[] };
        self.execute(&request).and_then(ok)
    }

    /// Reads the serial number, padded with NUL.
    ///
    /// # Errors
    /// As [`read`](BlockQueue::read).
    pub fn get_id(&mut self) -> Result<[u8; VIRTIO_BLK_ID_BYTES as usize], Error> {
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        self.transfer(RequestType::GetId, 0, id.len())?;
        self.bounce.read(0, &mut id)?;
        Ok(id)
    }

    /// Discards a range.
    ///
    /// # Errors
    /// As [`read`](BlockQueue::read).
    pub fn discard(&mut self, sector: u64, num_sectors: u32) -> Result<(), Error> {
        self.erase(RequestType::Discard, sector, num_sectors, 0)
    }

    /// Zeroes a range; with `unmap`, the device may unmap it.
    ///
    /// # Errors
    /// As [`read`](BlockQueue::read).
    pub fn write_zeroes(&mut self, sector: u64, num_sectors: u32, unmap: bool) -> Result<(), Error> {
        let flags = if unmap { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP } else { 0 };
        self.erase(RequestType::WriteZeroes, sector, num_sectors, flags)
    }

    fn erase(&mut self, kind: RequestType, sector: u64, count: u32, flags: u32) -> Result<(), Error> {
        // struct virtio_blk_discard_write_zeroes
        self.bounce.write(0, &sector.to_le_bytes())?;
        self.bounce.write(8, &count.to_le_bytes())?;
        self.bounce.write(12, &flags.to_le_bytes())?;
        self.transfer(kind, 0, 16)
    }

    /// How much one request of the calls that copy moves: what fits the bounce buffer, the segments
    /// and the queue.
    fn piece_size(&self) -> Result<usize, Error> {
        let segments = self.max_segments();
        let size = self.segment_size().saturating_mul(segments).min(self.bounce.len());
        match size - size % SECTOR {
            0 => Err(Error::Device("no sector fits a request; use larger buffers and queues")),
            size => Ok(size),
        }
    }

    fn segment_size(&self) -> usize {
        self.limits.size_max.map_or(usize::MAX, |size| size as usize).min(1 << 30)
    }

    fn max_segments(&self) -> usize {
        let of_queue = usize::from(self.ring.size()).saturating_sub(2);
        self.limits.seg_max.map_or(of_queue, |max| of_queue.min(max as usize))
    }

    /// Executes a request on the front of the bounce buffer.
    fn transfer(&mut self, kind: RequestType, sector: u64, len: usize) -> Result<(), Error> {
        let step = self.segment_size().max(1);
        let data = (0..len)
            .step_by(step)
            .map(|offset| self.bounce.segment(offset, step.min(len - offset)))
            .collect::<Result<Vec<_>, _>>()?;
        self.execute(&BlockRequest { kind, sector, data: &data }).and_then(ok)
    }
}

fn ok(completion: Completion) -> Result<(), Error> {
    match u32::from(completion.status) {
        VIRTIO_BLK_S_OK => Ok(()),
        _ => Err(Error::Status(completion.status)),
    }
}
