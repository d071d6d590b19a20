//! Why a file cannot be opened as a store.

use std::io;
use std::path::PathBuf;

/// Why a path cannot serve as a store.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct OpenError {
    /// What was to be opened.
    pub path: PathBuf,
    /// Why it was not.
    pub reason: OpenFailure,
}

/// The reason of an [`OpenError`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenFailure {
    /// There is none.
    #[error("there is no such file; a size would create it, unless it is to be read-only")]
    Missing,
    /// It is a directory, a pipe, a socket or a character device.
    #[error("it is neither a regular file nor a block device")]
    NotAStore,
    /// It holds no block.
    #[error("it is empty: create it with a size of 512 bytes or more")]
    Empty,
    /// It ends within a sector.
    #[error("it has {0} bytes, which is no multiple of 512: extend it, for instance with truncate -s %512")]
    Unaligned(u64),
    /// The size given is no size of a store.
    #[error("a size of {0} bytes is impossible: it must be a multiple of 512 and not zero")]
    Size(u64),
    /// It has another size than the one given.
    #[error("it has {found} bytes, not {wanted}: leave the size out, or resize it yourself")]
    SizeDiffers {
        /// Bytes that it has.
        found: u64,
        /// Bytes that were asked for.
        wanted: u64,
    },
    /// We may not.
    #[error("{}", if *.read_only {
        "no permission to read it"
    } else {
        "no permission to write it, or it is write-protected: open it read-only, or change that"
    })]
    Permission {
        /// Whether it was to be opened for reading only.
        read_only: bool,
    },
    /// Someone else uses it.
    #[error("it is in use: mounted, part of another device, or opened by another server")]
    Busy,
    /// It cannot be polled.
    #[error(
        "iopoll needs a file system and a device with polled queues, and this has none: leave iopoll out, or have the \
         device's driver make some (nvme: its parameter poll_queues, such as nvme.poll_queues=2 on the kernel's command \
         line; /sys/block/DEVICE/queue/io_poll then says 1)"
    )]
    NoPolledQueues,
    /// The path led to two different files.
    #[error("it was replaced while it was being opened: try again")]
    Replaced,
    /// The system refused something else.
    #[error("{action}: {source}")]
    System {
        /// What it refused.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl OpenFailure {
    /// Makes an error of the system, at this `action`, a reason.
    pub(in crate::backend) fn at(action: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| match source.raw_os_error() {
            Some(libc::EBUSY | libc::ETXTBSY) => Self::Busy,
            Some(libc::ENOENT) => Self::Missing,
            Some(libc::EISDIR) => Self::NotAStore,
            _ => Self::System { action, source },
        }
    }
}
