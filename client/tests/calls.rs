//! The calls of [`Client`] against a server that follows a script.

#![allow(clippy::unwrap_used, reason = "a failure is the result of a test")]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use client::{Client, Error};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use vfio_user::{
    Capabilities, Command, Connection, DeviceInfo, DmaMap, IoEventFd, IrqAction, IrqData, IrqInfo, Limits, Received,
    RegionData, RegionInfo, RegionIoFds, Reply, ReplyTo, Request, Sender, SparseMmapArea, Version,
};

/// A server whose `answer` sees each request with its file descriptors.
fn server(
    mut answer: impl FnMut(&mut Sender, ReplyTo, Request<'_>, Vec<OwnedFd>) + Send + 'static,
) -> (Client, JoinHandle<()>) {
    let (near, far) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let limits = Limits { max_msg_fds: 64, ..Limits::default() };
        let mut connection = Connection::new(far, limits).unwrap();
        loop {
            match connection.receiver.receive() {
                Ok(Received::Command { command, reply_to, payload, fds }) => {
                    let request = Request::decode(command, payload).unwrap();
                    answer(&mut connection.sender, reply_to, request, fds);
                }
                Ok(Received::WouldBlock) => {
                    poll(&mut [PollFd::new(connection.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE).unwrap();
                }
                Ok(Received::Reply { .. }) => {}
                _ => return,
            }
        }
    });
    (Client::from_stream(near).unwrap(), thread)
}

/// Runs calls against a server, then checks that the server has seen no surprise.
fn with_server(
    answer: impl FnMut(&mut Sender, ReplyTo, Request<'_>, Vec<OwnedFd>) + Send + 'static,
    calls: impl FnOnce(&Client),
) {
    let (client, thread) = server(answer);
    calls(&client);
    drop(client);
    thread.join().unwrap();
}

#[test]
fn versions_must_agree() {
    for (major, minor, agree) in [(0, 0, true), (0, 1, false), (1, 0, false)] {
        let capabilities = Capabilities { max_msg_fds: Some(7), ..Capabilities::default() };
        let version = Version { major, minor, capabilities };
        let answer = version.clone();
        with_server(
            move |sender, to, request, _| {
                assert_eq!(request, Request::Version(Client::proposal()));
                sender.reply(to, &Reply::Version(&answer)).unwrap();
            },
            |client| {
                let result = client.version(&Client::proposal());
                if agree {
                    assert_eq!(result.unwrap(), version);
                    assert_eq!(client.server_capabilities().max_msg_fds(), 7);
                } else {
                    assert!(matches!(result, Err(Error::Protocol(_))));
                }
            },
        );
    }
}

#[test]
fn infos_are_asked_for_until_they_fit() {
    let sparse_mmap = vec![SparseMmapArea { offset: 0x1000, size: 0x1000 }];
    let info = RegionInfo { flags: 7, index: 4, size: 0x4000, offset: 0x1000, sparse_mmap };
    let sub = IoEventFd { offset: 0x3000, size: 2, fd_index: 0, flags: 0, datamatch: 0 };
    let io_fds = RegionIoFds { index: 4, sub_regions: vec![sub; 3] };
    let (info_copy, io_fds_copy) = (info.clone(), io_fds.clone());
    let eventfd = EventFd::new().unwrap();
    let mut asked = Vec::new();
    with_server(
        move |sender, to, request, _| {
            let (reply, argsz) = match request {
                Request::DeviceGetRegionInfo { argsz, index: 4 } => {
                    (Reply::RegionInfo { info: &info_copy, argsz }, argsz)
                }
                Request::DeviceGetRegionIoFds { argsz, index: 4 } => {
                    (Reply::RegionIoFds { io_fds: &io_fds_copy, argsz }, argsz)
                }
                Request::DeviceGetInfo => (Reply::DeviceInfo(DeviceInfo { flags: 3, num_regions: 9, num_irqs: 5 }), 16),
                Request::DeviceGetIrqInfo { index } => (Reply::IrqInfo(IrqInfo { flags: 9, index, count: 3 }), 16),
                _ => panic!("{request:?}"),
            };
            asked.push(argsz);
            assert!(asked.len() > 4 || asked == [32, 64, 16, 136][..asked.len()]);
            sender.reply_with_fds(to, &reply, &[eventfd.as_fd()]).unwrap();
        },
        |client| {
            let (region, fd) = client.region_info(4).unwrap();
            assert_eq!(region, info);
            assert!(fd.is_some());
            let (subs, fds) = client.region_io_fds(4).unwrap();
            assert_eq!((subs, fds.len()), (io_fds, 1));
            assert_eq!(client.device_info().unwrap().num_regions, 9);
            assert_eq!(client.irq_info(2).unwrap(), IrqInfo { flags: 9, index: 2, count: 3 });
        },
    );
}

#[test]
fn a_refusal_carries_the_errno_and_the_connection_goes_on() {
    let map = DmaMap { readable: true, writeable: false, offset: 0, address: 0x1000, size: 0x1000 };
    with_server(
        move |sender, to, request, fds| match request {
            Request::DmaMap(got) => {
                assert_eq!((got, fds.len()), (map, 1));
                sender.refuse(to, Errno::EEXIST).unwrap();
            }
            _ => sender.reply(to, &Reply::Done).unwrap(),
        },
        |client| {
            let eventfd = EventFd::new().unwrap();
            let error = client.dma_map(&map, Some(eventfd.as_fd())).unwrap_err();
            assert_eq!(error.errno(), Some(Errno::EEXIST));
            assert!(matches!(error, Error::Refused { command: Command::DmaMap, .. }));
            client.dma_unmap(0x1000, 0x1000).unwrap();
            client.dma_unmap_all().unwrap();
            client.reset().unwrap();
        },
    );
}

#[test]
fn eventfds_go_in_messages_that_the_server_takes() {
    let (seen, chunks) = mpsc::channel();
    with_server(
        move |sender, to, request, fds| match request {
            Request::Version(_) => {
                let capabilities = Capabilities { max_msg_fds: Some(3), ..Capabilities::default() };
                sender.reply(to, &Reply::Version(&Version { capabilities, ..Version::default() })).unwrap();
            }
            Request::DeviceSetIrqs(set) => {
                assert_eq!((set.action, set.index), (IrqAction::Trigger, 2));
                seen.send((set.data == IrqData::EventFd, set.start, set.count, fds.len())).unwrap();
                sender.reply(to, &Reply::Done).unwrap();
            }
            _ => panic!("{request:?}"),
        },
        |client| {
            client.version(&Client::proposal()).unwrap();
            let eventfd = EventFd::new().unwrap();
            let fds: Vec<BorrowedFd<'_>> = vec![eventfd.as_fd(); 8];
            client.set_irq_eventfds(2, 1, &fds).unwrap();
            client.disable_irqs(2).unwrap();
        },
    );
    let chunks: Vec<_> = chunks.iter().collect();
    assert_eq!(chunks, [(true, 1, 3, 3), (true, 4, 3, 3), (true, 7, 2, 2), (false, 0, 0, 0)]);
}

#[test]
fn regions_are_read_and_written_and_posted_to_in_order() {
    let mut region = [0; 64];
    with_server(
        move |sender, to, request, _| match request {
            Request::RegionWrite(RegionData { offset, region: 0, data }) => {
                region[offset as usize..][..data.len()].copy_from_slice(data);
                let span = RegionData { offset, region: 0, data }.span();
                sender.reply(to, &Reply::RegionWrite(span)).unwrap();
            }
            Request::RegionWriteMulti(writes) => {
                for RegionData { offset, data, .. } in writes.iter() {
                    region[offset as usize..][..data.len()].copy_from_slice(data);
                }
                let wr_cnt = writes.iter().count() as u64;
                sender.reply(to, &Reply::RegionWriteMulti { wr_cnt }).unwrap();
            }
            Request::RegionRead(span) => {
                let data = &region[span.offset as usize..][..span.count as usize];
                let read = RegionData { offset: span.offset, region: span.region, data };
                sender.reply(to, &Reply::RegionRead(read)).unwrap();
            }
            _ => panic!("{request:?}"),
        },
        |client| {
            let write = |offset, data| RegionData { offset, region: 0, data };
            client.region_write(0, 0, b"written").unwrap();
            client.region_post(0, 8, b"posted").unwrap();
            client.region_write_multi(&[write(16, b"one"), write(20, b"two")], false).unwrap();
            client.region_write_multi(&[write(24, b"three"), write(32, b"four")], true).unwrap();
            let mut all = [0; 36];
            client.region_read(0, 0, &mut all).unwrap();
            assert_eq!(&all, b"written\0posted\0\0one\0two\0three\0\0\0four");
            let error = client.region_write_multi(&[write(0, b"nine bytes")], true).unwrap_err();
            assert_eq!(error.errno(), Some(Errno::E2BIG));
        },
    );
}

#[test]
fn a_command_of_the_server_does_not_disturb_a_call() {
    with_server(
        move |sender, to, _, _| {
            sender.command(77, false, &Request::DeviceReset, &[]).unwrap();
            sender.reply(to, &Reply::Done).unwrap();
        },
        |client| {
            client.reset().unwrap();
            client.reset().unwrap();
        },
    );
}

#[test]
fn broken_replies_are_errors() {
    with_server(
        move |sender, to, request, _| match request {
            // Too little data, a span that was not written, too short.
            Request::RegionRead(span) => {
                let read = RegionData { offset: span.offset, region: span.region, data: &[1] };
                sender.reply(to, &Reply::RegionRead(read)).unwrap();
            }
            Request::RegionWrite(data) => {
                let span = RegionData { offset: 1, ..data }.span();
                sender.reply(to, &Reply::RegionWrite(span)).unwrap();
            }
            _ => sender.reply(to, &Reply::Done).unwrap(),
        },
        |client| {
            assert!(matches!(client.region_read(0, 0, &mut [0; 2]), Err(Error::Protocol(_))));
            assert!(matches!(client.region_write(0, 0, &[0; 2]), Err(Error::Protocol(_))));
            assert!(matches!(client.device_info(), Err(Error::Protocol(_))));
        },
    );
}

#[test]
fn a_silent_server_is_not_waited_for_for_ever() {
    let (near, far) = UnixStream::pair().unwrap();
    let client = Client::from_stream(near).unwrap();
    client.set_timeout(Duration::from_millis(20));
    assert!(matches!(client.reset(), Err(Error::Timeout { .. })));
    assert!(client.recv_raw(Duration::from_millis(1)).unwrap().is_none());
    drop(far);
    assert!(matches!(client.recv_raw(Duration::from_secs(9)), Err(Error::Disconnected)));
}

#[test]
fn raw_messages_go_out_and_come_in_as_they_are() {
    let (near, far) = UnixStream::pair().unwrap();
    let client = Client::from_stream(near).unwrap();
    let peer = Client::from_stream(far).unwrap();
    let eventfd = EventFd::new().unwrap();
    let header = vfio_user::Header { id: 3, command: 99, size: 20, flags: 0x21, errno: 5 };
    client.send_raw(&header.encode(), &[eventfd.as_fd()]).unwrap();
    client.send_raw(b"data", &[]).unwrap();
    let message = peer.recv_raw(Duration::from_secs(30)).unwrap().unwrap();
    assert_eq!((message.header, message.payload.as_slice()), (header, b"data".as_slice()));
    assert_eq!(message.fds.len(), 1);
}
