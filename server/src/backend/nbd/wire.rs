//! The layouts of the transmission phase (NBD protocol, "Transmission phase"). All numbers are big-endian.

use crate::backend::nbd::export::Features;

/// Bytes of a request without its data.
#[cfg(test)]
pub(super) const REQUEST_LEN: usize = 28;
/// Bytes of a simple reply without its data.
pub(super) const SIMPLE_REPLY_LEN: usize = 16;
/// Bytes of the part that all chunks of structured replies begin with.
pub(super) const CHUNK_LEN: usize = 20;

pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(super) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(super) const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// `NBD_REPLY_FLAG_DONE`: the last chunk of a reply.
pub(super) const CHUNK_DONE: u16 = 1;

/// `NBD_REPLY_TYPE_*`.
pub(super) mod chunk {
    pub(in crate::backend::nbd) const NONE: u16 = 0;
    pub(in crate::backend::nbd) const OFFSET_DATA: u16 = 1;
    pub(in crate::backend::nbd) const OFFSET_HOLE: u16 = 2;
    /// All types from here on tell of errors, of which a client need not know each.
    pub(in crate::backend::nbd) const ERRORS: u16 = 1 << 15;
}

/// `NBD_ESHUTDOWN`: the server is about to go.
pub(super) const ESHUTDOWN: u32 = 108;

/// What a server is asked to do (`NBD_CMD_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CommandType {
    Read = 0,
    Write = 1,
    Flush = 3,
    Trim = 4,
    WriteZeroes = 6,
}

/// `NBD_CMD_FLAG_FUA`: on stable storage when it is answered.
pub(super) const FLAG_FUA: u16 = 1 << 0;
/// `NBD_CMD_FLAG_NO_HOLE`: zeroes are to take the space that data would.
pub(super) const FLAG_NO_HOLE: u16 = 1 << 1;

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Command {
    pub(super) kind: CommandType,
    pub(super) flags: u16,
    /// First byte of the export.
    pub(super) offset: u64,
    /// Bytes.
    pub(super) len: u32,
}

impl Command {
    pub(super) fn encode(&self, cookie: u64, into: &mut Vec<u8>) {
        into.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        into.extend_from_slice(&self.flags.to_be_bytes());
        into.extend_from_slice(&(self.kind as u16).to_be_bytes());
        into.extend_from_slice(&cookie.to_be_bytes());
        into.extend_from_slice(&self.offset.to_be_bytes());
        into.extend_from_slice(&self.len.to_be_bytes());
    }

    /// Asks for stable storage, where the server knows that of single requests.
    pub(super) fn durable(mut self, durable: bool, features: Features) -> Self {
        if durable && features.fua {
            self.flags |= FLAG_FUA;
        }
        self
    }
}

/// The error of ours that one of the protocol's is.
pub(super) fn errno(error: u32) -> i32 {
    match error {
        1 => libc::EPERM,
        12 => libc::ENOMEM,
        22 => libc::EINVAL,
        28 => libc::ENOSPC,
        75 => libc::EOVERFLOW,
        95 => libc::EOPNOTSUPP,
        _ => libc::EIO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_28_bytes_in_this_order() {
        let command = Command {
            kind: CommandType::WriteZeroes,
            flags: FLAG_FUA | FLAG_NO_HOLE,
            offset: 0x0102_0304_0506_0708,
            len: 0x0a0b_0c0d,
        };
        let mut bytes = Vec::new();
        command.encode(0x1112_1314_1516_1718, &mut bytes);
        assert_eq!(bytes.len(), REQUEST_LEN);
        assert_eq!(bytes[..8], [0x25, 0x60, 0x95, 0x13, 0, 3, 0, 6]);
        assert_eq!(bytes[8..16], [0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18]);
        assert_eq!(bytes[16..24], [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(bytes[24..], [10, 11, 12, 13]);
    }
}
