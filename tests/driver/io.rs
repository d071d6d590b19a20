//! Requests on every store, of any shape, on one queue and on many.

use std::thread;

use client::{BlockOptions, GuestMemory, NotifyMethod};
use vfio_user_blk::config::{Cache, Size};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::rig::{IOVA, Machine, Rig};
use crate::workload::{Arena, Workload};

const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const INDIRECT: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;

const PACKED: u64 = BlockOptions::PACKED;
const IN_ORDER: u64 = BlockOptions::IN_ORDER;

/// Each queue on a thread of its own, on sectors of its own.
pub(crate) fn run_all(machine: &mut Machine, workload: &Workload) {
    let Machine { memory, queues, .. } = machine;
    thread::scope(|scope| {
        for (index, queue) in queues.iter_mut().enumerate() {
            let own = Workload {
                seed: workload.seed + index as u64,
                first_sector: (workload.sectors * index) as u64,
                ..workload.clone()
            };
            let arena = Arena::new(memory, &own);
            scope.spawn(move || own.run(queue, &arena));
        }
    });
}

/// Each combination of ring features and notification, asleep and awake.
fn each_mode(rig: &Rig, workload: &Workload) {
    let client = rig.client();
    let mut seed = workload.seed;
    let (all, plain) = (BlockOptions::FEATURES, BlockOptions::FEATURES & !EVENT_IDX & !INDIRECT);
    let split = [all, all & !EVENT_IDX, all & !INDIRECT, plain, all | IN_ORDER];
    for features in split.into_iter().chain([all | PACKED, plain | PACKED, all | PACKED | IN_ORDER]) {
        for (notify, interrupts) in [(NotifyMethod::Posted, true), (NotifyMethod::IoEventFd, false)] {
            let options = BlockOptions { features, notify, interrupts, queues: 2, ..BlockOptions::default() };
            let memory = GuestMemory::new(16 << 20, IOVA).unwrap();
            let mut machine = Machine::with_memory(client.clone(), memory, &options);
            assert_eq!(machine.driver.features() & (PACKED | IN_ORDER), features & (PACKED | IN_ORDER));
            // What the last round left is zeroed, as the copy begins.
            let sectors = (2 * workload.sectors) as u32;
            if workload.keeps {
                machine.queues[0].write_zeroes(0, sectors, seed.is_multiple_of(2)).unwrap();
            }
            seed += 10;
            run_all(&mut machine, &Workload { seed, sleeps: interrupts, ..workload.clone() });
            drop(machine.queues);
            client.dma_unmap_all().unwrap();
        }
    }
}

#[test]
fn memory_keeps_what_is_written() {
    each_mode(&Rig::ram(), &Workload { seed: 1000, align: 1, ..Workload::default() });
}

#[test]
fn a_file_past_the_page_cache_keeps_what_is_written() {
    each_mode(&Rig::file(Cache::None), &Workload { seed: 2000, requests: 200, ..Workload::default() });
}

/// O_DIRECT has rules of alignment that a guest does not know.
#[test]
fn a_file_past_the_page_cache_takes_unaligned_buffers() {
    let rig = Rig::file(Cache::None);
    let mut machine = rig.boot();
    run_all(&mut machine, &Workload { seed: 2500, align: 1, requests: 300, ..Workload::default() });
    for align in [4, 16, 256] {
        machine.queues[0].write_zeroes(0, 4 * 512, false).unwrap();
        run_all(&mut machine, &Workload { seed: 2600, align, requests: 100, ..Workload::default() });
    }
    // Larger than what one bounce buffer holds.
    machine.queues[0].write_zeroes(0, 4 * 2048, false).unwrap();
    let large = Workload { seed: 2700, align: 2, largest: 512, sectors: 2048, depth: 4, ..Workload::default() };
    run_all(&mut machine, &Workload { requests: 60, ..large });
}

#[test]
fn a_file_through_the_page_cache_keeps_what_is_written() {
    each_mode(&Rig::file(Cache::Writeback), &Workload { seed: 3000, align: 1, requests: 200, ..Workload::default() });
}

#[test]
fn a_file_written_through_keeps_what_is_written() {
    let workload = Workload { seed: 4000, align: 1, requests: 60, ..Workload::default() };
    each_mode(&Rig::file(Cache::Writethrough), &workload);
}

#[test]
fn the_null_store_completes_everything() {
    each_mode(&Rig::null(), &Workload { seed: 5000, keeps: false, ..Workload::default() });
}

#[test]
fn requests_have_as_many_segments_as_the_device_says() {
    for cache in [None, Some(Cache::None)] {
        let rig = cache.map_or_else(Rig::ram, Rig::file);
        let options = BlockOptions { indirect_entries: 256, queues: 1, ..BlockOptions::default() };
        for rings in [0, PACKED] {
            requests_with_many_segments(&rig, &BlockOptions { features: options.features | rings, ..options.clone() });
        }
    }
}

fn requests_with_many_segments(rig: &Rig, options: &BlockOptions) {
    let mut machine = rig.boot_with(options);
    let segments = machine.driver.config().unwrap().seg_max.unwrap() as usize;
    assert_eq!(segments, 254);
    // Pieces so small that nearly every request has that many.
    let workload = Workload { seed: 6000, segments, align: 1, requests: 150, largest: 64, ..Workload::default() };
    machine.queues[0].write_zeroes(0, 512, true).unwrap();
    run_all(&mut machine, &workload);
    // And in the ring itself, where such a request leaves room for nothing else.
    machine.reboot(&BlockOptions { indirect_entries: 0, ..options.clone() });
    machine.queues[0].write_zeroes(0, 512, true).unwrap();
    run_all(&mut machine, &Workload { depth: 4, ..workload });
}

#[test]
fn queues_have_any_size() {
    for (queue_size, rings) in [2u16, 4, 8, 16, 64, 512, 1024].map(|size| (size, 0)).into_iter().chain(
        // A packed ring has any size, up to what the device offers.
        [1, 2, 3, 5, 7, 64, 100, 1000, 1024].map(|size| (size, PACKED)),
    ) {
        for features in [BlockOptions::FEATURES | rings, BlockOptions::FEATURES & !EVENT_IDX | rings] {
            let rig = Rig::with(|device| {
                device.queue_size = Some(queue_size.next_power_of_two().max(2));
                device.num_queues = Some(1);
            });
            // With two descriptors a request of three must go into a table.
            let options = BlockOptions { features, queue_size, ..BlockOptions::default() };
            let memory = GuestMemory::new(64 << 20, IOVA).unwrap();
            let mut machine = Machine::with_memory(rig.client(), memory, &options);
            let seg_max = machine.driver.config().unwrap().seg_max.unwrap() as usize;
            let workload = Workload {
                seed: 7000 + u64::from(queue_size),
                depth: usize::from(queue_size),
                segments: seg_max.min(6),
                sectors: 8192,
                requests: 1500,
                ..Workload::default()
            };
            run_all(&mut machine, &workload);
        }
    }
}

#[test]
fn sixty_four_queues_are_served_at_once() {
    let rig = Rig::with(|device| {
        device.num_queues = Some(64);
        device.size = Some(Size(64 << 20));
    });
    let options = BlockOptions { queue_size: 32, bounce_size: 64 << 10, ..BlockOptions::default() };
    let memory = GuestMemory::new(64 << 20, IOVA).unwrap();
    let mut machine = Machine::with_memory(rig.client(), memory, &options);
    assert_eq!(machine.queues.len(), 64);
    run_all(&mut machine, &Workload { seed: 8000, requests: 100, depth: 8, sectors: 256, ..Workload::default() });
}

/// Guest memory in two files side by side: a buffer may lie across them, and so may a table of indirect descriptors.
#[test]
fn buffers_may_cross_from_one_mapping_into_the_next() {
    for cache in [None, Some(Cache::None), Some(Cache::Writeback)] {
        let rig = cache.map_or_else(Rig::ram, Rig::file);
        let mut machine = rig.boot_with(&BlockOptions { queues: 1, ..BlockOptions::default() });
        // Ranges of IOVAs that follow each other, their bytes in two files by turns.
        let workload = Workload { seed: 9000, align: 1, depth: 8, largest: 32, ..Workload::default() };
        let size = (Arena::room(&workload) * workload.depth).next_multiple_of(0x1000);
        let data = GuestMemory::new(size, 0x80_0000_0000).unwrap();
        for (from, to) in pieces(size as u64, 0x3000) {
            let map =
                vfio_user::DmaMap { offset: from, address: data.base() + from, size: to - from, ..data.dma_map() };
            machine.client.dma_map(&map, Some(data.fd())).unwrap();
        }
        let arena = Arena::of(data.at(0, size).unwrap(), &workload);
        workload.run(&mut machine.queues[0], &arena);
    }
}

fn pieces(size: u64, piece: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..size).step_by(piece as usize).map(move |from| (from, size.min(from + piece)))
}

/// Rings that lie across mappings: all in one file, and the parts mapped in many pieces.
#[test]
fn rings_may_cross_mappings() {
    rings_across_mappings(BlockOptions::FEATURES);
}

#[test]
fn packed_rings_may_cross_mappings() {
    rings_across_mappings(BlockOptions::FEATURES | PACKED);
}

fn rings_across_mappings(features: u64) {
    let rig = Rig::ram();
    let client = rig.client();
    let memory = GuestMemory::new(8 << 20, IOVA).unwrap();
    for (from, to) in pieces(memory.size() as u64, 0x1000) {
        let map =
            vfio_user::DmaMap { offset: from, address: memory.base() + from, size: to - from, ..memory.dma_map() };
        client.dma_map(&map, Some(memory.fd())).unwrap();
    }
    // So that no area starts where a mapping does.
    memory.allocate(2064, 16).unwrap();
    let options = BlockOptions { features, queues: 2, queue_size: 256, ..BlockOptions::default() };
    let (driver, queues) = client::BlockDriver::start(client.clone(), &memory, &options).unwrap();
    let mut machine = Machine { client, memory, driver, queues };
    let table = machine.queues[0].ring().areas()[0];
    assert!(!table.is_multiple_of(0x1000), "the table, a page long, crosses");
    run_all(&mut machine, &Workload { seed: 9500, align: 1, ..Workload::default() });
}

/// The last pages below 2^64, where every sum is about to wrap.
#[test]
fn memory_may_lie_at_the_end_of_the_address_space() {
    for cache in [None, Some(Cache::None)] {
        let rig = cache.map_or_else(Rig::ram, Rig::file);
        let size = 16 << 20;
        // All but the very last page, for the end of a range must be a number too.
        let memory = GuestMemory::new(size, u64::MAX - 0xfff - size as u64).unwrap();
        let options = BlockOptions { queues: 2, bounce_size: 64 << 10, ..BlockOptions::default() };
        let mut machine = Machine::with_memory(rig.client(), memory, &options);
        run_all(&mut machine, &Workload { seed: 9700, align: 1, ..Workload::default() });
    }
}
