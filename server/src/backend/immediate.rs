//! The queue of a store that does everything at once.

use std::io;
use std::sync::Arc;

use super::{Backend, Completion, Full, Io};

/// A store that has done an operation when it returns.
pub(super) trait Execute {
    fn execute(&self, io: &Io) -> io::Result<()>;
}

/// One queue's access: works when an operation is submitted, and keeps the result until it is reaped.
pub(super) struct Immediate<S> {
    store: Arc<S>,
    done: Vec<Completion>,
}

impl<S> Immediate<S> {
    pub(super) fn new(store: &Arc<S>) -> Self {
        Self { store: Arc::clone(store), done: Vec::new() }
    }

    /// Apart, so that a submission which finds room calls nothing and saves no registers.
    #[cold]
    fn submit_with_more_room(&mut self, io: Box<Io>) -> Result<(), Full>
    where
        S: Execute,
    {
        self.done.reserve(1);
        self.submit(io)
    }
}

impl<S: Execute> Backend for Immediate<S> {
    fn submit(&mut self, io: Box<Io>) -> Result<(), Full> {
        if self.done.len() == self.done.capacity() {
            return self.submit_with_more_room(io);
        }
        let result = self.store.execute(&io);
        self.done.push(Completion { io, result });
        Ok(())
    }

    fn perform(&mut self, io: &Io) -> Option<io::Result<()>> {
        Some(self.store.execute(io))
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        if done.is_empty() {
            std::mem::swap(done, &mut self.done);
        } else {
            done.append(&mut self.done);
        }
    }

    fn in_flight(&self) -> usize {
        self.done.len()
    }
}
