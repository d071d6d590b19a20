use virtio::memory::PinnedBuffers;

use super::*;
use crate::backend::contract::{Rig, pattern};
use crate::backend::image::testing::open_entrance;
use crate::backend::moody::Moody;
use crate::backend::random::Random;
use crate::backend::{Op, SECTOR};

const MIB: u64 = 1 << 20;

fn store(limit: u64) -> (PowerCutStore, Arc<Moody>) {
    let below = Arc::new(Moody::new(MIB));
    (PowerCutStore::new(Arc::clone(&below) as Arc<dyn Store>, limit, &open_entrance()).unwrap(), below)
}

fn below(store: &Arc<Moody>, offset: u64, len: u64) -> Vec<u8> {
    Rig::new(&store.memory).read(offset, len)
}

fn zeroes(rig: &mut Rig, offset: u64, len: u64, durable: bool) {
    let op = Op::WriteZeroes { offset, len, unmap: true, durable };
    rig.one(op, PinnedBuffers::default()).result.unwrap();
}

fn flush(rig: &mut Rig) {
    rig.one(Op::Flush, PinnedBuffers::default()).result.unwrap();
}

#[test]
fn a_write_is_in_the_cache_until_it_is_flushed() {
    let (store, medium) = store(MIB);
    let mut rig = Rig::new(&store);
    let (old, new) = (pattern(1, 8192), pattern(2, 4096));
    rig.write(0, &old, false);
    rig.write(2048, &new, false);
    zeroes(&mut rig, 6144, 1024, false);
    let mut expected = old.clone();
    expected[2048..6144].copy_from_slice(&new);
    expected[6144..7168].fill(0);
    assert_eq!(rig.read(0, 8192), expected);
    assert_eq!(rig.read(1536, 1024), expected[1536..2560]);
    assert_eq!(below(&medium, 0, 8192), vec![0; 8192]);
    flush(&mut rig);
    assert_eq!(below(&medium, 0, 8192), expected);
    assert_eq!(rig.read(0, 8192), expected);
    rig.write(0, &new, false);
    store.flush().unwrap();
    assert_eq!(below(&medium, 0, 4096), new, "as at the end of a device's service");
}

#[test]
fn a_durable_write_goes_by_itself_and_is_not_covered_again() {
    let (store, medium) = store(MIB);
    let mut rig = Rig::new(&store);
    rig.write(0, &pattern(1, 4096), false);
    rig.write(1024, &pattern(2, 1024), true);
    zeroes(&mut rig, 3072, 512, true);
    let mut on_medium = vec![0; 4096];
    on_medium[1024..2048].copy_from_slice(&pattern(2, 1024));
    assert_eq!(below(&medium, 0, 4096), on_medium);
    let mut all = pattern(1, 4096);
    all[1024..2048].copy_from_slice(&pattern(2, 1024));
    all[3072..3584].fill(0);
    assert_eq!(rig.read(0, 4096), all);
    flush(&mut rig);
    assert_eq!(below(&medium, 0, 4096), all);
}

#[test]
fn a_cut_leaves_what_was_flushed_and_ends_the_queues() {
    let (store, _) = store(MIB);
    let mut rig = Rig::new(&store);
    rig.write(0, &pattern(1, 4096), false);
    flush(&mut rig);
    rig.write(0, &pattern(2, 4096), false);
    rig.write(8192, &pattern(3, 4096), true);
    let survivors = store.cut(PowerCut::Drop, 0).unwrap();
    assert_eq!(survivors, Survivors { unflushed: 1, whole: 0, torn_sectors: None });
    let buffers = rig.guest.buffers(&[(0, 512)]);
    let dead = rig.one(Op::Write { offset: 0, durable: false }, buffers);
    assert_eq!(dead.result.unwrap_err().raw_os_error(), Some(libc::EIO));
    assert!(rig.one(Op::Flush, PinnedBuffers::default()).result.is_err(), "it cannot say that something is flushed");
    let mut rig = Rig::new(&store);
    assert_eq!(rig.read(0, 4096), pattern(1, 4096));
    assert_eq!(rig.read(8192, 4096), pattern(3, 4096));
    rig.write(0, &pattern(4, 4096), false);
    assert_eq!(rig.read(0, 4096), pattern(4, 4096));
}

/// A value for each sector of a small disk: which write it is of, and 0 for none.
type Sectors = [u64; 32];

/// Does the same operations each time, then cuts: what a reader finds, and what each sector may hold.
fn cut_after_random_writes(seed: u64, cut: PowerCut, limit: u64) -> (Sectors, Vec<Vec<u64>>, Survivors) {
    let (store, medium) = store(limit);
    let mut rig = Rig::new(&store);
    let mut random = Random::new(seed, 0, 0);
    // Of each sector what was written since it was on stable storage, that first.
    let mut since: Vec<Vec<u64>> = vec![vec![0]; 32];
    for number in 1..=40u64 {
        let from = random.below(32);
        let sectors = 1 + random.below((32 - from).min(8));
        let range = from as usize..(from + sectors) as usize;
        match random.below(16) {
            0 => {
                flush(&mut rig);
                since.iter_mut().for_each(|values| drop(values.drain(..values.len() - 1)));
            }
            1 => {
                zeroes(&mut rig, from * SECTOR, sectors * SECTOR, false);
                since[range].iter_mut().for_each(|values| values.push(0));
            }
            kind => {
                let data: Vec<u8> = number.to_le_bytes().repeat((sectors * SECTOR) as usize / 8);
                rig.write(from * SECTOR, &data, kind == 2);
                for values in &mut since[range] {
                    if kind == 2 {
                        values.clear();
                    }
                    values.push(number);
                }
            }
        }
        let read = rig.read(0, 32 * SECTOR);
        let newest = since.iter().map(|values| *values.last().unwrap());
        assert!(read.chunks(512).zip(newest).all(|(sector, value)| sector == value.to_le_bytes().repeat(64)));
    }
    let survivors = store.cut(cut, seed).unwrap();
    let read = Rig::new(&store).read(0, 32 * SECTOR);
    assert_eq!(below(&medium, 0, 32 * SECTOR), read, "what survives is on the medium");
    let value = |sector: &[u8]| {
        assert_eq!(sector, sector[..8].repeat(64), "no sector is torn");
        u64::from_le_bytes(sector[..8].try_into().unwrap())
    };
    let values: Vec<_> = read.chunks(512).map(value).collect();
    (values.try_into().unwrap(), since, survivors)
}

#[test]
fn after_a_cut_each_sector_holds_what_a_real_disk_might() {
    for cut in [PowerCut::Drop, PowerCut::Tear, PowerCut::Reorder] {
        let mut lost = 0;
        for seed in 0..60 {
            let (found, since, survivors) = cut_after_random_writes(seed, cut, MIB);
            for (sector, (found, may)) in found.iter().zip(&since).enumerate() {
                assert!(may.contains(found), "{cut:?} {seed}: sector {sector} holds {found}, not of {may:?}");
                assert!(cut != PowerCut::Drop || *found == may[0], "{seed}: sector {sector}");
                lost += usize::from(found != may.last().unwrap());
            }
            assert!(survivors.whole <= survivors.unflushed);
            assert_eq!((found, survivors), {
                let (found, _, survivors) = cut_after_random_writes(seed, cut, MIB);
                (found, survivors)
            });
        }
        assert!(lost > 200, "{cut:?} loses {lost} sectors");
    }
}

#[test]
fn a_full_cache_writes_the_oldest_down() {
    // Room for one of the largest, or a few.
    let mut down = 0;
    for seed in 0..60 {
        let (found, since, _) = cut_after_random_writes(seed, PowerCut::Drop, 5 << 10);
        for (found, may) in found.iter().zip(&since) {
            assert!(may.contains(found), "{seed}: {found}, not of {may:?}");
            down += usize::from(*found != may[0]);
        }
    }
    assert!(down > 200, "{down}");
    let (store, medium) = store(4096);
    let mut rig = Rig::new(&store);
    rig.write(512, &pattern(1, 512), false);
    rig.write(0, &pattern(2, 8192), false);
    assert_eq!(below(&medium, 0, 8192), pattern(2, 8192), "larger than the cache");
    flush(&mut rig);
    assert_eq!(below(&medium, 0, 8192), pattern(2, 8192), "and newer than what the cache had");
}

#[test]
fn what_cannot_be_written_down_stays() {
    let (store, medium) = store(MIB);
    let mut rig = Rig::new(&store);
    rig.write(0, &pattern(1, 4096), false);
    medium.mood.fail(libc::ENOSPC);
    let error = rig.one(Op::Flush, PinnedBuffers::default()).result.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    medium.mood.fail(0);
    assert_eq!(rig.read(0, 4096), pattern(1, 4096));
    flush(&mut rig);
    assert_eq!(below(&medium, 0, 4096), pattern(1, 4096));
}

#[test]
fn it_changes_its_size() {
    let (store, medium) = store(MIB);
    Rig::new(&store).write(0, &pattern(1, 4096), false);
    assert_eq!(store.resize(Some(2 * MIB)).unwrap(), 2 * MIB);
    assert_eq!(store.info().capacity, 2 * MIB);
    assert_eq!(below(&medium, 0, 4096), pattern(1, 4096));
    let mut rig = Rig::new(&store);
    rig.write(2 * MIB - 512, &pattern(2, 512), false);
    assert_eq!(rig.read(2 * MIB - 512, 512), pattern(2, 512));
    assert!(store.resize(Some(513)).is_err());
    assert_eq!(rig.read(0, 512), pattern(1, 512), "it is as before");
}
