//! The [contract](super) as one suite of tests, run against each store.
//!
//! A store is brought in by a [`Fixture`], and its kind decides which clauses it has to keep: those about operations;
//! those about data if it [`KeepsBlocks`]; those about stable storage if it [`IsStable`]. The table at the end says
//! which store is of which kind.

mod layers;
mod stores;

use std::fs::File;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use proptest::prelude::*;
use virtio::memory::{Access, GuestMemory, Mapping, MemoryFile, PinnedBuffers, Release, SharedTable};

use layers::{Before, Distant, Late, Limited, Retried};
use stores::{Exported, FixedBuffers, Golden, LoopDevice, Overlay, OverlayOver, StoredFile, StoredImage, Submitted};

use super::memory::MemoryStore;
use super::null::NullStore;
use super::uring::{Uring, Waker};
use super::{Backend, Completion, Full, Io, Op, Store};

/// A store to be tested.
trait Fixture {
    /// A store of `capacity` bytes, zero where it keeps any.
    fn new(capacity: u64) -> Self;

    fn store(&self) -> &dyn Store;

    /// The ring that it is attached to.
    fn ring(waker: &Waker) -> Uring;
}

/// Reads return what was written.
trait KeepsBlocks: Fixture {}

/// What was put on stable storage can be seen there.
trait IsStable: KeepsBlocks {
    /// The bytes, by another descriptor.
    fn stored(&self) -> Vec<u8>;
}

/// Memory of a guest: 8 MiB from address 0 on.
pub(crate) struct Guest {
    memory: GuestMemory,
    table: Arc<SharedTable>,
    file: Arc<MemoryFile>,
    access: Access,
}

impl Guest {
    const LEN: u64 = 8 << 20;

    pub(crate) fn new() -> Self {
        Self::of_bytes(Self::LEN)
    }

    /// One that has another size.
    pub(super) fn of_bytes(len: u64) -> Self {
        let file = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(len).unwrap();
        Self::of_file(file, Access::READ_WRITE)
    }

    /// One with a file for its memory.
    pub(super) fn of_file(file: File, access: Access) -> Self {
        let file = Arc::new(MemoryFile::map(file).unwrap());
        let table = Arc::new(SharedTable::default());
        table.map(Mapping::of_file(0, file.len(), access, Arc::clone(&file), 0).unwrap()).unwrap();
        Self { memory: GuestMemory::new(Arc::clone(&table)), table, file, access }
    }

    /// Pieces of it: address and bytes.
    pub(crate) fn buffers(&mut self, pieces: &[(u64, u64)]) -> PinnedBuffers {
        let mut buffers = PinnedBuffers::default();
        for (at, len) in pieces {
            self.memory.pin(*at, *len, self.access, &mut buffers).unwrap();
        }
        buffers
    }

    /// Maps the memory at another address, from the start of its file.
    pub(super) fn remap(&mut self, iova: u64) {
        self.table.unmap(0, u64::MAX).unwrap();
        let file = Arc::clone(&self.file);
        self.table.map(Mapping::of_file(iova, file.len(), self.access, file, 0).unwrap()).unwrap();
        self.memory.refresh();
    }

    /// Lets go of the memory; tells when all others have.
    pub(super) fn release(self) -> Arc<Release> {
        self.table.unmap(0, u64::MAX).unwrap().remove(0).release()
    }
}

/// Ends a test that hangs: a limit, far above what any step takes.
struct Limit {
    expired: Arc<AtomicBool>,
    _end: mpsc::Sender<()>,
}

impl Limit {
    fn new(waker: &Waker) -> Self {
        let (end, ended) = mpsc::channel::<()>();
        let expired = Arc::new(AtomicBool::new(false));
        let (waker, flag) = (waker.clone(), Arc::clone(&expired));
        thread::spawn(move || {
            if ended.recv_timeout(Duration::from_secs(120)) == Err(mpsc::RecvTimeoutError::Timeout) {
                flag.store(true, Ordering::SeqCst);
                waker.wake();
            }
        });
        Self { expired, _end: end }
    }
}

/// One queue's place: a ring, a backend, a guest; does what a worker does.
pub(crate) struct Rig {
    pub(super) ring: Rc<Uring>,
    pub(super) backend: Box<dyn Backend>,
    pub(super) guest: Guest,
    limit: Limit,
    next: u16,
    in_flight: Vec<(u16, Op)>,
    /// What was done at once, and not told of yet.
    performed: Vec<Completion>,
}

impl Rig {
    /// On a ring of the kernel's.
    pub(super) fn new(store: &dyn Store) -> Self {
        Self::on(store, |waker| Uring::new(waker).unwrap())
    }

    fn of<F: Fixture>(fixture: &F) -> Self {
        Self::on(fixture.store(), F::ring)
    }

    pub(super) fn on(store: &dyn Store, ring: impl Fn(&Waker) -> Uring) -> Self {
        let waker = Waker::new().unwrap();
        let ring = Rc::new(ring(&waker));
        let backend = store.attach(&ring, 0).unwrap();
        let (limit, in_flight, performed) = (Limit::new(&waker), Vec::new(), Vec::new());
        Self { ring, backend, guest: Guest::new(), limit, next: 0, in_flight, performed }
    }

    pub(super) fn submit(&mut self, op: Op, buffers: PinnedBuffers) -> Result<(), Full> {
        let token = self.next;
        let io = Box::new(Io::new(token, op, buffers));
        // Every other operation is offered to be done at once.
        let performed = if token % 2 == 1 { self.backend.perform(&io) } else { None };
        if let Some(result) = performed {
            self.performed.push(Completion { io, result });
        } else {
            self.backend.submit(io)?;
            self.in_flight.push((token, op));
        }
        self.next = self.next.wrapping_add(1);
        assert_eq!(self.backend.in_flight(), self.in_flight.len());
        Ok(())
    }

    /// What has completed, checked against what was submitted.
    pub(super) fn reap(&mut self) -> Vec<Completion> {
        let mut done = Vec::new();
        self.backend.reap(&mut done);
        for Completion { io, .. } in &done {
            let known = self.in_flight.iter().position(|(token, op)| (*token, *op) == (io.token, io.op));
            self.in_flight.swap_remove(known.expect("completed twice, or never submitted"));
        }
        assert_eq!(self.backend.in_flight(), self.in_flight.len());
        done.append(&mut self.performed);
        done
    }

    /// Waits for all that is in flight.
    pub(super) fn finish(&mut self) -> Vec<Completion> {
        self.ring.submit().unwrap();
        let mut done = self.reap();
        while !self.in_flight.is_empty() {
            self.ring.wait().unwrap();
            self.check_limit();
            done.append(&mut self.reap());
        }
        done
    }

    /// Waits for all that is in flight by looking only.
    pub(super) fn look_until_done(&mut self) {
        while !self.in_flight.is_empty() {
            self.reap();
            self.check_limit();
            thread::yield_now();
        }
    }

    fn check_limit(&self) {
        assert!(!self.limit.expired.load(Ordering::SeqCst), "never completed: {:?}", self.in_flight);
    }

    pub(super) fn one(&mut self, op: Op, buffers: PinnedBuffers) -> Completion {
        self.submit(op, buffers).unwrap();
        self.finish().pop().unwrap()
    }

    /// The backend was exchanged: what was in flight will not complete.
    pub(super) fn forget(&mut self) {
        self.in_flight.clear();
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8], durable: bool) {
        let buffers = self.guest.buffers(&[(0, data.len() as u64)]);
        buffers.copy_from_slice(0, data);
        self.one(Op::Write { offset, durable }, buffers).result.unwrap();
    }

    pub(super) fn read(&mut self, offset: u64, len: u64) -> Vec<u8> {
        // Not where `write` puts its data, which would make a read that does nothing look good.
        let at = Guest::LEN / 2;
        let buffers = self.guest.buffers(&[(at, len)]);
        buffers.fill(0xa5);
        self.one(Op::Read { offset }, buffers).result.unwrap();
        let mut data = vec![0; len as usize];
        self.guest.buffers(&[(at, len)]).copy_to_slice(0, &mut data);
        data
    }
}

const MIB: u64 = 1 << 20;

/// Bytes that differ from sector to sector and from place to place in it.
pub(super) fn pattern(seed: u64, len: u64) -> Vec<u8> {
    (0..len).map(|at| (seed ^ at ^ (at / 512).wrapping_mul(167)) as u8 | 1).collect()
}

fn one_of_each(guest: &mut Guest) -> Vec<(Op, PinnedBuffers)> {
    let mut ops = Vec::new();
    for durable in [false, true] {
        ops.push((Op::Read { offset: 0 }, guest.buffers(&[(0, 4096)])));
        ops.push((Op::Write { offset: 8192, durable }, guest.buffers(&[(4096, 512), (8192, 512)])));
        ops.push((Op::Flush, PinnedBuffers::default()));
        ops.push((Op::Discard { offset: 16384, len: 4096 }, PinnedBuffers::default()));
        for unmap in [false, true] {
            let op = Op::WriteZeroes { offset: 512 * 65, len: 8192, unmap, durable };
            ops.push((op, PinnedBuffers::default()));
        }
    }
    ops
}

mod operations {
    //! For all stores.

    use super::*;

    pub(super) fn info_is_consistent<F: Fixture>() {
        for capacity in [512, 4096 + 512, MIB] {
            let fixture = F::new(capacity);
            let info = fixture.store().info();
            assert_eq!(info.capacity, capacity);
            assert!(info.block_size.is_power_of_two() && info.block_size >= 512);
            assert!(info.physical_block_size.is_power_of_two() && info.physical_block_size >= info.block_size);
            assert_eq!(info.optimal_io_size % info.block_size, 0);
            assert_eq!(info.capacity % u64::from(info.block_size), 0);
            assert!(!info.read_only);
        }
    }

    pub(super) fn each_comes_back_once<F: Fixture>() {
        let fixture = F::new(MIB);
        let mut rig = Rig::of(&fixture);
        for _ in 0..20 {
            for (op, buffers) in one_of_each(&mut rig.guest) {
                rig.submit(op, buffers).unwrap();
            }
            let done = rig.finish();
            assert_eq!(done.len(), 12);
            assert!(done.iter().all(|done| done.result.is_ok()), "{done:?}");
        }
        assert!(rig.reap().is_empty());
    }

    pub(super) fn tokens_belong_to_their_backend<F: Fixture>() {
        let fixture = F::new(MIB);
        let mut first = Rig::of(&fixture);
        let backend = fixture.store().attach(&first.ring, 0).unwrap();
        let mut second = Rig { backend, ring: Rc::clone(&first.ring), ..Rig::of(&fixture) };
        for round in 0..20 {
            for n in 0..16 {
                let buffers = first.guest.buffers(&[(0, 512)]);
                first.submit(Op::Read { offset: n * 512 }, buffers).unwrap();
                let buffers = second.guest.buffers(&[(0, 512)]);
                second.submit(Op::Read { offset: (n + 16) * 512 }, buffers).unwrap();
            }
            // Either may find the other's completions.
            if round % 2 == 0 {
                second.ring.submit().unwrap();
            }
            assert_eq!(first.finish().len(), 16);
            assert_eq!(second.finish().len(), 16);
        }
    }

    /// What was committed needs no more calls than those that look for it; a worker with much to do never waits.
    pub(super) fn looking_is_enough<F: Fixture>() {
        let fixture = F::new(MIB);
        let mut rig = Rig::of(&fixture);
        // Some of them take the kernel more than one turn.
        for n in 0..4 {
            let pieces: Vec<_> = (0..1200).map(|k| (n * MIB + k * 600, 512)).collect();
            let buffers = rig.guest.buffers(&pieces);
            rig.submit(Op::Read { offset: n * 512 }, buffers).unwrap();
            rig.submit(Op::Flush, PinnedBuffers::default()).unwrap();
        }
        rig.ring.submit().unwrap();
        rig.look_until_done();
    }

    pub(super) fn full_gives_the_operation_back<F: Fixture>() {
        let fixture = F::new(MIB);
        let mut rig = Rig::of(&fixture);
        for _ in 0..2 {
            let mut refused = None;
            let mut taken = 0;
            // A queue has no more than 2^15 entries (virtio 1.3 §2.7): who takes as many need never be full.
            while refused.is_none() && taken < 1 << 15 {
                let offset = taken % 2048 * 512;
                let buffers = rig.guest.buffers(&[(offset, 512)]);
                match rig.submit(Op::Read { offset }, buffers) {
                    Ok(()) => taken += 1,
                    Err(Full(io)) => refused = Some(io),
                }
            }
            assert!(taken >= 256, "fewer than a usual queue has");
            assert_eq!(rig.finish().len() as u64, taken);
            if let Some(refused) = refused {
                let Io { op, buffers, .. } = *refused;
                assert_eq!(op, Op::Read { offset: taken % 2048 * 512 });
                assert_eq!(buffers.len(), 512);
                rig.one(op, buffers).result.unwrap();
            }
        }
    }

    pub(super) fn dropped_in_flight_lets_go_of_memory_in_the_end<F: Fixture>() {
        for committed in [false, true] {
            let fixture = F::new(MIB);
            let mut rig = Rig::of(&fixture);
            for n in 0..100 {
                let buffers = rig.guest.buffers(&[(n * 4096, 4096)]);
                rig.submit(Op::Read { offset: n * 4096 }, buffers).unwrap();
            }
            if committed {
                rig.ring.submit().unwrap();
            }
            let Rig { ring, backend, guest, performed, .. } = rig;
            let release = guest.release();
            drop(performed);
            drop(backend);
            drop(ring);
            assert!(release.wait(Instant::now()));
        }
    }
}

mod blocks {
    //! For stores that keep what they are given.

    use super::*;

    pub(super) fn nothing_written_reads_as_zero<F: KeepsBlocks>() {
        let fixture = F::new(MIB);
        assert!(Rig::of(&fixture).read(0, MIB).iter().all(|byte| *byte == 0));
    }

    pub(super) fn writes_are_seen_by_later_reads<F: KeepsBlocks>() {
        let fixture = F::new(MIB);
        let mut rig = Rig::of(&fixture);
        // Sectors, blocks, and all; also the very last sector.
        for (offset, len) in [(0, 512), (512, 512), (4096, 4096), (MIB - 512, 512), (512 * 7, 512 * 9), (0, MIB)] {
            for durable in [false, true] {
                let data = pattern(offset + len, len);
                rig.write(offset, &data, durable);
                assert_eq!(rig.read(offset, len), data);
            }
        }
    }

    pub(super) fn all_queues_see_the_same_blocks<F: KeepsBlocks>() {
        let fixture = F::new(MIB);
        let (mut first, mut second) = (Rig::of(&fixture), Rig::of(&fixture));
        let data = pattern(3, MIB);
        first.write(0, &data, false);
        assert_eq!(second.read(0, MIB), data);
    }

    pub(super) fn buffers_of_many_pieces<F: KeepsBlocks>() {
        let fixture = F::new(2 * MIB);
        let mut rig = Rig::of(&fixture);
        // More pieces than the kernel takes at once, with gaps; at addresses and of lengths both good and bad.
        for (len, step) in [(512, 1024), (1024, 1536), (520, 1000), (1, 2)] {
            let count = 512 * 3;
            let pieces: Vec<_> = (0..count).map(|n| (n * step, len)).collect();
            let bytes = len * count;
            let data = pattern(len, bytes);
            let buffers = rig.guest.buffers(&pieces);
            assert!(buffers.iovecs().len() > 1024);
            assert_eq!(buffers.copy_from_slice(0, &data) as u64, bytes);
            rig.one(Op::Write { offset: 512, durable: false }, buffers).result.unwrap();
            assert_eq!(rig.read(512, bytes), data);
            let buffers = rig.guest.buffers(&pieces);
            buffers.fill(0);
            rig.one(Op::Read { offset: 512 }, buffers).result.unwrap();
            let mut read = vec![0; bytes as usize];
            rig.guest.buffers(&pieces).copy_to_slice(0, &mut read);
            assert_eq!(read, data);
        }
    }

    pub(super) fn reads_touch_their_buffers_only<F: KeepsBlocks>() {
        let fixture = F::new(MIB);
        let mut rig = Rig::of(&fixture);
        rig.write(0, &pattern(1, 65536), false);
        for start in [4096, 4096 + 512, 4096 + 13] {
            let around = rig.guest.buffers(&[(0, 65536)]);
            around.fill(0xee);
            let buffers = rig.guest.buffers(&[(start, 8192)]);
            rig.one(Op::Read { offset: 512 }, buffers).result.unwrap();
            let mut bytes = vec![0; 65536];
            around.copy_to_slice(0, &mut bytes);
            let (before, rest) = bytes.split_at(start as usize);
            let (read, after) = rest.split_at(8192);
            assert!(before.iter().chain(after).all(|byte| *byte == 0xee));
            assert_eq!(read, &pattern(1, 65536)[512..512 + 8192]);
        }
    }

    pub(super) fn zeroes_read_as_zeroes<F: KeepsBlocks>() {
        let fixture = F::new(MIB);
        let mut rig = Rig::of(&fixture);
        let data = pattern(9, MIB);
        for (offset, len) in [(0, MIB), (512, 512), (512 * 7, 512 * 40), (8192, 65536), (MIB - 512, 512)] {
            for (unmap, durable) in [(false, false), (false, true), (true, false), (true, true)] {
                rig.write(0, &data, false);
                rig.one(Op::WriteZeroes { offset, len, unmap, durable }, PinnedBuffers::default()).result.unwrap();
                let mut expected = data.clone();
                expected[offset as usize..(offset + len) as usize].fill(0);
                assert_eq!(rig.read(0, MIB), expected);
            }
        }
    }

    pub(super) fn discards_leave_the_rest<F: KeepsBlocks>() {
        let fixture = F::new(MIB);
        let mut rig = Rig::of(&fixture);
        let data = pattern(5, MIB);
        for (offset, len) in [(512, 512), (512 * 7, 512 * 40), (8192, 65536), (0, MIB)] {
            rig.write(0, &data, false);
            rig.one(Op::Discard { offset, len }, PinnedBuffers::default()).result.unwrap();
            let read = rig.read(0, MIB);
            let (from, to) = (offset as usize, (offset + len) as usize);
            assert_eq!(read[..from], data[..from]);
            assert_eq!(read[to..], data[to..]);
        }
    }

    /// A step of the random test: sectors, how its memory is cut, what is done.
    #[derive(Clone, Debug)]
    struct Action {
        sector: u64,
        sectors: u64,
        cut: Cut,
        kind: u8,
        seed: u64,
    }

    /// Memory of an action: distance from alignment, bytes of a piece.
    #[derive(Clone, Copy, Debug)]
    struct Cut {
        skew: u64,
        piece: u64,
    }

    const SECTORS: u64 = 512;

    fn actions() -> impl Strategy<Value = Vec<Action>> {
        let skew = prop_oneof![3 => Just(0), 1 => Just(512), 1 => 1u64..512];
        let piece = prop_oneof![Just(1 << 20), Just(4096), Just(512), 100u64..3000];
        let action = (0..SECTORS, 1u64..64, skew, piece, 0u8..8, any::<u64>());
        let action = action.prop_map(|(sector, sectors, skew, piece, kind, seed)| Action {
            sector,
            sectors: sectors.min(SECTORS - sector),
            cut: Cut { skew, piece },
            kind,
            seed,
        });
        prop::collection::vec(action, 1..80)
    }

    /// Where the `n`th action of a batch has its memory: places that do not touch.
    fn pieces(n: u64, cut: Cut, len: u64) -> Vec<(u64, u64)> {
        let start = n * (Guest::LEN / 16) + cut.skew;
        let gap = if len / cut.piece < 400 { 64 } else { 0 };
        (0..len.div_ceil(cut.piece))
            .map(|k| (start + k * (cut.piece + gap), cut.piece.min(len - k * cut.piece)))
            .collect()
    }

    /// Random operations, several in flight, against plain bytes.
    pub(super) fn behaves_like_an_array_of_bytes<F: KeepsBlocks>() {
        let config = ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() };
        proptest!(config, |(actions in actions())| {
            let fixture = F::new(SECTORS * 512);
            let mut rig = Rig::of(&fixture);
            let mut model = vec![0u8; (SECTORS * 512) as usize];
            // By sector: whether what it reads as is known.
            let mut known = vec![true; SECTORS as usize];
            let mut batch: Vec<Action> = Vec::new();
            for action in actions {
                let end = action.sector + action.sectors;
                if batch.len() == 16 || batch.iter().any(|b| b.sector < end && action.sector < b.sector + b.sectors) {
                    settle(&mut rig, &mut batch, &model, &known);
                }
                let (from, to) = ((action.sector * 512) as usize, (end * 512) as usize);
                let (offset, len) = (action.sector * 512, action.sectors * 512);
                let durable = action.seed % 4 == 0;
                let mut buffers = PinnedBuffers::default();
                let sectors = action.sector as usize..end as usize;
                let op = match action.kind {
                    0..3 => {
                        buffers = rig.guest.buffers(&pieces(batch.len() as u64, action.cut, len));
                        buffers.fill(0x5a);
                        Op::Read { offset }
                    }
                    3..6 => {
                        let data = pattern(action.seed, len);
                        buffers = rig.guest.buffers(&pieces(batch.len() as u64, action.cut, len));
                        buffers.copy_from_slice(0, &data);
                        model[from..to].copy_from_slice(&data);
                        known[sectors].fill(true);
                        Op::Write { offset, durable }
                    }
                    6 => {
                        model[from..to].fill(0);
                        known[sectors].fill(true);
                        Op::WriteZeroes { offset, len, unmap: action.seed % 2 == 0, durable }
                    }
                    _ => {
                        known[sectors].fill(false);
                        Op::Discard { offset, len }
                    }
                };
                rig.submit(op, buffers).unwrap();
                if action.seed % 8 == 0 {
                    rig.submit(Op::Flush, PinnedBuffers::default()).unwrap();
                }
                if action.seed % 3 == 0 {
                    rig.ring.submit().unwrap();
                }
                batch.push(action);
            }
            settle(&mut rig, &mut batch, &model, &known);
            let read = rig.read(0, SECTORS * 512);
            compare(&read, &model, &known);
        });
    }

    /// Waits for a batch, and compares what its reads have got.
    fn settle(rig: &mut Rig, batch: &mut Vec<Action>, model: &[u8], known: &[bool]) {
        for Completion { result, io } in rig.finish() {
            assert!(result.is_ok(), "{io:?}: {result:?}");
        }
        for (n, Action { sector, sectors, cut, kind, .. }) in batch.drain(..).enumerate() {
            if kind < 3 {
                let mut read = vec![0; (sectors * 512) as usize];
                rig.guest.buffers(&pieces(n as u64, cut, sectors * 512)).copy_to_slice(0, &mut read);
                let sectors = sector as usize..(sector + sectors) as usize;
                compare(&read, &model[sectors.start * 512..sectors.end * 512], &known[sectors]);
            }
        }
    }

    fn compare(read: &[u8], model: &[u8], known: &[bool]) {
        for (sector, known) in known.iter().enumerate() {
            let bytes = sector * 512..(sector + 1) * 512;
            assert!(!known || read[bytes.clone()] == model[bytes], "sector {sector}");
        }
    }
}

mod stable {
    //! For stores that outlive the process.

    use super::*;

    pub(super) fn durable_writes_are_stored<F: IsStable>() {
        let fixture = F::new(MIB);
        let mut rig = Rig::of(&fixture);
        let mut expected = vec![0; MIB as usize];
        for (offset, len) in [(0, 512), (4096, 8192), (MIB - 1024, 1024)] {
            let data = pattern(offset, len);
            rig.write(offset, &data, true);
            expected[offset as usize..(offset + len) as usize].copy_from_slice(&data);
            assert_eq!(fixture.stored(), expected);
        }
        let op = Op::WriteZeroes { offset: 4096, len: 4096, unmap: true, durable: true };
        rig.one(op, PinnedBuffers::default()).result.unwrap();
        expected[4096..8192].fill(0);
        assert_eq!(fixture.stored(), expected);
    }

    pub(super) fn flush_stores_what_was_completed<F: IsStable>() {
        let fixture = F::new(MIB);
        let mut rig = Rig::of(&fixture);
        let data = pattern(77, MIB);
        rig.write(0, &data, false);
        rig.one(Op::Flush, PinnedBuffers::default()).result.unwrap();
        assert_eq!(fixture.stored(), data);
    }

    pub(super) fn blocks_survive_the_store<F: IsStable>() {
        let fixture = F::new(MIB);
        let data = pattern(78, MIB);
        Rig::of(&fixture).write(0, &data, false);
        // As at the end of a device's service.
        fixture.store().flush().unwrap();
        assert_eq!(fixture.stored(), data);
    }
}

/// The clauses of one kind for one fixture.
macro_rules! clauses {
    ($fixture:ty, operations) => {
        clauses!(@ $fixture, operations: info_is_consistent each_comes_back_once looking_is_enough
            tokens_belong_to_their_backend full_gives_the_operation_back
            dropped_in_flight_lets_go_of_memory_in_the_end);
    };
    ($fixture:ty, blocks) => {
        clauses!(@ $fixture, blocks: nothing_written_reads_as_zero writes_are_seen_by_later_reads
            all_queues_see_the_same_blocks buffers_of_many_pieces reads_touch_their_buffers_only
            zeroes_read_as_zeroes discards_leave_the_rest behaves_like_an_array_of_bytes);
    };
    ($fixture:ty, stable) => {
        clauses!(@ $fixture, stable: durable_writes_are_stored flush_stores_what_was_completed
            blocks_survive_the_store);
    };
    (@ $fixture:ty, $kind:ident: $($clause:ident)+) => {
        $(#[test] fn $clause() { super::$kind::$clause::<$fixture>(); })+
    };
}

macro_rules! contract {
    ($($name:ident: $fixture:ty, $($kind:ident)+;)+) => {
        $(mod $name {
            use super::*;
            $(clauses!($fixture, $kind);)+
        })+
    };
}

contract! {
    memory: MemoryStore, operations blocks;
    null: NullStore, operations;
    file_direct: StoredFile<true>, operations blocks stable;
    file_fixed_buffers: StoredFile<true, FixedBuffers>, operations blocks stable;
    file_sqpoll: StoredFile<true, Submitted>, operations blocks stable;
    loop_direct: LoopDevice<true>, operations blocks stable;
    loop_buffered: LoopDevice<false>, operations blocks stable;
    file_buffered: StoredFile<false>, operations blocks stable;
    file_buffered_sqpoll: StoredFile<false, Submitted>, operations blocks stable;
    nbd_structured: Exported<true>, operations blocks stable;
    nbd_simple: Exported<false>, operations blocks stable;
    qcow2_direct: StoredImage<true, false>, operations blocks stable;
    qcow2_buffered: StoredImage<false, false>, operations blocks stable;
    qcow2_backed: StoredImage<false, true>, operations blocks stable;
    overlay_in_memory: Overlay<false, false>, operations blocks;
    overlay_kept: Overlay<true, false>, operations blocks stable;
    overlay_kept_direct: Overlay<true, true>, operations blocks stable;
    overlay_of_qcow2: OverlayOver<Golden>, operations blocks;
    overlay_of_nbd: OverlayOver<Exported<true>>, operations blocks;
    late: Late, operations blocks;
    limited: Limited, operations blocks;
    distant: Distant, operations blocks;
    retried: Retried, operations blocks;
    held_file: Before<false>, operations blocks stable;
    power_cut_file: Before<true>, operations blocks stable;
}
