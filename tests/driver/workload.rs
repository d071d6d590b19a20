//! Random requests on one queue, checked against a copy of what the disk must hold.

use std::time::{Duration, Instant};

use client::{BlockQueue, BlockRequest, Completion, GuestMemory, RequestType, Segment};

use crate::rig::{LIMIT, OK, Random, execute};

const SECTOR: usize = 512;

/// What to do to a queue. It works on sectors of its own, which hold zeroes at first.
#[derive(Clone)]
pub(crate) struct Workload {
    pub(crate) seed: u64,
    /// Of the disk.
    pub(crate) first_sector: u64,
    pub(crate) sectors: usize,
    /// How many requests.
    pub(crate) requests: usize,
    /// The most requests in flight.
    pub(crate) depth: usize,
    /// The most sectors of a request.
    pub(crate) largest: usize,
    /// The most segments of a request.
    pub(crate) segments: usize,
    /// What addresses and lengths of segments are multiples of.
    pub(crate) align: usize,
    /// Sleeps for interrupts rather than to poll.
    pub(crate) sleeps: bool,
    /// Whether the store keeps what is written.
    pub(crate) keeps: bool,
}

impl Default for Workload {
    fn default() -> Workload {
        Workload {
            seed: 1,
            first_sector: 0,
            sectors: 512,
            requests: 400,
            depth: 16,
            largest: 16,
            segments: 8,
            align: SECTOR,
            sleeps: true,
            keeps: true,
        }
    }
}

/// A place for one request's data, and what is there while it is in flight.
struct Slot {
    offset: usize,
    request: Option<InFlight>,
}

struct InFlight {
    write: bool,
    first: usize,
    bytes: Vec<u8>,
    segments: Vec<Segment>,
}

/// Guest memory for the data of a workload.
pub(crate) struct Arena {
    buffer: client::Buffer,
    room: usize,
}

impl Arena {
    pub(crate) fn new(memory: &GuestMemory, workload: &Workload) -> Arena {
        let room = Arena::room(workload);
        Arena { buffer: memory.allocate(room * workload.depth, 4096).unwrap(), room }
    }

    /// All of a buffer that was made for this.
    pub(crate) fn of(buffer: client::Buffer, workload: &Workload) -> Arena {
        let room = Arena::room(workload);
        assert!(buffer.len() >= room * workload.depth);
        Arena { buffer, room }
    }

    /// Twice the data: segments have gaps between them, and guards around.
    pub(crate) fn room(workload: &Workload) -> usize {
        (2 * workload.largest * SECTOR + 2 * workload.align * (workload.segments + 1)).next_multiple_of(4096)
    }
}

/// What fills the memory between segments: nothing may be written there.
const GUARD: u8 = 0xa5;

impl Workload {
    /// Runs on a queue whose device is at rest, and reads everything back at the end.
    pub(crate) fn run(&self, queue: &mut BlockQueue, arena: &Arena) {
        let begun = Instant::now();
        let mut random = Random::new(self.seed);
        let mut disk = vec![0; self.sectors * SECTOR];
        let mut slots: Vec<_> = (0..self.depth).map(|at| Slot { offset: at * arena.room, request: None }).collect();
        let mut tags = vec![usize::MAX; usize::from(queue.ring().size())];
        let (mut submitted, mut completed) = (0, 0);
        while completed < self.requests {
            let mut full = false;
            // Batches of any size, so that the device is found asleep, awake, and falling asleep.
            let batch = 1 + random.below(self.depth as u64);
            for _ in 0..batch {
                let free = slots.iter().position(|slot| slot.request.is_none());
                let (Some(at), true) = (free, submitted < self.requests) else { break };
                let Some(request) = self.choose(&mut random, &slots, &disk, arena, slots[at].offset) else { break };
                let kind = if request.write { RequestType::Write } else { RequestType::Read };
                let sector = self.first_sector + request.first as u64;
                match queue.submit(&BlockRequest { kind, sector, data: &request.segments }) {
                    Ok(tag) => tags[tag.index()] = at,
                    Err(client::Error::QueueFull) => {
                        full = true;
                        break;
                    }
                    Err(error) => panic!("{error}"),
                }
                slots[at].request = Some(request);
                submitted += 1;
            }
            queue.publish().unwrap();
            assert!(submitted > completed || !full, "a request that never fits");
            if self.sleeps || full {
                assert!(queue.wait(LIMIT).unwrap(), "no completion came: {completed} of {submitted}");
            }
            while let Some(done) = queue.poll().unwrap() {
                let slot = &mut slots[std::mem::replace(&mut tags[done.tag.index()], usize::MAX)];
                let request = slot.request.take().expect("completed once");
                self.check(&done, &request, arena, slot.offset, &mut disk);
                completed += 1;
            }
            assert!(begun.elapsed() < LIMIT, "stuck: {completed} of {submitted} are completed");
            if !self.sleeps {
                std::thread::yield_now();
            }
        }
        if self.keeps {
            assert!(
                self.read_back(queue, arena) == disk,
                "seed {}: the disk does not hold what was written",
                self.seed
            );
        }
        assert!(begun.elapsed() < LIMIT + Duration::from_secs(30));
    }

    /// All sectors, read one request after the other.
    fn read_back(&self, queue: &mut BlockQueue, arena: &Arena) -> Vec<u8> {
        let mut disk = Vec::new();
        for first in (0..self.sectors).step_by(self.largest) {
            let len = self.largest.min(self.sectors - first) * SECTOR;
            let data = [arena.buffer.segment(0, len).unwrap()];
            let done = execute(queue, RequestType::Read, self.first_sector + first as u64, &data);
            assert_eq!(done.status, OK);
            let mut bytes = vec![0; len];
            arena.buffer.read(0, &mut bytes).unwrap();
            disk.extend(bytes);
        }
        disk
    }

    /// A request that touches no sector that another in flight writes.
    fn choose(
        &self,
        random: &mut Random,
        slots: &[Slot],
        disk: &[u8],
        arena: &Arena,
        offset: usize,
    ) -> Option<InFlight> {
        let write = random.below(2) == 0;
        let (first, count) = (0..20).find_map(|_| {
            let count = 1 + random.below(self.largest.min(self.sectors) as u64) as usize;
            let first = random.below((self.sectors - count + 1) as u64) as usize;
            let clash = |other: &InFlight| {
                let end = other.first + other.bytes.len() / SECTOR;
                (write || other.write) && first < end && other.first < first + count
            };
            let free = !slots.iter().filter_map(|slot| slot.request.as_ref()).any(clash);
            free.then_some((first, count))
        })?;
        let mut bytes = disk[first * SECTOR..][..count * SECTOR].to_vec();
        if write {
            random.fill(&mut bytes);
        }
        let segments = self.cut(random, arena, offset, bytes.len());
        let mut whole = vec![GUARD; arena.room];
        if write {
            let mut at = 0;
            for segment in &segments {
                let start = (segment.iova - arena.buffer.iova()) as usize - offset;
                let len = segment.len as usize;
                whole[start..start + len].copy_from_slice(&bytes[at..at + len]);
                at += len;
            }
        }
        arena.buffer.write(offset, &whole).unwrap();
        Some(InFlight { write, first, bytes, segments })
    }

    /// Cuts `len` bytes into segments with gaps between them.
    fn cut(&self, random: &mut Random, arena: &Arena, offset: usize, len: usize) -> Vec<Segment> {
        let mut left = len;
        let mut at = self.align;
        let most = 1 + random.below(self.segments as u64) as usize;
        let mut segments = Vec::new();
        while left > 0 {
            let share = match segments.len() + 1 < most && left > self.align {
                true => self.align * (1 + random.below((left / self.align) as u64) as usize),
                false => left,
            };
            segments.push(arena.buffer.segment(offset + at, share).unwrap());
            at += share + self.align * random.below(2) as usize;
            left -= share;
        }
        segments
    }

    fn check(&self, done: &Completion, request: &InFlight, arena: &Arena, offset: usize, disk: &mut [u8]) {
        assert_eq!(done.status, OK, "seed {}", self.seed);
        let range = request.first * SECTOR..request.first * SECTOR + request.bytes.len();
        if request.write {
            assert_eq!(done.written, 1, "the status");
            disk[range].copy_from_slice(&request.bytes);
            return;
        }
        assert_eq!(done.written as usize, request.bytes.len() + 1, "the data and the status");
        if !self.keeps {
            return;
        }
        let mut expected = vec![GUARD; arena.room];
        let mut at = 0;
        for segment in &request.segments {
            let start = (segment.iova - arena.buffer.iova()) as usize - offset;
            let len = segment.len as usize;
            expected[start..start + len].copy_from_slice(&request.bytes[at..at + len]);
            at += len;
        }
        let mut found = vec![0; arena.room];
        arena.buffer.read(offset, &mut found).unwrap();
        assert!(found == expected, "seed {}: a read of sector {} brought other bytes", self.seed, request.first);
    }
}
