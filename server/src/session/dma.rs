//! The client's memory: DMA_MAP and DMA_UNMAP.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use vfio_user::{DmaMap, DmaUnmap, Errno};
use virtio::memory::{
    Access, FileIdentity, Loss, Mapping, MappingError, MemoryFile, MemoryFileError, OverlapError, Release, SharedTable,
    UnmapError, is_plain_memory,
};

use super::allowance::Allowance;
use super::observation::{ObservedMemory, observe_file};
use crate::config::{ClientLimits, Size};

/// Why a range was not mapped.
#[derive(Debug, thiserror::Error)]
pub(super) enum MapError {
    #[error("{0} descriptors came with it; at most one belongs to a range")]
    Descriptors(usize),
    #[error("{0} ranges are mapped, which is the limit (--max-dma-maps)")]
    TooMany(u32),
    #[error("its file is {0}, and with the others more than {1}, which is the limit (--max-guest-memory)", Size(*.len), Size(*.limit))]
    TooLarge { len: u64, limit: u64 },
    #[error("{0} descriptors of the client's are open, which is the limit (--max-fds)")]
    TooManyFds(u64),
    #[error(
        "its file lies on a file system that is not this machine's memory, and might have the server wait: \
         give the guest's RAM a memfd, tmpfs or hugetlbfs, or this server --any-memory-file"
    )]
    NotPlainMemory,
    #[error(transparent)]
    Mapping(#[from] MappingError),
    #[error(transparent)]
    Overlap(#[from] OverlapError),
}

impl MapError {
    pub(super) fn errno(&self) -> Errno {
        match self {
            Self::TooMany(_) => Errno::ENOSPC,
            Self::TooLarge { .. } => Errno::ENOMEM,
            Self::TooManyFds(_) => Errno::EMFILE,
            Self::NotPlainMemory => Errno::EACCES,
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
    limits: ClientLimits,
    /// Bytes of files to map.
    bytes: Arc<Allowance>,
    /// Descriptors to keep, these and others.
    fds: Arc<Allowance>,
    /// Told when a file has become shorter than it was.
    loss: Arc<Loss>,
}

impl ClientMemory {
    pub(super) fn new(limits: ClientLimits, fds: Arc<Allowance>, loss: Arc<Loss>) -> Self {
        let bytes = Allowance::new(limits.guest_memory);
        Self { table: Arc::default(), files: Vec::new(), limits, bytes, fds, loss }
    }

    /// What the queues look at.
    pub(super) fn table(&self) -> &Arc<SharedTable> {
        &self.table
    }

    /// Maps a range.
    pub(super) fn map(&mut self, request: &DmaMap, mut fds: Vec<OwnedFd>) -> Result<(), MapError> {
        let count = fds.len();
        let (fd, true) = (fds.pop(), fds.is_empty()) else { return Err(MapError::Descriptors(count)) };
        if self.table.load().len() as u64 >= u64::from(self.limits.dma_maps) {
            return Err(MapError::TooMany(self.limits.dma_maps));
        }
        let access = Access { read: request.readable, write: request.writeable };
        let mapping = match fd {
            Some(fd) => {
                let file = self.file(File::from(fd))?;
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

    /// What is mapped now.
    pub(super) fn observe(&self) -> ObservedMemory {
        let mut seen = ObservedMemory::default();
        for mapping in self.table.load().iter() {
            seen.ranges = seen.ranges.saturating_add(1);
            seen.bytes = seen.bytes.saturating_add(mapping.len());
            if !mapping.is_reachable() {
                seen.unreachable_ranges = seen.unreachable_ranges.saturating_add(1);
                seen.unreachable_bytes = seen.unreachable_bytes.saturating_add(mapping.len());
            }
        }
        seen.files = self.files.iter().filter_map(Weak::upgrade).map(|file| observe_file(&file)).collect();
        seen
    }

    /// `file` mapped, or what was mapped of the same file before.
    fn file(&mut self, file: File) -> Result<Arc<MemoryFile>, MapError> {
        let unfit = |error: MemoryFileError| MapError::Mapping(error.into());
        let (identity, len) = FileIdentity::of(&file).map_err(unfit)?;
        self.files.retain(|known| known.strong_count() > 0);
        let known = self.files.iter().filter_map(Weak::upgrade).find(|known| known.is(identity, len));
        if let Some(known) = known {
            return Ok(known);
        }
        if !self.limits.any_memory_file && !is_plain_memory(&file).map_err(unfit)? {
            return Err(MapError::NotPlainMemory);
        }
        let fd = self.fds.take(1).ok_or(MapError::TooManyFds(self.fds.limit()))?;
        let mapped = MemoryFile::map(file).map_err(unfit)?.watched(&self.loss);
        // Its length as it was mapped, whatever the client makes it meanwhile.
        let len = mapped.len();
        let bytes = self.bytes.take(len).ok_or(MapError::TooLarge { len, limit: self.bytes.limit() })?;
        mapped.on_release(move || drop((fd, bytes)));
        let mapped = Arc::new(mapped);
        self.files.push(Arc::downgrade(&mapped));
        Ok(mapped)
    }
}
