//! The stores that the suite runs on.

use std::fs::{self, File};
use std::marker::PhantomData;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use super::{Fixture, IsStable, KeepsBlocks, Rig};
use crate::backend::Store;
use crate::backend::file::{Cache, FileOptions, FileStore};
use crate::backend::image::{self, ImageOptions, ImageStore};
use crate::backend::memory::MemoryStore;
use crate::backend::nbd::NbdStore;
use crate::backend::nbd::testing::{Conduct, Server};
use crate::backend::null::NullStore;
use crate::backend::overlay::{self, Base, OverlayOptions, OverlayStore, Place};
use crate::backend::uring::{SqPoll, Uring, UringOptions, Waker};
use crate::sandbox::Entrance;

impl Fixture for MemoryStore {
    fn new(capacity: u64) -> Self {
        MemoryStore::new(capacity).unwrap()
    }

    fn store(&self) -> &dyn Store {
        self
    }

    fn ring(waker: &Waker) -> Uring {
        Uring::without_kernel(waker)
    }
}

impl KeepsBlocks for MemoryStore {}

impl Fixture for NullStore {
    fn new(capacity: u64) -> Self {
        NullStore::new(capacity).unwrap()
    }

    fn store(&self) -> &dyn Store {
        self
    }

    fn ring(waker: &Waker) -> Uring {
        Uring::without_kernel(waker)
    }
}

/// A file in a directory of its own, past the page cache or through it.
pub(super) struct StoredFile<const DIRECT: bool, W = Plain> {
    pub(super) store: FileStore,
    pub(super) path: PathBuf,
    pub(super) _dir: tempfile::TempDir,
    _way: PhantomData<W>,
}

/// How files use the kernel.
pub(super) trait Way {
    const FIXED_BUFFERS: bool = false;
    const SQPOLL: Option<SqPoll> = None;
}

/// In no special way.
pub(super) struct Plain;

impl Way for Plain {}

/// With guest memory that is registered.
pub(super) struct FixedBuffers;

impl Way for FixedBuffers {
    const FIXED_BUFFERS: bool = true;
}

/// By a thread of the kernel's that submits, and falls asleep as often as it can.
pub(super) struct Submitted;

impl Way for Submitted {
    const FIXED_BUFFERS: bool = true;
    const SQPOLL: Option<SqPoll> = Some(SqPoll { idle: 1, cpu: None });
}

impl<const DIRECT: bool, W: Way> Fixture for StoredFile<DIRECT, W> {
    fn new(capacity: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let options = FileOptions {
            path: path.clone(),
            read_only: false,
            cache: if DIRECT { Cache::None } else { Cache::Writeback },
            size: Some(capacity),
            fixed_buffers: W::FIXED_BUFFERS,
            iopoll: false,
        };
        Self { store: FileStore::open(&options).unwrap(), path, _dir: dir, _way: PhantomData }
    }

    fn store(&self) -> &dyn Store {
        &self.store
    }

    fn ring(waker: &Waker) -> Uring {
        Uring::with(waker, UringOptions { sqpoll: W::SQPOLL, iopoll: false }).unwrap()
    }
}

impl<const DIRECT: bool, W: Way> KeepsBlocks for StoredFile<DIRECT, W> {}

impl<const DIRECT: bool, W: Way> IsStable for StoredFile<DIRECT, W> {
    fn stored(&self) -> Vec<u8> {
        fs::read(&self.path).unwrap()
    }
}

/// An export of an NBD server, which answers with structured replies or simple ones, and takes little or much at once.
pub(super) struct Exported<const STRUCTURED: bool> {
    store: NbdStore,
    server: Server,
}

impl<const STRUCTURED: bool> Fixture for Exported<STRUCTURED> {
    fn new(capacity: u64) -> Self {
        let honest = Conduct::honest(capacity);
        let server = Server::new(if STRUCTURED {
            honest
        } else {
            // Neither durable writes nor zeroes, and no more than 64 KiB at once.
            let flags = honest.flags & !(1 << 3 | 1 << 6);
            Conduct { structured: false, flags, block_sizes: Some([1, 512, 65536]), ..honest }
        });
        Self { store: server.store(), server }
    }

    fn store(&self) -> &dyn Store {
        &self.store
    }

    fn ring(waker: &Waker) -> Uring {
        Uring::new(waker).unwrap()
    }
}

impl<const STRUCTURED: bool> KeepsBlocks for Exported<STRUCTURED> {}

impl<const STRUCTURED: bool> IsStable for Exported<STRUCTURED> {
    fn stored(&self) -> Vec<u8> {
        self.server.stored()
    }
}

/// A qcow2 image in a directory of its own, past the page cache or through it; above another one, if that is said.
pub(super) struct StoredImage<const DIRECT: bool, const BACKED: bool> {
    store: ImageStore,
    options: ImageOptions,
    entrance: Entrance,
    _dir: tempfile::TempDir,
}

impl<const DIRECT: bool, const BACKED: bool> Fixture for StoredImage<DIRECT, BACKED> {
    fn new(capacity: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let entrance = image::testing::open_entrance();
        if BACKED {
            image::testing::backed(dir.path(), capacity);
        }
        let options = ImageOptions {
            path: dir.path().join("image"),
            format: image::Format::Qcow2,
            read_only: false,
            cache: if DIRECT { Cache::None } else { Cache::Writeback },
            size: Some(capacity),
        };
        Self { store: ImageStore::open(&options, &entrance).unwrap(), options, entrance, _dir: dir }
    }

    fn store(&self) -> &dyn Store {
        &self.store
    }

    fn ring(waker: &Waker) -> Uring {
        Uring::without_kernel(waker)
    }
}

impl<const DIRECT: bool, const BACKED: bool> KeepsBlocks for StoredImage<DIRECT, BACKED> {}

impl<const DIRECT: bool, const BACKED: bool> IsStable for StoredImage<DIRECT, BACKED> {
    fn stored(&self) -> Vec<u8> {
        // A copy, for the image is locked.
        let path = self.options.path.with_extension("copy");
        fs::copy(&self.options.path, &path).unwrap();
        image::testing::close(&path);
        let options = ImageOptions { path, read_only: true, cache: Cache::Writeback, ..self.options.clone() };
        let copy = ImageStore::open(&options, &self.entrance).unwrap();
        Rig::on(&copy, Self::ring).read(0, copy.info().capacity)
    }
}

/// An overlay over a file of zeroes, in memory or in another file.
pub(super) struct Overlay<const KEPT: bool, const DIRECT: bool> {
    store: OverlayStore,
    base: Vec<u8>,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl<const KEPT: bool, const DIRECT: bool> Fixture for Overlay<KEPT, DIRECT> {
    fn new(capacity: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (base, path) = (dir.path().join("base"), dir.path().join("own"));
        // One that is kept ends after its base does.
        let base_len = if KEPT { (capacity / 2).next_multiple_of(512) } else { capacity };
        File::create(&base).unwrap().set_len(base_len).unwrap();
        let cache = if DIRECT { Cache::None } else { Cache::Writeback };
        let place = if KEPT { Place::Kept { path: path.clone(), cache } } else { Place::Memory };
        let options = OverlayOptions { place, size: Some(capacity), limit: None };
        let store = OverlayStore::open(&overlay::tests::base(&base), &options).unwrap();
        Self { store, base: vec![0; base_len as usize], path, _dir: dir }
    }

    fn store(&self) -> &dyn Store {
        &self.store
    }

    fn ring(waker: &Waker) -> Uring {
        Uring::new(waker).unwrap()
    }
}

impl<const KEPT: bool, const DIRECT: bool> KeepsBlocks for Overlay<KEPT, DIRECT> {}

impl<const DIRECT: bool> IsStable for Overlay<true, DIRECT> {
    fn stored(&self) -> Vec<u8> {
        overlay::tests::stored(&self.path, &self.base)
    }
}

/// What an overlay may lie over besides files.
pub(super) trait Beneath {
    /// One of zeroes.
    fn new(capacity: u64) -> Self;

    fn base(&self) -> Base;
}

impl<const STRUCTURED: bool> Beneath for Exported<STRUCTURED> {
    fn new(capacity: u64) -> Self {
        Fixture::new(capacity)
    }

    fn base(&self) -> Base {
        Base::named(Arc::new(self.server.store()), "export")
    }
}

/// A qcow2 image that is only read, over others.
pub(super) struct Golden {
    dir: tempfile::TempDir,
    entrance: Entrance,
}

impl Beneath for Golden {
    fn new(capacity: u64) -> Self {
        let (dir, entrance) = (tempfile::tempdir().unwrap(), image::testing::open_entrance());
        image::testing::backed(dir.path(), capacity);
        Self { dir, entrance }
    }

    fn base(&self) -> Base {
        let path = self.dir.path().join("image");
        let options = ImageOptions {
            path: path.clone(),
            format: image::Format::Qcow2,
            read_only: true,
            cache: Cache::Writeback,
            size: None,
        };
        Base::of_image(Arc::new(ImageStore::open(&options, &self.entrance).unwrap()), &path).unwrap()
    }
}

/// An overlay in memory over such a thing.
pub(super) struct OverlayOver<B> {
    store: OverlayStore,
    _beneath: B,
}

impl<B: Beneath> Fixture for OverlayOver<B> {
    fn new(capacity: u64) -> Self {
        let beneath = B::new(capacity);
        let options = OverlayOptions { place: Place::Memory, size: None, limit: None };
        Self { store: OverlayStore::open(&beneath.base(), &options).unwrap(), _beneath: beneath }
    }

    fn store(&self) -> &dyn Store {
        &self.store
    }

    fn ring(waker: &Waker) -> Uring {
        Uring::new(waker).unwrap()
    }
}

impl<B: Beneath> KeepsBlocks for OverlayOver<B> {}

/// A block device of the kernel's, on a file, past the page cache or through it. Where there is none to be had, which is said, it is
/// the file.
pub(super) struct LoopDevice<const DIRECT: bool> {
    store: FileStore,
    _device: Option<Detached>,
    dir: tempfile::TempDir,
}

/// Detaches a loop device when it is dropped.
struct Detached(PathBuf);

impl Drop for Detached {
    fn drop(&mut self) {
        let detached = Command::new("losetup").arg("--detach").arg(&self.0).status();
        assert!(detached.is_ok_and(|status| status.success()), "{} is left", self.0.display());
    }
}

impl<const DIRECT: bool> Fixture for LoopDevice<DIRECT> {
    fn new(capacity: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        File::create(&path).unwrap().set_len(capacity).unwrap();
        let output = Command::new("losetup").args(["--find", "--show"]).arg(&path).output();
        let device = match output {
            Ok(output) if output.status.success() => {
                Some(Detached(String::from_utf8(output.stdout).unwrap().trim().into()))
            }
            other => {
                println!("cannot run: no loop device (losetup, as root): {other:?}");
                None
            }
        };
        let options = FileOptions {
            path: device.as_ref().map_or(path, |device| device.0.clone()),
            read_only: false,
            cache: if DIRECT { Cache::None } else { Cache::Writeback },
            size: None,
            fixed_buffers: false,
            iopoll: false,
        };
        Self { store: FileStore::open(&options).unwrap(), _device: device, dir }
    }

    fn store(&self) -> &dyn Store {
        &self.store
    }

    fn ring(waker: &Waker) -> Uring {
        Uring::new(waker).unwrap()
    }
}

impl<const DIRECT: bool> KeepsBlocks for LoopDevice<DIRECT> {}

impl<const DIRECT: bool> IsStable for LoopDevice<DIRECT> {
    fn stored(&self) -> Vec<u8> {
        fs::read(self.dir.path().join("image")).unwrap()
    }
}
