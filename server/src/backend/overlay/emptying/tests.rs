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
    let options = OverlayOptions { place: place.clone(), size: None, limit: None };
    OverlayStore::open(&base(&dir.join("golden")), &options).unwrap()
}

/// Writes, zeroes and discards; what the disk is then.
fn change(store: &OverlayStore, bytes: &[u8]) -> Vec<u8> {
    let mut rig = Rig::new(store);
    let mut disk = bytes.to_vec();
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
    let mut rig = Rig::new(store);
    (0..LEN).step_by(MIB as usize).flat_map(|at| rig.read(at, MIB.min(LEN - at))).collect()
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
    let larger = OverlayStore::open(&base(&path), &options(Some(LEN + SECTOR))).unwrap();
    assert!(matches!(commit(&larger), Err(EmptyError::Larger { .. })));
    drop(larger);
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
