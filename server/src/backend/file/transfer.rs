//! One operation on a file, from its first entry in the ring to its last.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use io_uring::types::FsyncFlags;
use io_uring::{opcode, squeue};
use virtio::memory::PinnedBuffers;

use super::Opened;
use super::geometry::Page;
use crate::backend::uring::{FileName, FixedBuffers, Lane, Operation, RegisteredFile, Step, Uring};
use crate::backend::{Completion, Io, Op};

/// Pieces of a scatter list that the kernel takes at once (`UIO_MAXIOV`).
const MAX_PIECES: usize = 1024;

/// Bytes that the kernel moves at once (`MAX_RW_COUNT`). It cuts larger scatter lists off there by itself.
const MAX_BYTES: usize = 0x7fff_f000;

/// A block device's command to discard bytes, whose place is the entry's address and whose number the first part of the
/// command's own data (`BLOCK_URING_CMD_DISCARD` of linux/blkdev.h, Linux 6.12).
const BLOCK_DISCARD: u32 = 0x12 << 8;

/// How often an entry that the kernel interrupted, or had no resources for, is tried again.
const MAX_RETRIES: u8 = 100;

/// Pages of a bounce buffer: 64 KiB.
const BOUNCE_PAGES: usize = 16;

/// Bounce buffers that a backend keeps for later.
const SPARE_BOUNCES: usize = 16;

/// Where written zeroes come from, 1 MiB at a time.
static ZEROES: [Page; 256] = [const { Page::ZERO }; 256];

/// What the operations of one backend share.
#[derive(Clone)]
pub(super) struct Shared(Rc<Resources>);

struct Resources {
    opened: Arc<Opened>,
    /// The file that is used most, as the ring knows it.
    registered: Option<RegisteredFile>,
    /// The same as the polled lane knows it.
    registered_polled: Option<RegisteredFile>,
    bounces: RefCell<Vec<Bounce>>,
}

impl Shared {
    pub(super) fn new(opened: &Arc<Opened>, ring: &Uring) -> Self {
        let registered = ring.register(Lane::Interrupt, opened.main());
        let registered_polled = if opened.iopoll { ring.register(Lane::Polled, opened.main()) } else { None };
        let opened = Arc::clone(opened);
        Self(Rc::new(Resources { opened, registered, registered_polled, bounces: RefCell::default() }))
    }

    /// What an entry on a lane calls one of the store's files.
    fn name(&self, lane: Lane, file: &File) -> FileName {
        let registered = match lane {
            Lane::Interrupt => &self.0.registered,
            Lane::Polled => &self.0.registered_polled,
        };
        match registered {
            Some(registered) if std::ptr::eq(file, self.0.opened.main()) => registered.name(),
            _ => FileName::descriptor(file),
        }
    }

    fn take_bounce(&self) -> Bounce {
        self.0.bounces.borrow_mut().pop().unwrap_or_else(|| Bounce(vec![Page::ZERO; BOUNCE_PAGES]))
    }

    fn give_bounce_back(&self, bounce: Bounce) {
        let mut bounces = self.0.bounces.borrow_mut();
        if bounces.len() < SPARE_BOUNCES {
            bounces.push(bounce);
        }
    }
}

/// Aligned memory in place of guest memory that is not.
struct Bounce(Vec<Page>);

impl Bounce {
    const LEN: usize = BOUNCE_PAGES * size_of::<Page>();

    /// Takes the first bytes of the buffers, as many as fit.
    fn fill(&mut self, buffers: &PinnedBuffers) {
        for (page, offset) in self.0.iter_mut().zip((0..).step_by(size_of::<Page>())) {
            buffers.copy_to_slice(offset, &mut page.0);
        }
    }

    /// Puts its first `len` bytes into the buffers.
    fn empty(&self, mut len: usize, buffers: &PinnedBuffers) {
        for (page, offset) in self.0.iter().zip((0..).step_by(size_of::<Page>())) {
            let (bytes, _) = page.0.split_at(len.min(page.0.len()));
            buffers.copy_from_slice(offset, bytes);
            len -= bytes.len();
        }
    }

    fn iovec(&mut self, len: u64) -> libc::iovec {
        libc::iovec { iov_base: self.0.as_mut_ptr().cast(), iov_len: len.min(Self::LEN as u64) as usize }
    }
}

/// What the entry in the ring does, or the next one.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    /// Between the buffers and the file.
    Move,
    /// Frees blocks of a device, which read as anything from then on.
    Discard,
    /// Frees bytes, which read as zero from then on.
    PunchHole,
    /// Makes bytes zero.
    ZeroRange,
    /// Writes zeroes, where the file cannot be told to make some.
    WriteZeroes,
    /// Puts what was written on stable storage.
    Sync,
}

/// One operation.
pub(super) struct Transfer {
    io: Box<Io>,
    work: Work,
    /// Bytes that entries have moved before.
    moved: u64,
    /// In use by the last entry, if that had to.
    bounce: Option<Bounce>,
    retries: u8,
    /// The error it has ended with.
    errno: Option<i32>,
}

impl Transfer {
    pub(super) fn new(io: Box<Io>, shared: &Shared) -> Self {
        let work = match io.op {
            Op::Read { .. } | Op::Write { .. } => Work::Move,
            Op::Flush => Work::Sync,
            Op::Discard { .. } if !shared.0.opened.no_discard.load(Ordering::Relaxed) => Work::Discard,
            Op::Discard { .. } => Work::PunchHole,
            Op::WriteZeroes { unmap, .. } => zeroing(&shared.0.opened, unmap),
        };
        Self { io, work, moved: 0, bounce: None, retries: 0, errno: None }
    }

    pub(super) fn into_io(self) -> Box<Io> {
        self.io
    }

    pub(super) fn into_completion(self) -> Completion {
        Completion { io: self.io, result: self.errno.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno))) }
    }

    /// The first byte in the file that is left to do, and how many there are.
    fn left(&self) -> (u64, u64) {
        match self.io.op {
            // The buffers lose what was moved.
            Op::Read { offset } | Op::Write { offset, .. } => {
                (offset.saturating_add(self.moved), self.io.buffers.len())
            }
            Op::Discard { offset, len } | Op::WriteZeroes { offset, len, .. } => {
                (offset.saturating_add(self.moved), len.saturating_sub(self.moved))
            }
            Op::Flush => (0, 0),
        }
    }

    /// Reads or writes `pieces`, or as many of them as the kernel takes at once; `buffer` is the fixed buffer that they
    /// lie in, if they do.
    fn move_pieces(&self, file: FileName, offset: u64, pieces: &[libc::iovec], buffer: Option<u16>) -> squeue::Entry {
        let FileName { fd, flags } = file;
        let (list, count) = (pieces.as_ptr(), pieces.len().min(MAX_PIECES) as u32);
        let rw = if matches!(self.io.op, Op::Write { durable: true, .. }) { libc::RWF_DSYNC } else { 0 };
        let clamp = |piece: &libc::iovec| piece.iov_len.min(MAX_BYTES) as u32;
        let write = matches!(self.io.op, Op::Write { .. });
        let entry = match (write, pieces, buffer) {
            (true, [piece], None) => {
                opcode::Write::new(fd, piece.iov_base.cast(), clamp(piece)).offset(offset).rw_flags(rw).build()
            }
            (true, [piece], Some(buffer)) => opcode::WriteFixed::new(fd, piece.iov_base.cast(), clamp(piece), buffer)
                .offset(offset)
                .rw_flags(rw)
                .build(),
            (true, _, None) => opcode::Writev::new(fd, list, count).offset(offset).rw_flags(rw).build(),
            (true, _, Some(buffer)) => {
                opcode::WritevFixed::new(fd, list, count, buffer).offset(offset).rw_flags(rw).build()
            }
            (false, [piece], None) => opcode::Read::new(fd, piece.iov_base.cast(), clamp(piece)).offset(offset).build(),
            (false, [piece], Some(buffer)) => {
                opcode::ReadFixed::new(fd, piece.iov_base.cast(), clamp(piece), buffer).offset(offset).build()
            }
            (false, _, None) => opcode::Readv::new(fd, list, count).offset(offset).build(),
            (false, _, Some(buffer)) => opcode::ReadvFixed::new(fd, list, count, buffer).offset(offset).build(),
        };
        entry.flags(flags)
    }

    fn move_entry(&mut self, lane: Lane, shared: &Shared, fixed: &mut FixedBuffers<'_>) -> squeue::Entry {
        let opened = &*shared.0.opened;
        let (offset, len) = self.left();
        let direct = opened.direct_for(offset, len);
        if let Some(direct) = direct
            && !direct.alignment.fits(self.io.buffers.iovecs())
        {
            let mut bounce = self.bounce.take().unwrap_or_else(|| shared.take_bounce());
            if matches!(self.io.op, Op::Write { .. }) {
                bounce.fill(&self.io.buffers);
            }
            let entry = self.move_pieces(shared.name(lane, &direct.file), offset, &[bounce.iovec(len)], None);
            self.bounce = Some(bounce);
            return entry;
        }
        self.bounce.take().into_iter().for_each(|bounce| shared.give_bounce_back(bounce));
        let file = direct.map_or(&opened.file, |direct| &direct.file);
        // Through the page cache the data is copied: no page of the guest's has to be found and held.
        let buffer = if opened.fixed_buffers && direct.is_some() { fixed.find(&self.io.buffers) } else { None };
        self.move_pieces(shared.name(lane, file), offset, self.io.buffers.iovecs(), buffer)
    }

    /// `bytes` bytes of a read or write have been moved.
    fn moved(&mut self, bytes: usize) -> Step {
        let (_, left) = self.left();
        if let (Some(bounce), Op::Read { .. }) = (&self.bounce, self.io.op) {
            bounce.empty(bytes, &self.io.buffers);
        }
        match bytes as u64 {
            bytes if bytes >= left => Step::Over,
            // The file has become shorter than it was.
            0 => self.fail(libc::EIO),
            bytes => {
                self.io.buffers.advance(bytes);
                self.moved = self.moved.saturating_add(bytes);
                Step::Again
            }
        }
    }

    /// `bytes` zeroes have been written.
    fn zeroed(&mut self, bytes: u64) -> Step {
        let (_, left) = self.left();
        self.moved = self.moved.saturating_add(bytes);
        match bytes {
            bytes if bytes >= left => self.settle(),
            0 => self.fail(libc::EIO),
            _ => Step::Again,
        }
    }

    /// All is done, but for stable storage where zeroes are to be there.
    fn settle(&mut self) -> Step {
        match self.io.op {
            Op::WriteZeroes { durable: true, .. } => self.go_on(Work::Sync),
            _ => Step::Over,
        }
    }

    fn go_on(&mut self, work: Work) -> Step {
        self.work = work;
        Step::Again
    }

    fn fail(&mut self, errno: i32) -> Step {
        self.errno = Some(errno);
        Step::Over
    }

    fn failed(&mut self, errno: i32, opened: &Opened) -> Step {
        // Not for all of the file, perhaps: a range that is not made of the device's blocks is invalid, and one of which the page
        // cache of a block device has pages that are being written is busy.
        let unable = matches!(errno, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::EINVAL | libc::EBUSY);
        let always = unable && !matches!(errno, libc::EINVAL | libc::EBUSY);
        match (self.work, self.io.op) {
            _ if matches!(errno, libc::EINTR | libc::EAGAIN) && self.retries < MAX_RETRIES => {
                self.retries += 1;
                Step::Again
            }
            (Work::Discard, _) if unable => {
                opened.no_discard.fetch_or(always, Ordering::Relaxed);
                self.go_on(Work::PunchHole)
            }
            (Work::PunchHole, op) if unable => {
                opened.no_punch_hole.fetch_or(always, Ordering::Relaxed);
                if matches!(op, Op::Discard { .. }) { Step::Over } else { self.go_on(zeroing(opened, false)) }
            }
            (Work::ZeroRange, _) if unable => {
                opened.no_zero_range.fetch_or(always, Ordering::Relaxed);
                self.go_on(Work::WriteZeroes)
            }
            _ => self.fail(errno),
        }
    }
}

/// How zeroes are made.
fn zeroing(opened: &Opened, unmap: bool) -> Work {
    if unmap && !opened.no_punch_hole.load(Ordering::Relaxed) {
        Work::PunchHole
    } else if !opened.no_zero_range.load(Ordering::Relaxed) {
        Work::ZeroRange
    } else {
        Work::WriteZeroes
    }
}

// SAFETY: entries lead to
// - the iovecs of the buffers, which lie on the heap, and the guest memory they name, which the buffers pin; both are
//   changed by `landed` only;
// - a bounce buffer on the heap, used by `entry` before the kernel has it and by `landed`;
// - zeroes that are static and only read;
// - descriptors of `Opened` and an entry in the ring's table, which the context shares.
unsafe impl Operation for Transfer {
    type Context = Shared;

    fn lane(&self, shared: &Shared) -> Lane {
        let opened = &*shared.0.opened;
        // What is to be durable may come to more than the device's one command, of which no queue tells.
        let durable = matches!(self.io.op, Op::Write { durable: true, .. });
        let (offset, len) = self.left();
        if opened.iopoll && self.work == Work::Move && !durable && opened.direct_for(offset, len).is_some() {
            Lane::Polled
        } else {
            Lane::Interrupt
        }
    }

    fn entry(&mut self, shared: &Shared, fixed: &mut FixedBuffers<'_>) -> squeue::Entry {
        let opened = &*shared.0.opened;
        let lane = self.lane(shared);
        let FileName { fd, flags } = shared.name(lane, opened.main());
        let (offset, len) = self.left();
        match self.work {
            Work::Move => self.move_entry(lane, shared, fixed),
            Work::Discard => {
                let mut command = [0; 16];
                command[..8].copy_from_slice(&len.to_ne_bytes());
                let entry = opcode::UringCmd16::new(fd, BLOCK_DISCARD).addr(Some(offset)).cmd(command);
                entry.build().flags(flags)
            }
            Work::PunchHole | Work::ZeroRange => {
                let how =
                    if self.work == Work::PunchHole { libc::FALLOC_FL_PUNCH_HOLE } else { libc::FALLOC_FL_ZERO_RANGE };
                let mode = how | libc::FALLOC_FL_KEEP_SIZE;
                opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build().flags(flags)
            }
            Work::WriteZeroes => {
                let file = opened.direct_for(offset, len).map_or(&opened.file, |direct| &direct.file);
                let FileName { fd, flags } = shared.name(lane, file);
                let len = len.min(size_of_val(&ZEROES) as u64) as u32;
                opcode::Write::new(fd, ZEROES.as_ptr().cast(), len).offset(offset).build().flags(flags)
            }
            Work::Sync => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build().flags(flags),
        }
    }

    fn landed(&mut self, shared: &Shared, result: i32) -> Step {
        let step = match (u32::try_from(result), self.work) {
            (Ok(bytes), Work::Move) => self.moved(bytes as usize),
            (Ok(bytes), Work::WriteZeroes) => self.zeroed(u64::from(bytes)),
            (Ok(_), Work::Discard | Work::PunchHole | Work::ZeroRange) => self.settle(),
            (Ok(_), Work::Sync) => Step::Over,
            (Err(_), _) => self.failed(result.saturating_neg(), &shared.0.opened),
        };
        if matches!(step, Step::Over) {
            self.bounce.take().into_iter().for_each(|bounce| shared.give_bounce_back(bounce));
        }
        step
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::contract::Guest;
    use crate::backend::file::{Cache, FileOptions, FileStore};
    use crate::backend::uring::Waker;

    /// What operations on a new file share, and the next entry of one.
    struct Rig {
        shared: Shared,
        ring: Uring,
    }

    impl Rig {
        fn entry(&self, transfer: &mut Transfer) -> squeue::Entry {
            self.ring.with_fixed_buffers(|fixed| transfer.entry(&self.shared, fixed))
        }
    }

    fn rig(dir: &tempfile::TempDir) -> Rig {
        let path = dir.path().join("image");
        let options = FileOptions {
            path,
            read_only: false,
            cache: Cache::None,
            size: Some(1 << 20),
            fixed_buffers: false,
            iopoll: false,
        };
        let ring = Uring::new(&Waker::new().unwrap()).unwrap();
        Rig { shared: Shared::new(&FileStore::open(&options).unwrap().0, &ring), ring }
    }

    fn transfer(op: Op, buffers: PinnedBuffers, shared: &Shared) -> Transfer {
        Transfer::new(Box::new(Io::new(0, op, buffers)), shared)
    }

    /// The operation, and the flags that are its own (`rw_flags`, `fsync_flags`).
    fn parts(entry: &squeue::Entry) -> (u8, i32) {
        assert_eq!(size_of_val(entry), 64);
        // SAFETY: an entry is a `struct io_uring_sqe`: 64 initialised bytes, of which the 29th to 32nd are the flags.
        let bytes: [u8; 64] = unsafe { std::ptr::from_ref(entry).cast::<[u8; 64]>().read() };
        (bytes[0], i32::from_ne_bytes(bytes[28..32].try_into().unwrap()))
    }

    #[test]
    fn durable_writes_say_so_whichever_way_they_go() {
        let dir = tempfile::tempdir().unwrap();
        let rig = rig(&dir);
        let mut guest = Guest::new();
        let ways = [vec![(0, 4096)], vec![(0, 512), (4096, 512)], vec![(4, 512)], vec![(3, 500), (700, 12)]];
        for (pieces, durable) in ways.iter().flat_map(|way| [(way, false), (way, true)]) {
            let op = Op::Write { offset: 512, durable };
            let (_, flags) = parts(&rig.entry(&mut transfer(op, guest.buffers(pieces), &rig.shared)));
            assert_eq!(flags, if durable { libc::RWF_DSYNC } else { 0 });
        }
    }

    #[test]
    fn polled_queues_take_direct_reads_and_writes_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let options = FileOptions {
            path,
            read_only: false,
            cache: Cache::None,
            size: Some(1 << 20),
            fixed_buffers: false,
            iopoll: false,
        };
        let mut opened = FileStore::open(&options).unwrap().0;
        let ring = Uring::new(&Waker::new().unwrap()).unwrap();
        let mut guest = Guest::new();
        let durable = |durable| Op::Write { offset: 4096, durable };
        let zeroes = Op::WriteZeroes { offset: 0, len: 4096, unmap: false, durable: false };
        for iopoll in [false, true] {
            let change = Arc::get_mut(&mut opened).unwrap();
            change.iopoll = iopoll;
            change.direct.as_mut().unwrap().alignment.offset = 4096;
            let shared = Shared::new(&opened, &ring);
            let mut polled =
                |op, pieces: &[(u64, u64)]| transfer(op, guest.buffers(pieces), &shared).lane(&shared) == Lane::Polled;
            assert_eq!(polled(Op::Read { offset: 4096 }, &[(0, 4096)]), iopoll);
            assert_eq!(polled(Op::Read { offset: 4096 }, &[(3, 4096)]), iopoll, "by a buffer of ours");
            assert_eq!(polled(durable(false), &[(0, 4096)]), iopoll);
            assert!(!polled(durable(true), &[(0, 4096)]));
            assert!(!polled(Op::Read { offset: 512 }, &[(0, 4096)]), "through the page cache");
            assert!(!polled(Op::Read { offset: 4096 }, &[(0, 512)]), "through the page cache");
            assert!(!polled(Op::Flush, &[]));
            assert!(!polled(Op::Discard { offset: 0, len: 4096 }, &[]));
            assert!(!polled(zeroes, &[]));
        }
    }

    #[test]
    fn durable_zeroes_end_with_a_sync() {
        let dir = tempfile::tempdir().unwrap();
        let rig = rig(&dir);
        for (durable, unmap) in [(false, false), (false, true), (true, false), (true, true)] {
            let op = Op::WriteZeroes { offset: 0, len: 4096, unmap, durable };
            let mut transfer = transfer(op, PinnedBuffers::default(), &rig.shared);
            assert_eq!(parts(&rig.entry(&mut transfer)).0, opcode::Fallocate::CODE);
            let again = matches!(transfer.landed(&rig.shared, 0), Step::Again);
            assert_eq!(again, durable);
            if again {
                let datasync = FsyncFlags::DATASYNC.bits() as i32;
                assert_eq!(parts(&rig.entry(&mut transfer)), (opcode::Fsync::CODE, datasync));
                assert!(matches!(transfer.landed(&rig.shared, 0), Step::Over));
            }
            assert!(transfer.into_completion().result.is_ok());
        }
    }

    #[test]
    fn what_a_file_cannot_do_is_done_otherwise() {
        let dir = tempfile::tempdir().unwrap();
        let rig = rig(&dir);
        let refused_with = |errno: i32, op| {
            let mut transfer = transfer(op, PinnedBuffers::default(), &rig.shared);
            let mut codes = vec![parts(&rig.entry(&mut transfer)).0];
            while matches!(transfer.landed(&rig.shared, -errno), Step::Again) {
                codes.push(parts(&rig.entry(&mut transfer)).0);
            }
            (codes, transfer.into_completion().result.is_ok())
        };
        let refused = |op| refused_with(libc::EOPNOTSUPP, op);
        let (make, write) = (opcode::Fallocate::CODE, opcode::Write::CODE);
        let zeroes = Op::WriteZeroes { offset: 0, len: 4096, unmap: true, durable: false };
        let discard = Op::Discard { offset: 0, len: 4096 };
        // As on a device that discards, under a kernel that cannot be asked for it.
        rig.shared.0.opened.no_discard.store(false, Ordering::Relaxed);
        // Only now: it is tried again the next time.
        for _ in 0..2 {
            assert_eq!(refused_with(libc::EBUSY, discard), (vec![opcode::UringCmd16::CODE, make], true));
        }
        assert_eq!(refused(discard), (vec![opcode::UringCmd16::CODE, make], true));
        rig.shared.0.opened.no_punch_hole.store(false, Ordering::Relaxed);
        assert_eq!(refused(Op::Discard { offset: 0, len: 4096 }), (vec![make], true));
        assert_eq!(refused(zeroes), (vec![make, write], false), "holes were refused before");
        assert_eq!(refused(zeroes), (vec![write], false));
    }

    #[test]
    fn interruptions_are_not_errors_unless_they_never_end() {
        let dir = tempfile::tempdir().unwrap();
        let rig = rig(&dir);
        let mut transfer = transfer(Op::Flush, PinnedBuffers::default(), &rig.shared);
        for _ in 0..MAX_RETRIES {
            assert!(matches!(transfer.landed(&rig.shared, -libc::EINTR), Step::Again));
        }
        assert!(matches!(transfer.landed(&rig.shared, -libc::EINTR), Step::Over));
        assert_eq!(transfer.into_completion().result.unwrap_err().raw_os_error(), Some(libc::EINTR));
    }
}
