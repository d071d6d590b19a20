//! A session's hand on the queues that workers serve.

use std::mem;
use std::sync::Arc;
use std::time::Instant;

use virtio::memory::{GuestMemory, RingAddresses, SharedTable};
use virtio::queue::RingFeatures;
use virtio_bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::{DRAIN_LIMIT, Events};
use crate::backend::faults::Faults;
use crate::device::{Device, QueueParts, QueuePlace, StartError, StillBusy};
use crate::faults::FaultyQueue;
use crate::worker::{Attached, Detaching, Left, Pool};

/// The queues of one device.
pub(super) struct DataPath {
    pool: Arc<Pool>,
    memory: Arc<SharedTable>,
    events: Arc<Events>,
    queues: Vec<Slot>,
}

enum Slot {
    /// Paused: where to go on; or not started since the last reset.
    Stopped(Option<Left>),
    /// With what goes wrong with it on purpose, if anything did when it was started.
    Running(Attached, Option<Arc<Faults>>),
    /// Was stopped, and still has requests in flight.
    Stopping(Detaching),
}

impl DataPath {
    pub(super) fn new(pool: Arc<Pool>, memory: Arc<SharedTable>, events: Arc<Events>, num_queues: u16) -> Self {
        let queues = (0..num_queues).map(|_| Slot::Stopped(None)).collect();
        Self { pool, memory, events, queues }
    }

    /// Starts all queues that the driver has enabled and that do not run.
    pub(super) fn start_all(&mut self, device: &Device) -> Result<(), (u16, StartError)> {
        for index in 0..device.function.num_queues() {
            self.start(device, index).map_err(|error| (index, error))?;
        }
        Ok(())
    }

    /// Starts a queue, if it is enabled and does not run, and the device is not paused.
    pub(super) fn start(&mut self, device: &Device, index: u16) -> Result<(), StartError> {
        let (Some(slot), Some(setup)) = (self.queues.get_mut(usize::from(index)), device.function.queue(index)) else {
            return Ok(());
        };
        if !setup.enabled || device.paused {
            return Ok(());
        }
        slot.rest(Instant::now() + DRAIN_LIMIT)?;
        let Slot::Stopped(left) = slot else { return Ok(()) };
        let Some(interrupt) = device.function.queue_interrupt(index) else { return Ok(()) };
        // Should the queue not be started, the device needs a reset, which ends what is unfinished.
        let state = left.as_ref().map(|left| left.state.into());
        let left = mem::replace(left, state);
        let negotiated = |feature: u32| device.function.driver_features() & 1 << feature != 0;
        let faults = device.faults.rules();
        let faults = faults.any().then(|| Arc::clone(faults));
        let faulty = faults.as_ref().map(|faults| FaultyQueue::new(faults, index, &interrupt, &self.events));
        let interrupt = faulty.as_ref().map_or(interrupt, FaultyQueue::interrupt);
        let task = device.service.task(QueueParts {
            index,
            place: QueuePlace {
                size: setup.size,
                addresses: RingAddresses { desc: setup.desc, driver: setup.driver, device: setup.device },
                packed: negotiated(VIRTIO_F_RING_PACKED),
            },
            features: RingFeatures {
                event_idx: negotiated(VIRTIO_RING_F_EVENT_IDX),
                indirect_desc: negotiated(VIRTIO_RING_F_INDIRECT_DESC),
                in_order: negotiated(VIRTIO_F_IN_ORDER),
            },
            left,
            memory: GuestMemory::new(Arc::clone(&self.memory)),
            interrupt,
            events: Arc::clone(&self.events),
        })?;
        let worker = device.queue_workers.as_ref().and_then(|workers| workers.around(usize::from(index)));
        let task = match faulty {
            Some(faulty) => faulty.around(task),
            None => task,
        };
        *slot = Slot::Running(self.pool.attach(task, device.poll, worker)?, faults);
        Ok(())
    }

    /// Whether a worker serves the queue.
    pub(super) fn is_running(&self, index: u16) -> bool {
        matches!(self.queues.get(usize::from(index)), Some(Slot::Running(..)))
    }

    /// Passes a driver's kick on.
    pub(super) fn kick(&self, index: u16) {
        if let Some(Slot::Running(queue, faults)) = self.queues.get(usize::from(index)) {
            if faults.as_ref().is_some_and(|faults| faults.loses_kick(index)) {
                return;
            }
            queue.doorbell().ring();
        }
    }

    /// Has all queues look at guest memory anew.
    pub(super) fn refresh(&self) {
        for slot in &self.queues {
            if let Slot::Running(queue, _) = slot {
                queue.refresh();
            }
        }
    }

    /// Has each queue look for what it may go on with, those too that are to stop and can't.
    pub(super) fn look(&self) {
        for slot in &self.queues {
            match slot {
                Slot::Running(queue, _) => queue.refresh(),
                Slot::Stopping(queue) => queue.refresh(),
                Slot::Stopped(_) => {}
            }
        }
    }

    /// Stops a queue for good and waits, until `deadline` at most, for what it has in flight.
    pub(super) fn stop(&mut self, index: u16, deadline: Instant) -> Result<(), StillBusy> {
        match self.queues.get_mut(usize::from(index)) {
            Some(slot) => slot.stop(Stop::ForGood).rest(deadline),
            None => Ok(()),
        }
    }

    /// Stops all queues, as [`stop`](Self::stop); first all, then waits.
    pub(super) fn stop_all(&mut self, deadline: Instant) -> Result<(), StillBusy> {
        self.rest_all(Stop::ForGood, deadline)
    }

    /// Stops all queues for a while, and waits for what they have in flight: that has all the time that it takes, unless it waits for
    /// somebody's word. What they were doing is kept: started again, they go on there.
    pub(super) fn pause_all(&mut self, deadline: Instant) -> Result<(), StillBusy> {
        self.rest_all(Stop::ForAWhile, deadline)
    }

    fn rest_all(&mut self, stop: Stop, deadline: Instant) -> Result<(), StillBusy> {
        for slot in &mut self.queues {
            slot.stop(stop);
        }
        let mut result = Ok(());
        for slot in &mut self.queues {
            result = result.and(slot.rest(deadline));
        }
        result
    }

    /// Forgets where a stopped queue stood: it was reset.
    pub(super) fn forget(&mut self, index: u16) {
        if let Some(slot @ Slot::Stopped(_)) = self.queues.get_mut(usize::from(index)) {
            *slot = Slot::Stopped(None);
        }
    }

    /// As [`forget`](Self::forget), for all.
    pub(super) fn forget_all(&mut self) {
        for index in 0..self.queues.len() {
            self.forget(index as u16);
        }
    }
}

/// What becomes of requests that do not end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// They fail rather than take long.
    ForGood,
    /// They go on.
    ForAWhile,
}

impl Slot {
    fn stop(&mut self, stop: Stop) -> &mut Self {
        *self = match mem::replace(self, Self::Stopped(None)) {
            Self::Running(queue, _) => Self::Stopping(queue.detach()),
            other => other,
        };
        if let (Self::Stopping(queue), Stop::ForGood) = (&*self, stop) {
            queue.hurry();
        }
        self
    }

    fn rest(&mut self, deadline: Instant) -> Result<(), StillBusy> {
        if let Self::Stopping(queue) = self {
            *self = Self::Stopped(Some(queue.wait_until(deadline).ok_or(StillBusy)?));
        }
        Ok(())
    }
}
