//! DMA_MAP and DMA_UNMAP: what is taken, what is refused with which errno.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;

use client::{Client, GuestMemory};
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vfio_user::{Command, DmaMap, Request};

use crate::protocol::{encoded, in_step, message};
use crate::rig::{IOVA, LIMIT, Rig, eventfd, exercise, map};

const SIZE: u64 = 0x10000;

fn range(address: u64, size: u64) -> DmaMap {
    DmaMap { readable: true, writeable: true, offset: 0, address, size }
}

fn memfd(len: u64) -> File {
    let file = File::from(memfd_create(c"range", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file
}

/// Maps, and gives the errno of a refusal.
fn try_map(client: &Client, map: &DmaMap, fd: Option<BorrowedFd<'_>>) -> Option<Errno> {
    let errno = client.dma_map(map, fd).err().map(|error| error.errno().expect("an errno"));
    in_step(client);
    errno
}

fn try_unmap(client: &Client, address: u64, size: u64) -> Option<Errno> {
    let errno = client.dma_unmap(address, size).err().map(|error| error.errno().expect("an errno"));
    in_step(client);
    errno
}

#[test]
fn ranges_come_and_go() {
    let rig = Rig::ram();
    let client = rig.client();
    let file = memfd(SIZE);
    for _ in 0..3 {
        assert_eq!(try_map(&client, &range(IOVA, SIZE), Some(file.as_fd())), None);
        assert_eq!(try_map(&client, &range(IOVA + SIZE, SIZE), None), None, "without a file");
        assert_eq!(try_unmap(&client, IOVA, SIZE), None);
        assert_eq!(try_unmap(&client, IOVA + SIZE, SIZE), None);
    }
    // Several at once, by one unmap of all that lies within.
    for page in 0..16 {
        assert_eq!(try_map(&client, &range(IOVA + page * 0x1000, 0x1000), Some(file.as_fd())), None);
    }
    assert_eq!(try_unmap(&client, IOVA, SIZE), None);
    assert_eq!(try_unmap(&client, IOVA, SIZE), Some(Errno::EINVAL), "nothing is left");
    client.dma_unmap_all().unwrap();
    assert_eq!(try_map(&client, &range(IOVA, SIZE), Some(file.as_fd())), None);
    client.dma_unmap_all().unwrap();
    client.dma_unmap_all().unwrap();
    assert_eq!(try_map(&client, &range(IOVA, SIZE), Some(file.as_fd())), None, "all are gone");
}

#[test]
fn an_overlap_is_refused() {
    let rig = Rig::ram();
    let client = rig.client();
    let file = memfd(4 * SIZE);
    assert_eq!(try_map(&client, &range(IOVA, SIZE), Some(file.as_fd())), None);
    for (address, size) in [
        (IOVA, SIZE),
        (IOVA - 0x1000, 0x2000),
        (IOVA + SIZE - 0x1000, 0x2000),
        (IOVA + 0x1000, 0x1000),
        (IOVA - 0x1000, SIZE + 0x2000),
    ] {
        for fd in [Some(file.as_fd()), None] {
            assert_eq!(try_map(&client, &range(address, size), fd), Some(Errno::EEXIST), "{address:#x}+{size:#x}");
        }
    }
    assert_eq!(try_map(&client, &range(IOVA - 0x1000, 0x1000), Some(file.as_fd())), None, "just before");
    assert_eq!(try_map(&client, &range(IOVA + SIZE, 0x1000), Some(file.as_fd())), None, "just behind");
}

#[test]
fn an_unmap_that_cuts_a_range_is_refused() {
    let rig = Rig::ram();
    let client = rig.client();
    let file = memfd(SIZE);
    assert_eq!(try_map(&client, &range(IOVA, SIZE), Some(file.as_fd())), None);
    assert_eq!(try_map(&client, &range(IOVA + SIZE, SIZE), Some(file.as_fd())), None);
    for (address, size) in [
        (IOVA, 0x1000),
        (IOVA + 0x1000, SIZE - 0x1000),
        (IOVA, SIZE + 0x1000),
        (IOVA - 0x1000, 0x2000),
        (IOVA + 0x1000, 0x1000),
        (IOVA - SIZE, SIZE),
        (IOVA, 0),
        (IOVA, u64::MAX),
        (u64::MAX, 1),
    ] {
        assert_eq!(try_unmap(&client, address, size), Some(Errno::EINVAL), "{address:#x}+{size:#x}");
    }
    assert_eq!(try_unmap(&client, IOVA, 2 * SIZE), None, "all of it was still there");
    // VFIO_DMA_UNMAP_FLAG_ALL with a range.
    let mut all = [0; 24];
    all[..8].copy_from_slice(&[24, 0, 0, 0, 2, 0, 0, 0]);
    all[17] = 0x10;
    client.send_raw(&message(1, Command::DmaUnmap.number(), 0, &all), &[]).unwrap();
    assert_eq!(client.recv_raw(LIMIT).unwrap().unwrap().header.error(), Some(Errno::EINVAL));
}

#[test]
fn ranges_are_whole_pages_within_the_address_space() {
    let rig = Rig::ram();
    let client = rig.client();
    let file = memfd(SIZE);
    let high = 0xffff_ffff_ffff_0000;
    for (address, size, offset) in [
        (IOVA + 1, 0x1000, 0),
        (IOVA, 0xfff, 0),
        (IOVA, 0x1000, 512),
        (IOVA, 0, 0),
        (high, 0x2_0000, 0),
        (IOVA, !0xfff, 0),
        (IOVA, 0x1000, !0xfff),
        (IOVA, SIZE + 0x1000, 0),
        (IOVA, SIZE, 0x1000),
    ] {
        let map = DmaMap { offset, ..range(address, size) };
        assert_eq!(try_map(&client, &map, Some(file.as_fd())), Some(Errno::EINVAL), "{map:x?}");
    }
    assert_eq!(try_map(&client, &range(high, 0xf000), Some(file.as_fd())), None);
}

#[test]
fn what_cannot_be_mapped_is_refused() {
    let rig = Rig::with(|device| device.any_memory_file = true);
    let client = rig.client();
    let folder = tempfile::tempdir().unwrap();
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let (socket, _peer) = UnixStream::pair().unwrap();
    let event = eventfd();
    let path = folder.path().join("file");
    let full = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    full.set_len(SIZE).unwrap();
    let only_path = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&path).unwrap();
    let write_only = OpenOptions::new().write(true).open(&path).unwrap();
    let things: [(&str, OwnedFd); 8] = [
        ("a pipe's end", reader),
        ("a pipe's other end", writer),
        ("a folder", File::open(folder.path()).unwrap().into()),
        ("a socket", socket.into()),
        ("an eventfd", event.into()),
        ("a device", File::open("/dev/null").unwrap().into()),
        ("an empty file", memfd(0).into()),
        ("a file that is too short", memfd(SIZE - 1).into()),
    ];
    for (what, thing) in things {
        assert_eq!(try_map(&client, &range(IOVA, SIZE), Some(thing.as_fd())), Some(Errno::EINVAL), "{what}");
    }
    for (what, thing) in [("a file that is no more than a path", only_path), ("a file to write only", write_only)] {
        assert!(try_map(&client, &range(IOVA, SIZE), Some(thing.as_fd())).is_some(), "{what}");
    }
    let read_only = File::open(&path).unwrap();
    assert_eq!(try_map(&client, &range(IOVA, SIZE), Some(read_only.as_fd())), Some(Errno::EACCES));
    let reading = DmaMap { writeable: false, ..range(IOVA, SIZE) };
    assert_eq!(try_map(&client, &reading, Some(read_only.as_fd())), None, "the device only reads it");
}

#[test]
fn one_range_has_one_descriptor() {
    let rig = Rig::ram();
    let client = rig.client();
    let file = memfd(SIZE);
    let bytes = encoded(5, &Request::DmaMap(range(IOVA, SIZE)));
    client.send_raw(&bytes, &[file.as_fd(), file.as_fd()]).unwrap();
    assert_eq!(client.recv_raw(LIMIT).unwrap().unwrap().header.error(), Some(Errno::EINVAL));
    assert_eq!(try_map(&client, &range(IOVA, SIZE), Some(file.as_fd())), None);
}

/// As many as VERSION says, and not one more; they go as fast as they came.
#[test]
fn the_number_of_ranges_has_a_limit() {
    let rig = Rig::ram();
    let client = rig.client();
    let file = memfd(0x1000);
    let most = client.server_capabilities().max_dma_maps();
    assert_eq!(most, 65535);
    // A buffer for as many as the socket takes, so that no round trip is waited for.
    const AT_ONCE: u64 = 64;
    for first in (0..most).step_by(AT_ONCE as usize) {
        let ids = first..most.min(first + AT_ONCE);
        for id in ids.clone() {
            let map = Request::DmaMap(range(IOVA + 0x2000 * id, 0x1000));
            client.send_raw(&encoded(id as u16, &map), &[file.as_fd()]).unwrap();
        }
        for id in ids {
            let answer = client.recv_raw(LIMIT).unwrap().unwrap();
            assert_eq!((u64::from(answer.header.id), answer.header.error()), (id, None));
        }
    }
    let another = range(IOVA - 0x2000, 0x1000);
    assert_eq!(try_map(&client, &another, Some(file.as_fd())), Some(Errno::ENOSPC));
    assert_eq!(try_unmap(&client, IOVA, 0x1000), None);
    assert_eq!(try_map(&client, &another, Some(file.as_fd())), None);
    client.dma_unmap_all().unwrap();
}

/// The answer comes after the memory is gone from the server: what the client does with it then is its own affair.
#[test]
fn an_unmap_takes_the_memory_away_from_a_device_that_runs() {
    let rig = Rig::ram();
    let mut machine = rig.boot();
    let data = GuestMemory::new(1 << 20, 0x20_0000_0000).unwrap();
    for round in 0..20u8 {
        map(&machine.client, &data);
        let buffer = data.at(4096 * usize::from(round), 4096).unwrap();
        buffer.fill(round);
        let segment = buffer.segment(0, 4096).unwrap();
        let done = crate::rig::execute(&mut machine.queues[0], client::RequestType::Write, 8, &[segment]);
        assert_eq!(done.status, 0);
        machine.client.dma_unmap(data.base(), data.size() as u64).unwrap();
        let mut back = [0; 4096];
        machine.queues[1].read(8, &mut back).unwrap();
        assert_eq!(back, [round; 4096]);
    }
    exercise(&mut machine.queues);
}
