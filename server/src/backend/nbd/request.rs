//! One operation as the requests it takes: a store's operation may be larger than what a server takes at once, and ask for
//! what the server has not.

use std::time::Instant;

use super::export::Export;
use super::replies::Asked;
use super::wire::{Command, CommandType, FLAG_NO_HOLE};
use crate::backend::{Io, Op};

/// Bytes of a request without data, at most: well within what its 32 bits say.
const MAX_RANGE: u64 = 1 << 30;
/// Bytes of zeroes that are written at a time, where the server cannot make them.
const MAX_ZEROES: u64 = 1 << 20;

/// What a request carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Payload {
    Nothing,
    /// The buffers' bytes from there on, as many as the request says.
    Buffers {
        from: u64,
    },
    Zeroes,
}

/// One operation.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) io: Box<Io>,
    /// Bytes that are done with.
    done: u64,
    /// Bytes of the request that is under way.
    piece: u32,
    /// What is left is to put it on stable storage.
    syncing: bool,
    over: bool,
    /// When a connection was first lost while it was under way.
    lost: Option<Instant>,
    /// It may be its memory that could not be sent: it goes by itself, so that this shows.
    pub(super) alone: bool,
}

impl Request {
    pub(super) fn new(io: Box<Io>) -> Self {
        let syncing = matches!(io.op, Op::Flush);
        Self { io, done: 0, piece: 0, syncing, over: false, lost: None, alone: false }
    }

    /// The first byte in the export, and how many.
    fn range(&self) -> (u64, u64) {
        match self.io.op {
            Op::Read { offset } | Op::Write { offset, .. } => (offset, self.io.buffers.len()),
            Op::Discard { offset, len } | Op::WriteZeroes { offset, len, .. } => (offset, len),
            Op::Flush => (0, 0),
        }
    }

    fn is_durable(&self) -> bool {
        matches!(self.io.op, Op::Write { durable: true, .. } | Op::WriteZeroes { durable: true, .. })
    }

    /// Whether the export's blocks allow it.
    pub(super) fn fits(&self, export: &Export) -> bool {
        let (offset, len) = self.range();
        (offset | len) & u64::from(export.block).wrapping_sub(1) == 0
            && offset.checked_add(len).is_some_and(|end| end <= export.size)
    }

    /// Bytes before those of the request under way.
    pub(super) fn done(&self) -> u64 {
        self.done
    }

    /// The next request to be sent; `None` if there is none left.
    pub(super) fn next(&mut self, export: &Export) -> Option<(Command, Payload)> {
        let (offset, len) = self.range();
        let features = export.features;
        let left = len.saturating_sub(self.done);
        if !self.over && !self.syncing && left == 0 {
            self.syncing = self.is_durable() && !features.fua;
            self.over = !self.syncing;
        }
        if self.over || self.syncing && !features.flush {
            return None;
        }
        if self.syncing {
            return Some((Command { kind: CommandType::Flush, flags: 0, offset: 0, len: 0 }, Payload::Nothing));
        }
        let transfer = left.min(export.max_transfer.into());
        let from = Payload::Buffers { from: self.done };
        let (kind, flags, len, payload) = match self.io.op {
            Op::Read { .. } => (CommandType::Read, 0, transfer, Payload::Nothing),
            Op::Write { .. } => (CommandType::Write, 0, transfer, from),
            Op::Discard { .. } if !features.trim => return None,
            Op::Discard { .. } => (CommandType::Trim, 0, left.min(MAX_RANGE), Payload::Nothing),
            Op::WriteZeroes { unmap, .. } if features.write_zeroes => {
                let flags = if unmap { 0 } else { FLAG_NO_HOLE };
                (CommandType::WriteZeroes, flags, left.min(MAX_RANGE), Payload::Nothing)
            }
            Op::WriteZeroes { .. } => {
                // Whole blocks, as both are: the server's largest transfer and ours.
                (CommandType::Write, 0, transfer.min(MAX_ZEROES), Payload::Zeroes)
            }
            Op::Flush => return None,
        };
        self.piece = u32::try_from(len).unwrap_or_default();
        let command = Command { kind, flags, offset: offset.saturating_add(self.done), len: self.piece };
        Some((command.durable(self.is_durable(), features), payload))
    }

    /// The request under way has been answered, without an error. Whether that was the last.
    pub(super) fn advance(&mut self) {
        if self.syncing {
            self.over = true;
            self.syncing = false;
        } else {
            self.done = self.done.saturating_add(self.piece.into());
        }
    }

    /// The connection was lost while it was under way; since when it has tried again.
    pub(super) fn restart(&mut self, now: Instant) -> Instant {
        // What was answered and not on stable storage may be lost; where nobody asked for that, it is not for us to say.
        if self.is_durable() {
            (self.done, self.syncing) = (0, false);
        }
        *self.lost.get_or_insert(now)
    }
}

/// What a command's answer is held against.
pub(super) fn asked(command: &Command) -> Asked {
    match command.kind {
        CommandType::Read => Asked::Read { offset: command.offset, len: command.len },
        _ => Asked::Other,
    }
}

#[cfg(test)]
mod tests {
    use virtio::memory::PinnedBuffers;

    use super::*;
    use crate::backend::contract::Guest;
    use crate::backend::nbd::export::BlockSizes;
    use crate::backend::nbd::wire::FLAG_FUA;

    const FLUSH: u16 = 1 << 2;
    const FUA: u16 = 1 << 3;
    const TRIM: u16 = 1 << 5;
    const ZEROES: u16 = 1 << 6;

    /// An export that takes 4 KiB at a time.
    fn export(flags: u16) -> Export {
        Export::new(1 << 20, 1 | flags, Some(BlockSizes { minimum: 512, preferred: 4096, maximum: 4096 })).unwrap()
    }

    fn request(op: Op, bytes: u64) -> Request {
        let buffers = if bytes > 0 { Guest::new().buffers(&[(0, bytes)]) } else { PinnedBuffers::default() };
        Request::new(Box::new(Io::new(0, op, buffers)))
    }

    /// All requests that it takes: type, flags, offset, length.
    fn all(mut request: Request, flags: u16) -> Vec<(CommandType, u16, u64, u32)> {
        let mut commands = Vec::new();
        while let Some((Command { kind, flags, offset, len }, _)) = request.next(&export(flags)) {
            commands.push((kind, flags, offset, len));
            request.advance();
            assert!(commands.len() < 1000);
        }
        commands
    }

    #[test]
    fn what_is_too_large_goes_in_pieces() {
        use CommandType::Read;
        let read = request(Op::Read { offset: 512 }, 4096 * 2 + 512);
        assert_eq!(all(read, 0), [(Read, 0, 512, 4096), (Read, 0, 4608, 4096), (Read, 0, 8704, 512)]);
    }

    #[test]
    fn durable_writes_say_so_or_flush() {
        use CommandType::{Flush, Write, WriteZeroes};
        let write = || request(Op::Write { offset: 0, durable: true }, 4096);
        assert_eq!(all(write(), FUA | FLUSH), [(Write, FLAG_FUA, 0, 4096)]);
        assert_eq!(all(write(), FLUSH), [(Write, 0, 0, 4096), (Flush, 0, 0, 0)]);
        assert_eq!(all(write(), 0), [(Write, 0, 0, 4096)], "there is no stable storage");
        assert_eq!(all(request(Op::Write { offset: 0, durable: false }, 4096), FUA | FLUSH), [(Write, 0, 0, 4096)]);
        let zeroes = |unmap| request(Op::WriteZeroes { offset: 0, len: 8192, unmap, durable: true }, 0);
        assert_eq!(all(zeroes(true), FUA | ZEROES), [(WriteZeroes, FLAG_FUA, 0, 8192)]);
        assert_eq!(all(zeroes(false), FUA | ZEROES), [(WriteZeroes, FLAG_FUA | FLAG_NO_HOLE, 0, 8192)]);
    }

    #[test]
    fn what_a_server_cannot_do_is_done_otherwise_or_not_at_all() {
        use CommandType::{Flush, Trim, Write};
        let discard = || request(Op::Discard { offset: 512, len: 8192 }, 0);
        assert_eq!(all(discard(), TRIM), [(Trim, 0, 512, 8192)]);
        assert_eq!(all(discard(), 0), []);
        let zeroes = request(Op::WriteZeroes { offset: 0, len: 8192, unmap: true, durable: true }, 0);
        assert_eq!(all(zeroes, FLUSH), [(Write, 0, 0, 4096), (Write, 0, 4096, 4096), (Flush, 0, 0, 0)]);
        assert_eq!(all(request(Op::Flush, 0), FLUSH), [(Flush, 0, 0, 0)]);
        assert_eq!(all(request(Op::Flush, 0), 0), []);
    }

    /// A flush on a new connection says nothing of what a server that is gone has answered.
    #[test]
    fn a_lost_connection_has_a_durable_write_begin_anew_and_others_go_on() {
        for (durable, done) in [(true, 0), (false, 4096)] {
            let mut write = request(Op::Write { offset: 0, durable }, 8192);
            write.next(&export(FLUSH)).unwrap();
            write.advance();
            write.next(&export(FLUSH)).unwrap();
            write.restart(Instant::now());
            let (command, payload) = write.next(&export(FLUSH)).unwrap();
            assert_eq!((command.offset, payload), (done, Payload::Buffers { from: done }));
        }
        let mut write = request(Op::Write { offset: 0, durable: true }, 512);
        write.next(&export(FLUSH)).unwrap();
        write.advance();
        assert_eq!(write.next(&export(FLUSH)).unwrap().0.kind, CommandType::Flush);
        write.restart(Instant::now());
        assert_eq!(write.next(&export(FLUSH)).unwrap().0.kind, CommandType::Write);
    }

    #[test]
    fn requests_are_whole_blocks_within_the_export() {
        let export =
            Export::new(1 << 20, 1, Some(BlockSizes { minimum: 4096, preferred: 4096, maximum: 4096 })).unwrap();
        let fits = |offset, bytes| request(Op::Read { offset }, bytes).fits(&export);
        assert!(fits(4096, 4096) && fits((1 << 20) - 4096, 4096));
        assert!(!fits(512, 4096) && !fits(4096, 512) && !fits(1 << 20, 4096));
        assert!(request(Op::Flush, 0).fits(&export));
    }
}
