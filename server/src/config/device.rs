//! One device, as the operator describes it.

mod check;

use std::path::PathBuf;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

pub use check::InvalidDevice;

use super::fabric::FabricChoice;
use super::fault::FaultConfig;
use super::on_error::OnError;
use super::overlay::OverlayKind;
use super::rates::RateLimits;
use super::{ClientLimits, NumberList, Size, SocketMode};
use crate::backend::nbd::NbdUri;

/// The size of a disk that has neither a file nor a size.
const DEFAULT_SIZE: Size = Size(1 << 30);
/// Queues of a device that does not say how many.
const DEFAULT_NUM_QUEUES: u16 = 4;
/// Entries of each queue of a device that does not say how many.
const DEFAULT_QUEUE_SIZE: u16 = 256;

/// A device: `serve`'s options, and the keys of a `[[device]]` table.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, clap::Args)]
#[serde(deny_unknown_fields)]
#[group(id = "device")]
pub struct DeviceConfig {
    /// UNIX socket to listen on for the device's client
    #[arg(long, value_name = "PATH")]
    pub socket_path: PathBuf,

    /// Permissions of the socket, in octal digits [default: 0660 with --socket-group, what the umask leaves otherwise]
    #[arg(long, value_name = "MODE")]
    pub socket_mode: Option<SocketMode>,

    /// Group of the socket, by name or number
    #[arg(long, value_name = "GROUP")]
    pub socket_group: Option<String>,

    /// User, by number, whose processes may connect; to be repeated for more [default: all that the socket lets in]
    #[arg(long = "allow-uid", value_name = "UID")]
    pub allow_uids: Option<Vec<u32>>,

    /// Where the blocks live [default: file if --blk-file is given, nbd if --nbd-uri is, memory otherwise]
    #[arg(long, value_enum)]
    pub store: Option<StoreKind>,

    /// Image file or block device: of the file store, or a qcow2 or VMDK image
    #[arg(long, value_name = "FILE")]
    pub blk_file: Option<PathBuf>,

    /// Size of a memory or null disk [default: 1G], or of an image file that does not exist yet: 512M, 1G, ...
    #[arg(long)]
    pub size: Option<Size>,

    /// Refuse writes
    #[arg(long)]
    #[serde(default)]
    pub read_only: bool,

    /// Request queues, 1 to 64 [default: 4]
    #[arg(long, value_name = "N")]
    pub num_queues: Option<u16>,

    /// Entries of each queue, a power of two from 2 to 1024 [default: 256]
    #[arg(long, value_name = "N")]
    pub queue_size: Option<u16>,

    /// Serial number that the guest sees, at most 20 ASCII characters
    #[arg(long)]
    pub serial: Option<String>,

    /// How an image file is cached and when its writes are durable [default: none]
    #[arg(long, value_enum)]
    pub cache: Option<Cache>,

    /// Pin the guest memory that an image file's data goes to and comes from, for as long as the client has it
    #[arg(long)]
    #[serde(default)]
    pub fixed_buffers: bool,

    /// Look for the completions of an image file's reads and writes, in place of interrupts: for devices that have polled
    /// queues, such as nvme with its parameter poll_queues
    #[arg(long)]
    #[serde(default)]
    pub iopoll: bool,

    /// Workers that serve the device's queues, from 0: queue i goes to the i-th of them, and after the last comes the
    /// first [default: the one with the fewest queues]
    #[arg(long, value_name = "LIST")]
    pub queue_workers: Option<NumberList>,

    /// Whether the device's worker waits for requests awake or asleep [default: adaptive]
    #[arg(long, value_enum)]
    pub poll: Option<PollPolicy>,

    /// How drivers kick: by messages, or by writes to a page that they map [default: messages]
    #[arg(long, value_enum)]
    pub doorbell: Option<Doorbell>,

    /// Offer packed virtqueues [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub packed: Option<bool>,

    /// Offer to complete requests in the order in which the driver submits them [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub in_order: Option<bool>,

    /// Largest memory of the client's guest, in bytes of the files that it lies in [default: 1T]
    #[arg(long, value_name = "SIZE")]
    pub max_guest_memory: Option<Size>,

    /// Most ranges of memory that the client may map, 1 to 65535 [default: 65535]
    #[arg(long, value_name = "N")]
    pub max_dma_maps: Option<u32>,

    /// Most descriptors of the client's that are kept: one for each memory file and each interrupt [default: 128]
    #[arg(long, value_name = "N")]
    pub max_fds: Option<u32>,

    /// Largest region access, 4K to 64M, which bounds the messages that are taken and kept [default: 1M]
    #[arg(long, value_name = "SIZE")]
    pub max_data_xfer_size: Option<Size>,

    /// Take guest memory in files of any file system, which may have the server wait; otherwise memfd, tmpfs and hugetlbfs
    #[arg(long)]
    #[serde(default)]
    pub any_memory_file: bool,

    /// Export of the nbd store: nbd://HOST[:PORT]/EXPORT, or nbd+unix:///EXPORT?socket=PATH; with nbds in place of nbd for TLS
    #[arg(long, value_name = "URI")]
    pub nbd_uri: Option<NbdUri>,

    /// Connections to the NBD server at most, 1 to 64; each queue has one, and there are no more queues than that
    /// [default: 64, or 1 if the server does not allow several]
    #[arg(long, value_name = "N")]
    pub nbd_connections: Option<u16>,

    /// Seconds that requests wait for an NBD server that is gone or silent before they fail, 1 to 86400 [default: 60]
    #[arg(long, value_name = "SECONDS")]
    pub nbd_deadline: Option<u32>,

    /// Folder with ca-cert.pem and, if the server wants to know its clients, client-cert.pem and client-key.pem
    #[arg(long, value_name = "FOLDER")]
    pub nbd_tls_dir: Option<PathBuf>,

    /// Name in the NBD server's certificate [default: the URI's host, or localhost for a UNIX socket]
    #[arg(long, value_name = "NAME")]
    pub nbd_tls_hostname: Option<String>,

    /// File with a pre-shared key, USERNAME:KEY in hexadecimal digits, in place of certificates; or ?tls-psk-file= of --nbd-uri
    #[arg(long, value_name = "FILE")]
    pub nbd_tls_psk_file: Option<PathBuf>,

    /// Whose key of that file; or USERNAME@ of --nbd-uri [default: qemu]
    #[arg(long, value_name = "NAME")]
    pub nbd_tls_username: Option<String>,

    /// Image file or block device that the disk starts as a copy of, which is only read and may be shared by many devices; a qcow2
    /// or VMDK image with --store
    #[arg(long, value_name = "FILE")]
    pub overlay_of: Option<PathBuf>,

    /// Where changes go, in place of the store, which is only read [default: kept with --overlay-file, memory with
    /// --overlay-of, else into the store]
    #[arg(long, value_enum)]
    pub overlay: Option<OverlayKind>,

    /// File of a kept overlay, made if there is none; of a temporary one, the folder where its file is made
    #[arg(long, value_name = "PATH")]
    pub overlay_file: Option<PathBuf>,

    /// Most bytes of changes; writes of more fail [default: as many as the disk has]
    #[arg(long, value_name = "SIZE")]
    pub overlay_limit: Option<Size>,

    /// What goes wrong, on purpose: `[[device.fault]]` tables of the configuration file
    #[arg(skip)]
    #[serde(rename = "fault", default, skip_serializing)]
    pub faults: Vec<FaultConfig>,

    /// Where the sequence of faults starts: the same operations meet the same faults, time after time [default: 0]
    #[arg(skip)]
    pub fault_seed: Option<u64>,

    /// Name on the control socket and in metrics [default: the path of the socket]
    #[arg(long)]
    pub name: Option<String>,

    /// How fast it may be used: numbers such as iops=1000,bandwidth=100M, and read_iops, write_iops, read_bandwidth,
    /// write_bandwidth, iops_burst, bandwidth_burst [default: as fast as can be]
    #[arg(long = "limits", value_name = "LIMITS")]
    #[serde(rename = "limits")]
    pub rates: Option<RateLimits>,

    /// What is to lie between the device and its store: 25g-tor, 100g-spine, cxl-pool, a [[fabric]] of the configuration file, or
    /// numbers such as round_trip=20us,jitter=2us,bandwidth=3G,credits=128 [default: nothing]
    #[arg(long, value_name = "FABRIC")]
    pub fabric: Option<FabricChoice>,

    /// What becomes of requests that the storage has failed [default: report]
    #[arg(long, value_enum)]
    pub on_error: Option<OnError>,

    /// Seconds for which --on-error retry tries a request again, 1 to 86400 [default: 60]
    #[arg(long, value_name = "SECONDS")]
    pub retry_deadline: Option<u32>,

    /// Keep completed writes in memory until they are flushed, to lose them by `ctl power-cut`
    #[arg(long)]
    #[serde(default)]
    pub power_cut: bool,

    /// Most bytes of such writes, 4K to 64G; older ones are written down to make room [default: 64M]
    #[arg(long, value_name = "SIZE")]
    pub power_cut_cache: Option<Size>,
}

/// Where the blocks live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum StoreKind {
    /// An image file or a block device
    File,
    /// A RAM disk, gone with the server
    Memory,
    /// Discards writes and leaves the buffers of reads as they are: measures everything but the storage
    Null,
    /// An export of an NBD server
    Nbd,
    /// A qcow2 image, with the backing files that it names
    Qcow2,
    /// A VMDK image of plain extents, to be read only
    Vmdk,
}

impl StoreKind {
    /// Whether it lives in a file, which blk_file names.
    pub(super) fn has_file(self) -> bool {
        matches!(self, Self::File | Self::Qcow2 | Self::Vmdk)
    }
}

/// How a file is cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// Past the page cache; writes are durable after a flush
    None,
    /// Through the page cache; writes are durable after a flush
    Writeback,
    /// Through the page cache; writes are durable when they complete
    Writethrough,
}

/// How a worker waits for a device's requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum PollPolicy {
    /// Awake for as long as that has been shown to pay, then asleep
    #[default]
    Adaptive,
    /// Always awake: the shortest latency, for a whole processor
    Always,
    /// Asleep at once
    Never,
}

/// How drivers kick.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Doorbell {
    /// By messages, or by eventfds for clients that ask for these
    #[default]
    Messages,
    /// By writes to a page that the client maps, which costs nothing and wakes nobody: needs poll = "always", and has QEMU
    /// wait for the answer to every other register write
    Mapped,
}

impl DeviceConfig {
    /// A device on this socket, with all else as it is by default.
    pub fn new(socket_path: impl Into<PathBuf>) -> Self {
        Self {
            socket_path: socket_path.into(),
            socket_mode: None,
            socket_group: None,
            allow_uids: None,
            store: None,
            blk_file: None,
            size: None,
            read_only: false,
            num_queues: None,
            queue_size: None,
            serial: None,
            cache: None,
            fixed_buffers: false,
            iopoll: false,
            queue_workers: None,
            poll: None,
            doorbell: None,
            packed: None,
            in_order: None,
            max_guest_memory: None,
            max_dma_maps: None,
            max_fds: None,
            max_data_xfer_size: None,
            any_memory_file: false,
            nbd_uri: None,
            nbd_connections: None,
            nbd_deadline: None,
            nbd_tls_dir: None,
            nbd_tls_hostname: None,
            nbd_tls_psk_file: None,
            nbd_tls_username: None,
            overlay_of: None,
            overlay: None,
            overlay_file: None,
            overlay_limit: None,
            faults: Vec::new(),
            fault_seed: None,
            name: None,
            rates: None,
            fabric: None,
            on_error: None,
            retry_deadline: None,
            power_cut: false,
            power_cut_cache: None,
        }
    }

    /// The permissions of its socket, if they are not the umask's business.
    pub fn socket_mode(&self) -> Option<SocketMode> {
        self.socket_mode.or(self.socket_group.as_ref().map(|_| SocketMode::GROUP))
    }

    /// What its client may take.
    ///
    /// # Errors
    /// The first that makes no sense.
    pub fn limits(&self) -> Result<ClientLimits, InvalidDevice> {
        ClientLimits::of(self)
    }

    /// Whether its store is opened without threads of its own, and without more system calls than a plain file takes.
    pub(crate) fn needs_little(&self) -> bool {
        matches!(self.store_kind(), StoreKind::File | StoreKind::Memory | StoreKind::Null)
            && self.overlay().is_none()
            && !self.power_cut
    }

    /// The store that was named, or that follows from the rest.
    pub fn store_kind(&self) -> StoreKind {
        self.store.unwrap_or(match (self.blk_file.as_ref().or(self.overlay_of.as_ref()), &self.nbd_uri) {
            (Some(_), _) => StoreKind::File,
            (None, Some(_)) => StoreKind::Nbd,
            (None, None) => StoreKind::Memory,
        })
    }

    /// Bytes of a disk that has no file.
    pub fn size_or_default(&self) -> u64 {
        self.size.unwrap_or(DEFAULT_SIZE).0
    }

    /// Request queues.
    pub fn num_queues(&self) -> u16 {
        self.num_queues.unwrap_or(DEFAULT_NUM_QUEUES)
    }

    /// Entries of each queue.
    pub fn queue_size(&self) -> u16 {
        self.queue_size.unwrap_or(DEFAULT_QUEUE_SIZE)
    }

    /// How a worker waits for its requests.
    pub fn poll(&self) -> PollPolicy {
        self.poll.unwrap_or_default()
    }

    /// How drivers kick.
    pub fn doorbell(&self) -> Doorbell {
        self.doorbell.unwrap_or_default()
    }

    /// Whether packed virtqueues are offered.
    pub fn packed(&self) -> bool {
        self.packed.unwrap_or(false)
    }

    /// Whether completion in order is offered.
    pub fn in_order(&self) -> bool {
        self.in_order.unwrap_or(false)
    }

    /// Connections to an NBD server, at most.
    pub fn nbd_connections(&self) -> u16 {
        self.nbd_connections.unwrap_or(64)
    }

    /// Seconds that requests wait for an NBD server.
    pub fn nbd_deadline(&self) -> u32 {
        self.nbd_deadline.unwrap_or(60)
    }

    /// How a file is cached.
    pub fn cache(&self) -> Cache {
        self.cache.unwrap_or(Cache::None)
    }
}
