//! The commands of the protocol as calls.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use vfio_user::{
    Capabilities, Command, Connection, DeviceInfo, DmaMap, DmaUnmap, Header, IrqAction, IrqData, IrqInfo, Limits,
    Received, RegionData, RegionInfo, RegionIoFds, RegionSpan, RegionWrites, Request, SetIrqs, Version,
};

use crate::Error;

/// How long a call waits before it gives up, unless set otherwise.
const TIMEOUT: Duration = Duration::from_secs(30);
/// The most file descriptors that this client takes with one message.
const MAX_MSG_FDS: usize = 64;

/// A connection to a vfio-user server. Calls wait for the answer, with a limit of 30 seconds unless
/// [`set_timeout`](Client::set_timeout) says otherwise; they may come from any thread, one at a time.
pub struct Client {
    inner: Mutex<Inner>,
}

struct Inner {
    connection: Connection,
    next_id: u16,
    timeout: Duration,
    server: Capabilities,
}

/// A message as it came, for tests that look at the wire.
#[derive(Debug)]
pub struct RawMessage {
    /// The header.
    pub header: Header,
    /// What follows it.
    pub payload: Vec<u8>,
    /// The file descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

impl Client {
    /// Connects to a server and agrees with it on version 0.0 and on capabilities.
    ///
    /// # Errors
    /// [`Error::Connect`] when nobody listens, or what [`version`](Client::version) gives.
    pub fn connect(path: &Path) -> Result<Client, Error> {
        let stream = UnixStream::connect(path).map_err(|source| Error::Connect { path: path.to_owned(), source })?;
        let client = Client::from_stream(stream)?;
        client.version(&Client::proposal())?;
        Ok(client)
    }

    /// Takes a connected socket and sends nothing yet: [`version`](Client::version) comes first.
    ///
    /// # Errors
    /// [`Error::Connection`] when the socket cannot be configured.
    pub fn from_stream(stream: UnixStream) -> Result<Client, Error> {
        let limits = Limits { max_msg_fds: MAX_MSG_FDS, ..Limits::default() };
        let connection = Connection::new(stream, limits)?;
        let server = Capabilities::default();
        let inner = Inner { connection, next_id: 0, timeout: TIMEOUT, server };
        Ok(Client { inner: Mutex::new(inner) })
    }

    /// What [`connect`](Client::connect) proposes.
    pub fn proposal() -> Version {
        let capabilities = Capabilities {
            max_msg_fds: Some(MAX_MSG_FDS as u64),
            max_data_xfer_size: Some(1 << 20),
            max_dma_maps: Some(65535),
            pgsizes: Some(4096),
            write_multiple: Some(true),
            migration: None,
        };
        Version { major: 0, minor: 0, capabilities }
    }

    /// Sets how long each later call waits.
    pub fn set_timeout(&self, timeout: Duration) {
        self.lock().timeout = timeout;
    }

    /// How long each call waits.
    pub(crate) fn timeout(&self) -> Duration {
        self.lock().timeout
    }

    /// VERSION: proposes, and gives what the server answers.
    ///
    /// # Errors
    /// [`Error::Refused`], or [`Error::Protocol`] for another major or a later minor version.
    pub fn version(&self, proposal: &Version) -> Result<Version, Error> {
        let request = Request::Version(proposal.clone());
        let mut inner = self.lock();
        let answer = inner.call(&request, &[], |payload, _| Version::decode(payload))?;
        if answer.major != proposal.major || answer.minor > proposal.minor {
            return Err(Error::Protocol("the answer to VERSION is of a version not proposed"));
        }
        inner.server = answer.capabilities.clone();
        Ok(answer)
    }

    /// What the server supports, as it said in VERSION.
    pub fn server_capabilities(&self) -> Capabilities {
        self.lock().server.clone()
    }

    /// DEVICE_GET_INFO.
    ///
    /// # Errors
    /// [`Error::Refused`] and those of the connection, like all calls below.
    pub fn device_info(&self) -> Result<DeviceInfo, Error> {
        self.call(&Request::DeviceGetInfo, &[], |payload, _| DeviceInfo::decode(payload))
    }

    /// DEVICE_GET_REGION_INFO: the region with its capabilities, and the file to map when it has one.
    /// Asks twice when the capabilities need more room, like QEMU.
    ///
    /// # Errors
    /// [`Error::Refused`] and those of the connection.
    pub fn region_info(&self, index: u32) -> Result<(RegionInfo, Option<OwnedFd>), Error> {
        let ask = |argsz| {
            let request = Request::DeviceGetRegionInfo { argsz, index };
            self.call(&request, &[], |payload, fds| {
                let (info, argsz) = RegionInfo::decode(payload)?;
                Ok((info, argsz, fds.into_iter().next()))
            })
        };
        let (info, argsz, fd) = ask(RegionInfo::SIZE)?;
        if argsz <= RegionInfo::SIZE {
            return Ok((info, fd));
        }
        let (info, _, fd) = ask(argsz)?;
        Ok((info, fd))
    }

    /// DEVICE_GET_REGION_IO_FDS: the parts of a region that have an eventfd, and those eventfds. Asks
    /// twice when there are any.
    ///
    /// # Errors
    /// [`Error::Refused`] and those of the connection.
    pub fn region_io_fds(&self, index: u32) -> Result<(RegionIoFds, Vec<OwnedFd>), Error> {
        let ask = |argsz| {
            let request = Request::DeviceGetRegionIoFds { argsz, index };
            self.call(&request, &[], |payload, fds| {
                let (io_fds, argsz) = RegionIoFds::decode(payload)?;
                Ok((io_fds, argsz, fds))
            })
        };
        let (io_fds, argsz, fds) = ask(RegionIoFds::SIZE)?;
        if argsz <= RegionIoFds::SIZE {
            return Ok((io_fds, fds));
        }
        let (io_fds, _, fds) = ask(argsz)?;
        Ok((io_fds, fds))
    }

    /// DEVICE_GET_IRQ_INFO.
    ///
    /// # Errors
    /// [`Error::Refused`] and those of the connection.
    pub fn irq_info(&self, index: u32) -> Result<IrqInfo, Error> {
        let request = Request::DeviceGetIrqInfo { index };
        self.call(&request, &[], |payload, _| IrqInfo::decode(payload))
    }

    /// DEVICE_SET_IRQS, as given.
    ///
    /// # Errors
    /// [`Error::Refused`] and those of the connection.
    pub fn set_irqs(&self, set: SetIrqs<'_>, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        self.call(&Request::DeviceSetIrqs(set), fds, done)
    }

    /// Attaches eventfds to the interrupts `start..` of an index, in messages of as many as the server
    /// takes.
    ///
    /// # Errors
    /// [`Error::Refused`] and those of the connection.
    pub fn set_irq_eventfds(&self, index: u32, start: u32, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let at_once = self.lock().server.max_msg_fds().clamp(1, MAX_MSG_FDS as u64) as usize;
        let mut start = start;
        for fds in fds.chunks(at_once) {
            // A chunk is at most `MAX_MSG_FDS` long.
            let count = fds.len() as u32;
            let (action, data) = (IrqAction::Trigger, IrqData::EventFd);
            self.set_irqs(SetIrqs { action, data, index, start, count }, fds)?;
            start = start.saturating_add(count);
        }
        Ok(())
    }

    /// Disables all interrupts of an index.
    ///
    /// # Errors
    /// [`Error::Refused`] and those of the connection.
    pub fn disable_irqs(&self, index: u32) -> Result<(), Error> {
        let (action, data) = (IrqAction::Trigger, IrqData::None);
        self.set_irqs(SetIrqs { action, data, index, start: 0, count: 0 }, &[])
    }

    /// REGION_READ into `data`, in one message.
    ///
    /// # Errors
    /// [`Error::Refused`] and those of the connection.
    pub fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        let count = data.len().try_into().unwrap_or(u32::MAX);
        let request = Request::RegionRead(RegionSpan { offset, region, count });
        self.call(&request, &[], |payload, _| {
            let answer = RegionData::decode(payload)?;
            if (answer.offset, answer.region, answer.data.len()) != (offset, region, data.len()) {
                return Err(Errno::EINVAL);
            }
            data.copy_from_slice(answer.data);
            Ok(())
        })
    }

    /// REGION_WRITE, and waits until it is done.
    ///
    /// # Errors
    /// [`Error::Refused`] and those of the connection.
    pub fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Error> {
        let write = RegionData { offset, region, data };
        self.call(&Request::RegionWrite(write), &[], |payload, _| {
            if RegionSpan::decode(payload)? == write.span() { Ok(()) } else { Err(Errno::EINVAL) }
        })
    }

    /// REGION_WRITE without reply: returns when the message is sent.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn region_post(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Error> {
        self.post(&Request::RegionWrite(RegionData { offset, region, data }), &[])
    }

    /// REGION_WRITE_MULTI: at most 200 writes of at most 8 bytes, without reply as QEMU sends it, or
    /// waiting for it when `wait`.
    ///
    /// # Errors
    /// [`Error::Refused`], for too many or too long writes also with nothing sent, and those of the
    /// connection.
    pub fn region_write_multi(&self, writes: &[RegionData<'_>], wait: bool) -> Result<(), Error> {
        let command = Command::RegionWriteMulti;
        let mut buffer = Vec::new();
        let multi = RegionWrites::new(writes, &mut buffer).map_err(|errno| Error::Refused { command, errno })?;
        let request = Request::RegionWriteMulti(multi);
        if !wait {
            return self.post(&request, &[]);
        }
        let wr_cnt = writes.len() as u64;
        self.call(&request, &[], |payload, _| if payload == wr_cnt.to_ne_bytes() { Ok(()) } else { Err(Errno::EINVAL) })
    }

    /// DMA_MAP, with a file to map or without.
    ///
    /// # Errors
    /// [`Error::Refused`] and those of the connection.
    pub fn dma_map(&self, map: &DmaMap, fd: Option<BorrowedFd<'_>>) -> Result<(), Error> {
        self.call(&Request::DmaMap(*map), fd.as_slice(), done)
    }

    /// DMA_UNMAP of one range, exactly as it was mapped.
    ///
    /// # Errors
    /// [`Error::Refused`] and those of the connection.
    pub fn dma_unmap(&self, address: u64, size: u64) -> Result<(), Error> {
        self.call(&Request::DmaUnmap(DmaUnmap::Range { address, size }), &[], done)
    }

    /// DMA_UNMAP of all ranges.
    ///
    /// # Errors
    /// [`Error::Refused`] and those of the connection.
    pub fn dma_unmap_all(&self) -> Result<(), Error> {
        self.call(&Request::DmaUnmap(DmaUnmap::All), &[], done)
    }

    /// DEVICE_RESET.
    ///
    /// # Errors
    /// [`Error::Refused`] and those of the connection.
    pub fn reset(&self) -> Result<(), Error> {
        self.call(&Request::DeviceReset, &[], done)
    }

    /// Sends any request with the no-reply flag.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn post(&self, request: &Request<'_>, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        self.lock().transmit(request, true, fds).map(|_| ())
    }

    /// Sends bytes as they are, which need not be a message.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn send_raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        self.lock().send_raw(bytes, fds)
    }

    /// Takes the next message of the server, whatever it is; `None` when none comes in time.
    ///
    /// # Errors
    /// [`Error::Disconnected`], and those of the connection.
    pub fn recv_raw(&self, timeout: Duration) -> Result<Option<RawMessage>, Error> {
        self.lock().recv_raw(timeout)
    }

    fn call<T>(
        &self,
        request: &Request<'_>,
        fds: &[BorrowedFd<'_>],
        decode: impl FnOnce(&[u8], Vec<OwnedFd>) -> Result<T, Errno>,
    ) -> Result<T, Error> {
        self.lock().call(request, fds, decode)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A thread that panicked held no half-done state: each message is sent or kept as a whole.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// For replies whose payload says nothing.
fn done(_payload: &[u8], _fds: Vec<OwnedFd>) -> Result<(), Errno> {
    Ok(())
}

impl Inner {
    fn call<T>(
        &mut self,
        request: &Request<'_>,
        fds: &[BorrowedFd<'_>],
        decode: impl FnOnce(&[u8], Vec<OwnedFd>) -> Result<T, Errno>,
    ) -> Result<T, Error> {
        let command = request.command();
        let id = self.transmit(request, false, fds)?;
        let deadline = Instant::now() + self.timeout;
        loop {
            match self.connection.receiver.receive()? {
                Received::Reply { header, payload, fds } => {
                    if (header.id, header.command) != (id, command.number()) {
                        return Err(Error::Protocol("a reply to another command"));
                    }
                    if let Some(errno) = header.error() {
                        return Err(Error::Refused { command, errno });
                    }
                    return decode(payload, fds).map_err(|_| Error::Protocol("a malformed reply"));
                }
                // A server may ask for memory that was mapped without a file: this client has none.
                Received::Command { reply_to, .. } => {
                    self.connection.sender.refuse(reply_to, Errno::ENOTSUP)?;
                }
                Received::Refused { .. } => return Err(Error::Protocol("a reply that is too large")),
                Received::Closed => return Err(Error::Disconnected),
                Received::WouldBlock => {
                    if !self.wait(PollFlags::POLLIN, deadline)? {
                        return Err(Error::Timeout { what: "reply", limit: self.timeout });
                    }
                }
            }
        }
    }

    fn transmit(&mut self, request: &Request<'_>, no_reply: bool, fds: &[BorrowedFd<'_>]) -> Result<u16, Error> {
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        self.connection.sender.command(id, no_reply, request, fds)?;
        let deadline = Instant::now() + self.timeout;
        while self.connection.sender.has_pending() {
            if !self.wait(PollFlags::POLLOUT, deadline)? {
                return Err(Error::Timeout { what: "room to send", limit: self.timeout });
            }
            self.connection.sender.flush()?;
        }
        Ok(id)
    }

    fn send_raw(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let deadline = Instant::now() + self.timeout;
        let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let mut control = if fds.is_empty() { &[][..] } else { &rights[..] };
        let mut left = bytes;
        while !left.is_empty() {
            let socket = self.connection.as_fd().as_raw_fd();
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match sendmsg::<()>(socket, &[IoSlice::new(left)], control, flags, None) {
                Ok(sent) => {
                    control = &[];
                    left = left.get(sent..).unwrap_or_default();
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(Error::Disconnected),
                Err(Errno::EAGAIN) => {
                    if !self.wait(PollFlags::POLLOUT, deadline)? {
                        return Err(Error::Timeout { what: "room to send", limit: self.timeout });
                    }
                }
                Err(source) => return Err(Error::System { action: "send", source }),
            }
        }
        Ok(())
    }

    fn recv_raw(&mut self, timeout: Duration) -> Result<Option<RawMessage>, Error> {
        let deadline = Instant::now() + timeout;
        loop {
            match self.connection.receiver.receive()? {
                Received::Reply { header, payload, fds } => {
                    return Ok(Some(RawMessage { header, payload: payload.to_vec(), fds }));
                }
                Received::Command { command, reply_to, payload, fds } => {
                    let size = (Header::SIZE + payload.len()) as u32;
                    let header = Header { id: reply_to.id(), command, size, flags: 0, errno: 0 };
                    return Ok(Some(RawMessage { header, payload: payload.to_vec(), fds }));
                }
                Received::Refused { .. } => return Err(Error::Protocol("a message that is too large")),
                Received::Closed => return Err(Error::Disconnected),
                Received::WouldBlock => {
                    if !self.wait(PollFlags::POLLIN, deadline)? {
                        return Ok(None);
                    }
                }
            }
        }
    }

    /// Waits for the socket; false when the time is over.
    fn wait(&self, events: PollFlags, deadline: Instant) -> Result<bool, Error> {
        wait(self.connection.as_fd(), events, deadline)
    }
}

/// Waits for a file descriptor; false when the time is over.
pub(crate) fn wait(fd: BorrowedFd<'_>, events: PollFlags, deadline: Instant) -> Result<bool, Error> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up, so that the last millisecond is not spent spinning.
        let millis = left.as_nanos().div_ceil(1_000_000).min(i32::MAX as u128) as i32;
        let timeout = PollTimeout::try_from(millis).unwrap_or(PollTimeout::ZERO);
        match poll(&mut [PollFd::new(fd, events)], timeout) {
            Ok(0) if left.is_zero() => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(source) => return Err(Error::System { action: "poll", source }),
        }
    }
}
