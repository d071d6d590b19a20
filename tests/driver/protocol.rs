//! The commands of the protocol, their refusals, and the stream that stays in step through all of them.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use client::{BlockOptions, Client, CommonRegister, Error, NotifyMethod, VirtioPci};
use nix::errno::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_NUM_REGIONS,
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
};
use vfio_user::{Capabilities, Command, Header, RegionData, Request, Version};

use crate::rig::{IOVA, LIMIT, Machine, Rig, eventfd, exercise};

const CONFIG: u32 = VFIO_PCI_CONFIG_REGION_INDEX;
const VENDOR: [u8; 2] = 0x1af4u16.to_le_bytes();

/// A message as bytes.
pub(crate) fn message(id: u16, command: u16, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = (Header::SIZE + payload.len()) as u32;
    let mut bytes = Header { id, command, size, flags, errno: 0 }.encode().to_vec();
    bytes.extend(payload);
    bytes
}

/// A request as bytes.
pub(crate) fn encoded(id: u16, request: &Request<'_>) -> Vec<u8> {
    let mut payload = Vec::new();
    request.encode(&mut payload);
    message(id, request.command().number(), 0, &payload)
}

/// A request for the vendor ID, and whether a payload is its answer.
pub(crate) fn ask_vendor(id: u16) -> Vec<u8> {
    encoded(id, &Request::RegionRead(vfio_user::RegionSpan { offset: 0, region: CONFIG, count: 2 }))
}

/// Takes the answer to [`ask_vendor`], which must be the next message.
pub(crate) fn expect_vendor(client: &Client, id: u16) {
    let answer = client.recv_raw(LIMIT).unwrap().expect("an answer");
    assert_eq!((answer.header.id, answer.header.command), (id, Command::RegionRead.number()));
    assert_eq!(answer.header.error(), None);
    assert_eq!(answer.payload[16..], VENDOR);
}

/// That server and client are in step: the next question gets its own answer.
pub(crate) fn in_step(client: &Client) {
    let mut vendor = [0; 2];
    client.region_read(CONFIG, 0, &mut vendor).unwrap();
    assert_eq!(vendor, VENDOR);
}

/// Sends a message and gives the errno that comes back.
fn refused(client: &Client, bytes: &[u8]) -> Errno {
    client.send_raw(bytes, &[]).unwrap();
    let answer = client.recv_raw(LIMIT).unwrap().expect("an answer");
    assert_eq!(answer.header.encode()[..4], bytes[..4], "it names the message that it answers");
    assert!(answer.payload.is_empty() && answer.fds.is_empty());
    let errno = answer.header.error().expect("an error");
    in_step(client);
    errno
}

fn fresh(rig: &Rig) -> Client {
    let client = Client::from_stream(UnixStream::connect(rig.socket(0)).unwrap()).unwrap();
    client.set_timeout(LIMIT);
    client
}

#[test]
fn a_version_is_agreed_on() {
    let rig = Rig::ram();
    let client = fresh(&rig);
    let answer = client.version(&Client::proposal()).unwrap();
    assert_eq!((answer.major, answer.minor), (0, 0));
    // Within what QEMU takes.
    assert!(answer.capabilities.max_msg_fds() <= 16);
    assert!(answer.capabilities.max_data_xfer_size() <= 64 << 20);
    assert!(answer.capabilities.max_dma_maps() <= 65535);
    assert_eq!(answer.capabilities.pgsizes(), 4096);
    assert_eq!(answer.capabilities.write_multiple, None, "it would make QEMU queue what it sends");
    drop(client);
    let newer = Version { minor: 9, ..Client::proposal() };
    assert_eq!(fresh(&rig).version(&newer).unwrap().minor, 1);
}

/// Section "VFIO_USER_VERSION": the capabilities of the reply are a subset of those proposed.
#[test]
fn no_capability_is_answered_that_was_not_proposed() {
    let rig = Rig::ram();
    let none = Capabilities::default();
    for proposed in [
        none.clone(),
        Capabilities { max_msg_fds: Some(1), ..none.clone() },
        Capabilities { max_data_xfer_size: Some(1 << 20), pgsizes: Some(4096), ..none.clone() },
        Capabilities { max_dma_maps: Some(65535), ..none },
    ] {
        let proposal = Version { major: 0, minor: 1, capabilities: proposed.clone() };
        let answered = fresh(&rig).version(&proposal).unwrap().capabilities;
        let names = |it: &Capabilities| {
            [it.max_msg_fds, it.max_data_xfer_size, it.max_dma_maps, it.pgsizes].map(|it| it.is_some())
        };
        for (answered, proposed) in names(&answered).into_iter().zip(names(&proposed)) {
            assert!(proposed || !answered);
        }
        assert_eq!((answered.write_multiple, answered.migration), (None, None));
    }
}

/// QEMU: "reply larger than recv buffer" otherwise.
#[test]
fn the_answer_to_version_is_no_larger_than_the_request() {
    let rig = Rig::ram();
    let qemu = b"\0\0\0\0{\"capabilities\": {\"migration\": {\"pgsize\": 4096, \"max_bitmap_size\": 268435456}, \
        \"max_msg_fds\": 16, \"max_data_xfer_size\": 1048576, \"pgsizes\": 4096, \"max_dma_maps\": 65535, \
        \"write_multiple\": true}}\0";
    for payload in [&qemu[..], b"\0\0\0\0{}\0", b"\0\0\0\0{\"capabilities\":{}}\0"] {
        let client = fresh(&rig);
        client.send_raw(&message(0, 1, 0, payload), &[]).unwrap();
        let answer = client.recv_raw(LIMIT).unwrap().expect("an answer");
        assert_eq!(answer.header.error(), None);
        assert!(answer.payload.len() <= payload.len(), "{} for {}", answer.payload.len(), payload.len());
        assert_eq!(answer.payload.last(), Some(&0));
        in_step(&client);
    }
}

#[test]
fn another_major_version_is_refused_and_the_next_proposal_heard() {
    let rig = Rig::ram();
    let client = fresh(&rig);
    let error = client.version(&Version { major: 1, minor: 0, capabilities: Capabilities::default() }).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::ENOTSUP));
    for payload in [&b""[..], b"\0\0\0", b"\0\0\0\0{\0", b"\0\0\0\0[]\0", b"\0\0\0\0{}"] {
        client.send_raw(&message(7, 1, 0, payload), &[]).unwrap();
        let answer = client.recv_raw(LIMIT).unwrap().expect("an answer");
        assert_eq!(answer.header.error(), Some(Errno::EINVAL), "{payload:?}");
    }
    client.version(&Client::proposal()).unwrap();
    in_step(&client);
}

#[test]
fn nothing_is_answered_before_the_version() {
    let rig = Rig::ram();
    let client = fresh(&rig);
    assert_eq!(client.device_info().unwrap_err().errno(), Some(Errno::EINVAL));
    assert_eq!(client.reset().unwrap_err().errno(), Some(Errno::EINVAL));
    client.version(&Client::proposal()).unwrap();
    in_step(&client);
}

#[test]
fn the_device_is_a_pci_function_with_a_reset() {
    let rig = Rig::ram();
    let info = rig.client().device_info().unwrap();
    assert_eq!(info.flags, VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET);
    // Between those that QEMU takes.
    assert!((8..=9).contains(&info.num_regions) && (3..=5).contains(&info.num_irqs), "{info:?}");
}

#[test]
fn regions_are_told_with_their_sizes() {
    let rig = Rig::ram();
    let client = rig.client();
    let both = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
    for index in 0..VFIO_PCI_NUM_REGIONS {
        let Ok((info, fd)) = client.region_info(index) else {
            assert!(index > CONFIG, "region {index}");
            continue;
        };
        assert_eq!(info.index, index);
        assert!(fd.is_none() && info.sparse_mmap.is_empty(), "a region to map makes QEMU wait for each write");
        let expected = match index {
            0 => 0x2000,
            2 => 0x4000,
            CONFIG => 256,
            _ => 0,
        };
        assert_eq!((info.size, info.flags), (expected, if expected > 0 { both } else { 0 }), "region {index}");
    }
    for index in [9, 100, u32::MAX] {
        assert_eq!(client.region_info(index).unwrap_err().errno(), Some(Errno::EINVAL));
    }
}

/// Section "Message sizes": `argsz` is what the client takes; a reply never has more.
#[test]
fn argsz_bounds_the_answer() {
    let rig = Rig::ram();
    let client = rig.client();
    let ask = |argsz: u32, len: usize| {
        let mut payload = [0; 32];
        payload[..4].copy_from_slice(&argsz.to_ne_bytes());
        payload[8..12].copy_from_slice(&2u32.to_ne_bytes());
        message(3, Command::DeviceGetRegionInfo.number(), 0, &payload[..len])
    };
    for argsz in [32, 33, 64, 4096, u32::MAX] {
        client.send_raw(&ask(argsz, 32), &[]).unwrap();
        let answer = client.recv_raw(LIMIT).unwrap().expect("an answer");
        assert_eq!((answer.header.error(), answer.payload.len()), (None, 32), "{argsz}");
        assert_eq!(answer.payload[..4], 32u32.to_ne_bytes(), "what all of it takes");
    }
    for (argsz, len) in [(0, 32), (31, 32), (32, 31), (32, 12), (32, 0)] {
        assert_eq!(refused(&client, &ask(argsz, len)), Errno::EINVAL, "{argsz} {len}");
    }
}

#[test]
fn what_is_not_supported_gets_an_errno() {
    let rig = Rig::ram();
    let client = rig.client();
    for command in (0..=20).chain([100, 255, 256, u16::MAX]) {
        let supported = (1..=10).contains(&command) || command == 13 || command == 15;
        if !supported {
            for payload in [0, 1, 16, 64, 4096] {
                let errno = refused(&client, &message(command ^ 0x55, command, 0, &vec![0xff; payload]));
                assert_eq!(errno, Errno::ENOTSUP, "command {command}");
            }
        }
    }
    // DMA_UNMAP with VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP.
    let mut unmap = [0; 24];
    unmap[..8].copy_from_slice(&[24, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(refused(&client, &message(1, Command::DmaUnmap.number(), 0, &unmap)), Errno::ENOTSUP);
}

#[test]
fn short_payloads_get_an_errno() {
    let rig = Rig::ram();
    let client = rig.client();
    for command in [2, 3, 4, 5, 6, 7, 8, 9, 10, 15] {
        for len in [0, 1, 7] {
            assert_eq!(refused(&client, &message(9, command, 0, &vec![0; len])), Errno::EINVAL, "{command} {len}");
        }
    }
}

#[test]
fn messages_that_are_no_commands_do_no_harm() {
    let rig = Rig::ram();
    let client = rig.client();
    // A reply to nothing is not answered; a type that does not exist is.
    client.send_raw(&message(4, 9, 1, &[0; 16]), &[]).unwrap();
    client.send_raw(&message(4, 9, 0x21, &[]), &[]).unwrap();
    in_step(&client);
    assert_eq!(refused(&client, &message(5, 9, 7, &[0; 16])), Errno::EINVAL);
}

#[test]
fn a_message_may_come_byte_by_byte() {
    let rig = Rig::ram();
    let client = rig.client();
    for id in 0..4 {
        for byte in ask_vendor(id) {
            client.send_raw(&[byte], &[]).unwrap();
        }
        expect_vendor(&client, id);
    }
    // Descriptors belong to the message during which they come, whatever byte they come with.
    let memory = client::GuestMemory::new(4096, IOVA).unwrap();
    let map = encoded(9, &Request::DmaMap(memory.dma_map()));
    client.send_raw(&map[..1], &[memory.fd()]).unwrap();
    for byte in &map[1..] {
        client.send_raw(&[*byte], &[]).unwrap();
    }
    let answer = client.recv_raw(LIMIT).unwrap().expect("an answer");
    assert_eq!((answer.header.id, answer.header.error()), (9, None));
}

#[test]
fn many_messages_may_come_at_once() {
    let rig = Rig::ram();
    let client = rig.client();
    let all: Vec<u8> = (0..500).flat_map(ask_vendor).collect();
    client.send_raw(&all, &[]).unwrap();
    (0..500).for_each(|id| expect_vendor(&client, id));
}

/// A client that asks and does not read is not read from either; when it reads, every answer is there.
#[test]
fn a_client_that_does_not_read_loses_nothing() {
    let rig = Rig::ram();
    let client = rig.client();
    client.set_timeout(std::time::Duration::from_millis(500));
    let span = vfio_user::RegionSpan { offset: 0, region: 2, count: 0x4000 };
    let mut sent = 0;
    // Until both directions are full; the last message may have gone in part.
    let cut = loop {
        match client.send_raw(&encoded(sent, &Request::RegionRead(span)), &[]) {
            Ok(()) => sent += 1,
            Err(Error::Timeout { .. }) => break true,
            Err(error) => panic!("{error}"),
        }
        if sent == 60_000 {
            break false;
        }
    };
    assert!(cut && sent > 10, "nothing holds the client up after {sent} messages");
    for id in 0..sent {
        let answer = client.recv_raw(LIMIT).unwrap().expect("an answer");
        assert_eq!((answer.header.id, answer.payload.len()), (id, 0x4010));
    }
}

#[test]
fn a_message_that_is_too_large_is_refused_and_skipped() {
    let rig = Rig::ram();
    let client = rig.client();
    let large = message(11, Command::RegionWrite.number(), 0, &vec![0; 3 << 20]);
    assert_eq!(refused(&client, &large), Errno::EMSGSIZE);
    let mut silent = message(11, Command::RegionWrite.number(), 0x10, &vec![0; 3 << 20]);
    silent.extend(ask_vendor(12));
    client.send_raw(&silent, &[]).unwrap();
    expect_vendor(&client, 12);
}

#[test]
fn a_size_below_the_headers_ends_the_connection_and_nothing_else() {
    let rig = Rig::ram();
    for size in [0u32, 1, 15] {
        let client = rig.client();
        let mut bytes = message(1, 4, 0, &[]);
        bytes[4..8].copy_from_slice(&size.to_ne_bytes());
        client.send_raw(&bytes, &[]).unwrap();
        assert!(matches!(client.recv_raw(LIMIT), Err(Error::Disconnected)));
    }
    in_step(&rig.client());
}

#[test]
fn too_many_descriptors_are_refused() {
    let rig = Rig::ram();
    let client = rig.client();
    let events: Vec<_> = (0..17).map(|_| eventfd()).collect();
    let fds: Vec<_> = events.iter().map(AsFd::as_fd).collect();
    client.send_raw(&ask_vendor(1), &fds).unwrap();
    let answer = client.recv_raw(LIMIT).unwrap().expect("an answer");
    assert_eq!(answer.header.error(), Some(Errno::E2BIG));
    in_step(&client);
}

#[test]
fn region_accesses_keep_to_their_region() {
    let rig = Rig::ram();
    let client = rig.client();
    let mut bytes = [0; 64];
    for (region, offset, len) in
        [(CONFIG, 255, 2), (CONFIG, 256, 1), (CONFIG, u64::MAX, 1), (2, 0x4000, 4), (1, 0, 1), (6, 0, 1), (8, 0, 1)]
    {
        let error = client.region_read(region, offset, &mut bytes[..len]).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::EINVAL), "{region} {offset:#x}");
        let error = client.region_write(region, offset, &bytes[..len]).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::EINVAL), "{region} {offset:#x}");
    }
    client.region_read(CONFIG, 255, &mut bytes[..1]).unwrap();
    // No answer could carry it.
    let span = vfio_user::RegionSpan { offset: 0, region: 2, count: u32::MAX };
    assert_eq!(refused(&client, &encoded(2, &Request::RegionRead(span))), Errno::EINVAL);
    // As many bytes as it says, no more and no less.
    let write = RegionData { offset: 0, region: CONFIG, data: &bytes[..4] };
    let mut short = encoded(2, &Request::RegionWrite(write));
    short.pop();
    short[4..8].copy_from_slice(&((Header::SIZE + 19) as u32).to_ne_bytes());
    assert_eq!(refused(&client, &short), Errno::EINVAL);
}

#[test]
fn a_write_without_reply_is_never_answered() {
    let rig = Rig::ram();
    let client = rig.client();
    for region in [0, 2, 1, CONFIG, 99] {
        client.region_post(region, 0, &[0; 4]).unwrap();
        client.region_post(region, 1 << 40, &[0; 4]).unwrap();
    }
    client.post(&Request::DeviceReset, &[]).unwrap();
    client.post(&Request::DeviceGetInfo, &[]).unwrap();
    client.send_raw(&message(3, 77, 0x10, &[1, 2, 3]), &[]).unwrap();
    // The next thing that comes is the answer to the next question.
    client.send_raw(&ask_vendor(21), &[]).unwrap();
    expect_vendor(&client, 21);
    let transport = VirtioPci::new(client.clone()).unwrap();
    let common = transport.capabilities().common;
    client.region_post(common.bar.into(), u64::from(common.offset) + 22, &3u16.to_le_bytes()).unwrap();
    assert_eq!(transport.read_common(CommonRegister::QueueSelect).unwrap(), 3, "it was done nevertheless");
}

#[test]
fn several_writes_in_one_message_are_done_in_order() {
    let rig = Rig::ram();
    let client = rig.client();
    let transport = VirtioPci::new(client.clone()).unwrap();
    let common = transport.capabilities().common;
    let write = |at: u64, data| RegionData { offset: u64::from(common.offset) + at, region: common.bar.into(), data };
    let (queue, size) = (1u16.to_le_bytes(), 16u16.to_le_bytes());
    for wait in [false, true] {
        transport.reset().unwrap();
        client.region_write_multi(&[write(22, &[0, 0]), write(22, &queue), write(24, &size)], wait).unwrap();
        assert_eq!(transport.read_common(CommonRegister::QueueSize).unwrap(), 16);
        assert_eq!(transport.max_queue_size(0).unwrap(), 256, "the other queue's");
    }
    let outside = RegionData { offset: 1 << 40, region: 2, data: &[0] };
    let error = client.region_write_multi(&[outside], true).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::EINVAL));
    client.region_write_multi(&[outside], false).unwrap();
    in_step(&client);
    // One whose count is not that of its writes.
    for count in [0u64, 2, 201, u64::MAX] {
        let mut payload = count.to_ne_bytes().to_vec();
        payload.extend([0; 24]);
        assert_eq!(refused(&client, &message(1, 15, 0, &payload)), Errno::EINVAL, "{count}");
    }
}

#[test]
fn a_doorbell_rings_by_whatever_way() {
    for notify in [NotifyMethod::Posted, NotifyMethod::Message, NotifyMethod::IoEventFd] {
        let rig = Rig::ram();
        let mut machine = rig.boot_with(&BlockOptions { notify, ..BlockOptions::default() });
        exercise(&mut machine.queues);
        assert!(machine.queues.iter().all(|queue| queue.kicks() > 0), "{notify:?}");
    }
}

#[test]
fn ioeventfds_are_those_of_the_doorbells() {
    // More queues than one message carries descriptors.
    for num_queues in [1, 4, 16, 64] {
        let rig = Rig::with(|device| device.num_queues = Some(num_queues));
        let client = rig.client();
        let transport = VirtioPci::new(client.clone()).unwrap();
        let notify = transport.capabilities().notify;
        let (io_fds, fds) = client.region_io_fds(notify.bar.into()).unwrap();
        assert_eq!(fds.len(), usize::from(num_queues.min(16)));
        for (queue, sub) in io_fds.sub_regions.iter().enumerate() {
            assert_eq!(sub.offset, u64::from(notify.offset) + 4 * queue as u64);
            assert_eq!((sub.fd_index, sub.size), (queue as u32, 2));
        }
        let (none, fds) = client.region_io_fds(0).unwrap();
        assert!(none.sub_regions.is_empty() && fds.is_empty());
        assert_eq!(client.region_io_fds(8).unwrap_err().errno(), Some(Errno::EINVAL));
        // Asked again, the same descriptors come: a signal by either reaches the queue.
        let machine =
            Machine::new(client, &BlockOptions { notify: NotifyMethod::IoEventFd, queues: 1, ..Default::default() });
        let Machine { mut queues, .. } = machine;
        exercise(&mut queues);
    }
}

/// A client that says nothing of `max_msg_fds` takes one descriptor a message (section "VFIO_USER_VERSION").
#[test]
fn no_more_descriptors_come_than_the_client_takes() {
    let rig = Rig::ram();
    let client = fresh(&rig);
    let capabilities = Capabilities { max_msg_fds: Some(2), ..Capabilities::default() };
    client.version(&Version { major: 0, minor: 0, capabilities }).unwrap();
    assert_eq!(client.region_io_fds(2).unwrap().1.len(), 2);
}

#[test]
fn a_reset_brings_the_registers_back() {
    let rig = Rig::ram();
    let mut machine = rig.boot();
    exercise(&mut machine.queues);
    machine.client.reset().unwrap();
    assert_eq!(machine.status(), 0);
    let mut command = [0; 2];
    machine.client.region_read(CONFIG, 4, &mut command).unwrap();
    assert_eq!(command, [0, 0], "memory decoding and bus mastering are off");
    machine.reboot(&BlockOptions::default());
    exercise(&mut machine.queues);
}
