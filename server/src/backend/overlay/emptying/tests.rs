use std::cell::Cell;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use tempfile::TempDir;
use virtio::memory::PinnedBuffers;

use super::super::tests::{base, stored};
use super::super::{OverlayOptions, Place};
use super::*;
use crate::backend::contract::{Rig, pattern};
use crate::backend::file::{Cache, FileOptions};
use crate::backend::{Op, SECTOR};

const MIB: u64 = 1 << 20;
/// Of the base: more than a page of the map.
const LEN: u64 = 9 * MIB + 5 * SECTOR;

/// A base, and the places of overlays over it.
fn golden() -> (TempDir, Vec<u8>, [Place; 4]) {
    let dir = tempfile::tempdir().unwrap();
    let bytes = pattern(5, LEN);
    fs::write(dir.path().join("golden"), &bytes).unwrap();
    let at = |name: &str| dir.path().join(name);
    let places = [
        Place::Memory,
        Place::Temporary { folder: at(""), cache: Cache::Writeback },
        Place::Kept { path: at("own"), cache: Cache::Writeback },
        Place::Kept { path: at("own-direct"), cache: Cache::None },
    ];
    (dir, bytes, places)
}

fn open(dir: &Path, place: &Place) -> OverlayStore {
    sized(dir, place, None)
}

fn sized(dir: &Path, place: &Place, size: Option<u64>) -> OverlayStore {
    let options = OverlayOptions { place: place.clone(), size, limit: None };
    OverlayStore::open(&base(&dir.join("golden")), &options).unwrap()
}

/// Writes, zeroes and discards; what the disk is then.
fn change(store: &OverlayStore, bytes: &[u8]) -> Vec<u8> {
    let mut rig = Rig::new(store);
    let mut disk = bytes.to_vec();
    disk.resize(store.info().capacity as usize, 0);
    for (offset, len) in [(0, SECTOR), (3 * SECTOR, 5 * SECTOR), (MIB - SECTOR, 3 * MIB), (LEN - SECTOR, SECTOR)] {
        let data = pattern(offset + 99, len);
        rig.write(offset, &data, false);
        disk[offset as usize..][..len as usize].copy_from_slice(&data);
    }
    for (offset, len) in [(SECTOR, SECTOR), (5 * MIB, 2 * MIB), (LEN - 3 * SECTOR, SECTOR)] {
        let op = Op::WriteZeroes { offset, len, unmap: true, durable: false };
        rig.one(op, PinnedBuffers::default()).result.unwrap();
        disk[offset as usize..][..len as usize].fill(0);
    }
    disk
}

fn read(store: &OverlayStore) -> Vec<u8> {
    let (mut rig, len) = (Rig::new(store), store.info().capacity);
    (0..len).step_by(MIB as usize).flat_map(|at| rig.read(at, MIB.min(len - at))).collect()
}

fn commit(store: &OverlayStore) -> Result<Emptied, EmptyError> {
    store.begin_emptying()?.commit(&|| true)
}

#[test]
fn what_is_committed_is_the_bases() {
    let (dir, _, places) = golden();
    let path = dir.path().join("golden");
    for place in places {
        // Again and again, each time over what the last one has left.
        let bytes = fs::read(&path).unwrap();
        let store = open(dir.path(), &place);
        let disk = change(&store, &bytes);
        let own = store.own_bytes();
        let emptied = commit(&store).unwrap();
        assert_eq!(emptied, Emptied { own, written: 3 * MIB + 7 * SECTOR, zeroed: 2 * MIB + 2 * SECTOR });
        assert!(fs::read(&path).unwrap() == disk, "{place:?}");
        assert_eq!(store.own_bytes(), 0);
        assert!(read(&store) == disk);
        // Nothing of the past comes back, and others may read the base again.
        let again = open(dir.path(), &Place::Memory);
        assert!(read(&again) == disk);
        drop(again);
        let disk = change(&store, &disk);
        assert!(read(&store) == disk);
        store.flush().unwrap();
        drop(store);
        if let Place::Kept { path: own, .. } = &place {
            let base = fs::read(&path).unwrap();
            assert!(stored(own, &base) == disk);
            let store = open(dir.path(), &place);
            assert!(read(&store) == disk, "it knows its base again");
            commit(&store).unwrap();
            assert!(fs::read(&path).unwrap() == disk);
        }
    }
}

/// Wherever it is cut off, and whether the server goes on or starts anew, the disk is the same.
#[test]
fn a_commit_that_was_cut_off_can_be_done_again() {
    for steps in 1..12 {
        let (dir, bytes, places) = golden();
        let path = dir.path().join("golden");
        for place in places {
            fs::write(&path, &bytes).unwrap();
            let mut store = open(dir.path(), &place);
            let disk = change(&store, &bytes);
            let left = Cell::new(steps);
            let go_on = || left.replace(left.get() - 1) > 0;
            let cut_off = store.begin_emptying().unwrap().commit(&go_on);
            assert!(matches!(cut_off, Err(EmptyError::Stopped)), "{cut_off:?}");
            assert!(read(&store) == disk);
            if let Place::Kept { path: own, .. } = &place {
                drop(store);
                assert!(stored(own, &fs::read(&path).unwrap()) == disk);
                store = open(dir.path(), &place);
                assert!(read(&store) == disk);
                let discarded = store.begin_emptying().unwrap().discard();
                assert!(matches!(discarded, Err(EmptyError::HalfCommitted)), "{discarded:?}");
            }
            commit(&store).unwrap();
            assert!(fs::read(&path).unwrap() == disk);
            assert!(read(&store) == disk);
            drop(store);
            if let Place::Kept { path: own, .. } = &place {
                fs::remove_file(own).unwrap();
            }
        }
    }
}

/// Changes on both sides of where the base ends; what the disk is then.
fn change_at_its_end(store: &OverlayStore, disk: &mut [u8]) {
    let mut rig = Rig::new(store);
    for (offset, len) in [(LEN - SECTOR, 3 * SECTOR), (LEN + MIB, 2 * MIB), (store.info().capacity - SECTOR, SECTOR)] {
        let data = pattern(offset + 7, len);
        rig.write(offset, &data, false);
        disk[offset as usize..][..len as usize].copy_from_slice(&data);
    }
    let (offset, len) = (LEN + MIB + 4096, MIB);
    rig.one(Op::WriteZeroes { offset, len, unmap: true, durable: false }, PinnedBuffers::default()).result.unwrap();
    disk[offset as usize..][..len as usize].fill(0);
}

/// A base that is smaller than the disk has the disk's size then, wherever the first commit is cut off.
#[test]
fn a_base_that_is_smaller_grows() {
    const LARGER: u64 = LEN + 5 * MIB + 3 * SECTOR;
    for steps in [None, Some(0), Some(1), Some(5), Some(9)] {
        let (dir, bytes, places) = golden();
        let path = dir.path().join("golden");
        for place in places {
            fs::write(&path, &bytes).unwrap();
            let mut store = sized(dir.path(), &place, Some(LARGER));
            let mut disk = change(&store, &bytes);
            change_at_its_end(&store, &mut disk);
            if let Some(steps) = steps {
                let left = Cell::new(steps);
                let cut_off = store.begin_emptying().unwrap().commit(&|| left.replace(left.get() - 1) > 0);
                assert!(matches!(cut_off, Err(EmptyError::Stopped)), "{cut_off:?}");
                assert_eq!(fs::metadata(&path).unwrap().len(), LARGER);
                assert!(read(&store) == disk, "{place:?}, {steps:?}");
                if matches!(place, Place::Kept { .. }) {
                    drop(store);
                    store = sized(dir.path(), &place, Some(LARGER));
                    assert!(read(&store) == disk);
                }
            }
            commit(&store).unwrap();
            assert!(fs::read(&path).unwrap() == disk, "{place:?}, {steps:?}");
            assert!(read(&store) == disk);
            // The overlay knows where its base ends by now.
            let mut disk = change(&store, &disk);
            change_at_its_end(&store, &mut disk);
            assert!(read(&store) == disk);
            store.flush().unwrap();
            if let Place::Kept { path: own, .. } = &place {
                drop(store);
                store = open(dir.path(), &place);
                assert!(read(&store) == disk, "it knows its base again");
                commit(&store).unwrap();
                fs::remove_file(own).unwrap();
            } else {
                commit(&store).unwrap();
            }
            assert!(fs::read(&path).unwrap() == disk);
        }
    }
}

/// Cut off after it was marked, and before its base was made larger.
#[test]
fn a_base_that_was_to_grow_is_known_again() {
    let (dir, bytes, [.., place]) = golden();
    let store = sized(dir.path(), &place, Some(LEN + MIB));
    let disk = change(&store, &bytes);
    store.flush().unwrap();
    store.0.whole.own.mark(|header| header.fate = Fate::Committed).unwrap();
    drop(store);
    let store = open(dir.path(), &place);
    assert!(read(&store) == disk);
    drop(store);
    // As large as neither was: it is another one.
    let path = dir.path().join("golden");
    for len in [LEN - SECTOR, LEN + SECTOR, LEN + 2 * MIB] {
        File::options().write(true).open(&path).unwrap().set_len(len).unwrap();
        let options = OverlayOptions { place: place.clone(), size: None, limit: None };
        assert!(OverlayStore::open(&base(&path), &options).is_err(), "{len}");
    }
    fs::write(&path, &bytes).unwrap();
    let store = open(dir.path(), &place);
    commit(&store).unwrap();
    assert!(fs::read(&path).unwrap() == disk);
}

#[test]
fn a_commit_tells_how_far_it_is() {
    let (dir, bytes, [place, ..]) = golden();
    let store = open(dir.path(), &place);
    change(&store, &bytes);
    assert_eq!(store.progress(), None);
    let seen = std::cell::RefCell::new(Vec::new());
    let go_on = || {
        seen.borrow_mut().extend(store.progress());
        true
    };
    let emptied = store.begin_emptying().unwrap().commit(&go_on).unwrap();
    assert_eq!(store.progress(), None);
    let seen = seen.into_inner();
    assert!(seen.len() > 5 && seen.iter().all(|progress| progress.size == LEN));
    assert!(seen.is_sorted_by(|one, next| one.looked_at < next.looked_at && one.written <= next.written));
    let last = seen.last().unwrap();
    assert!(last.looked_at < LEN && last.written <= emptied.written && last.written > 2 * MIB, "{last:?}");
}

#[test]
fn what_is_discarded_is_gone() {
    let (dir, bytes, places) = golden();
    for place in places {
        let store = open(dir.path(), &place);
        let disk = change(&store, &bytes);
        let own = store.own_bytes();
        assert_eq!(store.begin_emptying().unwrap().discard().unwrap(), Emptied { own, ..Emptied::default() });
        assert!(read(&store) == bytes);
        assert_eq!(store.own_bytes(), 0);
        let mut rig = Rig::new(&store);
        rig.write(0, &disk[..512], true);
        assert!(rig.read(0, 1024) == [&disk[..512], &bytes[512..1024]].concat());
        drop((rig, store));
        let Place::Kept { path: own, .. } = &place else { continue };
        assert!(read(&open(dir.path(), &place))[..1024] == [&disk[..512], &bytes[512..1024]].concat());
        // Cut off after it was marked, which is all that counts.
        let file = File::options().read(true).write(true).open(own).unwrap();
        let store = open(dir.path(), &place);
        change(&store, &bytes);
        store.flush().unwrap();
        store.0.whole.own.mark(|header| header.fate = Fate::Discarded).unwrap();
        drop(store);
        assert!(read(&open(dir.path(), &place)) == bytes);
        let mut flags = [0; 4];
        file.read_exact_at(&mut flags, 12).unwrap();
        assert_eq!(flags, [1, 0, 0, 0], "and the mark is gone");
    }
    assert!(fs::read(dir.path().join("golden")).unwrap() == bytes);
}

#[test]
fn a_base_of_others_is_left_alone() {
    let (dir, bytes, [place, ..]) = golden();
    let path = dir.path().join("golden");
    let shared = base(&path);
    let options = |size| OverlayOptions { place: place.clone(), size, limit: None };
    let [first, second] = [(); 2].map(|()| OverlayStore::open(&shared, &options(None)).unwrap());
    drop(shared);
    let disk = change(&first, &bytes);
    assert!(matches!(commit(&first), Err(EmptyError::Shared(1))));
    drop(second);
    // Of another server.
    let file = FileOptions {
        path: path.clone(),
        read_only: true,
        cache: Cache::Writeback,
        size: None,
        fixed_buffers: false,
        iopoll: false,
    };
    let other = FileStore::open(&file).unwrap();
    assert!(matches!(commit(&first), Err(EmptyError::Busy { .. })));
    drop(other);
    let elsewhere = dir.path().join("elsewhere");
    fs::rename(&path, &elsewhere).unwrap();
    assert!(matches!(commit(&first), Err(EmptyError::Open { .. })));
    fs::write(&path, &bytes).unwrap();
    assert!(matches!(commit(&first), Err(EmptyError::Replaced { .. })));
    fs::rename(&elsewhere, &path).unwrap();
    assert!(fs::read(&path).unwrap() == bytes, "it is as it was");
    let emptying = first.begin_emptying().unwrap();
    assert!(matches!(commit(&first), Err(EmptyError::Already)));
    let ring =
        std::rc::Rc::new(crate::backend::uring::Uring::new(&crate::backend::uring::Waker::new().unwrap()).unwrap());
    assert!(first.attach(&ring, 0).is_err(), "nobody may use it meanwhile");
    drop(emptying);
    commit(&first).unwrap();
    assert!(fs::read(&path).unwrap() == disk);
    let memory = super::super::Base::named(Arc::new(MemoryStore::new(MIB).unwrap()), "memory");
    let unwritable = OverlayStore::open(&memory, &options(None)).unwrap();
    assert!(matches!(commit(&unwritable), Err(EmptyError::NotWritable)));
}
