//! What a server says of an export, and what of it we rely on.

use super::error::HandshakeError;
use crate::backend::{SECTOR, StoreInfo};

/// Bytes of the largest block that we ask guests to keep to.
const MAX_MINIMUM: u32 = 64 << 10;
/// Bytes of the largest block that is told to guests as preferred.
const MAX_PREFERRED: u32 = 1 << 20;
/// Bytes that a request moves at most, whatever more a server would take: also what the protocol lets clients assume of a
/// server that does not say.
const MAX_TRANSFER: u32 = 32 << 20;

/// Transmission flags (`NBD_FLAG_*`), by bit.
mod flag {
    pub(super) const HAS_FLAGS: u16 = 1 << 0;
    pub(super) const READ_ONLY: u16 = 1 << 1;
    pub(super) const SEND_FLUSH: u16 = 1 << 2;
    pub(super) const SEND_FUA: u16 = 1 << 3;
    pub(super) const SEND_TRIM: u16 = 1 << 5;
    pub(super) const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub(super) const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// Which requests a server takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Features {
    pub(super) flush: bool,
    pub(super) fua: bool,
    pub(super) trim: bool,
    pub(super) write_zeroes: bool,
    /// What one connection has flushed, all have.
    pub(super) multi_conn: bool,
}

/// An export, as far as what was said of it makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Export {
    /// Bytes.
    pub(super) size: u64,
    pub(super) read_only: bool,
    pub(super) features: Features,
    /// Bytes that offsets and lengths are multiples of: a power of two.
    pub(super) block: u32,
    /// Bytes of the block that the server prefers: a power of two.
    pub(super) preferred: u32,
    /// Bytes of data of one request, at most: a multiple of `block`.
    pub(super) max_transfer: u32,
}

/// What `NBD_INFO_BLOCK_SIZE` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BlockSizes {
    pub(super) minimum: u32,
    pub(super) preferred: u32,
    pub(super) maximum: u32,
}

impl Export {
    /// Checks what was said.
    pub(super) fn new(size: u64, flags: u16, sizes: Option<BlockSizes>) -> Result<Self, HandshakeError> {
        let has = |flag| flags & flag != 0;
        if !has(flag::HAS_FLAGS) {
            return Err(HandshakeError::Nonsense("it says nothing of what it can do"));
        }
        let sizes = sizes.unwrap_or(BlockSizes { minimum: 1, preferred: 4096, maximum: MAX_TRANSFER });
        let BlockSizes { minimum, preferred, maximum } = sizes;
        if !minimum.is_power_of_two() || minimum > MAX_MINIMUM || !preferred.is_power_of_two() || preferred < minimum {
            return Err(HandshakeError::BlockSizes { minimum, preferred, maximum });
        }
        let block = minimum.max(SECTOR as u32);
        let max_transfer = maximum.min(MAX_TRANSFER) / block * block;
        if max_transfer == 0 {
            return Err(HandshakeError::BlockSizes { minimum, preferred, maximum });
        }
        if size == 0 {
            return Err(HandshakeError::Empty);
        }
        // More than a signed offset can say is a lie, or of no use.
        if i64::try_from(size).is_err() || !size.is_multiple_of(block.into()) {
            return Err(HandshakeError::Size { size, block });
        }
        let features = Features {
            flush: has(flag::SEND_FLUSH),
            fua: has(flag::SEND_FUA),
            trim: has(flag::SEND_TRIM),
            write_zeroes: has(flag::SEND_WRITE_ZEROES),
            multi_conn: has(flag::CAN_MULTI_CONN),
        };
        Ok(Self { size, read_only: has(flag::READ_ONLY), features, block, preferred, max_transfer })
    }

    /// Whether requests that are right for this export are right for `other` too, which has come in its place.
    pub(super) fn is_continued_by(&self, other: &Self) -> bool {
        let keeps = |had: bool, has: bool| has || !had;
        self.size == other.size
            && keeps(other.read_only, self.read_only)
            && keeps(self.features.multi_conn, other.features.multi_conn)
            && keeps(self.features.flush, other.features.flush)
            && other.block <= self.block
    }

    /// What the device is told.
    pub(super) fn info(&self, read_only: bool) -> StoreInfo {
        let read_only = read_only || self.read_only;
        StoreInfo {
            capacity: self.size,
            block_size: self.block,
            physical_block_size: self.preferred.clamp(self.block, MAX_PREFERRED),
            optimal_io_size: 0,
            read_only,
            discard: self.features.trim && !read_only,
            write_zeroes_unmap: self.features.write_zeroes && !read_only,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u16 = u16::MAX;

    fn sizes(minimum: u32, preferred: u32, maximum: u32) -> Option<BlockSizes> {
        Some(BlockSizes { minimum, preferred, maximum })
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        assert!(Export::new(1 << 20, ALL & !1, None).is_err(), "without flags");
        assert!(Export::new(0, ALL, None).is_err());
        assert!(Export::new(513, ALL, None).is_err());
        assert!(Export::new(1 << 63, ALL, None).is_err());
        assert!(Export::new(512 * 9, ALL, sizes(4096, 4096, 4096)).is_err(), "half a block");
        for (minimum, preferred, maximum) in [
            (0, 4096, 4096),
            (3, 4096, 4096),
            (1, 0, 4096),
            (512, 256, 4096),
            (1, 4097, 4096),
            (1, 1, 0),
            (1, 512, 511),
        ] {
            assert!(Export::new(1 << 20, ALL, sizes(minimum, preferred, maximum)).is_err());
        }
        assert!(
            Export::new(1 << 20, ALL, sizes(128 << 10, 128 << 10, 1 << 20)).is_err(),
            "beyond the protocol's limit"
        );
    }

    #[test]
    fn transfers_are_whole_blocks_and_no_larger_than_the_server_takes() {
        let max = |sizes| Export::new(1 << 20, ALL, sizes).unwrap().max_transfer;
        assert_eq!(max(None), 32 << 20);
        assert_eq!(max(sizes(1, 4096, u32::MAX)), 32 << 20);
        assert_eq!(max(sizes(4096, 4096, 65536 + 512)), 65536);
        assert_eq!(max(sizes(1, 512, 1000)), 512);
    }

    #[test]
    fn an_export_in_the_place_of_another_must_do_what_that_did() {
        let export = |size, flags| Export::new(size, flags, None).unwrap();
        let all = export(1 << 20, ALL & !flag::READ_ONLY);
        assert!(all.is_continued_by(&all));
        assert!(!all.is_continued_by(&export(2 << 20, ALL & !flag::READ_ONLY)));
        for lost in [flag::CAN_MULTI_CONN, flag::SEND_FLUSH] {
            let less = export(1 << 20, ALL & !flag::READ_ONLY & !lost);
            assert!(!all.is_continued_by(&less));
            assert!(less.is_continued_by(&all));
        }
        assert!(!all.is_continued_by(&export(1 << 20, ALL)), "read-only");
        // Without these there are other ways.
        let plain = export(1 << 20, flag::HAS_FLAGS | flag::SEND_FLUSH | flag::CAN_MULTI_CONN);
        assert!(all.is_continued_by(&plain));
    }
}
