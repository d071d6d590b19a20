//! What a session does to its device when an operator orders it.

use std::time::{Duration, Instant};

use super::attendance::Attendance;
use super::orders::{Answer, Order, OrderError, Orders};
use crate::backend::faults::Breakdown;
use crate::device::Device;
use crate::store::{SaidFabric, SaidLimits};

/// How long an order may wait for requests in flight. The client's messages wait as long.
const REST_LIMIT: Duration = Duration::from_secs(1);

/// What an order came to, besides its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Obeyed {
    /// The service goes on.
    GoOn,
    /// The client's time is over.
    Disconnected,
    /// It ends for this client.
    Closed,
    /// It ends.
    Removed,
}

/// Whoever can carry out an order: a device by itself, or with a client.
pub(super) trait Obey {
    fn carry_out(&mut self, order: Order) -> Answer;

    /// Carries out what was ordered.
    fn obey(&mut self, orders: &Orders) -> Obeyed {
        orders.drain();
        let mut obeyed = Obeyed::GoOn;
        while let Some((order, answer)) = orders.pop() {
            let done = match order {
                Order::Remove { .. } => Obeyed::Removed,
                Order::Disconnect => Obeyed::Disconnected,
                Order::BreakDown(Breakdown::CloseSession) => Obeyed::Closed,
                _ => obeyed,
            };
            let result = self.carry_out(order);
            if result.is_ok() {
                obeyed = done;
            }
            // An operator that has lost its patience does not hear.
            let _gone = answer.send(result);
            if obeyed == Obeyed::Removed {
                break;
            }
        }
        obeyed
    }
}

/// Without a client: no queue runs.
impl Obey for Device {
    fn carry_out(&mut self, order: Order) -> Answer {
        match order {
            Order::Pause | Order::Resume => {
                self.set_paused(order == Order::Pause);
            }
            Order::Resize { capacity, shrink } => return self.resize(capacity, shrink),
            Order::Observe => self.status.observe(None),
            Order::BreakDown(_) | Order::Interrupt { .. } => return Err(OrderError::NoClient),
            // Queues are attached anew, and look, when they are started.
            Order::Disconnect | Order::Reattach | Order::Look | Order::Remove { .. } => {}
            Order::Limit(limits) => self.set_limits(limits),
            Order::Fabric(fabric) => self.set_fabric(fabric),
        }
        Ok(self.service.capacity())
    }
}

impl Obey for Attendance<'_> {
    fn carry_out(&mut self, order: Order) -> Answer {
        match order {
            Order::Pause => {
                self.device().set_paused(true);
                self.rest(Instant::now() + REST_LIMIT)?;
            }
            // Without a stop if there was none: what its storage holds back would not end in time.
            Order::Resume if !self.device().paused => self.start_again(),
            Order::Resume => self.resume()?,
            Order::Resize { capacity, shrink } => {
                // What is in flight keeps to the bounds that it was taken with.
                return self.at_rest(|device| device.resize(capacity, shrink))?;
            }
            // Queues are attached to what lies before the store when they are started.
            Order::Limit(limits) => self.at_rest(|device| device.set_limits(limits))?,
            Order::Fabric(fabric) => self.at_rest(|device| device.set_fabric(fabric))?,
            Order::Reattach => self.at_rest(|_| ())?,
            Order::Look => self.look(),
            Order::BreakDown(Breakdown::NeedsReset) => self.break_down(),
            Order::BreakDown(Breakdown::CloseSession) => {}
            Order::Interrupt { queue } => self.interrupt(queue),
            Order::Remove { force: false } => return Err(OrderError::InUse),
            Order::Observe => {
                let seen = self.observe();
                self.device().status.observe(Some(seen));
            }
            Order::Disconnect | Order::Remove { force: true } => {}
        }
        Ok(self.device().service.capacity())
    }
}

impl Attendance<'_> {
    /// Changes the device while none of its queues runs.
    fn at_rest<R>(&mut self, change: impl FnOnce(&mut Device) -> R) -> Result<R, OrderError> {
        let paused = self.device().set_paused(true);
        self.rest(Instant::now() + REST_LIMIT)?;
        let changed = change(self.device());
        if !paused {
            self.resume()?;
        }
        Ok(changed)
    }

    fn resume(&mut self) -> Result<(), OrderError> {
        self.rest(Instant::now() + REST_LIMIT)?;
        self.device().set_paused(false);
        self.start_again();
        Ok(())
    }
}

impl Device {
    /// Notes that its queues are to be stopped, or not; says what was noted before.
    fn set_paused(&mut self, paused: bool) -> bool {
        self.status.update(|status| status.paused = paused);
        std::mem::replace(&mut self.paused, paused)
    }

    /// Has queues that are started from now on be used no faster than that.
    fn set_limits(&mut self, limits: Option<SaidLimits>) {
        self.service.set_limits(limits.as_ref().map(|limits| limits.means));
        self.status.update(|status| status.limits = limits.map(|limits| limits.said));
    }

    /// Has queues that are started from now on reach the store over that.
    fn set_fabric(&mut self, fabric: Option<SaidFabric>) {
        self.service.set_fabric(fabric.as_ref().map(|fabric| fabric.means));
        self.status.update(|status| status.fabric = fabric.map(|fabric| fabric.said));
    }

    /// Changes its size and tells the driver. No queue runs.
    fn resize(&mut self, capacity: Option<u64>, shrink: bool) -> Answer {
        let now = self.service.capacity();
        if !shrink && capacity.is_some_and(|capacity| capacity < now) {
            return Err(OrderError::Shrinks { now });
        }
        let capacity = self.service.resize(capacity)?;
        if capacity != now {
            self.status.update(|status| status.size = capacity);
            self.function.config_changed();
        }
        Ok(capacity)
    }
}
