//! What each type of request does, and what the device says to those that it cannot do (virtio 1.3 section 5.2.6).

use std::os::unix::fs::MetadataExt;

use client::{BlockOptions, BlockQueue, BlockRequest, Buffer, Completion, GuestMemory, RequestType, Segment};
use vfio_user_blk::config::{Cache, Size};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_WRITE_ZEROES,
};

use crate::rig::{DISK, IOERR, Machine, OK, Rig, UNSUPP, execute, file, image_bytes};

const CAPACITY: u64 = DISK / 512;

fn buffer(memory: &GuestMemory, len: usize) -> Buffer {
    memory.allocate(len, 4096).unwrap()
}

fn whole(buffer: &Buffer) -> [Segment; 1] {
    [buffer.segment(0, buffer.len()).unwrap()]
}

/// A discard or a write-zeroes of one range.
fn erase(queue: &mut BlockQueue, buffer: &Buffer, kind: RequestType, sector: u64, sectors: u32, flags: u32) -> u8 {
    buffer.write(0, &sector.to_le_bytes()).unwrap();
    buffer.write(8, &sectors.to_le_bytes()).unwrap();
    buffer.write(12, &flags.to_le_bytes()).unwrap();
    execute(queue, kind, 0, &[buffer.segment(0, 16).unwrap()]).status
}

fn each_store() -> [Rig; 4] {
    [Rig::ram(), Rig::file(Cache::None), Rig::file(Cache::Writeback), Rig::file(Cache::Writethrough)]
}

#[test]
fn the_serial_is_what_the_operator_gave() {
    for (serial, expected) in [(Some("disk-0"), *b"disk-0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"), (None, [0; 20])] {
        let rig = Rig::with(|device| device.serial = serial.map(str::to_owned));
        let mut machine = rig.boot();
        assert_eq!(machine.queues[0].get_id().unwrap(), expected);
    }
    let rig = Rig::with(|device| device.serial = Some("12345678901234567890".into()));
    let mut machine = rig.boot();
    assert_eq!(machine.queues[0].get_id().unwrap(), *b"12345678901234567890", "no byte is left for a zero");
    // In pieces, and into less room than it needs.
    let id = buffer(&machine.memory, 64);
    let data = [id.segment(0, 7).unwrap(), id.segment(32, 13).unwrap()];
    assert_eq!(execute(&mut machine.queues[0], RequestType::GetId, 0, &data).status, OK);
    assert_eq!((&id.to_vec()[..7], &id.to_vec()[32..45]), (&b"1234567"[..], &b"8901234567890"[..]));
    id.fill(0);
    let done = execute(&mut machine.queues[0], RequestType::GetId, 0, &[id.segment(0, 4).unwrap()]);
    assert_eq!((done.status, &id.to_vec()[..5]), (OK, &b"1234\0"[..]));
}

#[test]
fn what_the_device_does_not_know_is_unsupported() {
    let rig = Rig::ram();
    let mut machine = rig.boot();
    let data = buffer(&machine.memory, 512);
    // SCSI commands, lifetime, secure erase, zoned requests, legacy barriers, and numbers of nobody.
    for value in [2, 3, 10, 14, 15, 16, 99, 1 << 31, u32::MAX] {
        for device_writes in [false, true] {
            for data in [&whole(&data)[..], &[]] {
                let done = execute(&mut machine.queues[0], RequestType::Raw { value, device_writes }, 0, data);
                assert_eq!(done.status, UNSUPP, "type {value}");
                assert!(done.written <= 1);
            }
        }
    }
    assert_eq!(data.to_vec(), [0; 512]);
}

#[test]
fn transfers_keep_to_the_capacity() {
    for rig in each_store() {
        let mut machine = rig.boot();
        let data = buffer(&machine.memory, 2048);
        data.fill(0x77);
        let queue = &mut machine.queues[0];
        for (sector, len, status) in [
            (CAPACITY - 1, 512, OK),
            (CAPACITY - 4, 2048, OK),
            (CAPACITY, 512, IOERR),
            (CAPACITY - 3, 2048, IOERR),
            (u64::MAX, 512, IOERR),
            (u64::MAX / 512, 512, IOERR),
            (1 << 55, 512, IOERR),
            (0, 511, IOERR),
            (0, 513, IOERR),
            (0, 1, IOERR),
        ] {
            let segment = [data.segment(0, len).unwrap()];
            for kind in [RequestType::Write, RequestType::Read] {
                let done = execute(queue, kind, sector, &segment);
                assert_eq!(done.status, status, "{kind:?} of {len} at {sector:#x}");
            }
        }
        assert_eq!(execute(queue, RequestType::Read, CAPACITY, &[]).status, OK, "nothing, at the end");
        let mut back = [0; 512];
        queue.read(0, &mut back).unwrap();
        assert_eq!(back, [0; 512], "what was refused was not done in part");
    }
}

/// Section 5.2.6.4: with VERSION_1 the layout of a request in descriptors is the driver's to choose.
#[test]
fn descriptors_may_cut_a_request_anywhere() {
    for rig in [Rig::ram(), Rig::file(Cache::None)] {
        let mut machine = rig.boot();
        let memory = machine.memory.allocate(16384, 4096).unwrap();
        let header = |value: u32, sector: u64| {
            memory.write(0, &value.to_le_bytes()).unwrap();
            memory.write(8, &sector.to_le_bytes()).unwrap();
        };
        let segment = |at, len| memory.segment(at, len).unwrap();
        let run = |queue: &mut BlockQueue, readable: &[Segment], writable: &[Segment]| -> Completion {
            queue.ring_mut().add(readable, writable).unwrap();
            queue.publish().unwrap();
            crate::rig::completion(queue)
        };
        let queue = &mut machine.queues[0];
        // Header and data in one piece, data and status in one piece: as a queue of two entries needs it.
        header(1, 40);
        memory.write(16, &[0x42; 1024]).unwrap();
        memory.write(8000, &[0xff]).unwrap();
        run(queue, &[segment(0, 16 + 1024)], &[segment(8000, 1)]);
        assert_eq!(memory.to_vec()[8000], OK);
        header(0, 40);
        memory.write(2000, &[0xff; 1025]).unwrap();
        assert_eq!(run(queue, &[segment(0, 16)], &[segment(2000, 1025)]).written, 1025);
        assert_eq!(memory.to_vec()[2000..3024], [0x42; 1024]);
        assert_eq!(memory.to_vec()[3024], OK);
        // A header in three pieces, the last of which is data, too; pieces of nothing between.
        header(1, 41);
        memory.write(16, &[0x43; 512]).unwrap();
        memory.write(8000, &[0xff]).unwrap();
        let pieces = [segment(0, 5), segment(5, 0), segment(5, 3), segment(8, 8 + 500), segment(516, 12)];
        run(queue, &pieces, &[segment(8000, 1)]);
        assert_eq!(memory.to_vec()[8000], OK);
        header(0, 40);
        memory.write(2000, &[0xff; 1026]).unwrap();
        run(queue, &[segment(0, 16)], &[segment(2000, 1), segment(2001, 0), segment(2001, 1023), segment(3024, 1)]);
        assert_eq!(memory.to_vec()[2000..2512], [0x42; 512]);
        assert_eq!(memory.to_vec()[2512..3024], [0x43; 512]);
        assert_eq!(memory.to_vec()[3024..3026], [OK, 0xff], "not a byte too many");
    }
}

#[test]
fn discarded_and_zeroed_sectors() {
    for rig in each_store() {
        let mut machine = rig.boot();
        let config = machine.driver.config().unwrap();
        let range = buffer(&machine.memory, 16);
        let queue = &mut machine.queues[0];
        let (discard, zeroes) = (RequestType::Discard, RequestType::WriteZeroes);
        let pattern = vec![0x99; 1 << 20];
        // The sectors that are neither whole pages nor whole blocks of a file system among them.
        for (first, count) in [(8u64, 16u32), (1, 1), (3, 30), (16, 1000), (2047, 1)] {
            for flags in [0, 1] {
                queue.write(0, &pattern).unwrap();
                assert_eq!(erase(queue, &range, zeroes, first, count, flags), OK);
                let mut back = vec![0; pattern.len()];
                queue.read(0, &mut back).unwrap();
                let (from, to) = (first as usize * 512, (first as usize + count as usize) * 512);
                assert!(back[from..to].iter().all(|byte| *byte == 0), "{first}+{count} are zero");
                assert!(back[..from].iter().chain(&back[to..]).all(|byte| *byte == 0x99), "and nothing else");
            }
        }
        queue.write(0, &pattern).unwrap();
        assert_eq!(erase(queue, &range, discard, 8, 1024, 0), OK);
        let mut back = vec![0; pattern.len()];
        queue.read(0, &mut back).unwrap();
        let kept = back[..8 * 512].iter().chain(&back[1032 * 512..]);
        assert!(kept.into_iter().all(|byte| *byte == 0x99), "what lies around is kept");
        // The bounds that the configuration tells.
        let most_zeroes = config.write_zeroes.unwrap().max_sectors;
        for kind in [discard, zeroes] {
            assert_eq!(erase(queue, &range, kind, CAPACITY - 8, 8, 0), OK);
            assert_eq!(erase(queue, &range, kind, 0, 0, 0), OK, "nothing at all");
            assert_eq!(erase(queue, &range, kind, CAPACITY - 8, 9, 0), IOERR);
            assert_eq!(erase(queue, &range, kind, u64::MAX, 1, 0), IOERR);
            assert_eq!(erase(queue, &range, kind, 0, u32::MAX, 0), IOERR);
        }
        assert_eq!(erase(queue, &range, discard, 0, 8, 1), UNSUPP, "a discard has no flags");
        assert_eq!(erase(queue, &range, zeroes, 0, 8, 2), UNSUPP);
        if u64::from(most_zeroes) < CAPACITY {
            assert_eq!(erase(queue, &range, zeroes, 0, most_zeroes + 1, 0), IOERR);
        }
        // Half a range, two ranges where one is the most, none.
        for len in [8, 15, 17, 32] {
            let two = machine.memory.allocate(32, 16).unwrap();
            let done = execute(queue, discard, 0, &[two.segment(0, len).unwrap()]);
            assert_eq!(done.status, IOERR, "{len} bytes of ranges");
        }
        assert_eq!(execute(queue, zeroes, 0, &[]).status, IOERR);
    }
}

#[test]
fn unmapped_sectors_free_the_file() {
    for cache in [Cache::None, Cache::Writeback] {
        let rig = Rig::file(cache);
        let mut machine = rig.boot();
        let range = buffer(&machine.memory, 16);
        let queue = &mut machine.queues[0];
        let blocks = || std::fs::metadata(rig.image()).unwrap().blocks();
        let pattern = vec![0x11; 4 << 20];
        let fill = |queue: &mut BlockQueue| {
            queue.write(0, &pattern).unwrap();
            queue.flush().unwrap();
            assert!(blocks() >= 8192, "{} blocks hold {} bytes", blocks(), pattern.len());
        };
        fill(queue);
        assert_eq!(erase(queue, &range, RequestType::WriteZeroes, 0, 8192, 0), OK);
        queue.flush().unwrap();
        assert!(blocks() >= 8192, "without UNMAP the blocks stay");
        if machine.driver.config().unwrap().write_zeroes_may_unmap == Some(true) {
            fill(queue);
            assert_eq!(erase(queue, &range, RequestType::WriteZeroes, 0, 8192, 1), OK);
            assert!(blocks() < 1024, "{} blocks are left", blocks());
            fill(queue);
            assert_eq!(erase(queue, &range, RequestType::Discard, 0, 8192, 0), OK);
            assert!(blocks() < 1024, "{} blocks are left", blocks());
        }
    }
}

/// What a driver has not negotiated it cannot use (section 2.2).
#[test]
fn requests_need_their_features() {
    let rig = Rig::ram();
    let without = 1u64 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
    let features = BlockOptions::FEATURES & !without;
    let mut machine = rig.boot_with(&BlockOptions { features, ..BlockOptions::default() });
    let range = buffer(&machine.memory, 16);
    for kind in [RequestType::Discard, RequestType::WriteZeroes] {
        assert_eq!(erase(&mut machine.queues[0], &range, kind, 0, 8, 0), UNSUPP);
    }
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    let content: Vec<u8> = (0..DISK).map(|at| (at / 512) as u8).collect();
    std::fs::write(&image, &content).unwrap();
    for cache in [Cache::None, Cache::Writeback] {
        let rig = Rig::devices(|other| {
            let mut device = file(other, cache);
            device.blk_file = Some(image.clone());
            device.read_only = true;
            vec![device]
        });
        let mut machine = rig.boot();
        assert!(machine.driver.has_feature(VIRTIO_BLK_F_RO));
        assert!(!machine.driver.has_feature(VIRTIO_BLK_F_DISCARD));
        let data = buffer(&machine.memory, 4096);
        let queue = &mut machine.queues[0];
        assert_eq!(execute(queue, RequestType::Write, 0, &whole(&data)).status, IOERR);
        for kind in [RequestType::Discard, RequestType::WriteZeroes] {
            assert_eq!(erase(queue, &data, kind, 0, 8, 0), IOERR);
        }
        assert_eq!(execute(queue, RequestType::Read, 9, &whole(&data)).status, OK);
        assert_eq!(data.to_vec(), content[9 * 512..17 * 512]);
        queue.flush().unwrap();
        // A driver that does not take the feature is no more able to write.
        let features = BlockOptions::FEATURES & !(1 << VIRTIO_BLK_F_RO);
        machine.reboot(&BlockOptions { features, ..BlockOptions::default() });
        assert_eq!(execute(&mut machine.queues[0], RequestType::Write, 0, &whole(&data)).status, IOERR);
        drop(machine);
        rig.stop();
        assert!(std::fs::read(&image).unwrap() == content);
    }
    // A disk in memory, too.
    let rig = Rig::with(|device| device.read_only = true);
    let mut machine = rig.boot();
    assert!(machine.driver.has_feature(VIRTIO_BLK_F_RO));
    let data = buffer(&machine.memory, 512);
    assert_eq!(execute(&mut machine.queues[0], RequestType::Write, 0, &whole(&data)).status, IOERR);
}

/// What was written before a flush is in the file, for whoever opens it.
#[test]
fn flushed_writes_are_in_the_file() {
    for cache in [Cache::None, Cache::Writeback, Cache::Writethrough] {
        let rig = Rig::file(cache);
        let mut machine = rig.boot();
        for (round, queue) in machine.queues.iter_mut().enumerate() {
            let pattern = vec![0x20 + round as u8; 65536 + 512];
            let sector = 3 + 200 * round as u64;
            queue.write(sector, &pattern).unwrap();
            if cache != Cache::Writethrough {
                queue.flush().unwrap();
            }
            assert_eq!(image_bytes(&rig.image(), 512 * sector, pattern.len()), pattern);
        }
    }
}

/// CONFIG_WCE: a driver may change its mind while requests are in flight.
#[test]
fn the_write_cache_is_switched_while_it_is_used() {
    for cache in [Cache::None, Cache::Writeback, Cache::Writethrough] {
        let rig = Rig::file(cache);
        let mut machine = rig.boot();
        assert_eq!(machine.driver.config().unwrap().writeback, Some(cache != Cache::Writethrough));
        let data = buffer(&machine.memory, 4096);
        for round in 0..40u8 {
            let writeback = round % 2 == 0;
            data.fill(round);
            let segment = whole(&data);
            let queue = &mut machine.queues[0];
            for slot in 0..8 {
                let write = BlockRequest { kind: RequestType::Write, sector: 8 * slot, data: &segment };
                queue.submit(&write).unwrap();
            }
            queue.publish().unwrap();
            machine.driver.set_writeback(writeback).unwrap();
            assert_eq!(machine.driver.config().unwrap().writeback, Some(writeback));
            let queue = &mut machine.queues[0];
            for _ in 0..8 {
                assert_eq!(crate::rig::completion(queue).status, OK);
            }
            assert_eq!(image_bytes(&rig.image(), 0, 8 * 4096), [round; 8 * 4096]);
        }
        // A reset brings back what the operator chose, and another driver its own.
        machine.driver.set_writeback(false).unwrap();
        let features = BlockOptions::FEATURES & !(1 << VIRTIO_BLK_F_FLUSH);
        machine.reboot(&BlockOptions { features, ..BlockOptions::default() });
        assert_eq!(machine.driver.config().unwrap().writeback, Some(cache != Cache::Writethrough));
        crate::rig::exercise(&mut machine.queues);
    }
}

#[test]
fn a_large_disk_is_addressed_to_its_end() {
    let rig = Rig::devices(|folder| {
        let mut device = file(folder, Cache::None);
        device.size = Some(Size(3 << 40));
        vec![device]
    });
    let Machine { queues, driver, .. } = &mut rig.boot();
    let capacity = driver.config().unwrap().capacity;
    assert_eq!(capacity, (3 << 40) / 512);
    for sector in [0, 1 << 23, 1 << 32, (1 << 32) - 1, capacity - 8] {
        let pattern = vec![sector as u8 ^ 0x3c; 4096];
        queues[0].write(sector, &pattern).unwrap();
        queues[0].flush().unwrap();
        assert_eq!(image_bytes(&rig.image(), 512 * sector, 4096), pattern, "sector {sector:#x}");
    }
}
