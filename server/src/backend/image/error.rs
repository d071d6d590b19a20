//! Why an image cannot be opened as a store.

use std::io;
use std::path::PathBuf;

use crate::backend::file::OpenFailure;

/// Why an image cannot serve as a store.
#[derive(Debug, thiserror::Error)]
#[error("{}{}: {reason}", path.display(), of_whom(child.as_ref()))]
pub struct ImageError {
    /// The file that is wrong: the image, or one that it is made of.
    pub path: PathBuf,
    /// The image that names it, unless the operator does.
    pub child: Option<PathBuf>,
    /// What is wrong with it.
    pub reason: ImageFailure,
}

fn of_whom(child: Option<&PathBuf>) -> String {
    child.map_or_else(String::new, |child| format!(" (named by {})", child.display()))
}

/// The reason of an [`ImageError`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageFailure {
    /// As for any file.
    #[error(transparent)]
    File(#[from] OpenFailure),
    /// A file that an image needs.
    #[error(
        "there is no such file, and the image is nothing without it: bring it back, or, for a backing file that has moved, \
         tell the image with qemu-img rebase -u -F FORMAT -b BACKING IMAGE"
    )]
    PartMissing,
    /// It starts with other bytes.
    #[error("it is no qcow2 image; if it is a raw one, leave store out, or say store = \"file\"")]
    NotQcow2,
    /// It is broken.
    #[error(
        "the qcow2 image is damaged: {0}; qemu-img check says more, and qemu-img check -r all mends what can be mended"
    )]
    Damaged(String),
    /// Its last user did not close it, and its reference counts may be wrong.
    #[error(
        "the qcow2 image was not closed, and its reference counts may be wrong: make them anew with qemu-img check -r all"
    )]
    Dirty,
    /// Its last user found it broken.
    #[error("the qcow2 image is marked as corrupt: mend it with qemu-img check -r all, or take a copy")]
    Corrupt,
    /// It needs what we cannot do.
    #[error("the image uses {0}, which is not supported: make one without by qemu-img convert -O qcow2 OLD NEW")]
    Unsupported(String),
    /// It has no way to say that its backing file holds plain blocks, and a guest that wrote those could make them look
    /// like an image.
    #[error(
        "it does not say what format its backing file {name} has, and guessing is not safe: say it with \
         qemu-img rebase -u -F FORMAT -b {name} IMAGE"
    )]
    BackingFormat {
        /// The backing file.
        name: String,
    },
    /// A backing file of a format, or in a place, that we cannot reach.
    #[error("its backing file is {0}, which is not supported; files in the formats raw, qcow2 and vmdk are")]
    Backing(String),
    /// It is its own backing file, perhaps by way of others.
    #[error("it is already in use in the same chain of backing files: an image cannot be its own backing file")]
    Loop,
    /// More layers than anybody needs.
    #[error("more than {0} images are stacked: put some of them together with qemu-img commit")]
    TooDeep(usize),
    /// A format that we only read.
    #[error("images of this format can be read, and not written: say read_only = true")]
    ReadOnlyFormat,
    /// A version without a mark for images that were not closed.
    #[error(
        "a qcow2 image of version 2 can be read, and not written, for it cannot say that it was not closed: make version 3 of \
         it with qemu-img amend -f qcow2 -o compat=1.1 IMAGE, or say read_only = true"
    )]
    OldVersion,
    /// A format that we do not create.
    #[error("there is no such file; a size creates qcow2 images only, unless they are to be read-only")]
    Missing,
    /// The format's reader says so.
    #[error("{0}")]
    Format(#[source] io::Error),
    /// The format's reader has a defect.
    #[error("reading it has met a defect of this server: {0}")]
    Defect(String),
    /// Threads.
    #[error("cannot start its threads: {0}")]
    Threads(#[source] io::Error),
}
