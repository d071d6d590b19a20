//! The client's memory: DMA_MAP and DMA_UNMAP.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use vfio_user::{DmaMap, DmaUnmap, Errno};
use virtio::memory::{
    Access, Mapping, MappingError, MemoryFile, MemoryFileError, OverlapError, Release, SharedTable, UnmapError,
};

/// The most ranges of one client, as VERSION tells it (`max_dma_maps`).
pub(super) const MAX_DMA_MAPS: u64 = 65535;

/// Why a range was not mapped.
#[derive(Debug, thiserror::Error)]
pub(super) enum MapError {
    #[error("{0} descriptors came with it; at most one belongs to a range")]
    Descriptors(usize),
    #[error("{MAX_DMA_MAPS} ranges are mapped, which is the limit")]
    TooMany,
    #[error(transparent)]
    Mapping(#[from] MappingError),
    #[error(transparent)]
    Overlap(#[from] OverlapError),
}

impl MapError {
    pub(super) fn errno(&self) -> Errno {
        match self {
            Self::TooMany => Errno::ENOSPC,
            Self::Overlap(_) => Errno::EEXIST,
            Self::Mapping(MappingError::ReadOnlyFile) => Errno::EACCES,
            Self::Mapping(MappingError::File(MemoryFileError::Map(error))) => {
                error.raw_os_error().map_or(Errno::EINVAL, Errno::from_raw)
            }
            _ => Errno::EINVAL,
        }
    }
}

/// The memory of one client.
pub(super) struct ClientMemory {
    table: Arc<SharedTable>,
    /// The files that live mappings point into: each is mapped once.
    files: Vec<Weak<MemoryFile>>,
}

impl ClientMemory {
    pub(super) fn new() -> Self {
        Self { table: Arc::default(), files: Vec::new() }
    }

    /// What the queues look at.
    pub(super) fn table(&self) -> &Arc<SharedTable> {
        &self.table
    }

    /// Maps a range.
    pub(super) fn map(&mut self, request: &DmaMap, mut fds: Vec<OwnedFd>) -> Result<(), MapError> {
        let count = fds.len();
        let (fd, true) = (fds.pop(), fds.is_empty()) else { return Err(MapError::Descriptors(count)) };
        if self.table.load().len() as u64 >= MAX_DMA_MAPS {
            return Err(MapError::TooMany);
        }
        let access = Access { read: request.readable, write: request.writeable };
        let mapping = match fd {
            Some(fd) => {
                let file = self.file(File::from(fd)).map_err(MappingError::from)?;
                Mapping::of_file(request.address, request.size, access, file, request.offset)?
            }
            None => Mapping::unreachable(request.address, request.size, access)?,
        };
        Ok(self.table.map(mapping)?)
    }

    /// Takes ranges out of the table. They are gone once all that is returned is released.
    pub(super) fn unmap(&mut self, request: &DmaUnmap) -> Result<Vec<Arc<Release>>, UnmapError> {
        let gone = match *request {
            DmaUnmap::Range { address, size } => {
                // The codec has refused empty ranges; one that reaches over the end holds no mapping whole.
                let last = size.checked_sub(1).and_then(|size| address.checked_add(size));
                self.table.unmap(address, last.ok_or(UnmapError::NotMapped)?)
            }
            DmaUnmap::All => match self.table.unmap(0, u64::MAX) {
                Err(UnmapError::NotMapped) => Ok(Vec::new()),
                result => result,
            },
        }?;
        Ok(gone.iter().map(|mapping| mapping.release()).collect())
    }

    /// `file` mapped, or what was mapped of the same file before.
    fn file(&mut self, file: File) -> Result<Arc<MemoryFile>, MemoryFileError> {
        self.files.retain(|known| known.strong_count() > 0);
        for known in self.files.iter().filter_map(Weak::upgrade) {
            if known.is(&file)? {
                return Ok(known);
            }
        }
        let mapped = Arc::new(MemoryFile::map(file)?);
        self.files.push(Arc::downgrade(&mapped));
        Ok(mapped)
    }
}
