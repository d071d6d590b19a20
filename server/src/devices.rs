//! The devices that a server has, which may come and go while it runs.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{io, iter};

use crossbeam::channel::{Receiver, RecvTimeoutError, bounded};

use crate::backend::Store;
use crate::backend::hold::HeldRequests;
use crate::backend::overlay::{Emptied, EmptyError, Emptying, OverlayStore, Progress};
use crate::backend::power_cut::{PowerCut, Survivors};
use crate::config::{DeviceConfig, FabricConfig, FaultConfig, InvalidServer, ServerConfig};
use crate::faults::{DeviceFaults, Told};
use crate::growing::Growing;
use crate::listener::Listener;
use crate::metrics::{DeviceMetrics, Statistics};
use crate::sandbox::{Entrance, Sandbox, ThreadKind};
use crate::server::{OpenError, Opened, ServeError, open_device, start_service};
use crate::session::{Observation, Operator, Order, OrderError, Session, Stop, orders};
use crate::status::{SharedStatus, Status};
use crate::store::{Bases, BuiltIn};
use crate::worker::Pool;

/// A session's stack: it recurses nowhere, and there may be a thousand.
const SESSION_STACK: usize = 256 << 10;
/// How long a device that is removed may take to write what it has completed to its storage before that goes on without us.
const FLUSH_PATIENCE: Duration = Duration::from_secs(30);

/// Why a device cannot be added to a running server.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AddError {
    /// It makes no sense, or something that it needs cannot be had.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It makes no sense here.
    #[error(transparent)]
    Server(#[from] InvalidServer),
    /// Another one has its name.
    #[error("there is a device {0} already; give this one another name")]
    Exists(String),
    /// The workers' rings were made without.
    #[error("iopoll needs workers with polled rings; start the server with a device that has iopoll")]
    NoPolledRings,
    /// To open its store takes more than the sandbox leaves.
    #[error(
        "only plain files, memory and null can be added in the sandbox, and none with an overlay or power_cut; name this device in \
         the configuration, or start the server with --sandbox off"
    )]
    Sandboxed,
}

/// The devices, and what all of them share.
pub(crate) struct Devices {
    served: Mutex<Vec<Served>>,
    /// Held by who adds: opening a store takes time, and nobody else needs to wait for it.
    adding: Mutex<()>,
    pool: Arc<Pool>,
    stop: Arc<Stop>,
    sandbox: Sandbox,
    entrance: Entrance,
    workers: usize,
    iopoll: bool,
    /// When they began to be.
    since: Instant,
    fabrics: Vec<FabricConfig>,
    /// Those that others may make larger.
    growing: Growing,
}

/// A device as others than its session see it.
#[derive(Clone)]
pub(crate) struct Handle {
    /// Its name among the devices of the server.
    pub(crate) name: String,
    /// Its socket, from the root.
    pub(crate) socket_path: PathBuf,
    /// What it is, in a few words.
    pub(crate) description: String,
    /// Its request queues.
    pub(crate) num_queues: u16,
    pub(crate) read_only: bool,
    /// What its queues have done.
    pub(crate) metrics: Arc<DeviceMetrics>,
    /// What they had done when an operator had them counted anew.
    baseline: Arc<Mutex<Vec<Statistics>>>,
    operator: Operator,
    status: Arc<SharedStatus>,
    faults: Arc<DeviceFaults>,
    /// Its session's, on whose thread it is closed.
    store: Weak<dyn Store>,
    /// As it was described.
    pub(crate) config: Arc<DeviceConfig>,
    /// What stands before that, and what lies in it.
    built_in: BuiltIn,
    /// Held by who gives an order.
    alone: Arc<Mutex<()>>,
}

impl Handle {
    /// What its session knows of the client, which it is asked for; `None` if there is no client.
    ///
    /// # Errors
    /// If it does not answer.
    pub(crate) fn observe(&self) -> Result<Option<Observation>, OrderError> {
        self.order(Order::Observe)?;
        Ok(self.status.observation())
    }

    /// Requests that its storage has failed and that wait; `None` if it reports failures.
    pub(crate) fn held(&self) -> Option<HeldRequests> {
        self.built_in.held.as_ref().map(|held| held.requests())
    }

    /// Has them sent again; says how many there were.
    pub(crate) fn send_again(&self) -> usize {
        self.built_in.held.as_ref().map_or(0, |held| held.resume())
    }

    /// Cuts its power, and disconnects its client; `None` if it has no cache to lose.
    pub(crate) fn cut_power(&self, cut: PowerCut, seed: u64) -> Option<Result<Survivors, OrderError>> {
        let cache = self.built_in.power.as_ref()?;
        let Some(cache) = cache.upgrade() else { return Some(Err(OrderError::Gone)) };
        if self.overlay().is_some_and(|overlay| overlay.is_being_emptied()) {
            return Some(Err(OrderError::Emptying));
        }
        let survivors = cache.cut(cut, seed).map_err(OrderError::Storage);
        // In any case: what was attached is dead.
        let disconnected = self.order(Order::Disconnect);
        Some(survivors.and_then(|survivors| disconnected.map(|_| survivors)))
    }

    /// How it is now.
    pub(crate) fn status(&self) -> Status {
        self.status.get()
    }

    /// What each queue has done since it was last asked to count anew.
    pub(crate) fn statistics(&self) -> Vec<Statistics> {
        let baseline = self.baseline.lock().unwrap_or_else(PoisonError::into_inner);
        let before = baseline.iter().cloned().chain(iter::repeat_with(Statistics::default));
        self.metrics.read().iter().zip(before).map(|(now, before)| now.since(&before)).collect()
    }

    /// Counts anew from now on. What Prometheus sees goes on.
    pub(crate) fn reset_statistics(&self) {
        *self.baseline.lock().unwrap_or_else(PoisonError::into_inner) = self.metrics.read();
    }

    /// Has its session do something; says how many bytes it has then.
    pub(crate) fn order(&self, order: Order) -> Result<u64, OrderError> {
        let _alone = self.alone();
        if self.overlay().is_some_and(|overlay| overlay.is_being_emptied()) {
            return Err(OrderError::Emptying);
        }
        // Here, where it may take its time, rather than by the session, for which a client waits.
        if matches!(order, Order::Resize { .. }) && self.built_in.power.is_some() {
            self.flush().map_err(OrderError::Storage)?;
        }
        self.operator.order(order)
    }

    fn alone(&self) -> MutexGuard<'_, ()> {
        self.alone.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn overlay(&self) -> Option<Arc<OverlayStore>> {
        self.built_in.overlay.as_ref()?.upgrade()
    }

    /// How far a commit of its overlay is; `None` if there is none under way.
    pub(crate) fn commit_progress(&self) -> Option<Progress> {
        self.overlay().and_then(|overlay| overlay.progress())
    }

    /// Does something to its overlay as a whole, while its queues are stopped. They are stopped before, and go on after it, unless
    /// they were stopped already. `may_begin` is asked once they stand.
    ///
    /// # Errors
    /// If it has none, or somebody is at it, or it does not come to rest, or what is to be done fails.
    pub(crate) fn empty<E: From<OrderError> + From<EmptyError>>(
        &self,
        cached: Cached,
        may_begin: impl FnOnce(&Status) -> Result<(), E>,
        work: impl Fn(&Emptying) -> Result<Emptied, EmptyError>,
    ) -> Result<Emptied, E> {
        let overlay = self.overlay().ok_or(OrderError::NoOverlay)?;
        let (emptying, paused) = {
            let _alone = self.alone();
            let emptying = overlay.begin_emptying()?;
            let paused = self.status().paused;
            self.operator.order(Order::Pause)?;
            (emptying, paused)
        };
        let result = may_begin(&self.status()).and_then(|()| {
            // What a cache before it still has would come into it afterwards.
            let cache = self.built_in.power.as_ref().and_then(Weak::upgrade);
            let mut emptied = Emptied::default();
            if cached == Cached::IsWritten && cache.is_some() {
                let written_down = || cache.as_ref().map(|cache| cache.written_down());
                let mut before = None;
                // A full overlay has room for more when what it has is elsewhere; but not for a write that it never has.
                while let Err(error) = self.flush() {
                    let now = written_down();
                    let made_room = work(&emptying)?;
                    if error.kind() != io::ErrorKind::StorageFull || made_room.own == 0 || before == Some(now) {
                        return Err(OrderError::Storage(error).into());
                    }
                    before = Some(now);
                    emptied = emptied.and(made_room);
                }
            }
            let emptied = emptied.and(work(&emptying)?);
            if let (Cached::IsForgotten, Some(cache)) = (cached, cache) {
                cache.cut(PowerCut::Drop, 0).map_err(OrderError::Storage)?;
            }
            Ok(emptied)
        });
        // Before queues are attached again.
        drop(emptying);
        let resumed = if paused { Ok(0) } else { self.order(Order::Resume) };
        let emptied = result?;
        resumed?;
        Ok(emptied)
    }

    /// Where the sequence of its faults starts, and what they are.
    pub(crate) fn faults(&self) -> (u64, Vec<Told>) {
        (self.faults.rules().seed(), self.faults.change().tell())
    }

    /// Has one thing more go wrong; says its number, if there is room for it.
    ///
    /// # Errors
    /// If its queues do not come to rest, which they have to for the first: nothing more goes wrong then.
    pub(crate) fn add_fault(&self, fault: &FaultConfig) -> Result<Option<u32>, OrderError> {
        let mut change = self.faults.change();
        let first = change.is_none();
        let number = change.add(fault);
        // Without faults there is nothing in the requests' way that could ask for them.
        if first && let Err(error) = self.order(Order::Reattach) {
            change.remove(number);
            return Err(error);
        }
        Ok(number)
    }

    /// Has one thing go wrong no more, or all; says which. What they held goes on.
    pub(crate) fn remove_faults(&self, which: Option<u32>) -> Result<Vec<u32>, OrderError> {
        let removed = self.faults.change().remove(which);
        self.order(Order::Look).map(|_| removed)
    }

    /// Has what one fault holds go on, or all; says which.
    pub(crate) fn release_faults(&self, which: Option<u32>) -> Result<Vec<u32>, OrderError> {
        let released = self.faults.change().release(which);
        self.order(Order::Look).map(|_| released)
    }

    /// Puts what it has completed on stable storage, and waits for that.
    pub(crate) fn flush(&self) -> io::Result<()> {
        self.store.upgrade().map_or(Ok(()), |store| store.flush())
    }
}

/// What becomes of the writes in a device's cache when its overlay is emptied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cached {
    /// They are part of what is in the overlay.
    IsWritten,
    /// They go with it.
    IsForgotten,
}

struct Served {
    handle: Handle,
    thread: JoinHandle<io::Result<()>>,
    /// Disconnected when the session has ended.
    ended: Receiver<()>,
}

impl Devices {
    /// None yet.
    pub(crate) fn new(
        config: &ServerConfig,
        pool: Pool,
        stop: Arc<Stop>,
        sandbox: Sandbox,
        entrance: Entrance,
    ) -> Self {
        Self {
            served: Mutex::default(),
            adding: Mutex::default(),
            pool: Arc::new(pool),
            stop,
            sandbox,
            entrance,
            workers: config.workers(),
            iopoll: config.devices.iter().any(|device| device.iopoll),
            since: Instant::now(),
            fabrics: config.fabrics.clone(),
            growing: Growing::default(),
        }
    }

    /// How long there have been any, by a clock that only goes forward.
    pub(crate) fn age(&self) -> Duration {
        self.since.elapsed()
    }

    fn served(&self) -> MutexGuard<'_, Vec<Served>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves a device from now on.
    ///
    /// # Errors
    /// If there can be no thread for it.
    pub(crate) fn serve(&self, config: &DeviceConfig, opened: Opened, listener: Listener) -> io::Result<()> {
        let Opened { device, description, read_only, store, store_service: _, metrics, built_in } = opened;
        let socket_path = listener.path().to_owned();
        let (operator, orders) = orders()?;
        let handle = Handle {
            name: name(config, &socket_path),
            socket_path,
            description,
            num_queues: device.function.num_queues(),
            read_only,
            operator,
            status: Arc::clone(&device.status),
            faults: Arc::clone(&device.faults),
            store,
            alone: Arc::default(),
            metrics,
            baseline: Arc::default(),
            config: Arc::new(config.clone()),
            built_in,
        };
        let session = Session::new(device, listener, Arc::clone(&self.pool), Arc::clone(&self.stop), orders);
        let sandbox = self.sandbox.clone();
        let (ends, ended) = bounded(0);
        let mut served = self.served();
        let thread = thread::Builder::new().name(format!("session-{}", served.len())).stack_size(SESSION_STACK).spawn(
            move || {
                let _ends = ends;
                sandbox.enter_as(ThreadKind::Session);
                session.run()
            },
        )?;
        let device_size = handle.built_in.device_size.clone();
        served.push(Served { handle: handle.clone(), thread, ended });
        drop(served);
        if let Some(size) = device_size {
            let name = handle.name.clone();
            if let Err(error) = self.growing.watch(handle, size, &self.stop, &self.sandbox) {
                log::error!("{name}: nobody looks whether its block device grows; ctl resize does: {error}");
            }
        }
        Ok(())
    }

    /// Opens a device and serves it.
    ///
    /// # Errors
    /// If it makes no sense, or something that it needs cannot be had.
    pub(crate) fn add(&self, config: &DeviceConfig) -> Result<Handle, AddError> {
        let _alone = self.adding.lock().unwrap_or_else(PoisonError::into_inner);
        let alone = ServerConfig {
            workers: Some(self.workers),
            fabrics: self.fabrics.clone(),
            ..ServerConfig::new(vec![config.clone()])
        };
        alone.check()?;
        if config.iopoll && !self.iopoll {
            return Err(AddError::NoPolledRings);
        }
        let socket_path = std::path::absolute(&config.socket_path).map_err(OpenError::Threads)?;
        let name = name(config, &socket_path);
        if self.list().iter().any(|device| device.name == name || device.socket_path == socket_path) {
            return Err(AddError::Exists(name));
        }
        if self.sandbox.is_on() && !config.needs_little() {
            return Err(AddError::Sandboxed);
        }
        let mut opened = open_device(config, &self.fabrics, &self.entrance, &mut Bases::default())?;
        let listener = Listener::bind(config).map_err(OpenError::from)?;
        if let Some(service) = opened.store_service.take() {
            start_service(service, &self.sandbox).map_err(OpenError::Threads)?;
        }
        self.serve(config, opened, listener).map_err(OpenError::Threads)?;
        self.find(&name).ok_or(AddError::Open(OpenError::Threads(io::ErrorKind::NotFound.into())))
    }

    /// Ends a device's service; says whether that is over, or its storage still at work.
    ///
    /// # Errors
    /// If its session refuses.
    pub(crate) fn remove(&self, device: &Handle, force: bool) -> Result<bool, OrderError> {
        device.order(Order::Remove { force })?;
        let ended = {
            let served = self.served();
            served.iter().find(|served| served.handle.name == device.name).map(|served| served.ended.clone())
        };
        let deadline = Instant::now() + FLUSH_PATIENCE;
        let over = ended.is_none_or(|ended| ended.recv_deadline(deadline) == Err(RecvTimeoutError::Disconnected));
        let mut served = self.served();
        let Some(at) = served.iter().position(|served| served.handle.name == device.name) else { return Ok(true) };
        let removed = served.remove(at);
        drop(served);
        if over {
            join(removed).map_err(|error| OrderError::Storage(io::Error::other(error.to_string())))?;
        }
        Ok(over)
    }

    /// Fabrics that have names.
    pub(crate) fn fabrics(&self) -> &[FabricConfig] {
        &self.fabrics
    }

    /// All of them, in the order in which they came.
    pub(crate) fn list(&self) -> Vec<Handle> {
        self.served().iter().map(|served| served.handle.clone()).collect()
    }

    /// The one with this name, or this socket, or the only one whose socket has this file name, with or without its extension.
    pub(crate) fn find(&self, name: &str) -> Option<Handle> {
        let mut list = self.list();
        let path = Path::new(name);
        if let Some(at) = list.iter().position(|device| device.name == name || device.socket_path == path) {
            return Some(list.swap_remove(at));
        }
        list.retain(|device| {
            [device.socket_path.file_name(), device.socket_path.file_stem()].contains(&Some(path.as_os_str()))
        });
        if list.len() == 1 { list.pop() } else { None }
    }

    /// Whether all are to end.
    pub(crate) fn are_stopping(&self) -> bool {
        self.stop.is_now()
    }

    /// Ends all.
    pub(crate) fn stop(&self) {
        self.stop.now();
    }

    /// Waits until all have ended.
    ///
    /// # Errors
    /// The first that failed; all have ended all the same.
    pub(crate) fn join(&self) -> Result<(), ServeError> {
        let served = std::mem::take(&mut *self.served());
        let mut result = Ok(());
        for served in served {
            let ended = join(served);
            result = result.and(ended);
        }
        self.growing.join();
        result
    }
}

fn name(config: &DeviceConfig, socket_path: &Path) -> String {
    config.name.clone().unwrap_or_else(|| socket_path.display().to_string())
}

fn join(served: Served) -> Result<(), ServeError> {
    let device = served.handle.socket_path.display().to_string();
    match served.thread.join() {
        Ok(ended) => ended.map_err(|source| ServeError::Device { device, source }),
        Err(_) => Err(ServeError::Panicked { device }),
    }
}
