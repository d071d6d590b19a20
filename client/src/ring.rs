//! A virtqueue of either format, from the driver's side.

use crate::{Error, PackedDriver, PackedMemory, Segment, SplitDriver, SplitMemory, Used};

/// The driver of a virtqueue.
pub enum Ring {
    /// A split one.
    Split(SplitDriver),
    /// A packed one.
    Packed(PackedDriver),
}

/// Calls the method of whichever it is.
macro_rules! either {
    ($ring:expr, $driver:ident => $call:expr) => {
        match $ring {
            Ring::Split($driver) => $call,
            Ring::Packed($driver) => $call,
        }
    };
}

impl Ring {
    /// The number of entries.
    pub fn size(&self) -> u16 {
        either!(self, driver => driver.memory().size())
    }

    /// The addresses for `queue_desc`, `queue_driver` and `queue_device`.
    pub fn areas(&self) -> [u64; 3] {
        either!(self, driver => driver.memory().areas())
    }

    /// The memory of a split virtqueue, for tests that look at it or break it.
    pub fn split(&self) -> Option<&SplitMemory> {
        match self {
            Ring::Split(driver) => Some(driver.memory()),
            Ring::Packed(_) => None,
        }
    }

    /// The same for a packed one.
    pub fn packed(&self) -> Option<&PackedMemory> {
        match self {
            Ring::Split(_) => None,
            Ring::Packed(driver) => Some(driver.memory()),
        }
    }

    /// As [`SplitDriver::restart`].
    pub fn restart(&mut self) {
        either!(self, driver => driver.restart());
    }

    /// As [`SplitDriver::in_flight`].
    pub fn in_flight(&self) -> u16 {
        either!(self, driver => driver.in_flight())
    }

    /// As [`SplitDriver::next_head`].
    #[inline]
    pub fn next_head(&self) -> Option<u16> {
        either!(self, driver => driver.next_head())
    }

    /// As [`SplitDriver::add`].
    #[inline]
    pub fn add(&mut self, readable: &[Segment], writable: &[Segment]) -> Option<u16> {
        either!(self, driver => driver.add(readable, writable))
    }

    /// As [`SplitDriver::publish`].
    #[must_use = "a device that is not notified may sleep for ever"]
    #[inline]
    pub fn publish(&mut self) -> bool {
        either!(self, driver => driver.publish())
    }

    /// As [`SplitDriver::take`].
    ///
    /// # Errors
    /// As there.
    #[inline]
    pub fn take(&mut self) -> Result<Option<Used>, Error> {
        either!(self, driver => driver.take())
    }

    /// As [`SplitDriver::has_used`].
    #[inline]
    pub fn has_used(&self) -> bool {
        either!(self, driver => driver.has_used())
    }

    /// As [`SplitDriver::disable_interrupts`].
    pub fn disable_interrupts(&mut self) {
        either!(self, driver => driver.disable_interrupts());
    }

    /// As [`SplitDriver::enable_interrupts`].
    #[must_use = "who sleeps while a chain is there may sleep for ever"]
    pub fn enable_interrupts(&mut self) -> bool {
        either!(self, driver => driver.enable_interrupts())
    }
}

impl From<SplitDriver> for Ring {
    fn from(driver: SplitDriver) -> Ring {
        Ring::Split(driver)
    }
}

impl From<PackedDriver> for Ring {
    fn from(driver: PackedDriver) -> Ring {
        Ring::Packed(driver)
    }
}
