//! A queue whose interrupts go wrong on purpose.
//!
//! What stands between a queue's task and its driver is another interrupt than the one that the driver has chosen, and what stands
//! between the task and its worker is another task, which has a timer in the worker's ring. A queue of a device with nothing
//! to go wrong has neither, and the task itself knows of none of this.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam::queue::SegQueue;
use pci::Interrupt;
use virtio::queue::Armed;

use crate::backend::faults::{Delivery, Faults, Timers};
use crate::backend::uring::Uring;
use crate::session::Events;
use crate::worker::{Left, QueueTask, Round, Share, TaskBuilder};

/// Interrupts of one queue that wait at most; those that come then are sent at once.
const MOST_LATE: usize = 1024;

/// What is put around one queue.
pub(crate) struct FaultyQueue {
    interrupt: Arc<FaultyInterrupt>,
    events: Arc<Events>,
}

/// An interrupt that may be lost, or late, or come again for nothing.
struct FaultyInterrupt {
    faults: Arc<Faults>,
    queue: u16,
    driver: Arc<dyn Interrupt>,
    /// How much later one is to be sent.
    late: SegQueue<Duration>,
    /// Whether the driver waits for one that was lost.
    lost: AtomicBool,
}

impl Interrupt for FaultyInterrupt {
    fn signal(&self) {
        match self.faults.deliver(self.queue) {
            Delivery::Sent => self.driver.signal(),
            Delivery::Lost => self.lost.store(true, Ordering::Relaxed),
            Delivery::Late(latency) => self.later(latency),
            Delivery::Twice(latency) => {
                self.driver.signal();
                self.later(latency);
            }
        }
    }
}

impl FaultyInterrupt {
    fn later(&self, latency: Duration) {
        if self.late.len() < MOST_LATE { self.late.push(latency) } else { self.driver.signal() }
    }
}

impl FaultyQueue {
    /// For a queue whose driver hears of it by `driver`.
    pub(crate) fn new(faults: &Arc<Faults>, queue: u16, driver: &Arc<dyn Interrupt>, events: &Arc<Events>) -> Self {
        let (faults, driver) = (Arc::clone(faults), Arc::clone(driver));
        let interrupt = FaultyInterrupt { faults, queue, driver, late: SegQueue::new(), lost: AtomicBool::new(false) };
        Self { interrupt: Arc::new(interrupt), events: Arc::clone(events) }
    }

    /// What the queue's task is to signal.
    pub(crate) fn interrupt(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.interrupt) as Arc<dyn Interrupt>
    }

    /// The task with this around it.
    pub(crate) fn around(self, task: TaskBuilder) -> TaskBuilder {
        let Self { interrupt, events } = self;
        Box::new(move |ring: &Rc<Uring>| -> io::Result<Box<dyn QueueTask>> {
            let task = task(ring)?;
            let timers = Timers::new(ring).inspect_err(|error| log::warn!("no interrupt will be late: {error}")).ok();
            let eased = interrupt.faults.eased();
            Ok(Box::new(FaultyTask { task, interrupt, events, timers, eased, stopping: false }))
        })
    }
}

struct FaultyTask {
    task: Box<dyn QueueTask>,
    interrupt: Arc<FaultyInterrupt>,
    events: Arc<Events>,
    /// For interrupts that are late, if the kernel has a ring.
    timers: Option<Timers<()>>,
    /// What [`Faults::eased`] was.
    eased: u64,
    /// Whether nothing is late any more.
    stopping: bool,
}

impl FaultyTask {
    /// Sends what was lost, once rules are gone that lost it.
    fn make_up(&mut self) {
        let eased = self.interrupt.faults.eased();
        if eased != self.eased {
            self.eased = eased;
            self.send_lost();
        }
    }

    fn send_lost(&self) {
        if self.interrupt.lost.swap(false, Ordering::Relaxed) {
            self.interrupt.driver.signal();
        }
    }

    /// Has interrupts wait for their time, and sends those that have waited; says whether some wait now that did not before.
    fn send_late(&mut self) -> Round {
        let driver = &self.interrupt.driver;
        if let Some(timers) = &mut self.timers {
            timers.reap(|()| driver.signal());
        }
        let mut round = Round::Nothing;
        while let Some(latency) = self.interrupt.late.pop() {
            let timers = self.timers.as_mut().filter(|_| !self.stopping);
            if timers.is_some_and(|timers| timers.start((), latency).is_ok()) {
                round = Round::Progress;
            } else {
                driver.signal();
            }
        }
        round
    }

    /// Interrupts that wait.
    fn late(&self) -> usize {
        if self.stopping { 0 } else { self.timers.as_ref().map_or(0, Timers::in_flight) }
    }
}

impl QueueTask for FaultyTask {
    fn run(&mut self, share: Share) -> Round {
        self.make_up();
        let round = self.task.run(share);
        if self.stopping {
            // What completes while the queue stops is the last that this knows of.
            self.send_lost();
        }
        while let Some(breakdown) = self.interrupt.faults.breakdown() {
            self.events.breakdown(breakdown);
        }
        if self.send_late() == Round::Progress { Round::Progress } else { round }
    }

    fn arm(&mut self) -> Armed {
        self.task.arm()
    }

    fn kicked(&mut self) {
        self.task.kicked();
    }

    fn refresh(&mut self) {
        self.task.refresh();
    }

    /// Nobody waits for what is late: it is sent now. So is what was lost, which nobody would know of afterwards.
    fn stop(&mut self) {
        self.task.stop();
        self.stopping = true;
        if let Some(timers) = &mut self.timers
            && timers.in_flight() > 0
        {
            timers.hurry();
            self.interrupt.driver.signal();
        }
        self.send_lost();
    }

    fn hurry(&mut self) {
        self.task.hurry();
    }

    fn in_flight(&self) -> usize {
        self.task.in_flight() + self.late()
    }

    fn is_dormant(&self) -> bool {
        self.task.is_dormant() || self.late() > 0 && self.task.in_flight() == 0
    }

    fn leave(&mut self) -> Left {
        self.task.leave()
    }

    fn give_up(&mut self, why: &str) {
        self.task.give_up(why);
    }
}
