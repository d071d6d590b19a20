//! What outlives a session: the server with its disks, a neighbour, and the files that clients send.

use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use client::{BlockDriver, BlockOptions, BlockQueue, Client, GuestMemory};
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, SealFlag, fallocate, fcntl, open};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::Mode;
use nix::unistd::{ftruncate, mkfifo};
use vfio_user_blk::Server;
use vfio_user_blk::config::ServerConfig;

use super::LIMIT;

/// Where guest memory starts among the device's addresses, in bytes.
pub const BASE: u64 = 0x10_0000;
/// The size of guest memory in bytes.
pub const LEN: usize = 64 * PAGE;
pub const PAGE: usize = 4096;
/// Request queues of a disk.
pub const QUEUES: u16 = 2;
/// The most entries of a queue: few, so that indices come round.
pub const QUEUE_SIZE: u16 = 16;

/// The disks that sessions are with. What is written to either is gone with the session, so that an input does the same
/// whatever came before it.
#[derive(Clone, Copy)]
pub enum Disk {
    /// Drops what is written.
    Null,
    /// A disk of zeroes.
    ReadOnly,
}

/// The server, and everybody else on this machine.
pub struct World {
    folder: PathBuf,
    /// What the guest of the session has.
    pub memory: Memory,
    pub files: Files,
    /// Where the MSI-X capability lies in the configuration space.
    pub msix_capability: u64,
    features: [u64; 2],
    neighbour: Neighbour,
    _server: Server,
    /// Descriptors and mappings of this process when there is no session.
    at_rest: (usize, usize),
}

/// A guest with the same worker and a disk of its own. It must not notice anything.
struct Neighbour {
    queue: BlockQueue,
    round: u8,
    _driver: BlockDriver,
    _memory: GuestMemory,
}

impl World {
    pub fn new() -> World {
        if log::set_logger(&Sink).is_ok() {
            // What the server logs has to be written too, whatever is in it.
            log::set_max_level(log::LevelFilter::Debug);
        }
        // The fuzzer ends without a word to anybody: the folder goes with the machine's temporary files.
        let folder = tempfile::tempdir().expect("a folder").keep();
        let config = format!(
            "workers = 1
             {}
             [[device]]
             socket_path = '{folder}/null.sock'
             poll = 'never'
             store = 'null'
             size = 65536
             num_queues = {QUEUES}
             queue_size = {QUEUE_SIZE}
             [[device]]
             socket_path = '{folder}/read-only.sock'
             poll = 'never'
             size = 65536
             read_only = true
             num_queues = {QUEUES}
             queue_size = {QUEUE_SIZE}
             [[device]]
             socket_path = '{folder}/neighbour.sock'
             poll = 'never'
             size = 65536
             num_queues = 1",
            SERVER,
            folder = folder.display()
        );
        let config = ServerConfig::parse(Path::new("fuzz.toml"), &config).expect("a configuration");
        let server = Server::start(&config).expect("a server");
        let features = [Disk::Null, Disk::ReadOnly].map(|disk| {
            let transport = client::VirtioPci::new(client(&socket(&folder, disk))).expect("a virtio device");
            transport.device_features().expect("its features")
        });
        let (neighbour, msix_capability) = Neighbour::new(&folder.join("neighbour.sock"));
        let (memory, files) = (Memory::new(), Files::new(&folder));
        let at_rest = (0, 0);
        let mut world = World { folder, memory, files, msix_capability, features, neighbour, _server: server, at_rest };
        world.settle();
        world.at_rest = count();
        world
    }

    pub fn socket(&self, disk: Disk) -> PathBuf {
        socket(&self.folder, disk)
    }

    /// What the disk offers.
    pub fn features(&self, disk: Disk) -> u64 {
        self.features[disk as usize]
    }

    /// Waits until the worker has looked at all queues: it has, when a request that came later is done. The neighbour
    /// must get its own data.
    pub fn settle(&mut self) {
        for _ in 0..2 {
            self.neighbour.exercise();
        }
    }

    /// That a client that has gone has left nothing behind.
    pub fn nothing_is_left(&mut self) {
        let begun = Instant::now();
        // Its session ends on a thread of its own.
        while count() != self.at_rest {
            assert!(
                begun.elapsed() < LIMIT,
                "descriptors and mappings of files in memory: {:?}, at rest {:?}\n{:#?}",
                count(),
                self.at_rest,
                descriptors()
            );
            std::thread::yield_now();
        }
    }
}

/// What concerns the whole server: the fuzzer's own system calls are not among those that serving needs.
const SERVER: &str = "sandbox = 'off'";

fn socket(folder: &Path, disk: Disk) -> PathBuf {
    folder.join(match disk {
        Disk::Null => "null.sock",
        Disk::ReadOnly => "read-only.sock",
    })
}

fn client(socket: &Path) -> Arc<Client> {
    let client = Client::connect(socket).expect("a session");
    client.set_timeout(LIMIT);
    Arc::new(client)
}

/// Open descriptors, and mappings of files in memory. The sanitizer's pipes are not ours.
fn count() -> (usize, usize) {
    let fds = descriptors().iter().filter(|target| !target.as_os_str().as_bytes().starts_with(b"pipe:")).count();
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    (fds, maps.lines().filter(|line| line.contains("/memfd:")).count())
}

/// What is open.
fn descriptors() -> Vec<PathBuf> {
    let entries = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    entries.filter_map(|entry| fs::read_link(entry.path()).ok()).collect()
}

impl Neighbour {
    fn new(socket: &Path) -> (Neighbour, u64) {
        let client = client(socket);
        let memory = GuestMemory::new(1 << 20, 0).expect("memory");
        client.dma_map(&memory.dma_map(), Some(memory.fd())).expect("the map");
        let options = BlockOptions { queue_size: 16, bounce_size: PAGE, ..BlockOptions::default() };
        let (driver, mut queues) = BlockDriver::start(client, &memory, &options).expect("a driver");
        let msix = driver.transport().capabilities().msix.expect("MSI-X").capability;
        let queue = queues.pop().expect("a queue");
        (Neighbour { queue, round: 0, _driver: driver, _memory: memory }, msix.into())
    }

    fn exercise(&mut self) {
        self.round = self.round.wrapping_add(1);
        let (data, mut back) = ([self.round; 512], [0; 512]);
        let begun = Instant::now();
        self.queue.write(3, &data).expect("the neighbour's write");
        self.queue.read(3, &mut back).expect("the neighbour's read");
        assert!(begun.elapsed() < LIMIT, "the neighbour waits");
        assert_eq!(back, data, "the neighbour's data");
    }
}

/// The memory of the session's guest.
pub struct Memory(GuestMemory);

impl Memory {
    fn new() -> Memory {
        Memory(GuestMemory::new(LEN, BASE).expect("memory"))
    }

    /// Leaves its first page alone.
    pub fn shrink(&self) {
        ftruncate(self.0.fd(), PAGE as i64).expect("a shorter file");
    }

    /// Makes it all zeroes, and as long as it was.
    pub fn clear(&self) {
        ftruncate(self.0.fd(), LEN as i64).expect("its length");
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(self.0.fd(), mode, 0, LEN as i64).expect("holes");
    }

    /// Writes at a distance from [`BASE`]; nothing, where that is outside.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let _outside = self.0.at(offset, bytes.len()).and_then(|place| place.write(0, bytes));
    }

    pub fn read_u16(&self, offset: usize) -> u16 {
        let mut bytes = [0; 2];
        let _outside = self.0.at(offset, 2).and_then(|place| place.read(0, &mut bytes));
        u16::from_le_bytes(bytes)
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd()
    }
}

/// Files that come with messages, good and bad.
pub struct Files {
    bad: Vec<OwnedFd>,
    eventfds: Vec<EventFd>,
}

impl Files {
    fn new(folder: &Path) -> Files {
        let memfd = |len| {
            let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
            let file = File::from(memfd_create(c"bad", flags).expect("a file in memory"));
            file.set_len(len).expect("its length");
            file
        };
        let (short, empty, sealed) = (memfd(PAGE as u64), memfd(0), memfd(LEN as u64));
        let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&sealed, FcntlArg::F_ADD_SEALS(seals)).expect("seals");
        let (socket, _) = std::os::unix::net::UnixStream::pair().expect("a socket");
        let path = |path: &str, flags| open(path, flags | OFlag::O_CLOEXEC, Mode::empty()).expect(path);
        let pipe = folder.join("pipe");
        mkfifo(&pipe, Mode::S_IRWXU).expect("a pipe");
        let bad = vec![
            short.into(),
            empty.into(),
            sealed.into(),
            path(&pipe.display().to_string(), OFlag::O_RDWR | OFlag::O_NONBLOCK),
            socket.into(),
            path("/", OFlag::O_DIRECTORY),
            path("/", OFlag::O_PATH),
            path("/dev/zero", OFlag::O_RDWR),
            path("/proc/self/maps", OFlag::O_RDONLY),
        ];
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let eventfds = (0..4).map(|_| EventFd::from_flags(flags).expect("an eventfd")).collect();
        Files { bad, eventfds }
    }

    /// Those that an input names: mostly guest memory, or none.
    pub fn choose<'a>(&'a self, memory: &'a Memory, which: u8) -> Vec<BorrowedFd<'a>> {
        match which {
            0..=0x5f => vec![memory.fd()],
            0x60..=0x7f => Vec::new(),
            0x80..=0x8f => vec![memory.fd(); usize::from(which & 0xf) + 4],
            0x90..=0x9f => self.eventfds(usize::from(which & 0xf)),
            _ => self.bad.iter().cycle().skip(which.into()).take(1).map(AsFd::as_fd).collect(),
        }
    }

    /// So many eventfds; the same ones come more than once.
    pub fn eventfds(&self, count: usize) -> Vec<BorrowedFd<'_>> {
        self.eventfds.iter().cycle().take(count).map(AsFd::as_fd).collect()
    }
}

/// Formats what is logged, and forgets it.
struct Sink;

impl log::Log for Sink {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        drop(record.args().to_string());
    }

    fn flush(&self) {}
}
