//! Why there can be no overlay.

use std::io;
use std::path::PathBuf;

use crate::backend::file;

/// Why an overlay cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct OverlayError {
    /// Its file or folder.
    pub path: PathBuf,
    /// Why.
    pub reason: OverlayFailure,
}

/// The reason of an [`OverlayError`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OverlayFailure {
    /// Its file, as any other.
    #[error(transparent)]
    File(#[from] file::OpenFailure),
    /// Some other file.
    #[error("it is no overlay: name another file, which is made if there is none")]
    NotAnOverlay,
    /// Made by a later version.
    #[error("it is an overlay of format {0}, and this server knows format 1 only")]
    Version(u32),
    /// Its header or its map is not as it was written.
    #[error("it is an overlay, but damaged")]
    Damaged,
    /// It lies over something of another size.
    #[error("it was made over a base of {made} bytes, and this one has {found}: name the base that it was made over")]
    BaseSize {
        /// Bytes of the base that it was made over.
        made: u64,
        /// Bytes of this one.
        found: u64,
    },
    /// It lies over something else.
    #[error("it was made over another base, or that has been changed since: name the base that it was made over")]
    OtherBase,
    /// Its base may be another by now.
    #[error(
        "its base has been written since it was made, which may have ruined it; if the base is still the same, say so by \
         touch -d @{seconds}.{nanoseconds:09} BASE"
    )]
    BaseChanged {
        /// When the base was last changed before, since 1970.
        seconds: i64,
        /// And nanoseconds.
        nanoseconds: i64,
    },
    /// A size that it cannot have.
    #[error(
        "a size of {size} bytes is impossible: it must be a multiple of {block}, and not less than the {base} of the base"
    )]
    Size {
        /// Bytes that were asked for.
        size: u64,
        /// Bytes of the base.
        base: u64,
        /// Bytes of the base's blocks.
        block: u32,
    },
    /// It has another size than the one given.
    #[error("it is of {found} bytes, not {wanted}: leave the size out")]
    SizeDiffers {
        /// Bytes of its disk.
        found: u64,
        /// Bytes that were asked for.
        wanted: u64,
    },
    /// The system refused something.
    #[error("{action}: {source}")]
    System {
        /// What it refused.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
}
