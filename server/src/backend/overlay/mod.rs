//! A disk that starts as a copy of another, which it never changes.
//!
//! An [`OverlayStore`] lies over a [`Base`], which is only read and which any number of overlays share: the open store, and
//! with it the page cache. What a guest writes goes to storage of the overlay's own: memory, a file without a name, or a file
//! that is kept ([`Place`]). A map says of each sector where it is: in the base, in the overlay's own storage, or nowhere,
//! because it is zero.
//!
//! The map knows single sectors, so a write never has to bring along what lies around it in the base: a write is one write of
//! the own storage, after which the map is told. There is nothing to lock, neither between queues nor between requests. A read
//! is one read where all of it is in one place, and else one for each run of sectors.
//!
//! What is discarded or made zero is noted in the map, and what storage it had is freed; the base does not show through again.
//!
//! Storage is counted in blocks of 4096 bytes, and a write that would take more than the limit fails with ENOSPC. It is freed
//! by requests that cover blocks as a whole.
//!
//! An overlay in memory or in a file without a name has no stable storage: a flush and a durable write do nothing more than
//! others. One that is kept has: see `format` for the file and what a crash leaves of it.

mod base;
mod commit;
mod emptying;
mod error;
mod format;
mod map;
mod queue;
mod slab;
#[cfg(test)]
pub(super) mod tests;

use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

pub use base::Base;
use commit::StoredMap;
pub use emptying::{Emptied, EmptyError};
pub(crate) use emptying::{Emptying, Progress};
use emptying::{Own, Whole};
pub use error::{OverlayError, OverlayFailure};
use format::{Fate, Header};
use map::{BLOCK, Map};
use queue::OverlayBackend;

use super::file::{Cache, FileOptions, FileStore};
use super::memory::MemoryStore;
use super::uring::Uring;
use super::{Backend, Service, Store, StoreInfo};

/// Where an overlay has what is its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In memory: gone with the store.
    Memory,
    /// In a sparse file without a name: gone with the store.
    Temporary {
        /// Where the file is made.
        folder: PathBuf,
        /// Which way its data goes.
        cache: Cache,
    },
    /// In a sparse file that is kept, and made if there is none.
    Kept {
        /// The file.
        path: PathBuf,
        /// Which way its data goes.
        cache: Cache,
    },
}

/// What an overlay is to be.
#[derive(Clone, Debug)]
pub struct OverlayOptions {
    /// Where it has what is its own.
    pub place: Place,
    /// Bytes of the disk, a multiple of 512, not fewer than the base has; what the base has not is zero. Without it, as many as
    /// the base, or as an overlay that is there already.
    pub size: Option<u64>,
    /// The most bytes of its own, rounded down to blocks of 4096.
    pub limit: Option<u64>,
}

/// A disk over a base; see the [module](self).
pub struct OverlayStore(Arc<Overlay>);

struct Overlay {
    base: Base,
    own: Arc<dyn Store>,
    /// Where in its own storage the disk starts.
    own_offset: u64,
    map: Arc<Map>,
    /// If it is kept.
    stored: Option<Arc<StoredMap>>,
    info: StoreInfo,
    /// What the operators' work on all of it at once needs.
    whole: Whole,
}

impl OverlayStore {
    /// Opens an overlay, or makes it.
    ///
    /// # Errors
    /// If there can be none, or the file that is there is no overlay of this base.
    pub fn open(base: &Base, options: &OverlayOptions) -> Result<Self, OverlayError> {
        let of_base = base.store.info();
        if let Some(size) = options.size {
            let fits = size >= of_base.capacity && size.is_multiple_of(u64::from(of_base.block_size));
            if !fits {
                let (base, block) = (of_base.capacity, of_base.block_size);
                return Err(options.error(OverlayFailure::Size { size, base, block }));
            }
        }
        let size = options.size.unwrap_or(of_base.capacity);
        let limit = options.limit.unwrap_or(u64::MAX);
        let map = |capacity, stored| Arc::new(Map::new(capacity, of_base.capacity, limit, stored));
        let system = |action| move |source| options.error(OverlayFailure::System { action, source });
        let (own, own_offset, map, stored) = match &options.place {
            Place::Memory => {
                let memory = MemoryStore::new(size).and_then(MemoryStore::without_huge_pages);
                let memory = memory.map_err(system("cannot have memory for it"))?;
                (Own::Memory(Arc::new(memory)), 0, map(size, false), None)
            }
            Place::Temporary { folder, cache } => {
                let file = temporary(folder, *cache, size)?;
                (Own::Temporary(Arc::new(file)), 0, map(size, false), None)
            }
            Place::Kept { path, cache } => {
                let (store, header) = open_kept(path, *cache, base, options.size)?;
                let map = map(header.capacity, true);
                format::load(store.buffered(), &map, header.capacity).map_err(|reason| options.error(reason))?;
                let stored = StoredMap::new(Arc::clone(&map), Arc::clone(&store), Header::MAP);
                (Own::Kept(store, Mutex::new(header)), header.sectors(), map, Some(stored))
            }
        };
        let (own, whole) = (own.store(), Whole::new(own));
        let info = StoreInfo {
            capacity: own.info().capacity - own_offset,
            physical_block_size: of_base.physical_block_size.max(BLOCK as u32),
            read_only: false,
            discard: true,
            write_zeroes_unmap: true,
            ..of_base
        };
        Ok(Self(Arc::new(Overlay { base: base.clone(), own, own_offset, map, stored, info, whole })))
    }

    /// Bytes of its own storage that are in use.
    pub fn own_bytes(&self) -> u64 {
        self.0.map.own_bytes()
    }
}

impl OverlayOptions {
    fn error(&self, reason: OverlayFailure) -> OverlayError {
        let path = match &self.place {
            Place::Memory => PathBuf::from("overlay in memory"),
            Place::Temporary { folder: path, .. } | Place::Kept { path, .. } => path.clone(),
        };
        OverlayError { path, reason }
    }
}

impl Store for OverlayStore {
    fn info(&self) -> StoreInfo {
        self.0.info.clone()
    }

    fn attach(&self, ring: &Rc<Uring>, queue: u16) -> io::Result<Box<dyn Backend>> {
        if self.is_being_emptied() {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "the overlay is being emptied"));
        }
        Ok(Box::new(OverlayBackend::new(&self.0, ring, queue)?))
    }

    fn flush(&self) -> io::Result<()> {
        // Not while the map goes: what was flushed is what is there after that.
        let _alone = self.0.whole.alone();
        self.0.stored.as_ref().map_or(Ok(()), |stored| stored.store())
    }

    fn max_queues(&self) -> u16 {
        self.0.base.store.max_queues()
    }

    /// Its base's, which the first of those that lie over it starts.
    fn service(&self) -> Option<Service> {
        self.0.base.store.service()
    }

    fn resize(&self, _: Option<u64>) -> io::Result<u64> {
        let why = "an overlay has the size that it was made with; make another one, with a size";
        Err(io::Error::new(io::ErrorKind::Unsupported, why))
    }
}

fn file_options(path: &Path, cache: Cache, size: Option<u64>) -> FileOptions {
    FileOptions { path: path.to_owned(), read_only: false, cache, size, fixed_buffers: false, iopoll: false }
}

/// A file of which nobody else knows.
fn temporary(folder: &Path, cache: Cache, size: u64) -> Result<FileStore, OverlayError> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = folder.join(format!(".vfio-user-blk-{}-{number}.cow", std::process::id()));
    let failed = |reason| OverlayError { path: path.clone(), reason };
    // Left by another process of this number that was killed in between.
    let _ = std::fs::remove_file(&path);
    let store =
        FileStore::open(&file_options(&path, cache, Some(size))).map_err(|error| failed(error.reason.into()))?;
    std::fs::remove_file(&path)
        .map_err(|source| failed(OverlayFailure::System { action: "cannot remove its name", source }))?;
    Ok(store)
}

/// The file of an overlay that is kept, made if there is none.
fn open_kept(
    path: &Path,
    cache: Cache,
    base: &Base,
    size: Option<u64>,
) -> Result<(Arc<FileStore>, Header), OverlayError> {
    let failed = |reason| OverlayError { path: path.to_owned(), reason };
    if !path.exists() {
        let capacity = size.unwrap_or(base.identity.capacity);
        Header { capacity, base: base.identity, fate: Fate::Kept }.create(path)?;
    }
    let store = FileStore::open(&file_options(path, cache, None)).map_err(|error| failed(error.reason.into()))?;
    let mut header = Header::read(store.buffered(), store.info().capacity, &base.identity).map_err(failed)?;
    match header.fate {
        Fate::Kept => {}
        Fate::Committed => log::warn!(
            "{}: it was being written into its base, which has a part of it; the disk is whole, but the base is no disk by \
             itself before vfio-user-blk ctl commit has done the rest",
            path.display()
        ),
        Fate::Discarded => {
            let end = |source| failed(OverlayFailure::System { action: "cannot end that it is discarded", source });
            format::forget(store.buffered(), &header).map_err(end)?;
            header.fate = Fate::Kept;
            header.rewrite(store.buffered()).map_err(end)?;
        }
    }
    if let Some(size) = size.filter(|size| *size != header.capacity) {
        return Err(failed(OverlayFailure::SizeDiffers { found: header.capacity, wanted: size }));
    }
    Ok((Arc::new(store), header))
}
