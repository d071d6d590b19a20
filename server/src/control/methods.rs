//! What an operator can ask for; docs/control.md describes each.

use std::time::Instant;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::faults;
use super::rpc::Failure;
use super::snapshot::Snapshot;
use crate::backend::hold::HeldRequests;
use crate::backend::overlay::{Emptied, EmptyError, Progress};
use crate::backend::power_cut::PowerCut;
use crate::config::{DeviceConfig, FabricChoice, InvalidFabric, RateLimits, Size};
use crate::devices::{AddError, Cached, Devices, Handle};
use crate::diagnosis::Diagnosis;
use crate::server::OpenError;
use crate::session::{Order, OrderError};
use crate::status::Status;
use crate::store::{Said, has_rings};

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
    ("device.power_cut", power_cut),
    ("device.commit", commit),
    ("device.discard", discard),
    ("device.progress", progress),
    ("device.statistics", statistics),
    ("device.reset_statistics", reset_statistics),
    ("device.set_limits", set_limits),
    ("device.set_fabric", set_fabric),
    ("server.stop", stop),
    ("server.statistics", all_statistics),
    ("device.diagnose", diagnose),
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
struct Forced {
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

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SetLimits {
    device: String,
    limits: Option<RateLimits>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SetFabric {
    device: String,
    fabric: Option<FabricChoice>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PowerCutParams {
    device: String,
    #[serde(default)]
    mode: PowerCut,
    #[serde(default)]
    seed: u64,
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
    #[serde(skip_serializing_if = "Option::is_none")]
    held: Option<HeldRequests>,
    #[serde(skip_serializing_if = "Option::is_none")]
    commit: Option<Progress>,
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
            held: device.held(),
            commit: device.commit_progress(),
        }
    }
}

impl From<OrderError> for Failure {
    fn from(error: OrderError) -> Self {
        let code = match error {
            OrderError::InUse => Self::IN_USE,
            OrderError::NoOverlay => Self::INVALID_DEVICE,
            OrderError::Busy | OrderError::Silent | OrderError::Late | OrderError::Emptying => Self::BUSY,
            OrderError::Shrinks { .. } => Self::LOSES_DATA,
            OrderError::Storage(_) => Self::SYSTEM,
            OrderError::Gone => Self::NO_DEVICE,
            OrderError::NoClient => Self::NO_CLIENT,
        };
        Self::new(code, error)
    }
}

impl From<EmptyError> for Failure {
    fn from(error: EmptyError) -> Self {
        let code = match error {
            EmptyError::Shared(_) | EmptyError::Busy { .. } => Self::IN_USE,
            EmptyError::Already | EmptyError::Stopped => Self::BUSY,
            EmptyError::Larger { .. } | EmptyError::HalfCommitted => Self::LOSES_DATA,
            _ => Self::SYSTEM,
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
    let Forced { device, force } = params(given)?;
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
    let device = find(devices, &device)?;
    // First, for a device that is paused comes to rest only then.
    let again = device.send_again();
    let mut resumed = ordered(&device, Order::Resume)?;
    if device.held().is_some() {
        resumed["sent_again"] = json!(again);
    }
    Ok(resumed)
}

fn power_cut(devices: &Devices, given: Value) -> Result<Value, Failure> {
    let PowerCutParams { device, mode, seed } = params(given)?;
    let device = find(devices, &device)?;
    let no_cache = || {
        let why = format!(
            "{}: its power cannot be cut; give it power_cut = true (--power-cut) and start it anew",
            device.name
        );
        Failure::new(Failure::INVALID_DEVICE, why)
    };
    let survivors = device.cut_power(mode, seed).ok_or_else(no_cache)??;
    log::info!("{}: its power was cut by an operator ({mode:?}, seed {seed}): {survivors:?}", device.name);
    let mut result = serde_json::to_value(survivors).map_err(|error| Failure::new(Failure::SYSTEM, error))?;
    result["device"] = json!(device.name);
    Ok(result)
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

fn commit(devices: &Devices, given: Value) -> Result<Value, Failure> {
    let Named { device } = params(given)?;
    let device = find(devices, &device)?;
    let begun = Instant::now();
    let go_on = || !devices.are_stopping();
    let Emptied { own, written, zeroed } =
        device.empty::<Failure>(Cached::IsWritten, |_| Ok(()), |overlay| overlay.commit(&go_on))?;
    let seconds = begun.elapsed().as_secs_f64();
    log::info!("{}: committed by an operator: {written} bytes and {zeroed} of zeroes in {seconds:.1} s", device.name);
    Ok(json!({ "device": device.name, "freed": own, "written": written, "zeroed": zeroed, "seconds": seconds }))
}

fn progress(devices: &Devices, given: Value) -> Result<Value, Failure> {
    let Named { device } = params(given)?;
    let device = find(devices, &device)?;
    Ok(json!({ "device": device.name, "commit": device.commit_progress() }))
}

fn discard(devices: &Devices, given: Value) -> Result<Value, Failure> {
    let Forced { device, force } = params(given)?;
    let device = find(devices, &device)?;
    let detached = |status: &Status| match status.client {
        Some(_) if !force => Err(Failure::from(OrderError::InUse)),
        _ => Ok(()),
    };
    // Asked before it is paused for that, and again when nobody can have seen anything of it since.
    detached(&device.status())?;
    let Emptied { own, .. } = device.empty(Cached::IsForgotten, detached, |overlay| overlay.discard())?;
    log::info!("{}: discarded by an operator: {own} bytes", device.name);
    Ok(json!({ "device": device.name, "freed": own }))
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

fn all_statistics(devices: &Devices, given: Value) -> Result<Value, Failure> {
    let Nothing {} = params(given)?;
    told(&Snapshot::of(devices))
}

fn diagnose(devices: &Devices, given: Value) -> Result<Value, Failure> {
    let Named { device } = params(given)?;
    told(&Diagnosis::of(&find(devices, &device)?))
}

fn told(result: &impl Serialize) -> Result<Value, Failure> {
    serde_json::to_value(result).map_err(|error| Failure::new(Failure::SYSTEM, error))
}

fn stop(devices: &Devices, given: Value) -> Result<Value, Failure> {
    let Nothing {} = params(given)?;
    log::info!("stopping; an operator asked for it");
    devices.stop();
    Ok(json!({}))
}

fn set_limits(devices: &Devices, given: Value) -> Result<Value, Failure> {
    let SetLimits { device, limits } = params(given)?;
    let device = find(devices, &device)?;
    let said = limits.unwrap_or_default();
    let limits = said.limits().map_err(|error| Failure::new(Failure::INVALID_DEVICE, error))?;
    layered(&device, Order::Limit(limits.map(|means| Said { said, means })))
}

fn set_fabric(devices: &Devices, given: Value) -> Result<Value, Failure> {
    let SetFabric { device, fabric: said } = params(given)?;
    let device = find(devices, &device)?;
    let none = FabricChoice::Named("none".to_owned());
    let fabric = said.filter(|said| *said != none).map(|said| {
        let means = said.find(devices.fabrics())?;
        Ok(Said { said, means })
    });
    let fabric = fabric.transpose().map_err(|error: InvalidFabric| Failure::new(Failure::INVALID_DEVICE, error))?;
    layered(&device, Order::Fabric(fabric))
}

/// Has layers before a device's store exchanged.
fn layered(device: &Handle, order: Order) -> Result<Value, Failure> {
    if !has_rings() {
        return Err(Failure::new(
            Failure::SYSTEM,
            "limits and fabrics need io_uring, which is not available; see the log",
        ));
    }
    device.order(order)?;
    let Status { limits, fabric, .. } = device.status();
    let name = fabric.as_ref().map_or("none".to_owned(), ToString::to_string);
    log::info!("{}: limits {}, fabric {name}, by an operator", device.name, limits.unwrap_or_default());
    Ok(json!({ "device": device.name, "limits": limits, "fabric": fabric }))
}

fn ordered(device: &Handle, order: Order) -> Result<Value, Failure> {
    let ordered = format!("{order:?}");
    let size = device.order(order)?;
    log::info!("{}: {ordered} by an operator", device.name);
    Ok(json!({ "device": device.name, "size": size, "paused": device.status().paused }))
}
