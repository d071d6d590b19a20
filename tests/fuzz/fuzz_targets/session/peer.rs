//! The client's end of the socket, which keeps count of the answers that it is owed.

use std::collections::VecDeque;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use client::{Client, RawMessage};
use vfio_user::{Header, MessageType, RegionSpan, Request, Version};

use super::LIMIT;

/// How many answers may be owed before they are taken: few enough that neither side's socket ever fills.
const MOST_OWED: usize = 16;
const NO_REPLY: u32 = 0x10;

/// A client that sends anything and checks that the stream stays in step.
pub struct Peer {
    client: Client,
    next_id: u16,
    owed: VecDeque<Owed>,
    /// The eventfds that the server gave for doorbells.
    pub doorbells: Vec<OwnedFd>,
    /// The server has a reason to end the session.
    may_end: bool,
}

/// An answer that must come.
struct Owed {
    id: u16,
    command: u16,
    /// The payload of an answer that is no error, if it follows from the question.
    len: Option<usize>,
}

impl Peer {
    pub fn connect(socket: &Path) -> Peer {
        let stream = UnixStream::connect(socket).expect("the server listens");
        let client = Client::from_stream(stream).expect("a socket");
        client.set_timeout(LIMIT);
        Peer { client, next_id: 0, owed: VecDeque::new(), doorbells: Vec::new(), may_end: false }
    }

    pub fn version(&mut self, version: &Version) {
        self.ask(&Request::Version(version.clone()), &[]);
    }

    /// Sends a request that waits for its answer.
    pub fn ask(&mut self, request: &Request<'_>, fds: &[BorrowedFd<'_>]) {
        self.request(request, true, fds);
    }

    /// Sends a request.
    pub fn request(&mut self, request: &Request<'_>, wait: bool, fds: &[BorrowedFd<'_>]) {
        let mut payload = Vec::new();
        request.encode(&mut payload);
        let len = match request {
            Request::RegionRead(span) => Some(16 + span.count as usize),
            Request::RegionWrite(_) | Request::DeviceGetInfo | Request::DeviceGetIrqInfo { .. } => Some(16),
            Request::RegionWriteMulti(_) => Some(8),
            Request::DmaUnmap(_) => Some(24),
            Request::DmaMap(_) | Request::DeviceSetIrqs(_) | Request::DeviceReset => Some(0),
            _ => None,
        };
        self.send(request.command().number(), if wait { 0 } else { NO_REPLY }, &payload, fds, len);
    }

    /// Sends any message with a header of the right size.
    pub fn message(&mut self, command: u16, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        self.send(command, flags, payload, fds, None);
    }

    fn send(&mut self, command: u16, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>], len: Option<usize>) {
        if self.owed.len() >= MOST_OWED {
            self.take_answers();
        }
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        let size = (Header::SIZE + payload.len()) as u32;
        let header = Header { id, command, size, flags, errno: 0 };
        let mut bytes = header.encode().to_vec();
        bytes.extend(payload);
        let sent = self.client.send_raw(&bytes, fds);
        if self.may_end {
            return;
        }
        sent.expect("the session goes on");
        if !header.no_reply() && header.message_type() != Ok(MessageType::Reply) {
            self.owed.push_back(Owed { id, command, len });
        }
    }

    /// Takes all answers that are owed; gives the last.
    pub fn take_answers(&mut self) -> Option<RawMessage> {
        let mut last = None;
        while let Some(owed) = self.owed.pop_front() {
            let answer = self.client.recv_raw(LIMIT).expect("the session goes on").expect("an answer in time");
            let RawMessage { header, payload, fds } = &answer;
            assert_eq!(header.message_type(), Ok(MessageType::Reply));
            assert_eq!((header.id, header.command), (owed.id, owed.command), "the answer to another question");
            if header.error().is_some() {
                assert!(payload.is_empty() && fds.is_empty(), "an error with more than its number");
            } else if let Some(len) = owed.len {
                assert_eq!(payload.len(), len, "command {}", owed.command);
            }
            last = Some(answer);
        }
        last
    }

    /// As [`take_answers`](Self::take_answers); whether the last was no error.
    pub fn succeeds(&mut self) -> bool {
        self.take_answers().is_some_and(|answer| answer.header.error().is_none())
    }

    /// The device status, as the device says it.
    pub fn status(&mut self) -> Option<u8> {
        self.ask(&Request::RegionRead(RegionSpan { offset: 0x14, region: 2, count: 1 }), &[]);
        self.take_answers()?.payload.last().copied()
    }

    /// That the next question gets its own answer, after all that are owed and nothing else.
    pub fn in_step(&mut self) {
        self.ask(&Request::DeviceGetInfo, &[]);
        self.take_answers();
    }

    /// From now on the server may end the session, and messages get no further than they get.
    pub fn may_end(&mut self) {
        self.in_step();
        self.may_end = true;
    }

    /// The beginning of a message whose end never comes.
    pub fn half_a_message(&mut self) {
        let header = Header { id: 0, command: 10, size: 4096, flags: 0, errno: 0 };
        self.client.send_raw(&header.encode(), &[]).expect("the session goes on");
    }
}
