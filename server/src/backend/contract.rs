//! The [contract](super) as one suite of tests, run against each store.
//!
//! A store is brought in by a [`Fixture`], and its kind decides which clauses it has to keep: those about operations;
//! those about data if it [`KeepsBlocks`]; those about stable storage if it [`IsStable`]. The table at the end says
//! which store is of which kind.

mod blocks;
mod layers;
mod operations;
mod stable;
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
