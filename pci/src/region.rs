//! The regions of a PCI function and the bounds of an access.

use std::ops::Range;

use thiserror::Error;

/// A region of a PCI function, with the index that VFIO gives it (`VFIO_PCI_*_REGION_INDEX`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
#[allow(missing_docs, reason = "the names say it all")]
pub enum Region {
    Bar0 = 0,
    Bar1 = 1,
    Bar2 = 2,
    Bar3 = 3,
    Bar4 = 4,
    Bar5 = 5,
    /// The expansion ROM.
    Rom = 6,
    /// The configuration space.
    Config = 7,
}

impl Region {
    /// How many regions a function has, absent ones included.
    pub const COUNT: usize = 8;

    pub(crate) const ALL: [Region; Region::COUNT] = [
        Region::Bar0,
        Region::Bar1,
        Region::Bar2,
        Region::Bar3,
        Region::Bar4,
        Region::Bar5,
        Region::Rom,
        Region::Config,
    ];

    /// The region with this VFIO index, or `None` if a function has no such region.
    pub fn from_index(index: u32) -> Option<Region> {
        usize::try_from(index).ok().and_then(|index| Region::ALL.get(index).copied())
    }

    /// The VFIO index.
    pub fn index(self) -> usize {
        self as usize
    }

    /// The bytes that an access covers, if it lies within this region of `size` bytes.
    pub fn range(self, size: u64, offset: u64, length: usize) -> Result<Range<usize>, AccessError> {
        let error = AccessError { region: self, size, offset, length };
        let start = usize::try_from(offset).map_err(|_| error)?;
        let end = start.checked_add(length).ok_or(error)?;
        match u64::try_from(end) {
            Ok(last) if last <= size => Ok(start..end),
            _ => Err(error),
        }
    }
}

/// An access that does not lie within its region. It changed nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("an access of {length} bytes at {offset:#x} is outside of {region:?}, which has {size:#x} bytes")]
pub struct AccessError {
    /// The region.
    pub region: Region,
    /// Its size in bytes, 0 if the function has no such region.
    pub size: u64,
    /// The first byte of the access.
    pub offset: u64,
    /// The length of the access in bytes.
    pub length: usize,
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    #[test]
    fn indices_are_those_of_vfio() {
        for (index, region) in Region::ALL.into_iter().enumerate() {
            assert_eq!(region.index(), index);
            assert_eq!(Region::from_index(index as u32), Some(region));
        }
        assert_eq!(Region::from_index(8), None);
        assert_eq!(Region::from_index(u32::MAX), None);
    }

    #[test]
    fn an_access_must_end_within_its_region() {
        let table = [
            (0, 0, 0, true),
            (0, 0, 1, false),
            (256, 0, 256, true),
            (256, 255, 1, true),
            (256, 255, 2, false),
            (256, 256, 0, true),
            (256, 257, 0, false),
            (256, u64::MAX, 1, false),
            (u64::MAX, u64::MAX, 1, false),
        ];
        for (size, offset, length, within) in table {
            let range = Region::Config.range(size, offset, length);
            assert_eq!(range.is_ok(), within, "{length} at {offset} of {size}");
        }
    }
}
