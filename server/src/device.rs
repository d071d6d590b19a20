//! One device: the function that clients see, and what serves its queues.

use std::io;
use std::sync::Arc;

use pci::Interrupt;
use virtio::memory::{GuestMemory, RingAddresses, RingMapError};
use virtio::queue::RingFeatures;
use virtio::transport::VirtioPci;

use crate::backend::fabric::Fabric;
use crate::backend::limits::Limits;
use crate::config::{ClientLimits, NumberList, PollPolicy};
use crate::doorbell_page::DoorbellPage;
use crate::faults::DeviceFaults;
use crate::session::Events;
use crate::status::SharedStatus;
use crate::worker::{Left, TaskBuilder};

/// A device as a session serves it. It outlives its clients.
pub(crate) struct Device {
    /// Registers and interrupts.
    pub(crate) function: VirtioPci,
    /// The data path's side of it.
    pub(crate) service: Box<dyn QueueService>,
    /// How workers wait for its requests.
    pub(crate) poll: PollPolicy,
    /// Which workers serve its queues, the first queue's the first; any if it is not said.
    pub(crate) queue_workers: Option<NumberList>,
    /// Where clients may write their kicks in place of sending them; only if its workers never sleep.
    pub(crate) doorbell_page: Option<DoorbellPage>,
    /// What a client may take.
    pub(crate) limits: ClientLimits,
    /// Whether an operator has stopped its queues: none is started then.
    pub(crate) paused: bool,
    /// What others see of it.
    pub(crate) status: Arc<SharedStatus>,
    /// What goes wrong with it on purpose.
    pub(crate) faults: Arc<DeviceFaults>,
}

/// What a kind of device adds to the data path.
pub(crate) trait QueueService: Send {
    /// The task that serves a queue.
    ///
    /// # Errors
    /// If the queue cannot be served where the driver has put it.
    fn task(&self, parts: QueueParts) -> Result<TaskBuilder, StartError>;

    /// Puts everything that was completed on stable storage; may wait for that.
    ///
    /// # Errors
    /// If the storage fails.
    fn flush(&self) -> io::Result<()>;

    /// Bytes that the device has.
    fn capacity(&self) -> u64;

    /// Gives it that many bytes, or as many as its storage has by now, and says how many that are. None of its queues runs.
    ///
    /// # Errors
    /// If the storage cannot; it is as before then.
    fn resize(&self, capacity: Option<u64>) -> io::Result<u64>;

    /// Has queues whose tasks are made from now on be used no faster than that. None of its queues runs.
    fn set_limits(&mut self, limits: Option<Limits>);

    /// Has queues whose tasks are made from now on reach the store over that. None of its queues runs.
    fn set_fabric(&mut self, fabric: Option<Fabric>);
}

/// Where the driver has put a queue, and what it looks like there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueuePlace {
    pub(crate) size: u16,
    pub(crate) addresses: RingAddresses,
    /// Its format, `VIRTIO_F_RING_PACKED` (virtio 1.3 §2.8).
    pub(crate) packed: bool,
}

/// What a queue's task is made of.
pub(crate) struct QueueParts {
    pub(crate) index: u16,
    pub(crate) place: QueuePlace,
    pub(crate) features: RingFeatures,
    /// What it left when it was stopped; `None` if it is new.
    pub(crate) left: Option<Left>,
    pub(crate) memory: GuestMemory,
    pub(crate) interrupt: Arc<dyn Interrupt>,
    pub(crate) events: Arc<Events>,
}

/// Why a queue could not be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    /// The driver's fault, in nearly all cases.
    #[error(transparent)]
    Place(#[from] RingMapError),
    /// The store's: it has not answered since the queue was stopped.
    #[error(transparent)]
    Busy(#[from] StillBusy),
    /// The system's.
    #[error("no worker can serve it: {0}")]
    Worker(#[from] io::Error),
}

/// A queue did not come to rest in time: its store does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("requests are still in flight")]
pub(crate) struct StillBusy;
