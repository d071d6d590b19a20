//! A server: its devices, their sessions, and the workers that all share.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::thread;

use virtio::block::{BlockConfig, BlockDevice, Discard, SERIAL_LEN, WriteZeroes};
use virtio::device::VirtioDevice;
use virtio::memory::outlive_lost_memory;
use virtio::transport::{Options, VirtioPci};
use virtio_bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_IOMMU_PLATFORM, VIRTIO_F_RING_PACKED};

use crate::backend::uring::{SqPoll, UringOptions, Waker};
use crate::backend::{SECTOR, Service, Store, StoreInfo};
use crate::block::BlockService;
use crate::config::{
    Cache, DeviceConfig, Doorbell, FabricConfig, InvalidDevice, InvalidServer, NumberList, OnError, ServerConfig, Size,
};
use crate::control::{self, Control};
use crate::device::Device;
use crate::devices::Devices;
use crate::doorbell_page::DoorbellPage;
use crate::faults::DeviceFaults;
use crate::inherited::{InheritedError, InheritedSockets};
use crate::listener::{ListenError, Listener};
use crate::metrics::{self, DeviceMetrics, Responder};
use crate::sandbox::{Entrance, Sandbox, SandboxError, ThreadKind};
use crate::session::Stop;
use crate::status::{SharedStatus, Status};
use crate::store::{self, Bases, BuiltIn, Layers, StoreError};
use crate::worker::{Pool, PoolError, WorkerPlan};

/// The most data segments of a request that we ask drivers to keep to, whatever the size of the queue.
const MAX_SEGMENTS: u16 = 254;
/// The most sectors of one discard: 1 GiB.
const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// The most sectors of one write-zeroes: 16 MiB, which a store that has to write them writes without a pause for others.
const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 15;
/// The stack of a store's own thread: cryptography takes some.
const STORE_STACK: usize = 512 << 10;

/// Why a server cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// What is said of the server as a whole.
    #[error(transparent)]
    Server(#[from] InvalidServer),
    /// The description of a device.
    #[error("{}: {source}", socket_path.display())]
    Invalid {
        /// The device's socket.
        socket_path: PathBuf,
        /// What is wrong.
        source: InvalidDevice,
    },
    /// Where its blocks live.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The function's registers.
    #[error("{}: {source}", socket_path.display())]
    Function {
        /// The device's socket.
        socket_path: PathBuf,
        /// What does not fit.
        source: virtio::transport::BuildError,
    },
    /// The socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The sockets that a service manager has handed over.
    #[error(transparent)]
    Inherited(#[from] InheritedError),
    /// Where metrics are to be had.
    #[error("metrics_address: cannot listen on {address}: {source}")]
    MetricsAddress {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// What the threads give up.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The workers.
    #[error(transparent)]
    Workers(#[from] PoolError),
    /// Threads or descriptors.
    #[error("cannot start the server's threads: {0}")]
    Threads(#[source] io::Error),
}

/// Why a server ended otherwise than by being told to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// A device failed, at work or when its store was flushed at the end.
    #[error("{device}: {source}")]
    Device {
        /// The device's socket.
        device: String,
        /// What the system said.
        source: io::Error,
    },
    /// A thread panicked: a defect of this server.
    #[error("{device}: its thread panicked; what was flushed before is safe")]
    Panicked {
        /// The device's socket.
        device: String,
    },
}

/// Tells a server to stop, from any thread.
#[derive(Clone)]
pub struct StopHandle(Arc<Stop>);

impl StopHandle {
    /// Has every device end what is in flight, flush, and remove its socket; [`Server::join`] then returns.
    pub fn stop(&self) {
        self.0.now();
    }
}

/// A running server.
pub struct Server {
    devices: Arc<Devices>,
    control: Option<Control>,
    metrics: Vec<Responder>,
    stop: Arc<Stop>,
    sandbox: Sandbox,
}

impl Server {
    /// Opens all devices, listens, and starts to serve. Nothing is left behind if one of them fails, but for the process's
    /// handler of SIGBUS, see [`outlive_lost_memory`].
    ///
    /// # Errors
    /// The first thing that cannot be had.
    pub fn start(config: &ServerConfig) -> Result<Self, OpenError> {
        Self::start_on(config, InheritedSockets::default())
    }

    /// As [`start`](Self::start), and listens on `sockets` where they are for a device, for operators or for metrics.
    ///
    /// # Errors
    /// The same, and if a socket is for nobody.
    pub fn start_on(config: &ServerConfig, mut sockets: InheritedSockets) -> Result<Self, OpenError> {
        config.check()?;
        outlive_lost_memory().map_err(OpenError::Threads)?;
        let stop = Arc::new(Stop::new().map_err(OpenError::Threads)?);
        // All or nothing: the sockets appear once every store is open.
        let entrance = Entrance::default();
        let mut bases = Bases::default();
        let mut opened: Vec<_> = config
            .devices
            .iter()
            .map(|device| open_device(device, &config.fabrics, &entrance, &mut bases))
            .collect::<Result<_, _>>()?;
        let listeners: Vec<_> =
            config.devices.iter().map(|device| listen(device, &mut sockets)).collect::<Result<_, _>>()?;
        if config.control_socket.is_some()
            && let Ok(waker) = Waker::new()
            && let Err(error) = store::try_ring(&waker)
        {
            log::warn!("no device with an image file can be added later, and none be limited: {error}");
        }
        let control = config.control_socket.as_deref().map(|path| match sockets.control(path) {
            Some(socket) => Ok(Listener::inherit(socket, None)),
            None => control::bind(path, config),
        });
        let control = control.transpose()?;
        let metrics_socket = config.metrics_socket.as_deref().map(|path| match sockets.metrics(path) {
            Some(socket) => Ok(Listener::inherit(socket, None)),
            None => metrics::bind(path),
        });
        let metrics_socket = metrics_socket.transpose()?;
        sockets.all_taken()?;
        let metrics_address = config.metrics_address.map(|address| {
            metrics::Place::tcp(address).map_err(|source| OpenError::MetricsAddress { address, source })
        });
        let metrics_address = metrics_address.transpose()?;
        // From here on threads only serve what is open.
        let sockets = listeners.iter().chain(&control).chain(&metrics_socket);
        let folders: Vec<_> = sockets.filter_map(|listener| listener.path().parent()).collect();
        let services: Vec<_> = opened.iter_mut().filter_map(|opened| opened.store_service.take()).collect();
        let ports: Vec<_> = services.iter().flat_map(|service| service.ports.iter().copied()).collect();
        let mode = config.sandbox.unwrap_or_default();
        let sandbox = Sandbox::with_control(mode, &folders, &ports, config.control_allow())?;
        entrance.open(&sandbox);
        services.into_iter().try_for_each(|service| start_service(service, &sandbox)).map_err(OpenError::Threads)?;
        let pool = Pool::new(worker_plans(config), &sandbox)?;
        let devices = Arc::new(Devices::new(config, pool, Arc::clone(&stop), sandbox.clone(), entrance));
        let mut server = Self { devices, control: None, metrics: Vec::new(), stop, sandbox };
        for ((device, opened), listener) in config.devices.iter().zip(opened).zip(listeners) {
            server.devices.serve(device, opened, listener).map_err(OpenError::Threads)?;
        }
        if let Some(listener) = control {
            let (devices, stop) = (Arc::clone(&server.devices), Arc::clone(&server.stop));
            server.control =
                Some(Control::start(listener, devices, stop, &server.sandbox).map_err(OpenError::Threads)?);
        }
        for place in metrics_socket.map(metrics::Place::Unix).into_iter().chain(metrics_address) {
            let (devices, stop) = (Arc::clone(&server.devices), Arc::clone(&server.stop));
            let responder = Responder::start(place, devices, stop, &server.sandbox).map_err(OpenError::Threads)?;
            server.metrics.push(responder);
        }
        Ok(server)
    }

    /// What stops it.
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle(Arc::clone(&self.stop))
    }

    /// What its threads are in; a process that does nothing else can put its own threads in too.
    pub fn sandbox(&self) -> Sandbox {
        self.sandbox.clone()
    }

    /// The devices: the socket of each, from the root, and what it is in a few words.
    pub fn devices(&self) -> impl Iterator<Item = (PathBuf, String)> {
        self.devices.list().into_iter().map(|device| (device.socket_path, device.description))
    }

    /// Waits until all devices have ended.
    ///
    /// # Errors
    /// The first of them that failed; all have ended all the same.
    pub fn join(self) -> Result<(), ServeError> {
        // First who could add more: with a control socket a server without a device waits for one.
        if let Some(control) = self.control {
            control.join();
        }
        self.metrics.into_iter().for_each(Responder::join);
        self.devices.join()
    }
}

/// A device that can be served.
pub(crate) struct Opened {
    pub(crate) device: Device,
    /// What it is, in a few words.
    pub(crate) description: String,
    pub(crate) read_only: bool,
    /// The store, which the device owns: it is closed when that ends.
    pub(crate) store: Weak<dyn Store>,
    /// What the store needs a thread for.
    pub(crate) store_service: Option<Service>,
    pub(crate) metrics: Arc<DeviceMetrics>,
    /// What stands before the store.
    pub(crate) built_in: BuiltIn,
}

/// What each worker is to be.
fn worker_plans(config: &ServerConfig) -> impl Iterator<Item = WorkerPlan> {
    let nth = |list: &Option<NumberList>, index| list.as_ref().and_then(|list| list.around(index));
    let iopoll = config.devices.iter().any(|device| device.iopoll);
    (0..config.workers()).map(move |index| {
        let cpu = nth(&config.sqpoll_cpus, index).and_then(|cpu| u32::try_from(cpu).ok());
        let sqpoll = config.sqpoll.then_some(SqPoll { idle: config.sqpoll_idle(), cpu });
        WorkerPlan { cpu: nth(&config.worker_cpus, index), uring: UringOptions { sqpoll, iopoll } }
    })
}

/// Listens where a device is to be found.
fn listen(device: &DeviceConfig, sockets: &mut InheritedSockets) -> Result<Listener, ListenError> {
    let Some(socket) = sockets.device(device.name.as_deref(), &device.socket_path) else {
        return Listener::bind(device);
    };
    if device.socket_mode.is_some() || device.socket_group.is_some() {
        let path = socket.path.display();
        log::warn!("{path}: socket_mode and socket_group are for the unit to say: SocketMode= and SocketGroup=");
    }
    Ok(Listener::inherit(socket, device.allow_uids.as_deref()))
}

/// Has a thread do what a store needs one for, in the sandbox; it ends by itself when the store is gone.
///
/// # Errors
/// If there can be no thread.
pub(crate) fn start_service(service: Service, sandbox: &Sandbox) -> io::Result<()> {
    let sandbox = sandbox.clone();
    let run = move || {
        sandbox.enter_as(ThreadKind::Connector);
        (service.run)();
    };
    thread::Builder::new().name("store".into()).stack_size(STORE_STACK).spawn(run).map(drop)
}

/// Opens what a device needs, but for its socket. What overlays lie over is among `bases`, or joins them; threads that a store
/// starts do nothing before `entrance` is open. Fabrics are called by their names in `fabrics`.
///
/// # Errors
/// If its description makes no sense, or something cannot be had.
pub(crate) fn open_device(
    config: &DeviceConfig,
    fabrics: &[FabricConfig],
    entrance: &Entrance,
    bases: &mut Bases,
) -> Result<Opened, OpenError> {
    let socket_path = || config.socket_path.clone();
    let invalid = |source| OpenError::Invalid { socket_path: socket_path(), source };
    config.check().map_err(invalid)?;
    let limits = config.limits().map_err(invalid)?;
    let rates = config.rates.map_or(Ok(None), |rates| rates.limits()).map_err(|error| invalid(error.into()))?;
    let fabric = config.fabric.as_ref().map(|fabric| fabric.find(fabrics)).transpose();
    let fabric = fabric.map_err(|error| invalid(error.into()))?;
    let waits = config.faults.iter().any(|fault| fault.latency.is_some());
    if rates.is_some() || fabric.is_some() || config.on_error() == OnError::Retry || waits {
        store::try_layers(config)?;
    }
    let faults = Arc::new(DeviceFaults::new(config));
    let (store, built_in) = store::open(config, entrance, bases, faults.rules())?;
    let info = store.info();
    let store_service = store.service();
    let queues = config.num_queues().min(store.max_queues());
    if queues < config.num_queues() {
        log::info!(
            "{}: {queues} of {} queues, which is what its store allows",
            config.socket_path.display(),
            config.num_queues()
        );
    }
    let block = BlockDevice::new(BlockConfig { num_queues: queues, ..block_config(config, &info) });
    let mut options = Options::for_device(&block);
    options.features |= 1 << VIRTIO_F_IOMMU_PLATFORM;
    options.features |= u64::from(config.packed()) << VIRTIO_F_RING_PACKED;
    options.features |= u64::from(config.in_order()) << VIRTIO_F_IN_ORDER;
    let weak = Arc::downgrade(&store);
    let metrics = Arc::new(DeviceMetrics::new(queues));
    let service = BlockService::new(Layers::new(store, rates, fabric), block.shared(), Arc::clone(&metrics));
    let features = block.features();
    let function = VirtioPci::new(Box::new(block), &options)
        .map_err(|source| OpenError::Function { socket_path: socket_path(), source })?;
    log::debug!("{}: {info:?}, features {features:#x}", config.socket_path.display());
    let size = Size(info.capacity);
    let kind = store::describe(config);
    let read_only = if info.read_only { ", read-only" } else { "" };
    let plural = if queues == 1 { "" } else { "s" };
    let description = format!("{kind}: {size}, {queues} queue{plural}{read_only}");
    let doorbell_page = match config.doorbell() {
        Doorbell::Messages => None,
        Doorbell::Mapped => Some(DoorbellPage::new(&function).map_err(OpenError::Threads)?),
    };
    let service = Box::new(service);
    let (poll, queue_workers) = (config.poll(), config.queue_workers.clone());
    let status = Arc::new(SharedStatus::default());
    let (limits_said, fabric) = (config.rates.filter(|_| rates.is_some()), config.fabric.clone());
    status.update(|status| *status = Status { size: info.capacity, limits: limits_said, fabric, ..Status::default() });
    let device =
        Device { function, service, poll, queue_workers, doorbell_page, limits, paused: false, status, faults };
    let read_only = config.read_only || info.read_only;
    Ok(Opened { device, description, read_only, store: weak, store_service, metrics, built_in })
}

/// What the guest is told of a store.
fn block_config(config: &DeviceConfig, info: &StoreInfo) -> BlockConfig {
    let read_only = config.read_only || info.read_only;
    let block_sectors = info.block_size / SECTOR as u32;
    let mut serial = [0; SERIAL_LEN];
    for (to, from) in serial.iter_mut().zip(config.serial.as_deref().unwrap_or_default().bytes()) {
        *to = from;
    }
    BlockConfig {
        capacity: info.capacity / SECTOR,
        block_size: info.block_size,
        physical_block_exp: (info.physical_block_size / info.block_size.max(1)).max(1).ilog2() as u8,
        opt_io_size: info.optimal_io_size / info.block_size.max(1),
        // Header and status need a descriptor each.
        seg_max: u32::from(config.queue_size().saturating_sub(2).clamp(1, MAX_SEGMENTS)),
        num_queues: config.num_queues(),
        max_queue_size: config.queue_size(),
        read_only,
        writeback: config.cache() != Cache::Writethrough,
        discard: (info.discard && !read_only)
            .then_some(Discard { max_sectors: MAX_DISCARD_SECTORS, alignment: block_sectors }),
        write_zeroes: (!read_only)
            .then_some(WriteZeroes { max_sectors: MAX_WRITE_ZEROES_SECTORS, may_unmap: info.write_zeroes_unmap }),
        serial,
    }
}
