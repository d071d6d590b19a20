//! What an operator can ask for; docs/control.md describes each.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::faults;
use super::rpc::Failure;
use crate::config::{DeviceConfig, Size};
use crate::devices::{AddError, Devices, Handle};
use crate::server::OpenError;
use crate::session::{Order, OrderError};
use crate::status::Status;

/// The version of what is said here: raised when something that was understood no longer is.
const VERSION: u32 = 1;

type Method = fn(&Devices, Value) -> Result<Value, Failure>;

const METHODS: &[(&str, Method)] = &[
    ("version", version),
    ("device.list", list),
    ("device.add", add),
    ("device.remove", remove),
    ("device.resize", resize),
    ("device.pause", pause),
    ("device.resume", resume),
    ("device.drain", drain),
    ("device.statistics", statistics),
    ("device.reset_statistics", reset_statistics),
    ("server.stop", stop),
    ("device.fault.add", faults::add),
    ("device.fault.list", faults::list),
    ("device.fault.remove", faults::remove),
    ("device.fault.release", faults::release),
    ("device.fault.trigger", faults::trigger),
];

/// Does what a method does.
pub(super) fn call(devices: &Devices, method: &str, params: Value) -> Result<Value, Failure> {
    match METHODS.iter().find(|(name, _)| *name == method) {
        Some((_, method)) => method(devices, params),
        None => Err(Failure::no_method(method, &METHODS.iter().map(|(name, _)| *name).collect::<Vec<_>>())),
    }
}

/// Without parameters.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Named {
    device: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Remove {
    device: String,
    #[serde(default)]
    force: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Resize {
    device: String,
    size: Option<Size>,
    #[serde(default)]
    shrink: bool,
}

/// A device, as it is told of.
#[derive(Serialize)]
struct Described {
    name: String,
    socket_path: String,
    description: String,
    num_queues: u16,
    read_only: bool,
    #[serde(flatten)]
    status: Status,
}

impl From<&Handle> for Described {
    fn from(device: &Handle) -> Self {
        Self {
            name: device.name.clone(),
            socket_path: device.socket_path.display().to_string(),
            description: device.description.clone(),
            num_queues: device.num_queues,
            read_only: device.read_only,
            status: device.status(),
        }
    }
}

impl From<OrderError> for Failure {
    fn from(error: OrderError) -> Self {
        let code = match error {
            OrderError::InUse => Self::IN_USE,
            OrderError::Busy | OrderError::Silent => Self::BUSY,
            OrderError::Shrinks { .. } => Self::LOSES_DATA,
            OrderError::Storage(_) => Self::SYSTEM,
            OrderError::Gone => Self::NO_DEVICE,
            OrderError::NoClient => Self::NO_CLIENT,
        };
        Self::new(code, error)
    }
}

impl From<AddError> for Failure {
    fn from(error: AddError) -> Self {
        let code = match error {
            AddError::Open(OpenError::Invalid { .. })
            | AddError::Server(_)
            | AddError::NoPolledRings
            | AddError::Sandboxed => Self::INVALID_DEVICE,
            AddError::Exists(_) => Self::IN_USE,
            AddError::Open(_) => Self::SYSTEM,
        };
        Self::new(code, error)
    }
}

pub(super) fn params<T: DeserializeOwned>(params: Value) -> Result<T, Failure> {
    // Those that may all be left out may be left out together.
    let params = if params.is_null() { json!({}) } else { params };
    if !params.is_object() {
        return Err(Failure::invalid_params("params must be an object"));
    }
    serde_json::from_value(params).map_err(Failure::invalid_params)
}

pub(super) fn find(devices: &Devices, name: &str) -> Result<Handle, Failure> {
    devices.find(name).ok_or_else(|| {
        let names = devices.list().into_iter().map(|device| device.name).collect::<Vec<_>>().join(", ");
        let names = if names.is_empty() { "none".to_owned() } else { names };
        Failure::new(Failure::NO_DEVICE, format!("there is no one device {name:?}; there are: {names}"))
    })
}

fn version(_: &Devices, given: Value) -> Result<Value, Failure> {
    let Nothing {} = params(given)?;
    Ok(json!({ "server": env!("CARGO_PKG_VERSION"), "control": VERSION }))
}

fn list(devices: &Devices, given: Value) -> Result<Value, Failure> {
    let Nothing {} = params(given)?;
    Ok(json!({ "devices": devices.list().iter().map(Described::from).collect::<Vec<_>>() }))
}

fn add(devices: &Devices, given: Value) -> Result<Value, Failure> {
    let config: DeviceConfig = params(given)?;
    config.check().map_err(|error| Failure::new(Failure::INVALID_DEVICE, error))?;
    let device = devices.add(&config)?;
    log::info!("{}: added by an operator: {}", device.name, device.description);
    Ok(json!({ "device": Described::from(&device) }))
}

fn remove(devices: &Devices, given: Value) -> Result<Value, Failure> {
    let Remove { device, force } = params(given)?;
    let device = find(devices, &device)?;
    let flushed = devices.remove(&device, force)?;
    log::info!("{}: removed by an operator", device.name);
    Ok(json!({ "device": device.name, "flushed": flushed }))
}

fn resize(devices: &Devices, given: Value) -> Result<Value, Failure> {
    let Resize { device, size, shrink } = params(given)?;
    ordered(&find(devices, &device)?, Order::Resize { capacity: size.map(|size| size.0), shrink })
}

fn pause(devices: &Devices, given: Value) -> Result<Value, Failure> {
    let Named { device } = params(given)?;
    ordered(&find(devices, &device)?, Order::Pause)
}

fn resume(devices: &Devices, given: Value) -> Result<Value, Failure> {
    let Named { device } = params(given)?;
    ordered(&find(devices, &device)?, Order::Resume)
}

fn drain(devices: &Devices, given: Value) -> Result<Value, Failure> {
    let Named { device } = params(given)?;
    let device = find(devices, &device)?;
    let drained = ordered(&device, Order::Pause)?;
    device
        .flush()
        .map_err(|error| Failure::new(Failure::SYSTEM, format!("it is paused, but cannot be flushed: {error}")))?;
    Ok(drained)
}

fn statistics(devices: &Devices, given: Value) -> Result<Value, Failure> {
    let Named { device } = params(given)?;
    let device = find(devices, &device)?;
    Ok(json!({ "device": device.name, "queues": device.statistics() }))
}

fn reset_statistics(devices: &Devices, given: Value) -> Result<Value, Failure> {
    let Named { device } = params(given)?;
    let device = find(devices, &device)?;
    device.reset_statistics();
    Ok(json!({ "device": device.name }))
}

fn stop(devices: &Devices, given: Value) -> Result<Value, Failure> {
    let Nothing {} = params(given)?;
    log::info!("stopping; an operator asked for it");
    devices.stop();
    Ok(json!({}))
}

fn ordered(device: &Handle, order: Order) -> Result<Value, Failure> {
    let size = device.order(order)?;
    log::info!("{}: {order:?} by an operator", device.name);
    Ok(json!({ "device": device.name, "size": size, "paused": device.status().paused }))
}
