//! How a device is, and what is wrong with it: `device.diagnose`, for `vfio-user-blk doctor` and for programs.
//!
//! What is known is gathered here, from the device's description, its counters, and its session, which is asked for what it
//! knows of the client. What follows from that is in [`findings`], which looks at nothing else.

mod findings;

use serde::{Deserialize, Serialize};

use crate::backend::hold::HeldRequests;
use crate::config::{Cache, DeviceConfig, Doorbell, PollPolicy, StoreKind};
use crate::devices::Handle;
use crate::metrics::{Latencies, Stages, Statistics};
use crate::session::Observation;
use crate::status::Status;

/// A device as it is found. The names of the fields are those of docs/control.md.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Diagnosis {
    device: String,
    description: String,
    #[serde(flatten)]
    status: Status,
    setup: Setup,
    /// What its storage has failed and waits; `None` if failures are reported.
    held: Option<HeldRequests>,
    /// Why its session does not say what it knows.
    silent: Option<String>,
    /// Of the client; `None` without one.
    session: Option<Observation>,
    /// All queues together, since they were last counted anew.
    statistics: Statistics,
    /// All queues together, since the device was added.
    stages: Vec<StageTimes>,
    findings: Vec<Finding>,
}

/// How the device was set up.
#[derive(Clone, Debug, Serialize)]
struct Setup {
    store: StoreKind,
    /// How its data reaches the store; `None` where there is nothing between.
    cache: Option<Cache>,
    poll: PollPolicy,
    doorbell: Doorbell,
    num_queues: u16,
    queue_size: u16,
    max_dma_maps: u32,
    /// Faults on purpose that it has now.
    faults: usize,
}

/// How long a piece of the way of requests takes.
#[derive(Clone, Debug, Serialize)]
struct StageTimes {
    stage: &'static str,
    count: u64,
    /// Nanoseconds, as all others.
    mean_ns: Option<u64>,
    p50_ns: Option<u64>,
    p99_ns: Option<u64>,
}

/// How much a [`Finding`] matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Good to know.
    Note,
    /// It works, but not as it could.
    Warning,
    /// It does not work.
    Error,
}

/// Something that was found out, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// How much it matters.
    pub level: Level,
    /// One word for programs, the same as long as it means the same.
    pub code: String,
    /// What was found.
    pub what: String,
    /// What to do next.
    pub next: String,
}

impl Diagnosis {
    /// Looks at a device, and asks its session, which answers within some seconds.
    pub(crate) fn of(device: &Handle) -> Self {
        let (session, silent) = match device.observe() {
            Ok(session) => (session, None),
            Err(error) => (None, Some(error.to_string())),
        };
        let stages: Stages = device.metrics.stages().iter().sum();
        let mut diagnosis = Self {
            device: device.name.clone(),
            description: device.description.clone(),
            status: device.status(),
            setup: Setup { faults: device.faults().1.len(), ..Setup::of(&device.config, device.num_queues) },
            held: device.held(),
            silent,
            session,
            statistics: device.statistics().iter().sum(),
            stages: stages.named().into_iter().map(|(stage, times)| StageTimes::of(stage, times)).collect(),
            findings: Vec::new(),
        };
        diagnosis.findings = findings::of(&diagnosis);
        diagnosis
    }
}

impl Setup {
    fn of(config: &DeviceConfig, num_queues: u16) -> Self {
        let store = config.store_kind();
        Self {
            store,
            cache: (store == StoreKind::File).then(|| config.cache()),
            poll: config.poll(),
            doorbell: config.doorbell(),
            num_queues,
            queue_size: config.queue_size(),
            max_dma_maps: config.limits().map_or(0, |limits| limits.dma_maps),
            faults: config.faults.len(),
        }
    }
}

impl StageTimes {
    fn of(stage: &'static str, times: &Latencies) -> Self {
        Self {
            stage,
            count: times.count(),
            mean_ns: times.mean_ns(),
            p50_ns: times.quantile_ns(0.5),
            p99_ns: times.quantile_ns(0.99),
        }
    }
}
