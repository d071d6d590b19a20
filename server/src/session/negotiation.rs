//! VERSION: what both sides can do.

use vfio_user::{Capabilities, Errno, Reply, Version};

use crate::config::ClientLimits;

/// The protocol's version that we speak.
const MAJOR: u16 = 0;
const MINOR: u16 = 1;
/// The most descriptors with one message; QEMU takes no more.
pub(super) const MAX_MSG_FDS: u64 = 16;
/// The unit of DMA ranges, in bytes.
const PAGE_SIZE: u64 = 4096;

/// Answers a client's proposal, with no capability that is not in it, and in at most `room` bytes where that is possible:
/// QEMU takes no reply that is larger than its request.
///
/// # Errors
/// ENOTSUP if the client speaks another major version.
pub(super) fn answer(proposed: &Version, limits: &ClientLimits, room: usize) -> Result<Version, Errno> {
    if proposed.major != MAJOR {
        return Err(Errno::ENOTSUP);
    }
    let theirs = &proposed.capabilities;
    let whole = Version {
        major: MAJOR,
        minor: proposed.minor.min(MINOR),
        capabilities: Capabilities {
            max_msg_fds: theirs.max_msg_fds.and(Some(MAX_MSG_FDS)),
            max_data_xfer_size: theirs.max_data_xfer_size.and(Some(limits.data_xfer_size.into())),
            max_dma_maps: theirs.max_dma_maps.and(Some(limits.dma_maps.into())),
            pgsizes: theirs.pgsizes.and(Some(PAGE_SIZE)),
            ..Capabilities::default()
        },
    };
    let mut bytes = Vec::new();
    Reply::Version(&whole).encode(&mut bytes);
    // Without capabilities the defaults of the specification hold, and we keep those too.
    Ok(if bytes.len() <= room { whole } else { Version { capabilities: Capabilities::default(), ..whole } })
}
