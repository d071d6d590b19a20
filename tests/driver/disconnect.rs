//! Clients that go at any moment: the next one is served, and nothing of the last stays behind.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use client::{BlockOptions, BlockRequest, Client, GuestMemory, RequestType, Segment};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use vfio_user::{DmaMap, IrqAction, IrqData, Request, SetIrqs};

use crate::binary::{Served, disk};
use crate::protocol::{encoded, in_step};
use crate::rig::{DISK, IOVA, LIMIT, Machine, Rig, completion, eventfd, exercise, map, until};

/// Sends bytes and descriptors and reads nothing.
fn send(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights[..] };
    let iov = [std::io::IoSlice::new(bytes)];
    assert_eq!(sendmsg::<()>(stream.as_raw_fd(), &iov, control, MsgFlags::empty(), None), Ok(bytes.len()));
}

fn version() -> Vec<u8> {
    encoded(0, &Request::Version(Client::proposal()))
}

/// A message and its descriptors, cut after each of its bytes: what came is closed, the next client is served.
fn cut_everywhere(server: &Served, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    for sent in 1..=bytes.len() {
        server.expect_client();
        let mut stream = UnixStream::connect(server.socket()).unwrap();
        // Sometimes together with what goes before, so that it lies in the server's socket in one piece.
        if sent % 2 == 0 {
            stream.write_all(&version()).unwrap();
            send(&stream, &bytes[..sent], fds);
        } else {
            send(&stream, &[&version(), &bytes[..sent]].concat(), fds);
        }
    }
    in_step(&server.client());
}

#[test]
fn a_client_may_go_between_any_two_bytes() {
    let server = Served::start(|folder| disk(&folder.join("blk.sock")));
    in_step(&server.client());
    let before = server.resources();
    let memory = GuestMemory::new(1 << 20, IOVA).unwrap();
    let map = encoded(1, &Request::DmaMap(memory.dma_map()));
    cut_everywhere(&server, &map, &[memory.fd()]);
    let events: Vec<_> = (0..4).map(|_| eventfd()).collect();
    let fds: Vec<_> = events.iter().map(AsFd::as_fd).collect();
    let set = SetIrqs { action: IrqAction::Trigger, data: IrqData::EventFd, index: 2, start: 0, count: 4 };
    cut_everywhere(&server, &encoded(1, &Request::DeviceSetIrqs(set)), &fds);
    // The last client has gone when nothing of it is left.
    server.rests_with(before);
    server.stop();
}

#[test]
fn hundreds_of_clients_leave_nothing_behind() {
    let server = Served::start(|folder| disk(&folder.join("blk.sock")));
    let visit = |round: usize| {
        let client = server.client();
        let options = BlockOptions { queue_size: 16, bounce_size: 4096, ..BlockOptions::default() };
        let memory = GuestMemory::new(1 << 20, IOVA).unwrap();
        let mut machine = Machine::with_memory(client, memory, &options);
        let _io_fds = machine.client.region_io_fds(2).unwrap();
        exercise(&mut machine.queues);
        let extra = GuestMemory::new(4096, 0x50_0000_0000).unwrap();
        map(&machine.client, &extra);
        match round % 4 {
            0 => machine.driver.stop().unwrap(),
            1 => machine.client.reset().unwrap(),
            2 => machine.client.dma_unmap_all().unwrap(),
            // And the rest just go.
            _ => {}
        }
    };
    (0..8).for_each(visit);
    in_step(&server.client());
    let before = server.resources();
    (0..200).for_each(visit);
    in_step(&server.client());
    server.rests_with(before);
    server.stop();
}

/// Fills a queue with writes of a pattern that tells their round, and goes.
fn go_while_writing(client: Arc<Client>, round: u8, wait_for: usize) {
    let memory = GuestMemory::new(16 << 20, IOVA).unwrap();
    let options = BlockOptions { queues: 2, interrupts: round.is_multiple_of(2), ..BlockOptions::default() };
    let mut machine = Machine::with_memory(client, memory, &options);
    let buffer = machine.memory.allocate(64 << 10, 4096).unwrap();
    buffer.fill(round);
    let segment = [buffer.segment(0, 64 << 10).unwrap()];
    for queue in &mut machine.queues {
        for slot in 0..40 {
            let write = BlockRequest { kind: RequestType::Write, sector: 128 * slot, data: &segment };
            queue.submit(&write).unwrap();
        }
        queue.publish().unwrap();
    }
    for _ in 0..wait_for {
        assert_eq!(completion(&mut machine.queues[0]).status, 0);
    }
}

/// Each unit of 64 KiB is of one round, and of none before `oldest`: no late write came through.
fn check_rounds(queue: &mut client::BlockQueue, newest: u8) {
    let mut unit = vec![0; 64 << 10];
    for slot in 0..40 {
        queue.read(128 * slot, &mut unit).unwrap();
        assert!(unit.chunks(512).all(|sector| sector.iter().all(|byte| *byte == sector[0])), "a torn sector");
        assert!(unit[0] <= newest, "slot {slot} is of round {}", unit[0]);
    }
}

#[test]
fn a_client_may_go_in_the_middle_of_requests() {
    for cache in [None, Some(vfio_user_blk::config::Cache::None), Some(vfio_user_blk::config::Cache::Writeback)] {
        let rig = cache.map_or_else(Rig::ram, Rig::file);
        for round in 1..=12 {
            go_while_writing(rig.client(), round, usize::from(round) % 3 * 13);
        }
        let mut machine = rig.boot();
        let queue = &mut machine.queues[0];
        check_rounds(queue, 12);
        // What the next client writes stays: nothing of the last one is still on its way.
        let mark = vec![0xee; 64 << 10];
        for slot in 0..40 {
            queue.write(128 * slot, &mark).unwrap();
        }
        drop(machine);
        let mut machine = rig.boot();
        let mut back = vec![0; 64 << 10];
        for slot in 0..40 {
            machine.queues[0].read(128 * slot, &mut back).unwrap();
            assert_eq!(back, mark, "slot {slot}");
        }
    }
}

#[test]
fn a_client_waits_while_another_is_served() {
    let rig = Rig::ram();
    let mut first = rig.boot();
    let second = UnixStream::connect(rig.socket(0)).unwrap();
    let second = Client::from_stream(second).unwrap();
    second.set_timeout(LIMIT);
    second.send_raw(&version(), &[]).unwrap();
    exercise(&mut first.queues);
    assert!(second.recv_raw(std::time::Duration::ZERO).unwrap().is_none(), "one client at a time");
    drop(first);
    assert_eq!(second.recv_raw(LIMIT).unwrap().expect("an answer").header.error(), None);
    in_step(&second);
}

/// A whole process that is killed in the middle of requests: this test's own program, run once more.
#[test]
fn a_killed_client_is_followed_by_the_next() {
    let server = Served::start(|folder| {
        let mut arguments = disk(&folder.join("blk.sock"));
        arguments.extend(["--blk-file".into(), folder.join("disk.img").display().to_string()]);
        arguments
    });
    let before = {
        in_step(&server.client());
        server.resources()
    };
    for round in 1..=3 {
        server.expect_client();
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "disconnect::victim", "--ignored", "--nocapture"])
            .env("VICTIM_SOCKET", server.socket())
            .env("VICTIM_ROUND", round.to_string())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
        assert!(lines.any(|line| line.unwrap().contains("writing")), "it did not start");
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let client = server.client();
    let mut machine = Machine::new(client, &BlockOptions::default());
    check_rounds(&mut machine.queues[0], 3);
    exercise(&mut machine.queues);
    drop(machine);
    server.rests_with(before);
    let folder = server.stop();
    assert_eq!(std::fs::metadata(folder.path().join("disk.img")).unwrap().len(), DISK);
}

/// Run by the test above: writes until it is killed.
#[test]
#[ignore = "runs until it is killed, for another test"]
fn victim() {
    let socket = std::env::var("VICTIM_SOCKET").expect("run by a_killed_client_is_followed_by_the_next");
    let round: u8 = std::env::var("VICTIM_ROUND").unwrap().parse().unwrap();
    let client = Arc::new(Client::connect(Path::new(&socket)).unwrap());
    let mut machine = Machine::new(client, &BlockOptions { queues: 1, ..BlockOptions::default() });
    let buffer = machine.memory.allocate(64 << 10, 4096).unwrap();
    buffer.fill(round);
    let data = [buffer.segment(0, 64 << 10).unwrap()];
    let queue = &mut machine.queues[0];
    println!("writing");
    for slot in (0..40).cycle() {
        let write = BlockRequest { kind: RequestType::Write, sector: 128 * slot, data: &data };
        if queue.submit(&write).is_err() {
            queue.publish().unwrap();
            completion(queue);
        }
    }
}

/// A client whose memory shrinks under the device: the end of that client, not of the server.
#[test]
fn a_client_may_shrink_its_memory() {
    let server = Served::start(|folder| disk(&folder.join("blk.sock")));
    let memory = GuestMemory::new(1 << 20, IOVA).unwrap();
    let shrinks = File::from(memfd_create(c"shrinks", MFdFlags::MFD_CLOEXEC).unwrap());
    shrinks.set_len(1 << 20).unwrap();
    let options = BlockOptions { queue_size: 16, bounce_size: 4096, ..BlockOptions::default() };
    let mut machine = Machine::with_memory(server.client(), memory, &options);
    let map = DmaMap { address: 0x50_0000_0000, ..machine.memory.dma_map() };
    machine.client.dma_map(&map, Some(shrinks.as_fd())).unwrap();
    shrinks.set_len(0).unwrap();
    let data = [Segment { iova: map.address, len: 4096 }];
    let queue = &mut machine.queues[0];
    queue.submit(&BlockRequest { kind: RequestType::Read, sector: 0, data: &data }).unwrap();
    queue.publish().unwrap();
    until("the request or the connection ends", || queue.ring().has_used() || machine.client.device_info().is_err());
    drop(machine);
    in_step(&server.client());
    server.stop();
}
