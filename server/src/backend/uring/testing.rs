//! An operation that takes as long as a test wants.

use std::any::Any;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};

use io_uring::{opcode, squeue, types::Fd};

use super::{Client, FixedBuffers, Lane, Operation, Step, Uring};

/// A read of a pipe.
struct PipeRead {
    pipe: File,
    into: Box<[u8; 1]>,
}

// SAFETY: owns the byte that is read to, on the heap, and the pipe; nothing touches the byte.
unsafe impl Operation for PipeRead {
    type Context = ();

    fn lane(&self, (): &()) -> Lane {
        Lane::Interrupt
    }

    fn entry(&mut self, (): &(), _: &mut FixedBuffers<'_>) -> squeue::Entry {
        opcode::Read::new(Fd(self.pipe.as_raw_fd()), self.into.as_mut_ptr(), 1).build()
    }

    fn landed(&mut self, (): &(), _: i32) -> Step {
        Step::Over
    }
}

/// A client with one operation in the kernel, which is over when the other half of what this returns is dropped.
pub(crate) fn client_at_work(ring: &Uring) -> (Box<dyn Any>, OwnedFd) {
    let (pipe, end) = nix::unistd::pipe().unwrap();
    let mut client = Client::new(ring, ()).unwrap();
    assert!(client.start(PipeRead { pipe: pipe.into(), into: Box::new([0]) }).is_ok());
    ring.submit().unwrap();
    (Box::new(client), end)
}
