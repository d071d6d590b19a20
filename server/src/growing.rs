//! Block devices that others make larger while they are served.
//!
//! The kernel tells of that by an event of udev's only, which does not come into containers. So one thread, which is there as long
//! as a block device is, asks each second of each how large it is: a system call that reads a number. One that has grown is what
//! `ctl resize` without a size would make of it, and its guest is told at once.

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};

use crate::backend::file::{DeviceSize, Sizes};
use crate::devices::Handle;
use crate::sandbox::{Sandbox, ThreadKind};
use crate::session::{Order, OrderError, Stop};

/// How long nobody looks, in milliseconds.
const INTERVAL: u16 = 1000;
/// How many looks go by before a device is bothered again that did not come to rest.
const PATIENCE: u32 = 30;
/// It gives orders, and logs.
const STACK: usize = 256 << 10;

/// The block devices of a server.
#[derive(Default)]
pub(crate) struct Growing(Arc<Mutex<Arrivals>>);

/// What the thread is to know of next.
#[derive(Default)]
struct Arrivals {
    devices: Vec<Watched>,
    /// Of a thread that looks at `devices` again; there is none if there was nothing left to do.
    thread: Option<JoinHandle<()>>,
}

/// One of them.
struct Watched {
    handle: Handle,
    size: DeviceSize,
    /// The size that the log has something of already.
    told: Option<u64>,
    /// It was paused to be resized, and did not come to rest: it is to go on.
    stuck: bool,
    /// Looks that it is not to be bothered for.
    patience: u32,
}

fn lock(arrivals: &Mutex<Arrivals>) -> MutexGuard<'_, Arrivals> {
    arrivals.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Growing {
    /// Has the device told when its block device grows.
    ///
    /// # Errors
    /// If there can be no thread for it.
    pub(crate) fn watch(
        &self,
        handle: Handle,
        size: DeviceSize,
        stop: &Arc<Stop>,
        sandbox: &Sandbox,
    ) -> io::Result<()> {
        let mut arrivals = lock(&self.0);
        arrivals.devices.push(Watched { handle, size, told: None, stuck: false, patience: 0 });
        if arrivals.thread.is_none() {
            let (shared, stop, sandbox) = (Arc::clone(&self.0), Arc::clone(stop), sandbox.clone());
            let run = move || {
                sandbox.enter_as(ThreadKind::Sizes);
                look_again(&shared, &stop);
            };
            arrivals.thread = Some(thread::Builder::new().name("sizes".into()).stack_size(STACK).spawn(run)?);
        }
        Ok(())
    }

    /// Waits for the thread, which ends with the server.
    pub(crate) fn join(&self) {
        let thread = lock(&self.0).thread.take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            log::error!("the thread that looks at block devices panicked");
        }
    }
}

/// Looks at them each second, until there are none or the server stops.
fn look_again(arrivals: &Mutex<Arrivals>, stop: &Stop) {
    let mut watched = Vec::new();
    loop {
        match poll(&mut [PollFd::new(stop.as_fd(), PollFlags::POLLIN)], INTERVAL) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return,
            Err(error) => return log::error!("nobody looks any more whether block devices grow: {error}"),
        }
        {
            let mut arrivals = lock(arrivals);
            watched.append(&mut arrivals.devices);
            if watched.is_empty() {
                // The next one has another thread.
                arrivals.thread = None;
                return;
            }
        }
        watched.retain_mut(Watched::look);
    }
}

impl Watched {
    /// Sees to what has changed; says whether it is still there.
    fn look(&mut self) -> bool {
        let Some(Sizes { device, store }) = self.size.look() else { return false };
        if self.stuck {
            // Whoever has it go on meanwhile may.
            self.stuck = self.handle.status().paused && self.handle.order(Order::Resume).is_err();
        }
        self.patience = self.patience.saturating_sub(1);
        if device == store {
            self.told = None;
        } else if self.told != Some(device) && !self.stuck && self.patience == 0 {
            self.told = Some(device);
            let name = &self.handle.name;
            if device < store {
                log::error!(
                    "{name}: the block device has become smaller, {device} bytes of {store}: requests for what is beyond fail \
                     until it is made larger again"
                );
            } else {
                self.grow(device);
            }
        }
        true
    }

    fn grow(&mut self, device: u64) {
        let (name, paused) = (&self.handle.name, self.handle.status().paused);
        match self.handle.order(Order::Resize { capacity: None, shrink: false }) {
            Ok(size) => log::info!("{name}: the block device has grown to {size} bytes, and so has the disk"),
            Err(error @ OrderError::Storage(_)) => {
                log::error!("{name}: the block device has grown to {device} bytes, and the disk has not: {error}");
            }
            Err(error) => {
                log::warn!("{name}: the block device has grown to {device} bytes, and the disk not yet: {error}");
                // Only then it was this order that paused it.
                let stuck = !paused && matches!(error, OrderError::Busy);
                (self.stuck, self.patience, self.told) = (stuck, PATIENCE, None);
            }
        }
    }
}
