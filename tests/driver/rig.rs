//! A server in this process, a client, and a driver that is ready for requests.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use client::{BlockDriver, BlockOptions, BlockQueue, BlockRequest, Client, Completion, GuestMemory, RequestType};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tempfile::TempDir;
use vfio_user_blk::Server;
use vfio_user_blk::config::{Cache, DeviceConfig, ServerConfig, Size, StoreKind};

/// How long anything may take before the test has failed.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
/// The size of a disk, in bytes, unless a test asks for another.
pub(crate) const DISK: u64 = 16 << 20;
/// Where guest memory starts among the device's addresses.
pub(crate) const IOVA: u64 = 0x1_0000_0000;

/// The size of guest memory, in bytes, unless a test takes its own.
pub(crate) const MEMORY: u64 = 48 << 20;

pub(crate) const OK: u8 = virtio_bindings::virtio_blk::VIRTIO_BLK_S_OK as u8;
pub(crate) const IOERR: u8 = virtio_bindings::virtio_blk::VIRTIO_BLK_S_IOERR as u8;
pub(crate) const UNSUPP: u8 = virtio_bindings::virtio_blk::VIRTIO_BLK_S_UNSUPP as u8;

/// A running server with its devices, in a folder that goes with it.
pub(crate) struct Rig {
    folder: TempDir,
    sockets: Vec<PathBuf>,
    server: Option<Server>,
}

impl Rig {
    /// A disk in memory.
    pub(crate) fn ram() -> Rig {
        Rig::with(|_| {})
    }

    /// A disk in memory, changed by `change`.
    pub(crate) fn with(change: impl FnOnce(&mut DeviceConfig)) -> Rig {
        Rig::devices(|folder| {
            let mut device = ram(&folder.join("blk.sock"));
            change(&mut device);
            vec![device]
        })
    }

    /// A disk that does nothing.
    pub(crate) fn null() -> Rig {
        Rig::with(|device| device.store = Some(StoreKind::Null))
    }

    /// A disk in the file [`Rig::image`], of zeroes.
    pub(crate) fn file(cache: Cache) -> Rig {
        Rig::devices(|folder| vec![file(folder, cache)])
    }

    /// What `devices` describes for the folder it is given.
    pub(crate) fn devices(devices: impl FnOnce(&Path) -> Vec<DeviceConfig>) -> Rig {
        let folder = tempfile::tempdir().unwrap();
        let devices = devices(folder.path());
        let sockets = devices.iter().map(|device| device.socket_path.clone()).collect();
        let server = Server::start(&ServerConfig { workers: Some(2), ..ServerConfig::new(devices) }).unwrap();
        Rig { folder, sockets, server: Some(server) }
    }

    /// The socket of a device.
    pub(crate) fn socket(&self, device: usize) -> &Path {
        &self.sockets[device]
    }

    /// The file of a disk made by [`Rig::file`].
    pub(crate) fn image(&self) -> PathBuf {
        self.folder.path().join("disk.img")
    }

    /// A client of the first device, which has agreed on a version.
    pub(crate) fn client(&self) -> Arc<Client> {
        self.client_of(0)
    }

    pub(crate) fn client_of(&self, device: usize) -> Arc<Client> {
        let client = Client::connect(self.socket(device)).unwrap();
        client.set_timeout(LIMIT);
        Arc::new(client)
    }

    /// A driver of the first device, with all features and queues.
    pub(crate) fn boot(&self) -> Machine {
        self.boot_with(&BlockOptions::default())
    }

    pub(crate) fn boot_with(&self, options: &BlockOptions) -> Machine {
        Machine::new(self.client(), options)
    }

    /// Stops the server and checks that it ends well.
    pub(crate) fn stop(mut self) -> TempDir {
        let server = self.server.take().unwrap();
        server.stop_handle().stop();
        server.join().unwrap();
        for socket in &self.sockets {
            assert!(!socket.exists(), "{} was left there", socket.display());
        }
        std::mem::replace(&mut self.folder, tempfile::tempdir().unwrap())
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.stop_handle().stop();
            let result = server.join();
            assert!(thread::panicking() || result.is_ok(), "{result:?}");
        }
    }
}

/// A disk of [`DISK`] bytes in memory, which offers what drivers may use or not.
pub(crate) fn ram(socket: &Path) -> DeviceConfig {
    let mut device = DeviceConfig::new(socket);
    (device.packed, device.in_order) = (Some(true), Some(true));
    device.size = Some(Size(DISK));
    device
}

/// A disk of [`DISK`] bytes in `disk.img` in the folder.
pub(crate) fn file(folder: &Path, cache: Cache) -> DeviceConfig {
    let mut device = ram(&folder.join("blk.sock"));
    device.blk_file = Some(folder.join("disk.img"));
    device.cache = Some(cache);
    device
}

/// What a guest has: memory, a driver that runs, its queues.
pub(crate) struct Machine {
    pub(crate) client: Arc<Client>,
    pub(crate) memory: GuestMemory,
    pub(crate) driver: BlockDriver,
    pub(crate) queues: Vec<BlockQueue>,
}

impl Machine {
    pub(crate) fn new(client: Arc<Client>, options: &BlockOptions) -> Machine {
        Machine::with_memory(client, GuestMemory::new(MEMORY as usize, IOVA).unwrap(), options)
    }

    pub(crate) fn with_memory(client: Arc<Client>, memory: GuestMemory, options: &BlockOptions) -> Machine {
        map(&client, &memory);
        let (driver, queues) = BlockDriver::start(Arc::clone(&client), &memory, options).unwrap();
        Machine { client, memory, driver, queues }
    }

    /// Resets the device and starts it again, in new rings of the same memory.
    pub(crate) fn reboot(&mut self, options: &BlockOptions) {
        let started = BlockDriver::start(Arc::clone(&self.client), &self.memory, options).unwrap();
        (self.driver, self.queues) = started;
    }

    /// The device's status bits.
    pub(crate) fn status(&self) -> u32 {
        self.driver.transport().status().unwrap()
    }
}

/// What a driver may want of its queues.
pub(crate) const RINGS: [u64; 4] =
    [0, BlockOptions::PACKED, BlockOptions::IN_ORDER, BlockOptions::PACKED | BlockOptions::IN_ORDER];

/// What the device has written into a queue to give back requests: as long as this stays, it has given back none.
pub(crate) fn given_back(queue: &BlockQueue) -> Vec<u16> {
    let ring = queue.ring();
    let of_split = ring.split().map(|memory| vec![memory.used_idx()]);
    let of_packed = ring.packed().map(|memory| (0..memory.size()).map(|index| memory.flags(index)).collect());
    of_split.or(of_packed).unwrap()
}

/// Gives the device all of `memory`.
pub(crate) fn map(client: &Client, memory: &GuestMemory) {
    client.dma_map(&memory.dma_map(), Some(memory.fd())).unwrap();
}

/// Writes and reads by each queue: whether the device is alive.
pub(crate) fn exercise(queues: &mut [BlockQueue]) {
    let begun = Instant::now();
    for (index, queue) in queues.iter_mut().enumerate() {
        let data = [index as u8 ^ 0x5a; 4096];
        queue.write(64 * index as u64, &data).unwrap();
        let mut back = [0; 4096];
        queue.read(64 * index as u64, &mut back).unwrap();
        assert_eq!(back, data);
    }
    in_time(begun);
}

/// That no wait since `begun` ended for its limit: a queue whose interrupt was lost looks once more then, and goes on.
fn in_time(begun: Instant) {
    assert!(begun.elapsed() < LIMIT, "an interrupt was lost");
}

/// Submits a request, publishes it and waits for the one completion that must come.
pub(crate) fn execute(queue: &mut BlockQueue, kind: RequestType, sector: u64, data: &[client::Segment]) -> Completion {
    let begun = Instant::now();
    let done = queue.execute(&BlockRequest { kind, sector, data }).unwrap();
    in_time(begun);
    done
}

/// The next completion, by whatever way the queue hears of it.
pub(crate) fn completion(queue: &mut BlockQueue) -> Completion {
    let begun = Instant::now();
    assert!(queue.wait(LIMIT).unwrap(), "no completion came");
    in_time(begun);
    queue.poll().unwrap().expect("a completion is there")
}

/// An eventfd that does not block.
pub(crate) fn eventfd() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).unwrap()
}

/// How often an eventfd was signalled since it was last asked.
pub(crate) fn count(eventfd: &EventFd) -> u64 {
    eventfd.read().unwrap_or(0)
}

/// Waits until an eventfd is signalled, and takes the signals.
pub(crate) fn signalled(eventfd: &EventFd) -> u64 {
    assert!(readable(std::os::fd::AsFd::as_fd(eventfd), LIMIT), "no signal came");
    eventfd.read().unwrap()
}

pub(crate) fn readable(fd: BorrowedFd<'_>, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
            Ok(0) if left.is_zero() => return false,
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => return true,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Waits until `condition` holds.
pub(crate) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {LIMIT:?}");
        thread::yield_now();
    }
}

/// What an image holds, read anew from outside.
pub(crate) fn image_bytes(path: &Path, offset: u64, len: usize) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; len];
    File::open(path).unwrap().read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

/// Numbers that look random and are the same each time.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        // Xorshift with a multiplication (Vigna, "An experimental exploration of Marsaglia's xorshift generators").
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 11) % bound
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
    }
}
