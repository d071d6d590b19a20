//! Many devices, and many mappings: what a large host and a guest behind an IOMMU make of a server.

use std::fmt::Write;
use std::fs;
use std::os::fd::AsFd;

use client::{BlockOptions, BlockRequest, Client, GuestMemory, RequestType, Segment};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use vfio_user::{DmaMap, Request};

use crate::binary::Served;
use crate::protocol::encoded;
use crate::rig::{IOVA, LIMIT, Machine, OK, Random, Rig, execute};

/// Each attached and at work beside all others, on two workers.
#[test]
fn a_thousand_devices_are_served_by_one_process() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    // On either side a handful of descriptors each.
    let devices = usize::try_from(most / 16).unwrap().min(1000);
    let server = Served::start(|folder| {
        let mut config = "[[device]]\nsocket_path = \"blk.sock\"\nsize = \"1M\"\nnum_queues = 1\n".to_owned();
        for device in 1..devices {
            writeln!(config, "[[device]]\nsocket_path = \"{device}.sock\"\nsize = \"1M\"\nnum_queues = 1").unwrap();
        }
        let path = folder.join("server.toml");
        fs::write(&path, config).unwrap();
        vec!["--config".into(), path.display().to_string()]
    });
    let options = BlockOptions { queues: 1, queue_size: 16, bounce_size: 4096, ..BlockOptions::default() };
    let attach = |device: usize| {
        let socket =
            if device == 0 { server.socket().to_owned() } else { server.folder().join(format!("{device}.sock")) };
        let client = Client::connect(&socket).unwrap();
        client.set_timeout(LIMIT);
        Machine::with_memory(client.into(), GuestMemory::new(128 << 10, IOVA).unwrap(), &options)
    };
    let mut machines: Vec<_> = (0..devices).map(attach).collect();
    let contents = |device: usize| [(device % 251) as u8 + 1; 512];
    for (device, machine) in machines.iter_mut().enumerate() {
        machine.queues[0].write(device as u64, &contents(device)).unwrap();
    }
    for (device, machine) in machines.iter_mut().enumerate() {
        let mut sector = [0; 512];
        machine.queues[0].read(device as u64, &mut sector).unwrap();
        assert_eq!(sector, contents(device), "device {device}");
    }
    assert_eq!(server.threads("worker-").len(), 2);
    drop(machines);
    server.stop();
}

/// Pages are found among tens of thousands, and the right ones.
#[test]
fn requests_find_their_pages_among_many() {
    const PAGE: u64 = 4096;
    const MAPPINGS: u64 = 50_000;
    /// Pages of the file that they lead to.
    const PAGES: u64 = 128;
    /// Maps that are sent before the first answer is read: fewer than a socket holds.
    const AT_ONCE: u64 = 64;
    let base = 0x100_0000_0000;
    let rig = Rig::ram();
    let mut machine = rig.boot();
    let memory = GuestMemory::new((PAGES * PAGE) as usize, base).unwrap();
    // With a gap behind each.
    let iova = |number: u64| base + 2 * PAGE * number;
    for first in (0..MAPPINGS).step_by(AT_ONCE as usize) {
        let numbers = first..MAPPINGS.min(first + AT_ONCE);
        for number in numbers.clone() {
            let (offset, address) = (number % PAGES * PAGE, iova(number));
            let map = DmaMap { readable: true, writeable: true, offset, address, size: PAGE };
            let message = encoded(number as u16, &Request::DmaMap(map));
            machine.client.send_raw(&message, &[memory.fd().as_fd()]).unwrap();
        }
        for _ in numbers {
            assert_eq!(machine.client.recv_raw(LIMIT).unwrap().unwrap().header.error(), None);
        }
    }
    for page in 0..PAGES {
        memory.at((page * PAGE) as usize, PAGE as usize).unwrap().fill(page as u8 + 1);
    }
    let mut random = Random::new(7);
    let queue = &mut machine.queues[0];
    for _ in 0..2000 {
        let number = random.below(MAPPINGS);
        let segment = Segment { iova: iova(number), len: PAGE as u32 };
        assert_eq!(execute(queue, RequestType::Write, 8, &[segment]).status, OK);
        let mut back = [0; PAGE as usize];
        queue.read(8, &mut back).unwrap();
        assert_eq!(back, [(number % PAGES) as u8 + 1; PAGE as usize], "mapping {number}");
    }
    // The gaps and what was unmapped are not there.
    machine.client.dma_unmap(iova(1000), 2 * PAGE * 30_000 - PAGE).unwrap();
    for number in [999, 31_000, 0, MAPPINGS - 1] {
        let segment = Segment { iova: iova(number), len: PAGE as u32 };
        assert_eq!(execute(&mut machine.queues[1], RequestType::Write, 8, &[segment]).status, OK);
    }
    let gone = Segment { iova: iova(15_000), len: PAGE as u32 };
    machine.queues[1].submit(&BlockRequest { kind: RequestType::Write, sector: 8, data: &[gone] }).unwrap();
    machine.queues[1].publish().unwrap();
    crate::rig::until("the device has seen that it is not there", || {
        machine.status() & virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET != 0
    });
}
