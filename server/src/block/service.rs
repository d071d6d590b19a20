//! What makes the queues of a block device, and changes its store.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use virtio::block::{SECTOR, SharedConfig};
use virtio::memory::{MappedPackedRing, MappedQueue, MappedRing};
use virtio::queue::{PackedQueue, SplitQueue, Virtqueue};

use super::{BATCH, BlockQueue, Ring, Unfinished, another};
use crate::backend::fabric::Fabric;
use crate::backend::limits;
use crate::device::{QueueParts, QueueService, StartError};
use crate::metrics::{DeviceMetrics, Meter};
use crate::store::Layers;
use crate::worker::{Left, TaskBuilder};

/// Makes the tasks of one device's queues.
pub(crate) struct BlockService {
    store: Layers,
    config: Arc<SharedConfig>,
    metrics: Arc<DeviceMetrics>,
}

impl BlockService {
    pub(crate) fn new(store: Layers, config: Arc<SharedConfig>, metrics: Arc<DeviceMetrics>) -> Self {
        Self { store, config, metrics }
    }
}

impl QueueService for BlockService {
    fn task(&self, parts: QueueParts) -> Result<TaskBuilder, StartError> {
        if parts.place.packed {
            self.task_over::<PackedQueue<MappedPackedRing>>(parts)
        } else {
            self.task_over::<SplitQueue<MappedRing>>(parts)
        }
    }

    fn flush(&self) -> io::Result<()> {
        self.store.outermost().flush()
    }

    fn capacity(&self) -> u64 {
        self.config.limits().capacity * SECTOR
    }

    fn resize(&self, capacity: Option<u64>) -> io::Result<u64> {
        let capacity = self.store.outermost().resize(capacity)?;
        self.config.set_capacity(capacity / SECTOR);
        Ok(capacity)
    }

    fn set_limits(&mut self, limits: Option<limits::Limits>) {
        self.store.set_limits(limits);
    }

    fn set_fabric(&mut self, fabric: Option<Fabric>) {
        self.store.set_fabric(fabric);
    }
}

impl BlockService {
    /// The task that serves a queue of this format: code of its own for each, so that no request asks which it is.
    fn task_over<Q>(&self, parts: QueueParts) -> Result<TaskBuilder, StartError>
    where
        Q: Virtqueue<Memory: MappedQueue, Parked: Send> + Send + 'static,
    {
        let QueueParts { index, place, features, left, mut memory, interrupt, events } = parts;
        let ring = Q::Memory::map(&mut memory, place.addresses, place.size)?;
        let Left { state, unfinished } = left.unwrap_or(Q::START.into());
        let unfinished = unfinished.and_then(|unfinished| unfinished.downcast::<Unfinished<Q::Parked>>().ok());
        let (queue, requests) = match unfinished {
            Some(unfinished) => unfinished.go_on::<Q>(ring),
            None => (Q::new(ring, features, state), Vec::new()),
        };
        let (store, config) = (Arc::clone(self.store.outermost()), Arc::clone(&self.config));
        let metrics = self.metrics.queue(index);
        Ok(Box::new(move |ring| {
            let backend = store.attach(ring, index)?;
            let mut made = 0;
            let batch = (0..BATCH).map(|_| another(&mut made)).collect();
            let mut queue = BlockQueue {
                index,
                place,
                queue: Ring::Mapped(queue),
                in_order: features.in_order,
                memory,
                batch,
                limits: config.limits(),
                config,
                backend,
                in_flight: 0,
                stalled: VecDeque::new(),
                completions: Vec::new(),
                spare: Vec::new(),
                made,
                interrupt,
                events,
                accepting: true,
                resting: false,
                put_off: Vec::new(),
                warned_blank: false,
                meter: Meter::new(metrics),
            };
            requests.into_iter().for_each(|put_off| queue.take_up(put_off.io));
            Ok(Box::new(queue))
        }))
    }
}
