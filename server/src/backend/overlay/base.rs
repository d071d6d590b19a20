//! What lies under overlays.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::OverlayFailure;
use crate::backend::Store;
use crate::backend::file::FileStore;

/// Places of a base that are looked at, to tell it from others.
const SAMPLES: u64 = 64;
/// Bytes of each.
const SAMPLE: usize = 4096;

/// A store that overlays only read, and that many share.
#[derive(Clone)]
pub struct Base {
    pub(super) store: Arc<dyn Store>,
    pub(super) identity: BaseIdentity,
    /// If it is a file or block device: that, and its path.
    pub(super) file: Option<(Arc<FileStore>, PathBuf)>,
    /// One for each clone, which is one for each overlay.
    pub(super) users: Arc<()>,
}

/// What tells a base from others, for overlays that are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BaseIdentity {
    /// Bytes.
    pub(super) capacity: u64,
    /// A hash of samples of what it holds, or of its name.
    pub(super) fingerprint: u64,
    /// Seconds and nanoseconds of a file's last change.
    pub(super) modified: Option<(i64, i64)>,
}

impl Base {
    /// A file or block device, known by what it holds and, a file, by when it was last changed.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn of_file(store: FileStore, path: &Path) -> io::Result<Self> {
        let identity = BaseIdentity::of_file(&store)?;
        let store = Arc::new(store);
        Ok(Self {
            store: Arc::clone(&store) as _,
            identity,
            file: Some((store, path.to_owned())),
            users: Arc::default(),
        })
    }

    /// An image in a file, known by what the file holds and when it was last changed.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn of_image(store: Arc<dyn Store>, path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        let identity = BaseIdentity { capacity: store.info().capacity, ..BaseIdentity::of(&file, len)? };
        Ok(Self { store, identity, file: None, users: Arc::default() })
    }

    /// Any other store, known by a name that no other has.
    pub fn named(store: Arc<dyn Store>, name: &str) -> Self {
        let identity =
            BaseIdentity { capacity: store.info().capacity, fingerprint: fnv(name.as_bytes()), modified: None };
        Self { store, identity, file: None, users: Arc::default() }
    }
}

impl BaseIdentity {
    /// That of a file or block device as it is now.
    pub(super) fn of_file(store: &FileStore) -> io::Result<Self> {
        Self::of(store.buffered(), store.info().capacity)
    }

    /// That of a file of `capacity` bytes.
    fn of(file: &File, capacity: u64) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let mut samples = Vec::with_capacity(SAMPLES as usize * SAMPLE);
        let step = (capacity / SAMPLES).max(SAMPLE as u64);
        for at in (0..capacity).step_by(step as usize).take(SAMPLES as usize) {
            let mut sample = [0; SAMPLE];
            let len = SAMPLE.min((capacity - at) as usize);
            let (sample, _) = sample.split_at_mut(len);
            file.read_exact_at(sample, at)?;
            samples.extend_from_slice(sample);
        }
        let modified = metadata.is_file().then(|| (metadata.mtime(), metadata.mtime_nsec()));
        Ok(Self { capacity, fingerprint: fnv(&samples), modified })
    }

    /// Whether an overlay over this one may be opened over `found`.
    pub(super) fn check(&self, found: &Self) -> Result<(), OverlayFailure> {
        if self.capacity != found.capacity {
            return Err(OverlayFailure::BaseSize { made: self.capacity, found: found.capacity });
        }
        if self.fingerprint != found.fingerprint {
            return Err(OverlayFailure::OtherBase);
        }
        match self.modified {
            Some((seconds, nanoseconds)) if self.modified != found.modified => {
                Err(OverlayFailure::BaseChanged { seconds, nanoseconds })
            }
            _ => Ok(()),
        }
    }
}

/// The hash FNV-1a of 64 bits: against mistakes, not against malice.
pub(super) fn fnv(bytes: &[u8]) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fnv_is_that_of_its_authors() {
        // From the test vectors of draft-eastlake-fnv.
        assert_eq!(fnv(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv(b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(fnv(b"foobar"), 0x8594_4171_f739_67e8);
    }
}
