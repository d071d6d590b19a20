//! What an operation comes to: where it ends, what it counts as, and what the driver is told of it.

use std::io;

use virtio::block::Status;
use virtio::queue::Written;

use crate::backend::{Io, Op};
use crate::metrics::Kind;

/// Where an operation ends in the store.
pub(super) fn end(io: &Io) -> u64 {
    match io.op {
        Op::Read { offset } | Op::Write { offset, .. } => offset.saturating_add(io.buffers.len()),
        Op::Discard { offset, len } | Op::WriteZeroes { offset, len, .. } => offset.saturating_add(len),
        Op::Flush => 0,
    }
}

/// What an operation counts as.
#[inline(always)]
pub(super) fn kind(op: Op) -> Kind {
    match op {
        Op::Read { .. } => Kind::Read,
        Op::Write { .. } => Kind::Write,
        Op::Flush => Kind::Flush,
        Op::Discard { .. } => Kind::Discard,
        Op::WriteZeroes { .. } => Kind::WriteZeroes,
    }
}

/// What a driver is told of a request that has been done: a read fills its buffers up to and with the status, others write
/// the status, and nothing of what else they might be allowed to.
#[inline(always)]
pub(super) fn success(io: &Io, written: u32) -> Written {
    let all = matches!(io.op, Op::Read { .. }) || !io.buffers.has_writable_data();
    if all { Written::All(written) } else { Written::First(written) }
}

/// What a driver is told of a request that has failed, and how many bytes of it have been written for sure: those of a
/// read, which come before the status, have not.
#[cold]
pub(super) fn failure(error: &io::Error, io: &Io, written: u32) -> (Status, Written) {
    let status = if error.kind() == io::ErrorKind::Unsupported { Status::Unsupp } else { Status::IoErr };
    (status, if matches!(io.op, Op::Read { .. }) { Written::First(0) } else { success(io, written) })
}
