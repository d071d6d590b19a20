//! The thread that makes connections, and watches over those that there are.
//!
//! A worker never waits for a server. It leaves that to its store's one thread, which connects and shakes hands, waits longer
//! from attempt to attempt, and leaves what it has in the [`Port`] of the queue that wants it. The same thread looks now and
//! then whether the requests of each queue get on, and tells the queue if they have not for too long. While no queue has a request
//! it sleeps without an end.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender};

use super::export::Export;
use super::link::{Dialer, Link};
use super::uri::NbdUri;
use crate::backend::nbd::error::HandshakeError;
use crate::backend::uring::Waker;

/// How long connecting and the handshake may take, each time.
pub(super) const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// From one attempt to the next, at first.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// The same at last.
const LAST_PAUSE: Duration = Duration::from_secs(3);
/// How long a flush at the end of a device's service may take.
pub(super) const FLUSH_LIMIT: Duration = Duration::from_secs(30);
/// How long a queue that is being stopped waits for a server that is silent: less than a session has patience.
const STOP_LIMIT: Duration = Duration::from_secs(2);

/// What a queue wants of the thread.
pub(super) enum Order {
    /// To be known.
    Attach(Arc<Port>),
    /// A connection, in place of one that is lost.
    Connect(Arc<Port>),
    /// A flush of what was written, by a connection of its own.
    Flush(Sender<io::Result<()>>),
    /// A look: there is a request where there was none, or a queue is stopping.
    Look,
}

/// Where a queue's worker and the thread meet.
pub(super) struct Port {
    waker: Waker,
    orders: Sender<Order>,
    watch: Arc<Watch>,
    /// For the worker: something has changed here.
    news: AtomicBool,
    link: Mutex<Option<Link>>,
    expired: AtomicBool,
    /// For the thread: there are requests, they have got so far, the queue is stopping, it is gone.
    busy: AtomicBool,
    progress: AtomicU64,
    stopping: AtomicBool,
    gone: AtomicBool,
}

/// What all queues of a store share with the thread.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// The thread sleeps until it is told to look.
    asleep: AtomicBool,
    /// Something was written since the last flush.
    unflushed: AtomicBool,
}

impl Watch {
    pub(super) fn is_unflushed(&self) -> bool {
        self.unflushed.load(Ordering::Acquire)
    }

    pub(super) fn flushed(&self) {
        self.unflushed.store(false, Ordering::Release);
    }
}

impl Port {
    pub(super) fn new(waker: &Waker, orders: &Sender<Order>, watch: &Arc<Watch>) -> Arc<Self> {
        let port = Arc::new(Self {
            waker: waker.clone(),
            orders: orders.clone(),
            watch: Arc::clone(watch),
            news: AtomicBool::new(false),
            link: Mutex::new(None),
            expired: AtomicBool::new(false),
            busy: AtomicBool::new(false),
            progress: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            gone: AtomicBool::new(false),
        });
        port.order(Order::Attach(Arc::clone(&port)));
        port
    }

    fn order(&self, order: Order) {
        // Without the thread requests end with the queue, which says so when it stops.
        let _gone = self.orders.send(order);
    }

    /// Asks for a connection.
    pub(super) fn connect(self: &Arc<Self>) {
        self.order(Order::Connect(Arc::clone(self)));
    }

    /// Whether there is something for the worker.
    pub(super) fn take_news(&self) -> bool {
        self.news.load(Ordering::Acquire) && self.news.swap(false, Ordering::AcqRel)
    }

    /// A new connection.
    pub(super) fn take_link(&self) -> Option<Link> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Whether requests have not got on for too long.
    pub(super) fn take_expired(&self) -> bool {
        self.expired.swap(false, Ordering::AcqRel)
    }

    fn tell(&self) {
        self.news.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Says whether there are requests, and how far they have got.
    pub(super) fn report(&self, busy: bool, progress: u64) {
        self.progress.store(progress, Ordering::Relaxed);
        if self.busy.load(Ordering::Relaxed) == busy {
            return;
        }
        // Either we see that the thread sleeps, or it sees that we are busy: it says that it sleeps before it looks once more.
        self.busy.store(busy, Ordering::SeqCst);
        if busy && self.watch.asleep.load(Ordering::SeqCst) {
            self.order(Order::Look);
        }
    }

    /// The queue takes nothing more.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.order(Order::Look);
    }

    /// The queue is gone.
    pub(super) fn close(&self) {
        self.gone.store(true, Ordering::Release);
        self.order(Order::Look);
    }

    /// Something was written.
    pub(super) fn changed(&self) {
        self.watch.unflushed.store(true, Ordering::Release);
    }

    /// A flush begins, which is for all that has been written so far.
    pub(super) fn flushing(&self) {
        self.watch.flushed();
    }
}

/// A queue, as the thread sees it.
struct Attached {
    port: Arc<Port>,
    /// How far its requests had got, and when that was first seen; `None` while it has none.
    seen: Option<(u64, Instant)>,
    /// When to connect next, if it wants a connection.
    retry: Option<Instant>,
    pause: Duration,
    /// How far it had got when it was connected last.
    progress_then: Option<u64>,
}

impl Attached {
    fn new(port: Arc<Port>) -> Self {
        Self { port, seen: None, retry: None, pause: FIRST_PAUSE, progress_then: None }
    }

    /// The queue has lost its connection.
    fn wants_link(&mut self, now: Instant) {
        let progress = self.port.progress.load(Ordering::Relaxed);
        // A server that takes connections and serves nobody is not asked again at once.
        if self.progress_then != Some(progress) {
            self.pause = FIRST_PAUSE;
            self.retry = Some(now);
        } else {
            self.retry = Some(now + self.pause);
            self.pause = (self.pause * 2).min(LAST_PAUSE);
        }
    }

    /// Whether its requests have not got on for as long as they may.
    fn expires(&mut self, now: Instant, deadline: Duration) -> bool {
        if !self.port.busy.load(Ordering::SeqCst) {
            self.seen = None;
            return false;
        }
        let progress = self.port.progress.load(Ordering::Relaxed);
        let limit = if self.port.stopping.load(Ordering::Acquire) { STOP_LIMIT.min(deadline) } else { deadline };
        match self.seen {
            Some((seen, since)) if seen == progress => {
                let over = now.saturating_duration_since(since) >= limit;
                if over {
                    self.seen = None;
                }
                over
            }
            _ => {
                self.seen = Some((progress, now));
                false
            }
        }
    }
}

/// What the thread does.
pub(super) struct Attendant {
    pub(super) uri: NbdUri,
    pub(super) dialer: Dialer,
    /// What the device was told.
    pub(super) export: Export,
    pub(super) deadline: Duration,
    pub(super) orders: Receiver<Order>,
    pub(super) watch: Arc<Watch>,
}

impl Attendant {
    /// Until the store and all its queues are gone.
    pub(super) fn run(self) {
        let mut queues: Vec<Attached> = Vec::new();
        // How often a queue with requests is looked at.
        let tick = (self.deadline / 4).min(Duration::from_millis(500));
        loop {
            let busy = |queues: &[Attached]| queues.iter().any(|queue| queue.port.busy.load(Ordering::SeqCst));
            let retry = queues.iter().filter_map(|queue| queue.retry).min();
            let order = if busy(&queues) || retry.is_some() {
                let pause = retry.map_or(tick, |at| at.saturating_duration_since(Instant::now()).min(tick));
                self.orders.recv_timeout(pause)
            } else {
                self.watch.asleep.store(true, Ordering::SeqCst);
                let order = if busy(&queues) {
                    Err(RecvTimeoutError::Timeout)
                } else {
                    self.orders.recv().map_err(|_| RecvTimeoutError::Disconnected)
                };
                self.watch.asleep.store(false, Ordering::SeqCst);
                order
            };
            match order {
                Ok(Order::Attach(port)) => queues.push(Attached::new(port)),
                Ok(Order::Connect(port)) => {
                    let asking = queues.iter_mut().find(|queue| Arc::ptr_eq(&queue.port, &port));
                    asking.into_iter().for_each(|queue| queue.wants_link(Instant::now()));
                }
                Ok(Order::Flush(answer)) => {
                    let link = self.dial().map_err(io::Error::other);
                    // Whoever has asked may have lost patience.
                    let _gone = answer.send(link.and_then(|mut link| link.flush(FLUSH_LIMIT)));
                }
                Ok(Order::Look) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            queues.retain(|queue| !queue.port.gone.load(Ordering::Acquire));
            for queue in &mut queues {
                self.attend(queue);
            }
        }
    }

    fn attend(&self, queue: &mut Attached) {
        if queue.expires(Instant::now(), self.deadline) {
            queue.port.expired.store(true, Ordering::Release);
            queue.port.tell();
        }
        if queue.port.stopping.load(Ordering::Acquire) {
            queue.retry = None;
        }
        if queue.retry.is_none_or(|at| at > Instant::now()) {
            return;
        }
        match self.dial() {
            Ok(link) => {
                queue.retry = None;
                queue.progress_then = Some(queue.port.progress.load(Ordering::Relaxed));
                *queue.port.link.lock().unwrap_or_else(PoisonError::into_inner) = Some(link);
                queue.port.tell();
            }
            Err(error) => {
                log::info!("{}: {error}; another attempt follows in {:?}", self.uri, queue.pause);
                queue.retry = Some(Instant::now() + queue.pause);
                queue.pause = (queue.pause * 2).min(LAST_PAUSE);
            }
        }
    }

    /// A connection to the same export.
    fn dial(&self) -> Result<Link, HandshakeError> {
        let link = self.dialer.dial(HANDSHAKE_LIMIT)?;
        if !self.export.is_continued_by(&link.agreement.export) {
            return Err(HandshakeError::Changed);
        }
        Ok(link)
    }
}
