//! Bytes and file descriptors that come off a UNIX socket together.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recvmsg};

/// The most file descriptors that Linux passes in one message (`SCM_MAX_FD`).
const SCM_MAX_FD: usize = 253;
const HEADER_SIZE: usize = size_of::<libc::cmsghdr>();
const BUFFER_SIZE: usize = HEADER_SIZE + SCM_MAX_FD.next_multiple_of(2) * size_of::<RawFd>();

/// Room for the control message of one `recvmsg`. It holds the most that the kernel passes at once,
/// so that a peer cannot have descriptors cut off by sending many.
#[repr(C, align(8))]
pub(crate) struct ControlBuffer([u8; BUFFER_SIZE]);

impl ControlBuffer {
    pub(crate) fn new() -> ControlBuffer {
        ControlBuffer([0; BUFFER_SIZE])
    }
}

/// What one `recvmsg` gave.
pub(crate) struct Chunk {
    /// How many bytes; 0 at the end of the stream.
    pub(crate) len: usize,
    /// The file descriptors that came with them, close-on-exec. Linux passes those of one sent
    /// message at most.
    pub(crate) fds: Vec<OwnedFd>,
    /// Some were lost, because this process may not open more.
    pub(crate) truncated: bool,
}

/// Receives bytes into `buffer`, without waiting.
pub(crate) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8], control: &mut ControlBuffer) -> Result<Chunk, Errno> {
    // The kernel leaves the buffer alone when there is no control message: no old one may stay.
    if let Some(header) = control.0.get_mut(..HEADER_SIZE) {
        header.fill(0);
    }
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let mut iov = [IoSliceMut::new(buffer)];
    let received = recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut control.0), flags)?;
    let (len, flags) = (received.bytes, received.flags);
    // The control message is read here and not by nix: for a truncated one nix gives an error, and
    // the descriptors that did arrive would stay open for ever.
    Ok(Chunk { len, fds: take_fds(control), truncated: flags.contains(MsgFlags::MSG_CTRUNC) })
}

/// Takes the descriptors out of the control message. There is one at most: no socket option that
/// brings others is set.
fn take_fds(control: &ControlBuffer) -> Vec<OwnedFd> {
    let Some((header, data)) = control.0.split_first_chunk::<HEADER_SIZE>() else {
        return Vec::new();
    };
    let [l0, l1, l2, l3, l4, l5, l6, l7, v0, v1, v2, v3, t0, t1, t2, t3] = *header;
    let len = usize::from_ne_bytes([l0, l1, l2, l3, l4, l5, l6, l7]);
    let level = i32::from_ne_bytes([v0, v1, v2, v3]);
    let kind = i32::from_ne_bytes([t0, t1, t2, t3]);
    if level != libc::SOL_SOCKET || kind != libc::SCM_RIGHTS {
        return Vec::new();
    }
    let data = len.checked_sub(HEADER_SIZE).and_then(|len| data.get(..len)).unwrap_or_default();
    let (fds, _) = data.as_chunks();
    fds.iter().map(|fd| adopt(RawFd::from_ne_bytes(*fd))).collect()
}

#[allow(unsafe_code)]
fn adopt(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel opened `fd` for this process in the `recvmsg` that wrote the control message
    // (the header is cleared before each), and each is taken out once: nobody else owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
