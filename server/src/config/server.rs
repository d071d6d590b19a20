//! A whole server, as the operator describes it.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::thread;

use serde::Deserialize;

use super::fabric::{self, FabricConfig, InvalidFabric};
use super::{DeviceConfig, NumberList, SandboxMode, SocketMode};

/// More than any machine is for.
const MOST_WORKERS: usize = 1024;
/// Milliseconds until a submission thread of the kernel's sleeps.
const DEFAULT_SQPOLL_IDLE: u32 = 10;

/// What concerns all devices, `serve`'s options and the keys above the first table of a file; and the devices.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, clap::Args)]
#[serde(deny_unknown_fields)]
#[group(id = "server")]
pub struct ServerConfig {
    /// Threads that serve the queues, 1 to 1024 [default: one for each of --worker-cpus, or for each processor]
    #[arg(long, value_name = "N")]
    pub workers: Option<usize>,

    /// Processors to which the workers are bound, the first worker to the first: 0,2,4-7 [default: none]
    #[arg(long, value_name = "LIST")]
    pub worker_cpus: Option<NumberList>,

    /// Have a thread of the kernel submit each worker's requests to image files, without system calls (io_uring's SQPOLL)
    #[arg(long)]
    #[serde(default)]
    pub sqpoll: bool,

    /// Milliseconds without a request after which that thread sleeps, 1 to 60000 [default: 10]
    #[arg(long, value_name = "MS")]
    pub sqpoll_idle: Option<u32>,

    /// Processors to which those threads are bound, the first worker's to the first [default: none]
    #[arg(long, value_name = "LIST")]
    pub sqpoll_cpus: Option<NumberList>,

    /// Whether its threads give up the system calls, files and capabilities that serving does not need [default: on]
    #[arg(long, value_enum)]
    pub sandbox: Option<SandboxMode>,

    /// UNIX socket on which vfio-user-blk ctl, and what speaks JSON-RPC, can look at the devices and change them [default: none]
    #[arg(long, value_name = "PATH")]
    pub control_socket: Option<PathBuf>,

    /// Permissions of the control socket, in octal digits [default: 0600]
    #[arg(long, value_name = "MODE")]
    pub control_mode: Option<SocketMode>,

    /// File or folder that devices added by the control socket may use: for their images and sockets; to be repeated for more
    /// [default: none]
    #[arg(long = "control-allow", value_name = "PATH")]
    pub control_allow: Option<Vec<PathBuf>>,

    /// TCP address on which Prometheus finds metrics: 127.0.0.1:9100 [default: none]
    #[arg(long, value_name = "ADDRESS")]
    pub metrics_address: Option<SocketAddr>,

    /// Whether that may be another than this machine's own: anybody who reaches it can read the metrics [default: false]
    #[arg(long)]
    #[serde(default)]
    pub metrics_remote: bool,

    /// UNIX socket on which metrics are found, for the server's own user [default: none]
    #[arg(long, value_name = "PATH")]
    pub metrics_socket: Option<PathBuf>,

    /// The devices, at least one without a control socket.
    #[arg(skip)]
    #[serde(rename = "device", default)]
    pub devices: Vec<DeviceConfig>,

    /// Fabrics that devices call by their names.
    #[arg(skip)]
    #[serde(rename = "fabric", default)]
    pub fabrics: Vec<FabricConfig>,
}

/// Why a server cannot be as it is described. The names are those of the configuration file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidServer {
    /// Number of threads.
    #[error("workers is {0}; it must be from 1 to 1024")]
    Workers(usize),
    /// Processors for more threads than there are, or for fewer.
    #[error("{key} names {named} processors for {workers} workers; name one for each, in their order")]
    NotOneEach {
        /// Which list.
        key: &'static str,
        /// How many it names.
        named: usize,
        /// Threads.
        workers: usize,
    },
    /// A detail of what is not asked for.
    #[error("{0} is for sqpoll = true only; leave it out")]
    SqpollUnused(&'static str),
    /// How long a thread of the kernel's waits awake.
    #[error("sqpoll_idle is {0}; it must be from 1 to 60000 milliseconds")]
    SqpollIdle(u32),
    /// A detail of a control socket that there is not.
    #[error("{0} is for a server with a control_socket only; leave it out, or name the socket")]
    ControlUnused(&'static str),
    /// An address that others can reach.
    #[error("metrics_address {0} is not this machine's own (127.0.0.1, ::1): name one that is, or set metrics_remote")]
    MetricsRemote(SocketAddr),
    /// Two devices with one name.
    #[error("two devices have the name {0:?}; give one of them another")]
    SameName(String),
    /// A queue for a worker that there is not.
    #[error(
        "{}: queue_workers names worker {worker}, but they are numbered from 0 and there are {workers}: \
         raise workers, or name another", socket_path.display()
    )]
    NoSuchWorker {
        /// The device's socket.
        socket_path: PathBuf,
        /// The worker.
        worker: usize,
        /// Threads.
        workers: usize,
    },
    /// A fabric.
    #[error(transparent)]
    Fabric(#[from] InvalidFabric),
}

impl ServerConfig {
    /// These devices, with all else as it is by default.
    pub fn new(devices: Vec<DeviceConfig>) -> Self {
        Self { devices, ..Self::default() }
    }

    /// Takes from `options` what it says of the workers.
    pub fn override_with(&mut self, options: Self) {
        let Self { workers, worker_cpus, sqpoll, sqpoll_idle, sqpoll_cpus, sandbox, .. } = options;
        self.control_socket = options.control_socket.or(self.control_socket.take());
        self.metrics_address = options.metrics_address.or(self.metrics_address);
        self.metrics_remote |= options.metrics_remote;
        self.metrics_socket = options.metrics_socket.or(self.metrics_socket.take());
        self.control_mode = options.control_mode.or(self.control_mode);
        self.control_allow = options.control_allow.or(self.control_allow.take());
        self.workers = workers.or(self.workers);
        self.worker_cpus = worker_cpus.or(self.worker_cpus.take());
        self.sqpoll |= sqpoll;
        self.sqpoll_idle = sqpoll_idle.or(self.sqpoll_idle);
        self.sqpoll_cpus = sqpoll_cpus.or(self.sqpoll_cpus.take());
        self.sandbox = sandbox.or(self.sandbox);
    }

    /// Checks that the words make sense together; not those of each device, see [`DeviceConfig::check`].
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<(), InvalidServer> {
        let workers = self.workers();
        if !(1..=MOST_WORKERS).contains(&workers) {
            return Err(InvalidServer::Workers(workers));
        }
        for (key, list) in [("worker_cpus", &self.worker_cpus), ("sqpoll_cpus", &self.sqpoll_cpus)] {
            let named = list.as_ref().map_or(workers, |list| list.as_slice().len());
            if named != workers {
                return Err(InvalidServer::NotOneEach { key, named, workers });
            }
        }
        if !self.sqpoll && self.sqpoll_idle.is_some() {
            return Err(InvalidServer::SqpollUnused("sqpoll_idle"));
        }
        if !self.sqpoll && self.sqpoll_cpus.is_some() {
            return Err(InvalidServer::SqpollUnused("sqpoll_cpus"));
        }
        if !(1..=60_000).contains(&self.sqpoll_idle()) {
            return Err(InvalidServer::SqpollIdle(self.sqpoll_idle()));
        }
        if self.control_socket.is_none() && self.control_mode.is_some() {
            return Err(InvalidServer::ControlUnused("control_mode"));
        }
        if self.control_socket.is_none() && self.control_allow.is_some() {
            return Err(InvalidServer::ControlUnused("control_allow"));
        }
        if let Some(address) =
            self.metrics_address.filter(|address| !address.ip().is_loopback() && !self.metrics_remote)
        {
            return Err(InvalidServer::MetricsRemote(address));
        }
        fabric::check_defined(&self.fabrics)?;
        for fabric in self.devices.iter().filter_map(|device| device.fabric.as_ref()) {
            fabric.find(&self.fabrics)?;
        }
        let mut names = HashSet::new();
        for name in self.devices.iter().filter_map(|device| device.name.as_ref()) {
            if !names.insert(name) {
                return Err(InvalidServer::SameName(name.clone()));
            }
        }
        for device in &self.devices {
            let pinned = device.queue_workers.iter().flat_map(NumberList::as_slice);
            if let Some(worker) = pinned.copied().find(|worker| *worker >= workers) {
                let socket_path = device.socket_path.clone();
                return Err(InvalidServer::NoSuchWorker { socket_path, worker, workers });
            }
        }
        Ok(())
    }

    /// What devices that are added later may use of the file system.
    pub fn control_allow(&self) -> &[PathBuf] {
        self.control_allow.as_deref().unwrap_or_default()
    }

    /// Threads that serve the queues.
    pub fn workers(&self) -> usize {
        let named = self.worker_cpus.as_ref().map(|cpus| cpus.as_slice().len());
        let processors = || thread::available_parallelism().map_or(1, usize::from).min(MOST_WORKERS);
        self.workers.or(named).unwrap_or_else(processors)
    }

    /// Milliseconds until a submission thread of the kernel's sleeps.
    pub fn sqpoll_idle(&self) -> u32 {
        self.sqpoll_idle.unwrap_or(DEFAULT_SQPOLL_IDLE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(change: fn(&mut ServerConfig)) -> Result<(), InvalidServer> {
        let mut config = ServerConfig::new(vec![DeviceConfig::new("a.sock")]);
        config.workers = Some(2);
        change(&mut config);
        config.check()
    }

    fn list(text: &str) -> Option<NumberList> {
        Some(text.parse().unwrap())
    }

    #[test]
    fn there_are_as_many_workers_as_processors_named_for_them() {
        let mut config = ServerConfig { worker_cpus: list("5,7,9"), ..ServerConfig::default() };
        assert_eq!((config.workers(), config.check()), (3, Ok(())));
        config.workers = Some(2);
        let error = config.check().unwrap_err();
        assert_eq!(error, InvalidServer::NotOneEach { key: "worker_cpus", named: 3, workers: 2 });
        assert!(ServerConfig::default().workers() >= 1);
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        assert_eq!(check(|_| {}), Ok(()));
        assert_eq!(check(|config| config.workers = Some(0)), Err(InvalidServer::Workers(0)));
        assert_eq!(check(|config| config.workers = Some(1025)), Err(InvalidServer::Workers(1025)));
        assert_eq!(check(|config| config.sqpoll_idle = Some(5)), Err(InvalidServer::SqpollUnused("sqpoll_idle")));
        let unused = check(|config| config.control_mode = Some("0600".parse().unwrap()));
        assert_eq!(unused, Err(InvalidServer::ControlUnused("control_mode")));
        let unused = check(|config| config.control_allow = Some(vec![]));
        assert_eq!(unused, Err(InvalidServer::ControlUnused("control_allow")));
        let address = "10.0.0.1:9100".parse().unwrap();
        let remote = ServerConfig { workers: Some(2), metrics_address: Some(address), ..ServerConfig::default() };
        assert_eq!(remote.check(), Err(InvalidServer::MetricsRemote(address)));
        assert_eq!(ServerConfig { metrics_remote: true, ..remote }.check(), Ok(()));
        assert_eq!(check(|config| config.metrics_address = Some("[::1]:0".parse().unwrap())), Ok(()));
        let twins = check(|config| {
            config.devices.push(DeviceConfig::new("b.sock"));
            config.devices.iter_mut().for_each(|device| device.name = Some("twin".into()));
        });
        assert_eq!(twins, Err(InvalidServer::SameName("twin".into())));
        assert_eq!(check(|config| config.sqpoll_cpus = list("0,1")), Err(InvalidServer::SqpollUnused("sqpoll_cpus")));
        let polled = |change: fn(&mut ServerConfig)| {
            let mut config = ServerConfig { workers: Some(2), sqpoll: true, ..ServerConfig::default() };
            change(&mut config);
            config.check()
        };
        assert_eq!(polled(|config| config.sqpoll_cpus = list("0,0")), Ok(()));
        let too_few = InvalidServer::NotOneEach { key: "sqpoll_cpus", named: 1, workers: 2 };
        assert_eq!(polled(|config| config.sqpoll_cpus = list("0")), Err(too_few));
        for (idle, right) in [(0, false), (1, true), (60_000, true), (60_001, false)] {
            let config = ServerConfig { sqpoll: true, sqpoll_idle: Some(idle), ..ServerConfig::default() };
            assert_eq!(config.check().is_ok(), right, "{idle}");
        }
    }

    #[test]
    fn queues_go_to_workers_that_there_are() {
        assert_eq!(check(|config| config.devices[0].queue_workers = list("1,0,1")), Ok(()));
        let error = check(|config| config.devices[0].queue_workers = list("0-2")).unwrap_err();
        assert!(error.to_string().starts_with("a.sock: queue_workers names worker 2,"), "{error}");
    }

    #[test]
    fn options_come_before_the_file() {
        let mut file = ServerConfig { workers: Some(2), worker_cpus: list("0,1"), ..ServerConfig::new(vec![]) };
        file.devices.push(DeviceConfig::new("a"));
        let options = ServerConfig { worker_cpus: list("1,0"), sqpoll: true, ..ServerConfig::default() };
        file.override_with(options);
        let expected = ServerConfig {
            workers: Some(2),
            worker_cpus: list("1,0"),
            sqpoll: true,
            ..ServerConfig::new(vec![DeviceConfig::new("a")])
        };
        assert_eq!(file, expected);
    }
}
