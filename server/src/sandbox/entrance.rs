//! The way into the sandbox for threads that are older than it is.

use std::sync::{Mutex, PoisonError};

use crossbeam::channel::{Receiver, Sender, bounded};

use super::Sandbox;

/// A sandbox that will be: stores are opened before there is one, and some of them start threads then.
#[derive(Debug, Default)]
pub(crate) struct Entrance(Mutex<Queue>);

#[derive(Debug, Default)]
struct Queue {
    sandbox: Option<Sandbox>,
    waiting: Vec<Sender<Sandbox>>,
}

impl Entrance {
    /// Where one thread is given the sandbox, as soon as there is one. If there will never be one, it is told that nothing
    /// comes.
    pub(crate) fn queue_up(&self) -> Receiver<Sandbox> {
        let (give, take) = bounded(1);
        let mut queue = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &queue.sandbox {
            Some(sandbox) => drop(give.send(sandbox.clone())),
            None => queue.waiting.push(give),
        }
        take
    }

    /// Lets in who waits, and who comes.
    pub(crate) fn open(&self, sandbox: &Sandbox) {
        let mut queue = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        queue.sandbox = Some(sandbox.clone());
        // One that has ended meanwhile needs none.
        queue.waiting.drain(..).for_each(|waiting| drop(waiting.send(sandbox.clone())));
    }
}
