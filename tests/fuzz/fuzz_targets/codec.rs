//! The wire: what the layouts make of any bytes, and how a stream is cut into messages wherever the socket cuts it.

#![no_main]

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg, setsockopt, sockopt};
use nix::sys::stat::fstat;
use vfio_user::{
    Connection, ConnectionError, DeviceInfo, DmaUnmap, Errno, Header, IrqInfo, Limits, MessageType, Received,
    RegionData, RegionInfo, RegionIoFds, RegionSpan, Reply, Request, Version,
};

/// Small, so that messages of a few bytes reach them.
const LIMITS: Limits = Limits { max_message_size: 256, max_msg_fds: 3, max_pending: 16 << 10 };

fuzz_target!(|data: &[u8]| {
    let Some((kind, rest)) = data.split_first() else { return };
    match kind % 4 {
        0 => request(rest),
        1 => replies(rest),
        // The input has come to its end: so has the stream.
        2 => incoming(&mut Unstructured::new(rest)).unwrap_or_default(),
        _ => outgoing(&mut Unstructured::new(rest)).unwrap_or_default(),
    }
});

/// What was decoded says the same when it is encoded and decoded once more.
fn request(data: &[u8]) {
    let Some((command, payload)) = data.split_first_chunk() else { return };
    let command = u16::from_le_bytes(*command);
    if let Ok(request) = Request::decode(command, payload) {
        let mut bytes = Vec::new();
        request.encode(&mut bytes);
        assert_eq!(request.command().number(), command);
        assert_eq!(Request::decode(command, &bytes).as_ref(), Ok(&request), "as {bytes:?}");
        if let Request::RegionWriteMulti(writes) = request {
            assert!(writes.iter().all(|write| write.data.len() <= 8));
        }
    }
}

/// The same for each layout that a client takes.
fn replies(payload: &[u8]) {
    let encoded = |reply: &Reply<'_>| {
        let mut bytes = Vec::new();
        reply.encode(&mut bytes);
        bytes
    };
    let whole = u32::MAX;
    if let Ok(version) = Version::decode(payload) {
        assert_eq!(Version::decode(&encoded(&Reply::Version(&version))), Ok(version));
    }
    if let Ok(unmap) = DmaUnmap::decode(payload) {
        assert_eq!(DmaUnmap::decode(&encoded(&Reply::DmaUnmap(unmap))), Ok(unmap));
    }
    if let Ok(info) = DeviceInfo::decode(payload) {
        assert_eq!(DeviceInfo::decode(&encoded(&Reply::DeviceInfo(info))), Ok(info));
    }
    if let Ok(info) = IrqInfo::decode(payload) {
        assert_eq!(IrqInfo::decode(&encoded(&Reply::IrqInfo(info))), Ok(info));
    }
    if let Ok((info, _)) = RegionInfo::decode(payload) {
        assert!(16 * info.sparse_mmap.len() <= payload.len(), "areas that did not come");
        let bytes = encoded(&Reply::RegionInfo { info: &info, argsz: whole });
        assert_eq!(bytes.len(), info.argsz() as usize);
        assert_eq!(RegionInfo::decode(&bytes), Ok((info, bytes.len() as u32)));
    }
    if let Ok((io_fds, _)) = RegionIoFds::decode(payload) {
        assert!(40 * io_fds.sub_regions.len() <= payload.len(), "sub-regions that did not come");
        let bytes = encoded(&Reply::RegionIoFds { io_fds: &io_fds, argsz: whole });
        assert_eq!(bytes.len(), io_fds.argsz() as usize);
        assert_eq!(RegionIoFds::decode(&bytes), Ok((io_fds, bytes.len() as u32)));
    }
    if let Ok(span) = RegionSpan::decode(payload) {
        assert_eq!(RegionSpan::decode(&encoded(&Reply::RegionWrite(span))), Ok(span));
    }
    if let Ok(data) = RegionData::decode(payload) {
        assert_eq!(encoded(&Reply::RegionRead(data)), payload);
    }
}

/// How a message ends up with its receiver.
#[derive(Debug, PartialEq)]
enum Seen {
    Command { command: u16, payload: Vec<u8>, files: Vec<u64> },
    Reply { id: u16, payload: Vec<u8>, files: Vec<u64> },
    Refused { id: u16, errno: Errno },
    Closed,
    Broken,
}

/// Messages with any header, cut anywhere: each is seen once, whole, in order, with its own descriptors.
fn incoming(input: &mut Unstructured<'_>) -> Result<()> {
    let Some((peer, mut connection)) = pair() else { return Ok(()) };
    let mut expected = VecDeque::new();
    let mut kept = Vec::new();
    let mut broken = false;
    for _ in 0..32 {
        if broken || input.is_empty() {
            break;
        }
        let (message, files) = message(input, &mut expected)?;
        broken = expected.back() == Some(&Seen::Broken);
        let mut rest = message.as_slice();
        let mut files = files.as_slice();
        while !rest.is_empty() {
            let cut = if input.arbitrary()? { rest.len() } else { input.int_in_range(1..=rest.len())? };
            let (piece, tail) = rest.split_at(cut);
            send(&peer, piece, files);
            // The descriptors go with the first byte.
            (rest, files) = (tail, &[]);
            receive(&mut connection, &mut kept, &mut expected);
        }
    }
    drop(peer);
    if !broken {
        expected.push_back(Seen::Closed);
        receive(&mut connection, &mut kept, &mut expected);
    }
    assert!(expected.is_empty(), "not seen: {expected:?}");
    Ok(())
}

/// A message, and what must be seen of it.
fn message(input: &mut Unstructured<'_>, expected: &mut VecDeque<Seen>) -> Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut header = Header {
        id: input.arbitrary()?,
        command: input.int_in_range(0..=20)?,
        size: 0,
        flags: input.arbitrary::<u8>()?.into(),
        errno: 0,
    };
    let len = input.int_in_range(0..=300)?;
    let broken = input.ratio(1, 16)?;
    header.size = if broken { input.int_in_range(0..=15)? } else { (Header::SIZE + len) as u32 };
    let fds = if input.ratio(1, 4)? { input.int_in_range(0..=5)? } else { 0 };
    let files: Vec<OwnedFd> = (0..fds).filter_map(|_| memfd_create(c"fuzz", MFdFlags::MFD_CLOEXEC).ok()).collect();
    let identities = files.iter().map(identity).collect();
    let mut payload = input.bytes(len.min(input.len()))?.to_vec();
    payload.resize(len, 0);
    let mut bytes = header.encode().to_vec();
    bytes.extend(&payload);
    let id = header.id;
    expected.push_back(if broken {
        bytes.truncate(Header::SIZE);
        Seen::Broken
    } else if bytes.len() > LIMITS.max_message_size {
        Seen::Refused { id, errno: Errno::EMSGSIZE }
    } else if fds > LIMITS.max_msg_fds {
        Seen::Refused { id, errno: Errno::E2BIG }
    } else {
        match header.message_type() {
            Ok(MessageType::Command) => Seen::Command { command: header.command, payload, files: identities },
            Ok(MessageType::Reply) => Seen::Reply { id, payload, files: identities },
            Err(errno) => Seen::Refused { id, errno },
        }
    });
    Ok((bytes, files))
}

/// What is wrong, without all the bytes.
fn difference(seen: &Seen, expected: Option<&Seen>) -> String {
    let text = |seen: &dyn std::fmt::Debug| format!("{seen:?}").chars().take(200).collect::<String>();
    format!("saw {}, expected {}", text(seen), text(&expected))
}

/// Takes what there is; all of it must be expected.
fn receive(connection: &mut Connection, kept: &mut Vec<OwnedFd>, expected: &mut VecDeque<Seen>) {
    loop {
        let mut identities = |fds: Vec<OwnedFd>| {
            let identities = fds.iter().map(identity).collect();
            // An inode may be used again once its file is gone.
            kept.extend(fds);
            identities
        };
        let seen = match connection.receiver.receive() {
            Ok(Received::WouldBlock) => return,
            Ok(Received::Command { command, reply_to, payload, fds }) => {
                assert_eq!(reply_to.command(), command);
                Seen::Command { command, payload: payload.to_vec(), files: identities(fds) }
            }
            Ok(Received::Reply { header, payload, fds }) => {
                Seen::Reply { id: header.id, payload: payload.to_vec(), files: identities(fds) }
            }
            Ok(Received::Refused { reply_to, errno }) => Seen::Refused { id: reply_to.id(), errno },
            Ok(Received::Closed) => Seen::Closed,
            Err(ConnectionError::MessageSize { .. }) => Seen::Broken,
            Err(error) => panic!("{error}"),
        };
        assert!(Some(&seen) == expected.front(), "{}", difference(&seen, expected.front()));
        expected.pop_front();
        if matches!(seen, Seen::Closed | Seen::Broken) {
            return;
        }
    }
}

/// Messages through a socket that is full most of the time: what waits goes out whole, in order, with its descriptors.
fn outgoing(input: &mut Unstructured<'_>) -> Result<()> {
    let limits = Limits { max_message_size: 16 << 10, max_msg_fds: 3, max_pending: 64 << 10 };
    let Ok((here, there)) = UnixStream::pair() else { return Ok(()) };
    // The kernel makes a few kilobytes of it.
    setsockopt(&here, sockopt::SndBuf, &1).expect("a socket's buffer");
    let mut from = Connection::new(here, limits).expect("a socket");
    let mut to = Connection::new(there, limits).expect("a socket");
    let mut expected = VecDeque::new();
    let mut kept = Vec::new();
    let mut pending: usize = 0;
    for id in 0..64 {
        if input.is_empty() {
            break;
        }
        match input.int_in_range(0..=3)? {
            0 => from.sender.flush().expect("room"),
            1 => receive(&mut to, &mut kept, &mut expected),
            _ => {
                let (len, byte) = (input.int_in_range(0..=8000)?, input.arbitrary()?);
                if pending + len + 32 > limits.max_pending {
                    break;
                }
                let payload = vec![byte; len];
                let files: Vec<OwnedFd> = (0..input.int_in_range(0..=3)?)
                    .filter_map(|_| memfd_create(c"fuzz", MFdFlags::MFD_CLOEXEC).ok())
                    .collect();
                let write = Request::RegionWrite(RegionData { offset: 0, region: 0, data: &payload });
                let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
                from.sender.command(id, false, &write, &fds).expect("room");
                pending += len + 32;
                let mut bytes = Vec::new();
                write.encode(&mut bytes);
                let files = files.iter().map(identity).collect();
                expected.push_back(Seen::Command { command: write.command().number(), payload: bytes, files });
            }
        }
    }
    // A round moves something, or all has gone.
    for _ in 0..200 {
        from.sender.flush().expect("room");
        receive(&mut to, &mut kept, &mut expected);
    }
    assert!(!from.sender.has_pending() && expected.is_empty(), "{} messages are lost", expected.len());
    Ok(())
}

fn pair() -> Option<(UnixStream, Connection)> {
    let (peer, stream) = UnixStream::pair().ok()?;
    Some((peer, Connection::new(stream, LIMITS).ok()?))
}

fn send(peer: &UnixStream, bytes: &[u8], files: &[OwnedFd]) {
    let fds: Vec<_> = files.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    let flags = MsgFlags::MSG_NOSIGNAL;
    let sent = sendmsg::<()>(peer.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None);
    assert_eq!(sent, Ok(bytes.len()));
}

/// Which file a descriptor is of.
fn identity(fd: &OwnedFd) -> u64 {
    fstat(fd).map_or(0, |stat| stat.st_ino)
}
