//! Reading fields off the front of a payload.

use nix::errno::Errno;

/// The bytes of a payload that are still to be read. Each read is EINVAL when too few are left.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn new(payload: &'a [u8]) -> Fields<'a> {
        Fields(payload)
    }

    /// Starts `offset` bytes into the payload.
    pub(crate) fn at(payload: &'a [u8], offset: usize) -> Result<Fields<'a>, Errno> {
        payload.get(offset..).map(Fields).ok_or(Errno::EINVAL)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Errno> {
        let (front, rest) = self.0.split_first_chunk().ok_or(Errno::EINVAL)?;
        self.0 = rest;
        Ok(*front)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Errno> {
        self.array().map(u16::from_ne_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Errno> {
        self.array().map(u32::from_ne_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Errno> {
        self.array().map(u64::from_ne_bytes)
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Result<&'a [u8], Errno> {
        let (front, rest) = self.0.split_at_checked(count).ok_or(Errno::EINVAL)?;
        self.0 = rest;
        Ok(front)
    }

    /// Reads an `argsz` field and refuses one below the size of the fixed part.
    pub(crate) fn argsz(&mut self, fixed: u32) -> Result<u32, Errno> {
        let argsz = self.u32()?;
        if argsz < fixed {
            return Err(Errno::EINVAL);
        }
        Ok(argsz)
    }

    pub(crate) fn rest(self) -> &'a [u8] {
        self.0
    }
}

/// A length as it goes into a 32-bit field. A message whose length does not fit is never sent: the
/// sender refuses it by its whole size.
pub(crate) fn length(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

/// Appends 32-bit fields.
pub(crate) fn put_u32s(out: &mut Vec<u8>, fields: &[u32]) {
    for field in fields {
        out.extend_from_slice(&field.to_ne_bytes());
    }
}

/// Appends 64-bit fields.
pub(crate) fn put_u64s(out: &mut Vec<u8>, fields: &[u64]) {
    for field in fields {
        out.extend_from_slice(&field.to_ne_bytes());
    }
}
