//! What an operator wants of a device while it is served.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::backend::faults::Breakdown;
use crate::store::{SaidFabric, SaidLimits};

/// Orders that may wait for a session; more are refused.
const MOST_WAITING: usize = 16;
/// How long an operator waits for an answer: longer than a session may wait for requests in flight.
const PATIENCE: Duration = Duration::from_secs(10);

/// Something to be done to a device by the thread that serves it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Take no requests until further notice. The guest sees a slow disk.
    Pause,
    /// Take requests again.
    Resume,
    /// Have this many bytes, or what the storage has by now.
    Resize {
        /// Bytes.
        capacity: Option<u64>,
        /// Whether what lies beyond them may be lost.
        shrink: bool,
    },
    /// Part with the client; the next one may come.
    Disconnect,
    /// Stop the queues and start them again, with all that is to be in the requests' way now.
    Reattach,
    /// Have the queues look for what they may go on with.
    Look,
    /// Break down, on purpose.
    BreakDown(Breakdown),
    /// Interrupt the driver for nothing, on purpose.
    Interrupt {
        /// The queue that the interrupt is of; all if it is not said.
        queue: Option<u16>,
    },
    /// End the service.
    Remove {
        /// Even if a client is connected.
        force: bool,
    },
    /// Tell what is known of the client, in the device's status.
    Observe,
    /// Be used no faster than that.
    Limit(Option<SaidLimits>),
    /// Have that before its store.
    Fabric(Option<SaidFabric>),
}

/// Why an order was not carried out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OrderError {
    /// A client is connected.
    #[error("a client is connected; detach the disk from its machine first, or use force")]
    InUse,
    /// No client is connected.
    #[error("no client is connected: there is nobody to notice")]
    NoClient,
    /// Requests do not end.
    #[error(
        "requests are still in flight, and the storage does not answer; the device is paused: try again, or resume it"
    )]
    Busy,
    /// It would lose data.
    #[error(
        "that is less than it has now ({now} bytes), and would lose what lies beyond; say shrink to do it nevertheless"
    )]
    Shrinks {
        /// Bytes that it has.
        now: u64,
    },
    /// It has no overlay.
    #[error("it has no overlay")]
    NoOverlay,
    /// Its overlay is worked on as a whole.
    #[error("its overlay is being committed or discarded; wait for the end of that")]
    Emptying,
    /// The storage's.
    #[error("the storage cannot: {0}")]
    Storage(#[from] io::Error),
    /// Nobody answers.
    #[error("the device does not answer: it waits for requests in flight; try again")]
    Silent,
    /// It has begun, and takes long.
    #[error("the device is at it, and takes long: look at it again later")]
    Late,
    /// Nobody will.
    #[error("the device is no longer served")]
    Gone,
}

/// How an order went: bytes that the device has.
pub(crate) type Answer = Result<u64, OrderError>;

/// An order, and where the answer goes.
pub(super) type Letter = (Order, Sender<Answer>);

/// A letter on its way, and whether it is somebody's by now: the session's, or its sender's who has taken it back.
type Sent = (Letter, Arc<AtomicBool>);

/// Who gives orders to a session.
#[derive(Clone)]
pub(crate) struct Operator {
    letters: Sender<Sent>,
    wake: Arc<EventFd>,
}

/// A session's letter box for orders. It outlives clients.
pub(crate) struct Orders {
    letters: Receiver<Sent>,
    wake: Arc<EventFd>,
}

/// Both ends.
///
/// # Errors
/// If the system has no eventfd.
pub(crate) fn orders() -> io::Result<(Operator, Orders)> {
    let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
    let (send, letters) = bounded(MOST_WAITING);
    Ok((Operator { letters: send, wake: Arc::clone(&wake) }, Orders { letters, wake }))
}

impl Operator {
    /// Gives an order and waits until it has been carried out, or for some seconds: one that was not begun by then is not
    /// carried out.
    pub(crate) fn order(&self, order: Order) -> Answer {
        let (answer, answered) = bounded(1);
        let taken = Arc::new(AtomicBool::new(false));
        self.letters.try_send(((order, answer), Arc::clone(&taken))).map_err(|error| match error {
            TrySendError::Full(_) => OrderError::Silent,
            TrySendError::Disconnected(_) => OrderError::Gone,
        })?;
        self.wake.write(1).map_err(io::Error::from)?;
        answered.recv_timeout(PATIENCE).unwrap_or_else(|error| match error {
            RecvTimeoutError::Timeout if taken.swap(true, Ordering::AcqRel) => Err(OrderError::Late),
            RecvTimeoutError::Timeout => Err(OrderError::Silent),
            // The session has ended, and its letters with it.
            RecvTimeoutError::Disconnected => Err(OrderError::Gone),
        })
    }
}

impl Orders {
    /// The oldest order. Answer it.
    pub(super) fn pop(&self) -> Option<Letter> {
        loop {
            let (letter, taken) = self.letters.try_recv().ok()?;
            if !taken.swap(true, Ordering::AcqRel) {
                return Some(letter);
            }
        }
    }

    /// Looks at orders from now on, which wakes it no more: call [`pop`](Self::pop) until there is none.
    pub(super) fn drain(&self) {
        // EAGAIN says that it is empty already.
        let _empty = self.wake.read();
    }
}

/// Nobody waits for a session that has ended.
impl Drop for Orders {
    fn drop(&mut self) {
        while self.letters.try_recv().is_ok() {}
    }
}

/// Becomes readable with an order.
impl AsFd for Orders {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn an_order_is_answered_or_its_session_has_gone() {
        let (operator, orders) = orders().unwrap();
        thread::scope(|scope| {
            let asking = scope.spawn(|| operator.order(Order::Pause));
            let ((order, answer), _) = orders.letters.recv().unwrap();
            assert_eq!(order, Order::Pause);
            answer.send(Ok(7)).unwrap();
            assert_eq!(asking.join().unwrap().unwrap(), 7);
            // One that is not looked at any more.
            let asking = scope.spawn(|| operator.order(Order::Resume));
            while orders.letters.is_empty() {
                thread::yield_now();
            }
            drop(orders);
            assert!(matches!(asking.join().unwrap(), Err(OrderError::Gone)));
        });
        assert!(matches!(operator.order(Order::Resume), Err(OrderError::Gone)));
    }

    #[test]
    fn orders_do_not_pile_up() {
        let (operator, orders) = orders().unwrap();
        for _ in 0..MOST_WAITING {
            operator.letters.try_send(((Order::Pause, bounded(1).0), Arc::default())).unwrap();
        }
        assert!(matches!(operator.order(Order::Pause), Err(OrderError::Silent)));
        // What its sender has taken back is not carried out.
        let taken = orders.letters.try_recv().unwrap().1;
        assert!(!taken.swap(true, Ordering::AcqRel));
        operator.letters.try_send(((Order::Resume, bounded(1).0), taken)).unwrap();
        let left: Vec<_> = std::iter::from_fn(|| orders.pop()).map(|(order, _)| order).collect();
        assert!(left.len() == MOST_WAITING - 1 && !left.contains(&Order::Resume));
        drop(orders);
    }
}
