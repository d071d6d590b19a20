//! Messages over a socket: cut anywhere, merged by the kernel, too large, broken, and with the file
//! descriptors that belong to them.

#![allow(clippy::unwrap_used, reason = "a failure is the result of a test")]

use std::collections::VecDeque;
use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg, setsockopt, sockopt};
use nix::sys::stat::fstat;
use proptest::collection::vec;
use proptest::prelude::*;
use vfio_user::{Connection, ConnectionError, Errno, Header, Limits, Received, RegionData, RegionSpan, Reply, Request};

const READ: u16 = 9;
const LIMIT: usize = 1024;

fn pair(limits: Limits) -> (UnixStream, Connection) {
    let (peer, stream) = UnixStream::pair().unwrap();
    (peer, Connection::new(stream, limits).unwrap())
}

fn small_limits() -> Limits {
    Limits { max_message_size: LIMIT, max_msg_fds: 4, max_pending: 64 << 10 }
}

fn file() -> OwnedFd {
    memfd_create(c"framing", MFdFlags::empty()).unwrap()
}

/// Which file a descriptor is of.
fn identity(fd: impl AsFd) -> u64 {
    fstat(fd).unwrap().st_ino
}

fn header(id: u16, flags: u32, payload_len: usize) -> [u8; 16] {
    let size = (Header::SIZE + payload_len) as u32;
    Header { id, command: READ, size, flags, errno: 0 }.encode()
}

fn message(id: u16, flags: u32, payload: &[u8]) -> Vec<u8> {
    [&header(id, flags, payload.len()), payload].concat()
}

fn send(peer: &UnixStream, bytes: &[u8], fds: &[RawFd]) {
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    let iov = [IoSlice::new(bytes)];
    let sent = sendmsg::<()>(peer.as_raw_fd(), &iov, control, MsgFlags::empty(), None).unwrap();
    assert_eq!(sent, bytes.len());
}

/// What a test looks at in a message.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Seen {
    Command { id: u16, payload: Vec<u8>, files: Vec<u64> },
    Reply { id: u16, error: Option<Errno>, payload: Vec<u8>, files: Vec<u64> },
    Refused { id: u16, errno: Errno },
}

fn files(fds: &[OwnedFd]) -> Vec<u64> {
    fds.iter().map(identity).collect()
}

/// Takes all whole messages that have come.
fn drain(connection: &mut Connection, seen: &mut Vec<Seen>) {
    loop {
        seen.push(match connection.receiver.receive().unwrap() {
            Received::Command { command, reply_to, payload, fds } => {
                assert_eq!(command, READ);
                assert_eq!(reply_to.command(), READ);
                Seen::Command { id: reply_to.id(), payload: payload.to_vec(), files: files(&fds) }
            }
            Received::Reply { header, payload, fds } => {
                Seen::Reply { id: header.id, error: header.error(), payload: payload.to_vec(), files: files(&fds) }
            }
            Received::Refused { reply_to, errno } => Seen::Refused { id: reply_to.id(), errno },
            Received::WouldBlock | Received::Closed => return,
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// However the bytes are cut, and whenever they are read, each message arrives whole and with its
    /// own descriptors. Messages too large or with too many descriptors do not disturb the others.
    #[test]
    fn messages_survive_any_fragmentation(
        messages in vec((0usize..1200, 0usize..6, any::<u8>()), 1..12),
        mut cuts in vec(0usize..14_000, 0..40),
        reads in vec(any::<bool>(), 60),
    ) {
        let (peer, mut connection) = pair(small_limits());
        let mut stream = Vec::new();
        let mut attached = Vec::new();
        let mut expected = Vec::new();
        for (id, (len, fd_count, byte)) in messages.iter().enumerate() {
            let id = id as u16;
            let fds: Vec<OwnedFd> = (0..*fd_count).map(|_| file()).collect();
            let payload = vec![*byte; *len];
            expected.push(if Header::SIZE + len > LIMIT {
                Seen::Refused { id, errno: Errno::EMSGSIZE }
            } else if *fd_count > 4 {
                Seen::Refused { id, errno: Errno::E2BIG }
            } else {
                Seen::Command { id, payload: payload.clone(), files: files(&fds) }
            });
            // A message with descriptors begins a fragment of its own, as each sender does it.
            if !fds.is_empty() {
                cuts.push(stream.len());
            }
            attached.push((stream.len(), fds));
            stream.extend(message(id, 0, &payload));
        }
        cuts.extend([0, stream.len()]);
        cuts.retain(|cut| *cut <= stream.len());
        cuts.sort_unstable();
        cuts.dedup();

        let mut seen = Vec::new();
        for (window, read) in cuts.windows(2).zip(reads.iter().cycle()) {
            let fds: Vec<RawFd> = attached
                .iter()
                .filter(|(start, _)| *start == window[0])
                .flat_map(|(_, fds)| fds.iter().map(AsRawFd::as_raw_fd))
                .collect();
            send(&peer, &stream[window[0]..window[1]], &fds);
            if *read {
                drain(&mut connection, &mut seen);
            }
        }
        drain(&mut connection, &mut seen);
        // A message may be refused for either reason when it gives both.
        prop_assert_eq!(seen.len(), expected.len());
        for ((seen, expected), (len, fd_count, _)) in seen.iter().zip(&expected).zip(&messages) {
            if Header::SIZE + len > LIMIT && *fd_count > 4 {
                let refused = matches!(seen, Seen::Refused { .. });
                prop_assert!(refused, "{:?}", seen);
            } else {
                prop_assert_eq!(seen, expected);
            }
        }
    }

    /// Whatever bytes come, the receiver ends or waits, and holds no more than it may.
    #[test]
    fn any_bytes_are_survived(bytes in vec(any::<u8>(), 0..4000)) {
        let (mut peer, mut connection) = pair(small_limits());
        peer.write_all(&bytes).unwrap();
        drop(peer);
        while let Ok(received) = connection.receiver.receive() {
            match received {
                Received::Closed => break,
                Received::WouldBlock => panic!("the stream has ended"),
                _ => {}
            }
        }
    }

    /// A socket that is full delays messages; it neither reorders them nor moves their descriptors.
    #[test]
    fn pending_messages_keep_order_and_descriptors(
        replies in vec((0usize..6000, 0usize..4), 1..20),
        reads in vec(any::<bool>(), 40),
    ) {
        let limits = Limits { max_message_size: 8192, max_msg_fds: 4, max_pending: 1 << 20 };
        let (peer, mut server) = pair(limits);
        setsockopt(&server, sockopt::SndBuf, &4608).unwrap();
        let mut client = Connection::new(peer, limits).unwrap();
        let mut expected = Vec::new();
        let mut seen = Vec::new();
        let mut reads = reads.iter().cycle();
        for (id, (len, fd_count)) in replies.iter().enumerate() {
            let id = id as u16;
            let fds: Vec<OwnedFd> = (0..*fd_count).map(|_| file()).collect();
            let data = vec![id as u8; *len];
            let reply = Reply::RegionRead(RegionData { offset: 0, region: 0, data: &data });
            let mut payload = Vec::new();
            reply.encode(&mut payload);
            expected.push(Seen::Reply { id, error: None, payload, files: files(&fds) });

            let request = Request::RegionRead(RegionSpan { offset: 0, region: 0, count: *len as u32 });
            client.sender.command(id, false, &request, &[]).unwrap();
            let Received::Command { reply_to, .. } = server.receiver.receive().unwrap() else {
                panic!("no command");
            };
            let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
            server.sender.reply_with_fds(reply_to, &reply, &borrowed).unwrap();
            if *reads.next().unwrap() {
                drain(&mut client, &mut seen);
                server.sender.flush().unwrap();
            }
        }
        while server.sender.has_pending() {
            drain(&mut client, &mut seen);
            server.sender.flush().unwrap();
        }
        drain(&mut client, &mut seen);
        prop_assert_eq!(seen, expected);
    }
}

#[test]
fn the_kernel_merges_messages_and_descriptors_still_find_theirs() {
    let (peer, mut connection) = pair(small_limits());
    let (one, two) = (file(), file());
    send(&peer, &message(1, 0, b"first"), &[]);
    send(&peer, &message(2, 0, b"second"), &[one.as_raw_fd(), two.as_raw_fd()]);
    send(&peer, &message(3, 0, b""), &[]);
    let mut seen = Vec::new();
    drain(&mut connection, &mut seen);
    let command = |id, payload: &[u8], fds: &[&OwnedFd]| {
        let files = fds.iter().map(identity).collect();
        Seen::Command { id, payload: payload.to_vec(), files }
    };
    let expected = [command(1, b"first", &[]), command(2, b"second", &[&one, &two]), command(3, b"", &[])];
    assert_eq!(seen, expected);
}

#[test]
fn received_descriptors_are_close_on_exec() {
    let (peer, mut connection) = pair(small_limits());
    send(&peer, &message(1, 0, b""), &[file().as_raw_fd()]);
    let Received::Command { fds, .. } = connection.receiver.receive().unwrap() else {
        panic!("no command");
    };
    let flags = FdFlag::from_bits_truncate(fcntl(&fds[0], FcntlArg::F_GETFD).unwrap());
    assert!(flags.contains(FdFlag::FD_CLOEXEC));
}

/// The descriptors of a refused message are closed: the last writer of the pipe is gone.
#[test]
fn refused_messages_leave_no_descriptor_open() {
    for (payload_len, fd_count) in [(0, 5), (LIMIT, 1), (0, 253), (LIMIT, 253)] {
        let (peer, mut connection) = pair(small_limits());
        let (mut reader, writer) = std::io::pipe().unwrap();
        let message = message(1, 0, &vec![0; payload_len]);
        send(&peer, &message, &vec![writer.as_raw_fd(); fd_count]);
        drop(writer);
        let mut seen = Vec::new();
        drain(&mut connection, &mut seen);
        assert!(matches!(seen[..], [Seen::Refused { id: 1, .. }]), "{seen:?}");
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    }
}

/// Descriptors with each fragment count together.
#[test]
fn descriptors_of_all_fragments_are_counted() {
    let (peer, mut connection) = pair(small_limits());
    let (mut reader, writer) = std::io::pipe().unwrap();
    for byte in message(1, 0, b"payload") {
        send(&peer, &[byte], &[writer.as_raw_fd()]);
    }
    drop(writer);
    send(&peer, &message(2, 0, b""), &[]);
    let mut seen = Vec::new();
    drain(&mut connection, &mut seen);
    let second = Seen::Command { id: 2, payload: vec![], files: vec![] };
    assert_eq!(seen, [Seen::Refused { id: 1, errno: Errno::E2BIG }, second]);
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_message_far_beyond_the_limit_is_discarded_in_steps() {
    const SIZE: usize = 40 << 20;
    let (mut peer, mut connection) = pair(small_limits());
    let writer = std::thread::spawn(move || {
        peer.write_all(&header(1, 0, SIZE)).unwrap();
        let chunk = vec![0xaa; 1 << 20];
        for _ in 0..SIZE / chunk.len() {
            peer.write_all(&chunk).unwrap();
        }
        peer.write_all(&message(2, 0, b"after")).unwrap();
        peer
    });
    let mut seen = Vec::new();
    while seen.len() < 2 {
        drain(&mut connection, &mut seen);
        std::thread::yield_now();
    }
    let after = Seen::Command { id: 2, payload: b"after".to_vec(), files: vec![] };
    assert_eq!(seen, [Seen::Refused { id: 1, errno: Errno::EMSGSIZE }, after]);
    drop(writer.join().unwrap());
}

/// One client's junk must not keep a thread that serves others: each call takes a bounded share, even
/// when all of it is there.
#[test]
fn discarding_gives_way_to_others() {
    let (mut peer, mut connection) = pair(small_limits());
    peer.write_all(&message(1, 0, &[0; 100 << 10])).unwrap();
    assert!(matches!(connection.receiver.receive(), Ok(Received::WouldBlock)));
    assert!(matches!(connection.receiver.receive(), Ok(Received::Refused { .. })));
}

#[test]
fn a_message_at_the_limit_is_taken_and_one_above_is_not() {
    let (peer, mut connection) = pair(small_limits());
    send(&peer, &message(1, 0, &[7; LIMIT - 16]), &[]);
    send(&peer, &message(2, 0, &[7; LIMIT - 15]), &[]);
    let mut seen = Vec::new();
    drain(&mut connection, &mut seen);
    let taken = Seen::Command { id: 1, payload: vec![7; LIMIT - 16], files: vec![] };
    assert_eq!(seen, [taken, Seen::Refused { id: 2, errno: Errno::EMSGSIZE }]);
}

#[test]
fn an_unknown_type_is_refused_and_replies_come_as_replies() {
    let (peer, mut connection) = pair(small_limits());
    send(&peer, &message(1, 7, b"payload"), &[]);
    send(&peer, &message(2, 1, b"payload"), &[]);
    let mut seen = Vec::new();
    drain(&mut connection, &mut seen);
    let reply = Seen::Reply { id: 2, error: None, payload: b"payload".to_vec(), files: vec![] };
    assert_eq!(seen, [Seen::Refused { id: 1, errno: Errno::EINVAL }, reply]);
}

#[test]
fn a_size_below_the_header_ends_the_connection() {
    for size in [0, 15] {
        let (mut peer, mut connection) = pair(small_limits());
        let bytes = Header { id: 5, command: READ, size, flags: 0, errno: 0 }.encode();
        peer.write_all(&bytes).unwrap();
        let error = connection.receiver.receive().unwrap_err();
        assert!(matches!(error, ConnectionError::MessageSize { id: 5, command: READ, size: s } if s == size));
    }
}

#[test]
fn the_end_of_the_stream() {
    let whole = message(1, 0, b"payload");
    for len in 0..=whole.len() {
        let (mut peer, mut connection) = pair(small_limits());
        peer.write_all(&whole[..len]).unwrap();
        drop(peer);
        let mut received = connection.receiver.receive();
        if len == whole.len() {
            assert!(matches!(received, Ok(Received::Command { .. })));
            received = connection.receiver.receive();
        }
        if len == 0 || len == whole.len() {
            assert!(matches!(received, Ok(Received::Closed)), "{len}: {received:?}");
        } else {
            assert!(matches!(received, Err(ConnectionError::Truncated)), "{len}: {received:?}");
        }
    }
}

#[test]
fn no_reply_commands_are_never_answered() {
    let (mut peer, mut connection) = pair(small_limits());
    for id in 0..3 {
        send(&peer, &message(id, 0x10, b""), &[]);
        let Received::Command { reply_to, .. } = connection.receiver.receive().unwrap() else {
            panic!("no command");
        };
        match id {
            0 => connection.sender.reply(reply_to, &Reply::Done).unwrap(),
            1 => connection.sender.refuse(reply_to, Errno::EIO).unwrap(),
            _ => {
                let file = file();
                connection.sender.reply_with_fds(reply_to, &Reply::Done, &[file.as_fd()]).unwrap();
            }
        }
    }
    drop(connection);
    let mut answers = Vec::new();
    peer.read_to_end(&mut answers).unwrap();
    assert_eq!(answers, Vec::<u8>::new());
}

#[test]
fn an_error_reply_is_the_bare_header() {
    let (mut peer, mut connection) = pair(small_limits());
    send(&peer, &message(0x1234, 0, b""), &[]);
    let Received::Command { reply_to, .. } = connection.receiver.receive().unwrap() else {
        panic!("no command");
    };
    connection.sender.refuse(reply_to, Errno::EEXIST).unwrap();
    drop(connection);
    let mut answer = Vec::new();
    peer.read_to_end(&mut answer).unwrap();
    let expected = Header { id: 0x1234, command: READ, size: 16, flags: 0x21, errno: 17 };
    assert_eq!(answer, expected.encode());
}

#[test]
fn a_peer_that_never_reads_is_cut_off() {
    let limits = Limits { max_pending: 4096, ..small_limits() };
    let (_peer, mut connection) = pair(limits);
    setsockopt(&connection, sockopt::SndBuf, &4608).unwrap();
    let data = [0; 900];
    let request = Request::RegionWrite(RegionData { offset: 0, region: 0, data: &data });
    let mut sent = 0;
    let error = loop {
        match connection.sender.command(0, false, &request, &[]) {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
        assert!(sent < 1000);
    };
    assert!(matches!(error, ConnectionError::Backlog { limit: 4096 }));
    assert!(connection.sender.has_pending());
}

#[test]
fn a_closed_peer_is_an_error_and_no_signal() {
    let (peer, mut connection) = pair(small_limits());
    drop(peer);
    let result = connection.sender.command(0, false, &Request::DeviceReset, &[]);
    assert!(matches!(result, Err(ConnectionError::Closed)));
}

#[test]
fn a_message_larger_than_agreed_is_not_sent() {
    let (_peer, mut connection) = pair(small_limits());
    let data = [0; LIMIT];
    let request = Request::RegionWrite(RegionData { offset: 0, region: 0, data: &data });
    let result = connection.sender.command(0, false, &request, &[]);
    assert!(matches!(result, Err(ConnectionError::TooLarge { size: 1056, limit: LIMIT })));
}

/// Replies to commands that were answered out of the order they came in keep their identifiers.
#[test]
fn replies_may_be_delayed() {
    let (peer, mut server) = pair(small_limits());
    let mut client = Connection::new(peer, small_limits()).unwrap();
    let mut waiting = VecDeque::new();
    for id in 0..4 {
        client.sender.command(id, false, &Request::DeviceReset, &[]).unwrap();
        let Received::Command { reply_to, .. } = server.receiver.receive().unwrap() else {
            panic!("no command");
        };
        waiting.push_front(reply_to);
    }
    for reply_to in waiting {
        server.sender.reply(reply_to, &Reply::Done).unwrap();
    }
    for expected in (0..4).rev() {
        let Received::Reply { header, .. } = client.receiver.receive().unwrap() else {
            panic!("no reply");
        };
        assert_eq!((header.id, header.command, header.flags), (expected, 13, 1));
    }
}
