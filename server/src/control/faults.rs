//! What an operator has go wrong; docs/faults.md describes it.

use serde::Deserialize;
use serde_json::{Value, json};

use super::methods::{find, params};
use super::rpc::Failure;
use crate::backend::faults::{Breakdown, MAX_RULES};
use crate::config::{FaultConfig, InvalidFault, TriggerKind};
use crate::devices::Devices;
use crate::session::Order;
use crate::store::has_rings;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Add {
    device: String,
    rule: FaultConfig,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Named {
    device: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Release {
    device: String,
    id: Option<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Remove {
    device: String,
    id: Option<u32>,
    #[serde(default)]
    all: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Trigger {
    device: String,
    what: TriggerKind,
    queue: Option<u16>,
}

pub(super) fn add(devices: &Devices, given: Value) -> Result<Value, Failure> {
    let Add { device, rule } = params(given)?;
    let device = find(devices, &device)?;
    rule.check(device.num_queues).map_err(Failure::invalid_params)?;
    if rule.latency.is_some() && !has_rings() {
        return Err(Failure::new(Failure::SYSTEM, "a latency needs io_uring, which is not available; see the log"));
    }
    let full = || Failure::new(Failure::BUSY, format!("the device has {MAX_RULES} faults; remove some"));
    let id = device.add_fault(&rule)?.ok_or_else(full)?;
    log::warn!("{}: fault {id} by an operator: {}", device.name, json!(rule));
    Ok(json!({ "device": device.name, "id": id }))
}

pub(super) fn list(devices: &Devices, given: Value) -> Result<Value, Failure> {
    let Named { device } = params(given)?;
    let device = find(devices, &device)?;
    let (seed, faults) = device.faults();
    Ok(json!({ "device": device.name, "seed": seed, "faults": faults }))
}

pub(super) fn remove(devices: &Devices, given: Value) -> Result<Value, Failure> {
    let Remove { device, id, all } = params(given)?;
    if id.is_some() == all {
        return Err(Failure::invalid_params("say id, or all"));
    }
    let device = find(devices, &device)?;
    let removed = there(device.remove_faults(id)?, id)?;
    log::info!("{}: faults removed by an operator: {removed:?}", device.name);
    Ok(json!({ "device": device.name, "removed": removed }))
}

pub(super) fn release(devices: &Devices, given: Value) -> Result<Value, Failure> {
    let Release { device, id } = params(given)?;
    let device = find(devices, &device)?;
    let released = there(device.release_faults(id)?, id)?;
    Ok(json!({ "device": device.name, "released": released }))
}

pub(super) fn trigger(devices: &Devices, given: Value) -> Result<Value, Failure> {
    let Trigger { device, what, queue } = params(given)?;
    let device = find(devices, &device)?;
    if let Some(queue) = queue {
        if what != TriggerKind::SpuriousInterrupt {
            return Err(Failure::invalid_params("a queue is for spurious-interrupt; leave it out"));
        }
        if queue >= device.num_queues {
            return Err(Failure::invalid_params(InvalidFault::Queue { queue, num_queues: device.num_queues }));
        }
    }
    device.order(match what {
        TriggerKind::NeedsReset => Order::BreakDown(Breakdown::NeedsReset),
        TriggerKind::CloseSession => Order::BreakDown(Breakdown::CloseSession),
        TriggerKind::SpuriousInterrupt => Order::Interrupt { queue },
    })?;
    log::warn!("{}: {what:?} by an operator", device.name);
    Ok(json!({ "device": device.name, "what": what }))
}

/// One that was named has to be there.
fn there(found: Vec<u32>, named: Option<u32>) -> Result<Vec<u32>, Failure> {
    match named {
        Some(id) if found.is_empty() => {
            Err(Failure::invalid_params(format!("there is no fault {id}; device.fault.list shows them")))
        }
        _ => Ok(found),
    }
}
