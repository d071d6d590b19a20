//! An image and all that it is made of: its backing file, the backing file of that, and so on.
//!
//! All of it is opened, and locked, when the store is opened. From then on no file is looked for.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use imago::format::builder::FormatDriverBuilder;
use imago::format::gate::ImplicitOpenGate;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::vmdk::Vmdk;
use imago::{FormatAccess, FormatCreateBuilder, StorageOpenOptions};

use super::error::{ImageError, ImageFailure};
use super::layer_file::{LayerFile, beside};
use super::qcow2_header::{Header, check_size};
use crate::backend::file::OpenFailure;
use crate::backend::lock::Access;
use crate::backend::threads::message;

/// The most images of one chain.
pub(super) const MAX_LAYERS: usize = 64;

/// An image as its format's reader has it.
pub(super) type Image = FormatAccess<LayerFile>;

/// What the bytes of a layer mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LayerFormat {
    Raw,
    Qcow2,
    Vmdk,
}

impl LayerFormat {
    /// By QEMU's name.
    pub(super) fn named(name: &str) -> Result<Self, ImageFailure> {
        match name {
            "raw" | "file" | "host_device" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            "vmdk" => Ok(Self::Vmdk),
            _ => Err(ImageFailure::Backing(format!("in the format {name:?}"))),
        }
    }
}

/// What an image is like.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) image: Image,
    /// Bytes.
    pub(super) capacity: u64,
    /// Bytes that are allocated together; 0 if that is not known.
    pub(super) cluster_size: u32,
    /// Bytes of the blocks that the image's own file is read and written in.
    pub(super) file_block_size: usize,
    /// The file of an image that is to be marked while it is open.
    pub(super) to_mark: Option<LayerFile>,
}

/// Opens an image and its chain.
pub(super) fn open(path: &Path, format: LayerFormat, access: Access, direct: bool) -> Result<Opened, ImageError> {
    Chain { direct, files: Vec::new() }.open(path, None, format, access)
}

/// Creates a qcow2 image of zeroes.
pub(super) fn create(path: &Path, size: u64) -> Result<(), ImageError> {
    let error = |reason| ImageError { path: path.to_owned(), child: None, reason };
    let file = LayerFile::create(path).map_err(|reason| error(reason.into()))?;
    let created = guarded(|| Qcow2::<LayerFile>::create_builder(file).size(size).create());
    created.map_err(|reason| {
        // Nothing is in it yet.
        let _ = std::fs::remove_file(path);
        error(reason)
    })
}

/// The files of an image.
struct Chain {
    direct: bool,
    /// What was opened, by its identity.
    files: Vec<(u64, u64)>,
}

impl Chain {
    fn open(
        &mut self,
        path: &Path,
        child: Option<&Path>,
        format: LayerFormat,
        access: Access,
    ) -> Result<Opened, ImageError> {
        let error = |reason| ImageError { path: path.to_owned(), child: child.map(Path::to_owned), reason };
        let file = self.file(path, child, access).map_err(error)?;
        let file_block_size = file.block_size();
        match format {
            LayerFormat::Raw => {
                let capacity = file.len();
                let image = guarded(|| Raw::open_image(file, access == Access::Exclusive)).map_err(error)?;
                let image = FormatAccess::new(image);
                Ok(Opened { image, capacity, cluster_size: 0, file_block_size, to_mark: None })
            }
            LayerFormat::Qcow2 => {
                let header = Header::read(&file).map_err(error)?;
                let write = access == Access::Exclusive;
                if write && header.version < 3 {
                    return Err(error(ImageFailure::OldVersion));
                }
                let backing = header.backing.as_ref().map(|(name, format)| {
                    self.open(&beside(path, name), Some(path), *format, Access::Shared).map(|below| below.image)
                });
                let backing = backing.transpose()?;
                let to_mark = write.then(|| file.clone());
                let mut image: Qcow2<LayerFile> = guarded(|| Qcow2::open_image(file, write)).map_err(error)?;
                image.set_data_file(None);
                image.set_backing(backing);
                let (capacity, cluster_size) = (header.size, header.cluster_size);
                Ok(Opened { image: FormatAccess::new(image), capacity, cluster_size, file_block_size, to_mark })
            }
            LayerFormat::Vmdk => {
                if access == Access::Exclusive {
                    return Err(error(ImageFailure::ReadOnlyFormat));
                }
                let gate = Gate { chain: self, child: path };
                let image = guarded(|| Vmdk::<LayerFile>::builder(file).open(gate)).map_err(error)?;
                let image = FormatAccess::new(image);
                let capacity = image.size();
                check_size(capacity).map_err(error)?;
                Ok(Opened { image, capacity, cluster_size: 0, file_block_size, to_mark: None })
            }
        }
    }

    fn file(&mut self, path: &Path, child: Option<&Path>, access: Access) -> Result<LayerFile, ImageFailure> {
        // Before it is locked: it is, if we have it already.
        if self.files.len() == MAX_LAYERS {
            return Err(ImageFailure::TooDeep(MAX_LAYERS));
        }
        let identity = LayerFile::identity_of(path);
        if identity.is_some_and(|identity| self.files.contains(&identity)) {
            return Err(ImageFailure::Loop);
        }
        let file = LayerFile::open(path, access, self.direct).map_err(|reason| match reason {
            OpenFailure::Missing if child.is_some() => ImageFailure::PartMissing,
            OpenFailure::Missing => ImageFailure::Missing,
            reason => reason.into(),
        })?;
        self.files.push(file.identity());
        Ok(file)
    }
}

/// Opens what a VMDK names.
struct Gate<'a> {
    chain: &'a mut Chain,
    child: &'a Path,
}

impl ImplicitOpenGate<LayerFile> for Gate<'_> {
    /// VMDKs have no other images below them.
    fn open_format<F: FormatDriverBuilder<LayerFile>>(&mut self, _: F) -> io::Result<Image> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<LayerFile> {
        let path = options.get_filename().map(PathBuf::from).unwrap_or_default();
        self.chain.file(&path, Some(self.child), Access::Shared).map_err(io::Error::other)
    }
}

/// The reader's answer; a panic is one too.
fn guarded<T>(read: impl FnOnce() -> io::Result<T>) -> Result<T, ImageFailure> {
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(result) => result.map_err(ImageFailure::Format),
        Err(panic) => Err(ImageFailure::Defect(message(&*panic).to_owned())),
    }
}
