//! No blocks at all: what everything but the store costs.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::immediate::{Execute, Immediate};
use super::uring::Uring;
use super::{Backend, Io, SECTOR, Service, Store, StoreInfo};

/// Completes everything at once and does nothing: writes are forgotten, and reads leave the guest's memory as it is.
///
/// The one store that does not keep the contract's clauses about data. It offers all operations, so that each way
/// through the device can be measured.
#[derive(Debug)]
pub struct NullStore {
    capacity: AtomicU64,
}

impl NullStore {
    /// A store that says it has `capacity` bytes, a multiple of 512 and not zero.
    ///
    /// # Errors
    /// If there can be none of this size.
    pub fn new(capacity: u64) -> io::Result<Self> {
        Ok(Self { capacity: Self::possible(capacity)?.into() })
    }

    fn possible(capacity: u64) -> io::Result<u64> {
        if capacity == 0 || !capacity.is_multiple_of(SECTOR) {
            let why =
                format!("a null store of {capacity} bytes is impossible: it must be a multiple of 512 and not zero");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        Ok(capacity)
    }
}

impl Store for NullStore {
    fn info(&self) -> StoreInfo {
        StoreInfo {
            capacity: self.capacity.load(Ordering::Relaxed),
            block_size: SECTOR as u32,
            physical_block_size: SECTOR as u32,
            optimal_io_size: 0,
            read_only: false,
            discard: true,
            write_zeroes_unmap: true,
        }
    }

    /// Needs no ring of the kernel's.
    fn attach(&self, _: &Rc<Uring>, _: u16) -> io::Result<Box<dyn Backend>> {
        Ok(Box::new(Immediate::new(&Arc::new(Nothing))))
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn max_queues(&self) -> u16 {
        u16::MAX
    }

    fn service(&self) -> Option<Service> {
        None
    }

    fn resize(&self, capacity: Option<u64>) -> io::Result<u64> {
        let capacity = Self::possible(capacity.unwrap_or(self.capacity.load(Ordering::Relaxed)))?;
        self.capacity.store(capacity, Ordering::Relaxed);
        Ok(capacity)
    }
}

struct Nothing;

impl Execute for Nothing {
    fn execute(&self, _: &Io) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Op;
    use crate::backend::contract::Guest;

    #[test]
    fn reads_leave_the_buffers_as_they_are() {
        let mut guest = Guest::new();
        let buffers = guest.buffers(&[(0, 512)]);
        buffers.fill(7);
        Nothing.execute(&Io::new(0, Op::Read { offset: 0 }, buffers)).unwrap();
        let mut bytes = [0; 512];
        guest.buffers(&[(0, 512)]).copy_to_slice(0, &mut bytes);
        assert_eq!(bytes, [7; 512]);
        assert!(NullStore::new(0).is_err() && NullStore::new(513).is_err());
    }
}
