//! What a session does to its device when an operator orders it.

use std::time::{Duration, Instant};

use super::attendance::Attendance;
use super::orders::{Answer, Order, OrderError, Orders};
use crate::backend::faults::Breakdown;
use crate::device::Device;

/// How long an order may wait for requests in flight. The client's messages wait as long.
const REST_LIMIT: Duration = Duration::from_secs(1);

/// What an order came to, besides its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Obeyed {
    /// The service goes on.
    GoOn,
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
        while let Some((order, answer)) = orders.pop() {
            let result = self.carry_out(order);
            let obeyed = match order {
                Order::Remove { .. } if result.is_ok() => Obeyed::Removed,
                Order::BreakDown(Breakdown::CloseSession) if result.is_ok() => Obeyed::Closed,
                _ => Obeyed::GoOn,
            };
            // An operator that has lost its patience does not hear.
            let _gone = answer.send(result);
            if obeyed != Obeyed::GoOn {
                return obeyed;
            }
        }
        Obeyed::GoOn
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
            Order::BreakDown(_) | Order::Interrupt { .. } => return Err(OrderError::NoClient),
            // They do when they are started.
            Order::Reattach | Order::Look | Order::Remove { .. } => {}
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
            Order::Resume => self.resume()?,
            Order::Resize { capacity, shrink } => {
                // What is in flight keeps to the bounds that it was taken with.
                let paused = self.device().set_paused(true);
                self.rest(Instant::now() + REST_LIMIT)?;
                let resized = self.device().resize(capacity, shrink);
                if !paused {
                    self.resume()?;
                }
                return resized;
            }
            Order::Reattach => {
                let paused = self.device().set_paused(true);
                self.rest(Instant::now() + REST_LIMIT)?;
                if !paused {
                    self.resume()?;
                }
            }
            Order::Look => self.look(),
            Order::BreakDown(Breakdown::NeedsReset) => self.break_down(),
            Order::BreakDown(Breakdown::CloseSession) => {}
            Order::Interrupt { queue } => self.interrupt(queue),
            Order::Remove { force: false } => return Err(OrderError::InUse),
            Order::Remove { force: true } => {}
        }
        Ok(self.device().service.capacity())
    }
}

impl Attendance<'_> {
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
