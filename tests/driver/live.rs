//! What changes under a device that runs: its memory, its bus mastering, and resets in the middle of requests.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use client::{BlockOptions, BlockRequest, Client, GuestMemory, NotifyMethod, RequestType};
use vfio_bindings::bindings::vfio::VFIO_PCI_CONFIG_REGION_INDEX;
use vfio_user::Request;
use vfio_user_blk::config::Cache;

use crate::protocol::{encoded, in_step};
use crate::rig::{IOVA, LIMIT, Machine, OK, RINGS, Rig, completion, execute, exercise, given_back, map};
use crate::workload::{Arena, Workload};

fn each_rig() -> [Rig; 2] {
    [Rig::ram(), Rig::file(Cache::None)]
}

/// Runs `change` again and again while each queue does its work; gives how often.
fn meanwhile(machine: &mut Machine, workload: &Workload, mut change: impl FnMut(&Client, u64) + Send) -> u64 {
    let over = AtomicBool::new(false);
    let changes = AtomicU64::new(0);
    let client = Arc::clone(&machine.client);
    let Machine { memory, queues, .. } = machine;
    thread::scope(|scope| {
        let workers: Vec<_> = queues
            .iter_mut()
            .enumerate()
            .map(|(index, queue)| {
                let first_sector = (index * workload.sectors) as u64;
                let own = Workload { seed: workload.seed + index as u64, first_sector, ..workload.clone() };
                let arena = Arena::new(memory, &own);
                scope.spawn(move || own.run(queue, &arena))
            })
            .collect();
        let (over, changes) = (&over, &changes);
        scope.spawn(move || {
            while !over.load(Ordering::Relaxed) {
                change(&client, changes.fetch_add(1, Ordering::Relaxed));
            }
        });
        let results: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
        over.store(true, Ordering::Relaxed);
        assert!(results.iter().all(Result::is_ok));
    });
    changes.into_inner()
}

#[test]
fn other_memory_comes_and_goes_under_requests() {
    for rig in each_rig() {
        let mut machine = rig.boot_with(&BlockOptions { queues: 2, ..BlockOptions::default() });
        let other = GuestMemory::new(64 << 10, 0x40_0000_0000).unwrap();
        let workload = Workload { seed: 100, align: 1, requests: 2000, ..Workload::default() };
        let changes = meanwhile(&mut machine, &workload, |client, _| {
            map(client, &other);
            client.dma_unmap(other.base(), other.size() as u64).unwrap();
        });
        assert!(changes > 10);
        exercise(&mut machine.queues);
    }
}

/// All of guest memory, rings and all, goes and comes back: a driver sees no more than a pause.
#[test]
fn the_rings_may_go_and_come_back_under_requests() {
    for rig in each_rig() {
        for (notify, rings) in
            [(NotifyMethod::IoEventFd, 0)].into_iter().chain(RINGS.map(|r| (NotifyMethod::Posted, r)))
        {
            let memory = GuestMemory::new(16 << 20, IOVA).unwrap();
            let all = memory.dma_map();
            let fd = memory.fd().try_clone_to_owned().unwrap();
            let features = BlockOptions::FEATURES | rings;
            let options = BlockOptions { features, queues: 2, notify, ..BlockOptions::default() };
            let mut machine = Machine::with_memory(rig.client(), memory, &options);
            machine.queues[0].write_zeroes(0, 1024, true).unwrap();
            let workload = Workload { seed: 200, align: 1, requests: 1500, ..Workload::default() };
            let changes = meanwhile(&mut machine, &workload, |client, _| {
                client.dma_unmap(all.address, all.size).unwrap();
                client.dma_map(&all, Some(std::os::fd::AsFd::as_fd(&fd))).unwrap();
            });
            assert!(changes > 3, "{changes} changes");
            exercise(&mut machine.queues);
        }
    }
}

/// QEMU sends all maps of a memory transaction without waiting in between: the one that brings a ring back may come while
/// the queue still looks for it after the one before.
#[test]
fn a_ring_is_found_again_by_whichever_map_brings_it() {
    let rig = Rig::ram();
    let mut machine = rig.boot_with(&BlockOptions { queues: 1, ..BlockOptions::default() });
    let all = machine.memory.dma_map();
    let other = GuestMemory::new(4096, 0x40_0000_0000).unwrap();
    let maps = [encoded(1, &Request::DmaMap(other.dma_map())), encoded(2, &Request::DmaMap(all))];
    let queue = &mut machine.queues[0];
    for _ in 0..1500 {
        machine.client.dma_unmap(all.address, all.size).unwrap();
        // Left in the ring while that is not mapped; the kick goes nowhere.
        queue.submit(&BlockRequest { kind: RequestType::Flush, sector: 0, data: &[] }).unwrap();
        queue.publish().unwrap();
        machine.client.send_raw(&maps[0], &[other.fd()]).unwrap();
        machine.client.send_raw(&maps[1], &[machine.memory.fd()]).unwrap();
        for _ in 0..2 {
            assert_eq!(machine.client.recv_raw(LIMIT).unwrap().unwrap().header.error(), None);
        }
        assert_eq!(completion(queue).status, OK);
        machine.client.dma_unmap(other.base(), other.size() as u64).unwrap();
    }
}

#[test]
fn a_reset_ends_requests_in_flight() {
    for rig in each_rig() {
        let memory = GuestMemory::new(256 << 20, IOVA).unwrap();
        let options = BlockOptions { bounce_size: 64 << 10, ..BlockOptions::default() };
        // Split and packed rings by turns.
        let each = RINGS.map(|rings| BlockOptions { features: BlockOptions::FEATURES | rings, ..options.clone() });
        let mut machine = Machine::with_memory(rig.client(), memory, &options);
        let data = machine.memory.allocate(64 << 10, 4096).unwrap();
        let segment = [data.segment(0, 64 << 10).unwrap()];
        for round in 0..40u8 {
            for queue in &mut machine.queues {
                for slot in 0..20 {
                    queue
                        .submit(&BlockRequest { kind: RequestType::Read, sector: 128 * slot, data: &segment })
                        .unwrap();
                }
                queue.publish().unwrap();
            }
            if round % 2 == 0 {
                machine.client.reset().unwrap();
            } else {
                machine.driver.transport().reset().unwrap();
            }
            assert_eq!(machine.status(), 0);
            // From the answer on the memory is the driver's: nothing is written there any more.
            data.fill(round);
            machine.reboot(&each[usize::from(round) % each.len()]);
            exercise(&mut machine.queues);
            assert!(data.to_vec().iter().all(|byte| *byte == round), "a late read came through");
        }
    }
}

#[test]
fn without_bus_mastering_nothing_moves() {
    let posted = RINGS.map(|rings| (NotifyMethod::Posted, rings));
    for (notify, rings) in posted.into_iter().chain([(NotifyMethod::IoEventFd, 0)]) {
        let rig = Rig::ram();
        let features = BlockOptions::FEATURES | rings;
        let mut machine = rig.boot_with(&BlockOptions { features, notify, ..BlockOptions::default() });
        let command = |client: &Client, value: u16| {
            client.region_write(VFIO_PCI_CONFIG_REGION_INDEX, 4, &value.to_le_bytes()).unwrap();
            // The answer to a write comes before its effects, the next answer after them.
            in_step(client);
        };
        for _ in 0..20 {
            exercise(&mut machine.queues);
            command(&machine.client, 2);
            for queue in &mut machine.queues {
                for _ in 0..3 {
                    queue.submit(&BlockRequest { kind: RequestType::Flush, sector: 0, data: &[] }).unwrap();
                    queue.publish().unwrap();
                }
            }
            in_step(&machine.client);
            assert!(!machine.queues.iter().any(|queue| queue.ring().has_used()));
            command(&machine.client, 6);
            for queue in &mut machine.queues {
                for _ in 0..3 {
                    assert_eq!(completion(queue).status, OK);
                }
            }
        }
        // Off in the middle of requests: those in flight end, the rest wait.
        for round in 0..20 {
            let queue = &mut machine.queues[round % 4];
            for _ in 0..50 {
                queue.submit(&BlockRequest { kind: RequestType::Flush, sector: 0, data: &[] }).unwrap();
            }
            queue.publish().unwrap();
            command(&machine.client, 2);
            let before = given_back(queue);
            in_step(&machine.client);
            assert_eq!(given_back(queue), before);
            command(&machine.client, 6);
            for _ in 0..50 {
                assert_eq!(completion(queue).status, OK);
            }
        }
    }
}

/// A reset while bus mastering is off, and a start that waits for it.
#[test]
fn a_device_may_be_reset_and_started_without_bus_mastering() {
    let rig = Rig::ram();
    let mut machine = rig.boot();
    let client = Arc::clone(&machine.client);
    let command = |value: u16| client.region_write(VFIO_PCI_CONFIG_REGION_INDEX, 4, &value.to_le_bytes()).unwrap();
    for _ in 0..10 {
        command(2);
        machine.driver.transport().reset().unwrap();
        machine.reboot(&BlockOptions { bounce_size: 4096, queue_size: 16, ..BlockOptions::default() });
        exercise(&mut machine.queues);
    }
    let data = machine.memory.allocate(512, 512).unwrap();
    let done = execute(&mut machine.queues[0], RequestType::Read, 0, &[data.segment(0, 512).unwrap()]);
    assert_eq!(done.status, OK);
}
