//! What a connection has in the ring: one message on its way to the server, and one place for what comes from it.

use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;

use io_uring::types::Fd;
use io_uring::{opcode, squeue};

use super::request::Request;
use crate::backend::uring::{FixedBuffers, Lane, Operation, Step};

/// Pieces of a scatter list that the kernel takes at once (`UIO_MAXIOV`).
const MAX_PIECES: usize = 1024;
/// How often an entry that the kernel interrupted, or had no resources for, is tried again.
const MAX_RETRIES: u8 = 100;

/// Where written zeroes come from.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// A request whose memory the kernel is at work on, and its place in the table.
pub(super) struct Lent {
    pub(super) slot: u16,
    pub(super) request: Box<Request>,
}

/// A scatter list, at an address that stays.
struct Message {
    header: Box<libc::msghdr>,
    iovecs: Vec<libc::iovec>,
}

impl Message {
    fn new() -> Self {
        // SAFETY: a struct of integers and pointers, which zeroes are valid for.
        let header = Box::new(unsafe { std::mem::zeroed::<libc::msghdr>() });
        Self { header, iovecs: Vec::new() }
    }

    /// The message that the pieces from the `from`th on make, as many as the kernel takes.
    fn from(&mut self, from: usize) -> *mut libc::msghdr {
        let pieces = self.iovecs.get_mut(from..).unwrap_or_default();
        self.header.msg_iovlen = pieces.len().min(MAX_PIECES);
        self.header.msg_iov = pieces.as_mut_ptr();
        &raw mut *self.header
    }
}

/// Bytes on their way to the server.
pub(super) struct Outgoing {
    message: Message,
    /// The first piece that is not sent yet.
    sent: usize,
    /// What is not guest memory: headers, or all of it where that is encrypted.
    bytes: Vec<u8>,
    /// Requests whose buffers are among the pieces.
    pub(super) lent: Vec<Lent>,
    retries: u8,
    /// How it has failed.
    pub(super) errno: Option<i32>,
}

impl Outgoing {
    pub(super) fn new() -> Self {
        let (bytes, lent) = (Vec::new(), Vec::new());
        Self { message: Message::new(), sent: 0, bytes, lent, retries: 0, errno: None }
    }

    /// Makes it empty, and keeps what it has allocated.
    pub(super) fn clear(&mut self) {
        self.message.iovecs.clear();
        self.bytes.clear();
        self.lent.clear();
        (self.sent, self.retries, self.errno) = (0, 0, None);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Whether there is room for another request without another system call.
    pub(super) fn has_room(&self) -> bool {
        self.message.iovecs.len() < MAX_PIECES / 2
    }

    /// Appends what `write` appends to the bytes. Nothing but this changes them, so that those of a message are in order.
    pub(super) fn append(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        let before = self.bytes.len();
        write(&mut self.bytes);
        let len = self.bytes.len().saturating_sub(before);
        // Without an address yet: the bytes may still move.
        match self.message.iovecs.last_mut().filter(|last| last.iov_base.is_null()) {
            Some(last) => last.iov_len = last.iov_len.saturating_add(len),
            None => self.message.iovecs.push(libc::iovec { iov_base: std::ptr::null_mut(), iov_len: len }),
        }
    }

    /// Appends `len` bytes of a request's buffers, from byte `from` on.
    pub(super) fn append_buffers(&mut self, lent: Lent, from: u64, len: u64) {
        append_range(&mut self.message.iovecs, lent.request.io.buffers.iovecs(), from, len, usize::MAX);
        self.lent.push(lent);
    }

    /// Appends `len` zeroes.
    pub(super) fn append_zeroes(&mut self, mut len: usize) {
        while len > 0 {
            let piece = len.min(ZEROES.len());
            // Only ever read: nothing is received by this message.
            let iov_base = ZEROES.as_ptr().cast_mut().cast();
            self.message.iovecs.push(libc::iovec { iov_base, iov_len: piece });
            len = len.saturating_sub(piece);
        }
    }

    /// Gives the bytes their addresses; nothing is appended any more.
    pub(super) fn seal(&mut self) {
        let mut place = self.bytes.as_mut_ptr();
        for piece in self.message.iovecs.iter_mut().filter(|piece| piece.iov_base.is_null()) {
            piece.iov_base = place.cast();
            place = place.wrapping_add(piece.iov_len);
        }
    }

    fn moved(&mut self, mut bytes: usize) -> Step {
        for piece in self.message.iovecs.get_mut(self.sent..).unwrap_or_default() {
            if bytes < piece.iov_len {
                piece.iov_base = piece.iov_base.wrapping_byte_add(bytes);
                piece.iov_len = piece.iov_len.wrapping_sub(bytes);
                return Step::Again;
            }
            bytes = bytes.wrapping_sub(piece.iov_len);
            self.sent = self.sent.wrapping_add(1);
        }
        Step::Over
    }
}

/// Where what comes from the server goes.
pub(super) struct Incoming {
    message: Message,
    /// For all that is not data.
    staging: Box<[u8]>,
    /// The request whose data comes first, and how many bytes of that there is room for.
    pub(super) lent: Option<Lent>,
    room: usize,
    retries: u8,
    /// Bytes that came, or an error number, negated.
    pub(super) result: i32,
}

impl Incoming {
    /// Bytes besides data, at most.
    pub(super) const STAGING: usize = 16 << 10;

    pub(super) fn new() -> Self {
        let staging = vec![0; Self::STAGING].into_boxed_slice();
        Self { message: Message::new(), staging, lent: None, room: 0, retries: 0, result: 0 }
    }

    /// Makes room: `len` bytes of a request's buffers from byte `from` on, and after them `staging` bytes besides.
    pub(super) fn prepare(&mut self, data: Option<(Lent, u64, u64)>, staging: usize) {
        self.message.iovecs.clear();
        (self.room, self.retries, self.result) = (0, 0, 0);
        self.lent = data.map(|(lent, from, len)| {
            let buffers = lent.request.io.buffers.iovecs();
            self.room = append_range(&mut self.message.iovecs, buffers, from, len, MAX_PIECES - 1);
            if self.room as u64 == len {
                self.stage(staging);
            }
            lent
        });
        if self.lent.is_none() {
            self.stage(staging);
        }
    }

    fn stage(&mut self, len: usize) {
        let (iov_base, iov_len) = (self.staging.as_mut_ptr().cast(), len.min(self.staging.len()));
        self.message.iovecs.push(libc::iovec { iov_base, iov_len });
    }

    /// The bytes of data that came, and what came after them.
    pub(super) fn received(&self) -> (u32, &[u8]) {
        let all = usize::try_from(self.result).unwrap_or_default();
        let data = all.min(self.room);
        let rest = all.saturating_sub(data);
        (data as u32, self.staging.get(..rest).unwrap_or_default())
    }
}

/// Appends `len` bytes of a scatter list from byte `from` on, in `most` pieces; says how many bytes that came to.
fn append_range(into: &mut Vec<libc::iovec>, list: &[libc::iovec], mut from: u64, len: u64, most: usize) -> usize {
    let (mut left, mut count) = (usize::try_from(len).unwrap_or(usize::MAX), 0);
    let wanted = left;
    for piece in list {
        if left == 0 || count == most {
            break;
        }
        if from >= piece.iov_len as u64 {
            from -= piece.iov_len as u64;
            continue;
        }
        let skip = from as usize; // less than the piece's length
        let iov_len = piece.iov_len.wrapping_sub(skip).min(left);
        into.push(libc::iovec { iov_base: piece.iov_base.wrapping_byte_add(skip), iov_len });
        (from, left, count) = (0, left.wrapping_sub(iov_len), count + 1);
    }
    wanted.wrapping_sub(left)
}

/// One of the two.
pub(super) enum Transfer {
    Send(Outgoing),
    Receive(Incoming),
}

// SAFETY: entries lead to
// - a `msghdr` in a box and the scatter list that it names, on the heap, changed by `entry` and `landed` only;
// - bytes of ours on the heap: those of `Outgoing` are not touched after `seal`, those of `Incoming` after `prepare` and before
//   `landed`;
// - guest memory, pinned by requests that are lent to the operation and owned by it;
// - zeroes that are static and only read;
// - the socket, which the context shares.
unsafe impl Operation for Transfer {
    type Context = Rc<OwnedFd>;

    fn lane(&self, _: &Rc<OwnedFd>) -> Lane {
        Lane::Interrupt
    }

    fn entry(&mut self, socket: &Rc<OwnedFd>, _: &mut FixedBuffers<'_>) -> squeue::Entry {
        let fd = Fd(socket.as_raw_fd());
        match self {
            Self::Send(outgoing) => {
                let flags = libc::MSG_NOSIGNAL as u32;
                opcode::SendMsg::new(fd, outgoing.message.from(outgoing.sent)).flags(flags).build()
            }
            // There is no room for descriptors: those that a server sends are closed.
            Self::Receive(incoming) => opcode::RecvMsg::new(fd, incoming.message.from(0)).build(),
        }
    }

    fn landed(&mut self, _: &Rc<OwnedFd>, result: i32) -> Step {
        let again = matches!(result.saturating_neg(), libc::EINTR | libc::EAGAIN);
        match self {
            Self::Send(outgoing) => match usize::try_from(result) {
                Ok(bytes) if bytes > 0 => {
                    outgoing.retries = 0;
                    outgoing.moved(bytes)
                }
                _ if again && outgoing.retries < MAX_RETRIES => {
                    outgoing.retries += 1;
                    Step::Again
                }
                _ => {
                    outgoing.errno = Some(if result == 0 { libc::EPIPE } else { result.saturating_neg() });
                    Step::Over
                }
            },
            Self::Receive(incoming) if again && incoming.retries < MAX_RETRIES => {
                incoming.retries += 1;
                Step::Again
            }
            Self::Receive(incoming) => {
                incoming.result = result;
                Step::Over
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn iovec(at: usize, iov_len: usize) -> libc::iovec {
        libc::iovec { iov_base: std::ptr::without_provenance_mut(at), iov_len }
    }

    fn places(list: &[libc::iovec]) -> Vec<(usize, usize)> {
        list.iter().map(|piece| (piece.iov_base.addr(), piece.iov_len)).collect()
    }

    #[test]
    fn a_range_of_a_list_begins_and_ends_within_pieces() {
        let list = [iovec(1000, 10), iovec(2000, 20), iovec(3000, 30)];
        let range = |from, len, most| {
            let mut into = Vec::new();
            let bytes = append_range(&mut into, &list, from, len, most);
            (bytes, places(&into))
        };
        assert_eq!(range(0, 60, 9), (60, vec![(1000, 10), (2000, 20), (3000, 30)]));
        assert_eq!(range(3, 4, 9), (4, vec![(1003, 4)]));
        assert_eq!(range(9, 22, 9), (22, vec![(1009, 1), (2000, 20), (3000, 1)]));
        assert_eq!(range(10, 20, 9), (20, vec![(2000, 20)]));
        assert_eq!(range(0, 60, 2), (30, vec![(1000, 10), (2000, 20)]));
        assert_eq!(range(59, 100, 9), (1, vec![(3029, 1)]));
        assert_eq!(range(60, 0, 9), (0, vec![]));
    }

    #[test]
    fn what_was_sent_in_part_goes_on_where_it_stopped() {
        let mut outgoing = Outgoing::new();
        outgoing.append(|bytes| bytes.extend_from_slice(&[1; 28]));
        outgoing.append(|bytes| bytes.extend_from_slice(&[2; 28]));
        outgoing.append_zeroes(100);
        outgoing.append(|bytes| bytes.extend_from_slice(&[3; 28]));
        outgoing.seal();
        let base = outgoing.bytes.as_ptr().addr();
        let zeroes = ZEROES.as_ptr().addr();
        assert_eq!(places(&outgoing.message.iovecs), [(base, 56), (zeroes, 100), (base + 56, 28)]);
        assert!(matches!(outgoing.moved(57), Step::Again));
        assert_eq!(places(&outgoing.message.iovecs[outgoing.sent..]), [(zeroes + 1, 99), (base + 56, 28)]);
        assert!(matches!(outgoing.moved(99), Step::Again));
        assert!(matches!(outgoing.moved(27), Step::Again));
        assert!(matches!(outgoing.moved(1), Step::Over));
    }
}
