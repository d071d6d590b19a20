//! What overlays promise beyond the [contract](crate::backend) of all stores.

use std::collections::HashMap;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::thread;
use std::time::{Duration, SystemTime};

use tempfile::TempDir;
use virtio::memory::PinnedBuffers;

use super::commit::Outcome;
use super::*;
use crate::backend::contract::{Rig, pattern};
use crate::backend::faults::{Fault, Faults, FaultyStore, Kind, Rule};
use crate::backend::uring::Waker;
use crate::backend::{Io, Op, SECTOR};

const MIB: u64 = 1 << 20;

/// A file as a base.
pub(in crate::backend) fn base(path: &Path) -> Base {
    let options = FileOptions { read_only: true, ..file_options(path, Cache::Writeback, None) };
    Base::of_file(FileStore::open(&options).unwrap(), path).unwrap()
}

/// The disk that a kept overlay's file holds, by its documented format and nothing else.
pub(in crate::backend) fn stored(path: &Path, base: &[u8]) -> Vec<u8> {
    let file = fs::read(path).unwrap();
    let number = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().unwrap());
    let capacity = number(16) as usize;
    let map = 4096;
    let map_len = capacity.div_ceil(8 << 20) * 4096;
    let sectors = (map + map_len).next_multiple_of(1 << 20);
    assert_eq!(file.len(), sectors + capacity);
    let mut disk = base.to_vec();
    disk.resize(capacity, 0);
    for (sector, bytes) in disk.chunks_mut(512).enumerate() {
        match number(map + sector / 32 * 8) >> (sector % 32 * 2) & 3 {
            0 => {}
            1 => bytes.fill(0),
            2 => bytes.copy_from_slice(&file[sectors + sector * 512..][..512]),
            _ => panic!("sector {sector}"),
        }
    }
    disk
}

/// A base of a known pattern, in a folder of its own.
struct Golden {
    dir: TempDir,
    bytes: Vec<u8>,
}

impl Golden {
    fn new(len: u64) -> Self {
        let (dir, bytes) = (tempfile::tempdir().unwrap(), pattern(len, len));
        fs::write(dir.path().join("golden"), &bytes).unwrap();
        Self { dir, bytes }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("golden")
    }

    fn own(&self) -> PathBuf {
        self.dir.path().join("own")
    }

    fn base(&self) -> Base {
        base(&self.path())
    }

    fn open(&self, place: Place) -> OverlayStore {
        OverlayStore::open(&self.base(), &OverlayOptions { place, size: None, limit: None }).unwrap()
    }

    fn kept(&self) -> Place {
        Place::Kept { path: self.own(), cache: Cache::Writeback }
    }

    fn places(&self) -> [Place; 4] {
        let folder = self.dir.path().to_owned();
        [
            Place::Memory,
            Place::Temporary { folder, cache: Cache::None },
            Place::Kept { path: self.own(), cache: Cache::Writeback },
            Place::Kept { path: self.dir.path().join("own-direct"), cache: Cache::None },
        ]
    }
}

impl Drop for Golden {
    fn drop(&mut self) {
        // Whatever a test does, the base stays as it was.
        assert!(thread::panicking() || fs::read(self.path()).unwrap() == self.bytes, "the base was changed");
    }
}

/// Numbers that look random and are the same each time.
struct Random(u64);

impl Random {
    fn next(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }
}

/// A disk as plain bytes, and what a crash may leave of each sector that has changed since the last flush.
struct Model {
    disk: Vec<u8>,
    possible: HashMap<usize, Vec<Vec<u8>>>,
}

impl Model {
    fn change(&mut self, bytes: &Range<u64>, change: impl FnOnce(&mut [u8])) {
        let bytes = bytes.start as usize..bytes.end as usize;
        let sectors = bytes.start / 512..bytes.end / 512;
        let now = |disk: &[u8], sector: usize| disk[sector * 512..][..512].to_vec();
        for sector in sectors.clone() {
            self.possible.entry(sector).or_insert_with(|| vec![now(&self.disk, sector)]);
        }
        change(&mut self.disk[bytes]);
        for sector in sectors {
            self.possible.entry(sector).or_default().push(now(&self.disk, sector));
        }
    }

    fn part(&self, bytes: &Range<u64>) -> &[u8] {
        &self.disk[bytes.start as usize..bytes.end as usize]
    }

    /// Checks what a crash would leave now.
    fn check_crashed(&self, found: &[u8]) {
        for (sector, (found, disk)) in found.chunks(512).zip(self.disk.chunks(512)).enumerate() {
            let possible = self.possible.get(&sector);
            let good = possible.map_or(found == disk, |possible| possible.iter().any(|was| was == found));
            assert!(good, "sector {sector} is none of what it was since the last flush");
        }
    }
}

/// Thousands of operations against plain bytes. Where the overlay is kept, what a crash would leave of it is looked at too.
fn behaves_like_a_copy(golden: &Golden, place: &Place, seed: u64) {
    let store = golden.open(place.clone());
    let mut rig = Rig::new(&store);
    let mut random = Random(seed | 1);
    let mut model = Model { disk: golden.bytes.clone(), possible: HashMap::new() };
    let capacity = golden.bytes.len() as u64;
    let stored = || match place {
        Place::Kept { path, .. } => Some(stored(path, &golden.bytes)),
        _ => None,
    };
    for step in 0..4000 {
        let len = SECTOR * (1 + if random.next(8) == 0 { random.next(300) } else { random.next(20) });
        // Mostly where one page of the map ends and the next begins, so that requests meet.
        let (first, sectors) = if random.next(4) > 0 { (16384 - 200, 400) } else { (0, capacity / SECTOR) };
        let offset = ((first + random.next(sectors)) * SECTOR).min(capacity - len);
        let (bytes, durable) = (offset..offset + len, random.next(24) == 0);
        match random.next(16) {
            0..6 => assert!(rig.read(offset, len) == model.part(&bytes), "step {step}: {bytes:?}"),
            action @ 6..14 => {
                if action < 12 {
                    let data = pattern(random.next(1 << 40), len);
                    rig.write(offset, &data, durable);
                    model.change(&bytes, |disk| disk.copy_from_slice(&data));
                } else {
                    let op = Op::WriteZeroes { offset, len, unmap: random.next(4) > 0, durable };
                    rig.one(op, PinnedBuffers::default()).result.unwrap();
                    model.change(&bytes, |disk| disk.fill(0));
                }
                if durable && let Some(found) = stored() {
                    assert!(found[offset as usize..][..len as usize] == *model.part(&bytes), "step {step}: {bytes:?}");
                }
            }
            14 => {
                rig.one(Op::Discard { offset, len }, PinnedBuffers::default()).result.unwrap();
                // Blocks are zero, and what is around them as before: the base never shows through.
                let blocks = offset.next_multiple_of(BLOCK)..bytes.end / BLOCK * BLOCK;
                if !blocks.is_empty() {
                    model.change(&blocks, |disk| disk.fill(0));
                }
            }
            _ if random.next(8) > 0 => {}
            _ => {
                stored().into_iter().for_each(|found| model.check_crashed(&found));
                rig.one(Op::Flush, PinnedBuffers::default()).result.unwrap();
                model.possible.clear();
                stored().into_iter().for_each(|found| model.check_crashed(&found));
            }
        }
    }
    drop(rig);
    let whole = |store: &OverlayStore| {
        let mut rig = Rig::new(store);
        (0..capacity).step_by(MIB as usize).flat_map(|at| rig.read(at, MIB.min(capacity - at))).collect::<Vec<_>>()
    };
    assert!(whole(&store) == model.disk);
    if matches!(place, Place::Kept { .. }) {
        store.flush().unwrap();
        let own = store.own_bytes();
        drop(store);
        let again = golden.open(place.clone());
        assert!(whole(&again) == model.disk, "as it was left");
        assert_eq!(again.own_bytes(), own);
    }
}

#[test]
fn overlays_behave_like_copies() {
    // The last block, word and page of the map are not full.
    let golden = Golden::new(8 * MIB + 117 * SECTOR);
    for (seed, place) in (3..).zip(golden.places()) {
        behaves_like_a_copy(&golden, &place, 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed));
    }
}

#[test]
fn a_read_of_many_turns_is_put_together() {
    let golden = Golden::new(4 * MIB);
    for place in golden.places() {
        let store = golden.open(place);
        let mut rig = Rig::new(&store);
        let mut disk = golden.bytes.clone();
        // Base, own and zero by turns, a sector each: more parts than a store takes at once.
        for sector in (1..8190).step_by(3) {
            let data = pattern(sector, SECTOR);
            rig.write(sector * SECTOR, &data, false);
            disk[sector as usize * 512..][..512].copy_from_slice(&data);
            let zero = Op::WriteZeroes { offset: (sector + 1) * SECTOR, len: SECTOR, unmap: true, durable: false };
            rig.one(zero, PinnedBuffers::default()).result.unwrap();
            disk[(sector as usize + 1) * 512..][..512].fill(0);
        }
        assert!(rig.read(0, 4 * MIB) == disk);
        // Several at a time, in pieces that end elsewhere than sectors, until no more are taken.
        let mut taken = 0;
        while taken < 1 << 14 {
            let buffers = rig.guest.buffers(&[(0, 700), (1000, 512 * 200 - 700)]);
            if rig.submit(Op::Read { offset: 512 * 300 }, buffers).is_err() {
                break;
            }
            taken += 1;
        }
        let done = rig.finish();
        assert_eq!(done.len(), taken);
        assert!(done.iter().all(|done| done.result.is_ok()));
        let mut read = vec![0; 512 * 200];
        rig.guest.buffers(&[(0, 700), (1000, 512 * 200 - 700)]).copy_to_slice(0, &mut read);
        assert!(read == disk[512 * 300..512 * 500]);
    }
}

#[test]
fn queues_that_share_blocks_do_not_disturb_each_other() {
    const QUEUES: u64 = 4;
    const STEPS: u64 = 400;
    let golden = Golden::new(64 * SECTOR * QUEUES);
    for place in golden.places() {
        let store = golden.open(place.clone());
        // The sectors of each queue lie between those of the others.
        let writer = |queue: u64| {
            let (store, golden) = (&store, &golden);
            let place = &place;
            move || {
                let mut rig = Rig::new(store);
                let mut random = Random(queue + 1);
                let mut last = HashMap::new();
                for step in 0..STEPS {
                    let sector = random.next(64) * QUEUES + queue;
                    let (offset, durable) = (sector * SECTOR, random.next(4) == 0);
                    let data = if random.next(4) == 0 {
                        let op = Op::WriteZeroes { offset, len: SECTOR, unmap: random.next(2) == 0, durable };
                        rig.one(op, PinnedBuffers::default()).result.unwrap();
                        vec![0; 512]
                    } else {
                        let data = pattern(queue << 32 | step, SECTOR);
                        rig.write(offset, &data, durable);
                        data
                    };
                    last.insert(sector, data);
                    let flush = !durable && random.next(8) == 0;
                    if flush {
                        rig.one(Op::Flush, PinnedBuffers::default()).result.unwrap();
                    }
                    if let Place::Kept { path, .. } = place
                        && (durable || flush)
                    {
                        let stored = stored(path, &golden.bytes);
                        let mut own = last.iter().filter(|(at, _)| flush || **at == sector);
                        assert!(own.all(|(at, data)| stored[*at as usize * 512..][..512] == **data));
                    }
                }
                last
            }
        };
        let written: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = (0..QUEUES).map(|queue| scope.spawn(writer(queue))).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        let mut disk = golden.bytes.clone();
        for (sector, data) in written {
            disk[sector as usize * 512..][..512].copy_from_slice(&data);
        }
        assert!(Rig::new(&store).read(0, disk.len() as u64) == disk);
    }
}

#[test]
fn overlays_of_one_base_share_its_descriptors_and_nothing_else() {
    let golden = Golden::new(MIB);
    let base = golden.base();
    let descriptors = || {
        let links = fs::read_dir("/proc/self/fd").unwrap().filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
        links.filter(|path| *path == golden.path()).count()
    };
    let before = descriptors();
    let options = OverlayOptions { place: Place::Memory, size: None, limit: None };
    let overlays: Vec<_> = (0..100).map(|_| OverlayStore::open(&base, &options).unwrap()).collect();
    let mut rigs: Vec<_> = overlays.iter().step_by(33).map(|overlay| Rig::new(overlay)).collect();
    assert_eq!(descriptors(), before);
    for (n, rig) in rigs.iter_mut().enumerate() {
        rig.write(512 * n as u64, &pattern(n as u64, 512), false);
    }
    for (n, rig) in rigs.iter_mut().enumerate() {
        let mut disk = golden.bytes.clone();
        disk[512 * n..][..512].copy_from_slice(&pattern(n as u64, 512));
        assert!(rig.read(0, MIB) == disk);
    }
    assert!(overlays.iter().enumerate().all(|(n, overlay)| overlay.own_bytes() == if n % 33 == 0 { BLOCK } else { 0 }));
}

#[test]
fn a_write_beyond_the_limit_fails_until_something_is_discarded() {
    let golden = Golden::new(MIB);
    for place in golden.places() {
        let options = OverlayOptions { place, size: None, limit: Some(4 * BLOCK + 100) };
        let store = OverlayStore::open(&golden.base(), &options).unwrap();
        let mut rig = Rig::new(&store);
        let error = |rig: &mut Rig, offset| {
            let buffers = rig.guest.buffers(&[(0, BLOCK)]);
            rig.one(Op::Write { offset, durable: false }, buffers).result.err().map(|error| error.raw_os_error())
        };
        for n in 0..4 {
            assert_eq!(error(&mut rig, 3 * n * BLOCK), None);
        }
        assert_eq!(error(&mut rig, BLOCK), Some(Some(libc::ENOSPC)));
        assert!(rig.read(BLOCK, BLOCK) == golden.bytes[BLOCK as usize..2 * BLOCK as usize]);
        assert_eq!(error(&mut rig, 3 * BLOCK), None, "what is there is written again");
        rig.one(Op::Discard { offset: 0, len: BLOCK }, PinnedBuffers::default()).result.unwrap();
        assert_eq!(error(&mut rig, BLOCK), None);
        assert_eq!(store.own_bytes(), 4 * BLOCK);
        let zero = |len, unmap| Op::WriteZeroes { offset: 0, len, unmap, durable: false };
        rig.one(zero(MIB, true), PinnedBuffers::default()).result.unwrap();
        assert_eq!(store.own_bytes(), 0);
        assert!(rig.one(zero(MIB, false), PinnedBuffers::default()).result.is_err(), "zeroes with storage");
        rig.one(zero(BLOCK, false), PinnedBuffers::default()).result.unwrap();
        assert_eq!(store.own_bytes(), BLOCK);
    }
}

#[test]
fn a_temporary_file_has_no_name_and_is_sparse() {
    let golden = Golden::new(MIB);
    let folder = golden.dir.path().to_owned();
    let _store = golden.open(Place::Temporary { folder: folder.clone(), cache: Cache::Writeback });
    let names: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["golden"]);
}

#[test]
fn a_kept_overlay_goes_with_its_base_only() {
    let golden = Golden::new(MIB);
    let options = |size| OverlayOptions { place: golden.kept(), size, limit: None };
    let store = OverlayStore::open(&golden.base(), &options(Some(2 * MIB))).unwrap();
    let busy = OverlayStore::open(&golden.base(), &options(None)).err().unwrap();
    assert!(matches!(busy.reason, OverlayFailure::File(crate::backend::file::OpenFailure::Busy)), "{busy}");
    Rig::new(&store).write(MIB, &pattern(1, 512), true);
    drop(store);
    let refused = |change: &dyn Fn(&File), undo: &dyn Fn(&File)| {
        let file = File::options().write(true).open(golden.path()).unwrap();
        change(&file);
        let refused = OverlayStore::open(&golden.base(), &options(None)).err().map(|error| error.reason);
        undo(&file);
        refused.unwrap()
    };
    let modified = fs::metadata(golden.path()).unwrap().modified().unwrap();
    let restore = |file: &File| {
        file.write_all_at(&golden.bytes, 0).unwrap();
        file.set_len(MIB).unwrap();
        file.set_modified(modified).unwrap();
    };
    let longer = refused(&|file| file.set_len(MIB + 512).unwrap(), &restore);
    assert!(matches!(longer, OverlayFailure::BaseSize { made: MIB, .. }), "{longer}");
    let other = refused(&|file| file.write_all_at(b"other", 0).unwrap(), &restore);
    assert!(matches!(other, OverlayFailure::OtherBase), "{other}");
    let later = refused(&|file| file.set_modified(SystemTime::now() + Duration::from_secs(9)).unwrap(), &restore);
    let told = later.to_string();
    assert!(matches!(later, OverlayFailure::BaseChanged { .. }) && told.contains("touch -d @"), "{told}");

    let size = OverlayStore::open(&golden.base(), &options(Some(3 * MIB))).err().unwrap().reason;
    assert!(matches!(size, OverlayFailure::SizeDiffers { found, .. } if found == 2 * MIB), "{size}");
    let size = OverlayStore::open(&golden.base(), &options(Some(MIB - 512))).err().unwrap().reason;
    assert!(matches!(size, OverlayFailure::Size { .. }), "{size}");
    let store = OverlayStore::open(&golden.base(), &options(None)).unwrap();
    assert_eq!(store.info().capacity, 2 * MIB);
    assert_eq!(Rig::new(&store).read(MIB, 512), pattern(1, 512));
    drop(store);

    let own = File::options().write(true).open(golden.own()).unwrap();
    own.write_all_at(&[0xff], 4096).unwrap();
    let damaged = OverlayStore::open(&golden.base(), &options(None)).err().unwrap().reason;
    assert!(matches!(damaged, OverlayFailure::Damaged), "{damaged}");
    own.write_all_at(b"QFI\xfb", 0).unwrap();
    let foreign = OverlayStore::open(&golden.base(), &options(None)).err().unwrap().reason;
    assert!(matches!(foreign, OverlayFailure::NotAnOverlay), "{foreign}");
}

#[test]
fn the_map_follows_what_it_speaks_of() {
    let golden = Golden::new(MIB);
    let store = golden.open(golden.kept());
    let map = || fs::read(golden.own()).unwrap()[4096..8192].to_vec();
    let mut rig = Rig::new(&store);
    rig.write(0, &pattern(1, 512), false);
    let kept = store.0.stored.as_ref().unwrap();
    assert!(!kept.is_stored() && map() == [0; 4096]);
    let round = kept.join(None);
    let mut leading = kept.lead().unwrap();
    assert!(kept.lead().is_none(), "one at a time");
    assert!(!kept.is_stored(), "it runs");
    // What is written from here on may not be on stable storage when the map is.
    rig.write(512, &pattern(2, 512), false);
    // Syncs, writes, syncs.
    let ring = Uring::new(&Waker::new().unwrap()).unwrap();
    let opcodes: Vec<_> = [0, 4096, 0]
        .into_iter()
        .map(|result| {
            use crate::backend::uring::Operation;
            let entry = ring.with_fixed_buffers(|fixed| leading.entry(&(), fixed));
            leading.landed(&(), result);
            format!("{entry:?}")
        })
        .collect();
    let is = |index: usize, code: u8| opcodes[index].contains(&format!("op_code: {code},"));
    assert!(is(0, 3) && is(1, 23) && is(2, 3), "fsync, write, fsync: {opcodes:?}");
    drop(leading);
    assert!(matches!(round.outcome(), Some(Outcome::Stored)));
    assert!(!kept.is_stored(), "the second write is not");
    store.flush().unwrap();
    assert!(kept.is_stored());
    assert_eq!(map()[..8], [0b1010, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn a_failed_round_fails_those_who_wait_and_is_done_again() {
    let golden = Golden::new(MIB);
    let store = golden.open(golden.kept());
    let mut rig = Rig::new(&store);
    rig.write(0, &pattern(1, 512), false);
    let kept = store.0.stored.as_ref().unwrap();
    for (outcome, fails) in [(Some(libc::EIO), true), (None, false)] {
        let round = kept.join(None);
        let mut leading = kept.lead().unwrap();
        rig.submit(Op::Flush, PinnedBuffers::default()).unwrap();
        rig.ring.submit().unwrap();
        assert!(rig.reap().is_empty(), "it waits for the next round");
        if let Some(errno) = outcome {
            use crate::backend::uring::Operation;
            leading.landed(&(), -errno);
        }
        drop(leading);
        let failed = matches!(round.outcome(), Some(Outcome::Failed(_)));
        assert_eq!(failed, fails);
        // The waker was told, or this would wait for ever; what was not stored is stored now.
        assert!(rig.finish().pop().unwrap().result.is_ok());
        assert!(kept.is_stored());
        assert_eq!(stored(&golden.own(), &golden.bytes)[..512], pattern(1, 512));
        rig.write(0, &pattern(2, 512), false);
        rig.write(512, &pattern(1, 512), false);
        rig.write(0, &pattern(1, 512), false);
    }
}

#[test]
fn who_waits_for_a_round_shares_its_outcome() {
    use crate::backend::uring::Operation;
    let golden = Golden::new(MIB);
    let store = golden.open(golden.kept());
    let kept = store.0.stored.as_ref().unwrap();
    let mut rig = Rig::new(&store);
    for (sector, fails) in [(0, false), (1, true), (2, false)] {
        rig.write(sector * SECTOR, &pattern(sector, SECTOR), false);
        // One runs, so that the flush waits for the next, which is led by somebody else and fails, or is abandoned.
        kept.join(None);
        let running = kept.lead().unwrap();
        rig.submit(Op::Flush, PinnedBuffers::default()).unwrap();
        drop(running);
        let mut next = kept.lead().unwrap();
        if fails {
            next.landed(&(), -libc::EIO);
        }
        drop(next);
        let result = rig.finish().pop().unwrap().result;
        assert_eq!(result.err().and_then(|error| error.raw_os_error()), fails.then_some(libc::EIO));
        let found = stored(&golden.own(), &golden.bytes);
        assert_eq!(found[sector as usize * 512..][..512] == pattern(sector, SECTOR), !fails, "sector {sector}");
    }
}

/// A worker with much to do never waits: what follows a completion must start by itself.
#[test]
fn looking_is_enough_for_all_that_follows() {
    let golden = Golden::new(4 * MIB);
    let store = golden.open(golden.kept());
    let mut rig = Rig::new(&store);
    let buffers = rig.guest.buffers(&[(0, 512)]);
    rig.submit(Op::Write { offset: 0, durable: true }, buffers).unwrap();
    rig.ring.submit().unwrap();
    rig.look_until_done();
    for sector in (0..8192).step_by(2) {
        rig.write(sector * SECTOR, &pattern(sector, SECTOR), false);
    }
    // More parts than a store takes at once.
    let buffers = rig.guest.buffers(&[(0, 4 * MIB)]);
    rig.submit(Op::Read { offset: 0 }, buffers).unwrap();
    rig.ring.submit().unwrap();
    rig.look_until_done();
}

#[test]
fn what_fails_leaves_what_was_there() {
    let golden = Golden::new(MIB);
    let with = |kinds, base_fails: bool| {
        let fault = |inner| -> Arc<dyn Store> {
            let rule = Rule { kinds, ..Rule::always(Fault::Error(libc::EIO)) };
            Arc::new(FaultyStore::new(inner, Faults::new(0, vec![rule])))
        };
        let store = golden.open(Place::Memory);
        let Overlay { base, own, own_offset, map, info, .. } = &*store.0;
        let (mut base, own) = (base.clone(), Arc::clone(own));
        let (own_offset, map, info) = (*own_offset, Arc::clone(map), info.clone());
        let own = if base_fails {
            base.store = fault(base.store);
            own
        } else {
            fault(own)
        };
        let whole = Whole::new(Own::Memory(Arc::new(MemoryStore::new(MIB).unwrap())));
        OverlayStore(Arc::new(Overlay { base, own, own_offset, map, stored: None, info, whole }))
    };
    let failed = |rig: &mut Rig, op, len| {
        let buffers = rig.guest.buffers(&[(0, len)]);
        rig.one(op, buffers).result.is_err()
    };
    let store = with(vec![Kind::Write], false);
    let mut rig = Rig::new(&store);
    assert!(failed(&mut rig, Op::Write { offset: 0, durable: false }, 4096));
    assert!(rig.read(0, 8192) == golden.bytes[..8192]);
    assert_eq!(store.own_bytes(), 0, "it takes no room");
    // A read of parts fails once when some of them do.
    let store = with(vec![Kind::Read], true);
    let mut rig = Rig::new(&store);
    for sector in (0..64).step_by(2) {
        rig.write(sector * SECTOR, &pattern(sector, SECTOR), false);
    }
    assert!(failed(&mut rig, Op::Read { offset: 0 }, 64 * SECTOR));
    assert_eq!(rig.read(2 * SECTOR, SECTOR), pattern(2, SECTOR), "that needs no base");
}

#[test]
fn a_flush_goes_on_when_the_queue_that_led_it_is_dropped() {
    let golden = Golden::new(MIB);
    let store = golden.open(golden.kept());
    for committed in [false, true] {
        let (mut first, mut second) = (Rig::new(&store), Rig::new(&store));
        first.write(u64::from(committed) * 512, &pattern(9, 512), false);
        first.submit(Op::Flush, PinnedBuffers::default()).unwrap();
        second.submit(Op::Flush, PinnedBuffers::default()).unwrap();
        if committed {
            first.ring.submit().unwrap();
        }
        let Rig { ring, backend, .. } = first;
        drop(backend);
        // The kernel's part of it is over when the ring says so.
        while ring.has_orphans() {
            thread::yield_now();
        }
        assert!(second.finish().pop().unwrap().result.is_ok());
        assert_eq!(stored(&golden.own(), &golden.bytes)[usize::from(committed) * 512..][..512], pattern(9, 512));
    }
}

#[test]
fn an_overlay_of_any_store_is_known_by_its_name() {
    let memory = Arc::new(MemoryStore::new(MIB).unwrap());
    let ring = Rc::new(Uring::new(&Waker::new().unwrap()).unwrap());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("own");
    let place = Place::Kept { path, cache: Cache::Writeback };
    let options = OverlayOptions { place, size: None, limit: None };
    let store = OverlayStore::open(&Base::named(memory.clone(), "one"), &options).unwrap();
    let mut backend = store.attach(&ring, 0).unwrap();
    let mut done = Vec::new();
    backend.submit(Box::new(Io::new(7, Op::Read { offset: 0 }, PinnedBuffers::default()))).unwrap();
    backend.reap(&mut done);
    assert!(done.len() == 1 && done[0].io.token == 7);
    drop((store, backend));
    assert!(OverlayStore::open(&Base::named(memory.clone(), "two"), &options).is_err());
    assert!(OverlayStore::open(&Base::named(memory, "one"), &options).is_ok());
}
