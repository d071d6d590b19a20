//! A front end for vhost-user-blk, as far as a measurement needs one: one queue, driven as a vfio-user server's.
//!
//! The numbers and layouts are those of QEMU's docs/interop/vhost-user.rst. Each message is sent with the wish to be
//! answered, so that what a back end refuses is known at once.

use std::io::{IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use client::{BlockQueue, Buffer, SplitDriver};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::disk;

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;

/// `VHOST_USER_F_PROTOCOL_FEATURES`
const F_PROTOCOL_FEATURES: u32 = 30;
/// `VHOST_USER_PROTOCOL_F_REPLY_ACK`
const PROTOCOL_F_REPLY_ACK: u32 = 3;
/// `VHOST_USER_PROTOCOL_F_CONFIG`: back ends of disks refuse front ends without it.
const PROTOCOL_F_CONFIG: u32 = 9;

const VERSION: u32 = 1;
const NEED_REPLY: u32 = 1 << 3;
const HEADER_LEN: usize = 12;
/// How long the back end may take to answer.
const LIMIT: Duration = Duration::from_secs(10);
/// Segments of a request: header, data and status.
const SEGMENTS: u16 = 3;

/// The disk of a vhost-user back end, in use until the front end detaches.
pub(super) struct Disk {
    pub(super) front_end: FrontEnd,
    pub(super) queue: BlockQueue,
    pub(super) data: Buffer,
}

impl Disk {
    /// Attaches to the back end at `socket` with one queue of `queue_size` entries, and `size` bytes for data.
    pub(super) fn attach(socket: &Path, queue_size: u16, size: usize) -> Result<Self> {
        let mut front_end = FrontEnd::connect(socket)?;
        let features = front_end.negotiate()?;
        let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let indirect = if features & 1 << VIRTIO_RING_F_INDIRECT_DESC != 0 { SEGMENTS } else { 0 };
        let memory = disk::memory(size)?;
        let data = memory.allocate(size, 4096)?;
        let ring = SplitDriver::new(&memory, queue_size, event_idx, indirect)?;

        // One region, which lies at the same addresses for the guest and for us.
        let mut table = Payload::new().u32(1).u32(0);
        table = table.u64(memory.base()).u64(memory.size() as u64).u64(memory.base()).u64(0);
        front_end.set(SET_MEM_TABLE, &table, &[memory.fd()])?;
        front_end.set(SET_VRING_NUM, &Payload::new().u32(0).u32(queue_size.into()), &[])?;
        front_end.set(SET_VRING_BASE, &Payload::new().u32(0).u32(0), &[])?;
        let [desc, avail, used] = ring.memory().areas();
        let areas = Payload::new().u32(0).u32(0).u64(desc).u64(used).u64(avail).u64(0);
        front_end.set(SET_VRING_ADDR, &areas, &[])?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let (kick, call) = (EventFd::from_flags(flags)?, EventFd::from_flags(flags)?);
        front_end.set(SET_VRING_CALL, &Payload::new().u64(0), &[call.as_fd()])?;
        front_end.set(SET_VRING_KICK, &Payload::new().u64(0), &[kick.as_fd()])?;
        front_end.set(SET_VRING_ENABLE, &Payload::new().u32(0).u32(1), &[])?;
        let kick = kick.as_fd().try_clone_to_owned()?;
        let queue = BlockQueue::over_eventfds(&memory, ring, kick, Some(call), LIMIT)?;
        Ok(Self { front_end, queue, data })
    }
}

pub(super) struct FrontEnd {
    stream: UnixStream,
    /// Whether the back end answers what is no question.
    reply_ack: bool,
}

impl FrontEnd {
    fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).with_context(|| format!("cannot connect to {}", socket.display()))?;
        stream.set_read_timeout(Some(LIMIT))?;
        Ok(Self { stream, reply_ack: false })
    }

    /// Agrees on features; those of virtio.
    fn negotiate(&mut self) -> Result<u64> {
        self.set(SET_OWNER, &Payload::new(), &[])?;
        let offered = self.get(GET_FEATURES)?;
        ensure!(offered & 1 << F_PROTOCOL_FEATURES != 0, "the back end has no protocol features");
        let protocol = self.get(GET_PROTOCOL_FEATURES)? & (1 << PROTOCOL_F_REPLY_ACK | 1 << PROTOCOL_F_CONFIG);
        self.set(SET_PROTOCOL_FEATURES, &Payload::new().u64(protocol), &[])?;
        self.reply_ack = protocol & 1 << PROTOCOL_F_REPLY_ACK != 0;
        let known = [VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, F_PROTOCOL_FEATURES];
        let features = offered & known.iter().fold(0, |bits, bit| bits | 1u64 << bit);
        self.set(SET_FEATURES, &Payload::new().u64(features), &[])?;
        Ok(features)
    }

    /// Stops the queue.
    pub(super) fn detach(mut self) -> Result<()> {
        self.send(GET_VRING_BASE, &Payload::new().u32(0).u32(0), &[], false)?;
        self.receive(GET_VRING_BASE).map(drop)
    }

    fn get(&mut self, request: u32) -> Result<u64> {
        self.send(request, &Payload::new(), &[], false)?;
        self.receive(request)
    }

    fn set(&mut self, request: u32, payload: &Payload, fds: &[BorrowedFd<'_>]) -> Result<()> {
        self.send(request, payload, fds, self.reply_ack)?;
        if self.reply_ack {
            let answer = self.receive(request)?;
            ensure!(answer == 0, "the back end refuses request {request}: {answer}");
        }
        Ok(())
    }

    fn send(&mut self, request: u32, payload: &Payload, fds: &[BorrowedFd<'_>], reply: bool) -> Result<()> {
        let flags = VERSION | if reply { NEED_REPLY } else { 0 };
        let header = Payload::new().u32(request).u32(flags).u32(u32::try_from(payload.0.len())?);
        let message = [header.0.as_slice(), &payload.0].concat();
        let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = ControlMessage::ScmRights(&fds);
        let control = if fds.is_empty() { &[][..] } else { std::slice::from_ref(&rights) };
        let iov = [IoSlice::new(&message)];
        let sent = sendmsg::<()>(self.stream.as_raw_fd(), &iov, control, MsgFlags::MSG_NOSIGNAL, None)
            .context("cannot send to the back end")?;
        ensure!(sent == message.len(), "the back end's socket takes no whole message");
        Ok(())
    }

    /// The answer to `request`: its last 8 bytes, which are all of it but for GET_VRING_BASE.
    fn receive(&mut self, request: u32) -> Result<u64> {
        let mut header = [0; HEADER_LEN];
        self.stream.read_exact(&mut header).context("the back end does not answer")?;
        let word =
            |at: usize| header.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_ne_bytes);
        if (word(0), word(8)) != (request, 8) {
            bail!("the back end answers request {request} with {} and {} bytes", word(0), word(8));
        }
        let mut value = [0; 8];
        self.stream.read_exact(&mut value).context("the back end does not answer")?;
        Ok(u64::from_ne_bytes(value))
    }
}

/// A message's contents, in the machine's byte order as the protocol wants it.
struct Payload(Vec<u8>);

impl Payload {
    fn new() -> Self {
        Self(Vec::new())
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }
}
