//! What all devices have done until some moment: `server.statistics`, for those who look again and again.

use serde::{Deserialize, Serialize};

use crate::devices::Devices;
use crate::metrics::{Stages, Statistics};

/// All devices, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Nanoseconds since the server began, by a clock that only goes forward: what rates are to be computed with.
    pub time_ns: u64,
    /// In the order in which they came.
    pub devices: Vec<DeviceSnapshot>,
}

/// A device in a [`Snapshot`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceSnapshot {
    /// Its name among the devices of the server.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Whether an operator has stopped its queues.
    pub paused: bool,
    /// Whether a client is connected.
    pub attached: bool,
    /// Requests that its storage has failed and that wait.
    #[serde(default)]
    pub held: usize,
    /// The first queue's first.
    pub queues: Vec<QueueSnapshot>,
}

/// A queue in a [`Snapshot`]: all that it has done since the device was added.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueSnapshot {
    /// Counters.
    #[serde(flatten)]
    pub statistics: Statistics,
    /// How long requests took for which piece of their way.
    pub stages: Stages,
}

impl Snapshot {
    /// As it is now.
    pub(super) fn of(devices: &Devices) -> Self {
        let devices_now = devices.list();
        let devices_now = devices_now.iter().map(|device| {
            let status = device.status();
            let queues = device.metrics.read().into_iter().zip(device.metrics.stages());
            DeviceSnapshot {
                name: device.name.clone(),
                size: status.size,
                paused: status.paused,
                attached: status.client.is_some(),
                held: device.held().map_or(0, |held| held.requests),
                queues: queues.map(|(statistics, stages)| QueueSnapshot { statistics, stages }).collect(),
            }
        });
        let time_ns = u64::try_from(devices.age().as_nanos()).unwrap_or(u64::MAX);
        Self { time_ns, devices: devices_now.collect() }
    }
}
