//! A byte map in which every bit has a declared access: read-only, writable, or cleared by writing 1.

use std::ops::Range;

/// The size of a conventional configuration space in bytes.
pub(crate) const SIZE: usize = 256;

/// The bytes of a configuration space and what a client may do to each of their bits. A bit that was
/// never declared is read-only and zero.
#[derive(Clone)]
pub(crate) struct Registers {
    bytes: [u8; SIZE],
    reset: [u8; SIZE],
    writable: [u8; SIZE],
    write_one_to_clear: [u8; SIZE],
}

impl Registers {
    pub(crate) fn new() -> Registers {
        Registers { bytes: [0; SIZE], reset: [0; SIZE], writable: [0; SIZE], write_one_to_clear: [0; SIZE] }
    }

    /// Declares the value that bytes have out of reset.
    pub(crate) fn declare(&mut self, offset: usize, value: &[u8]) {
        copy(&mut self.reset, offset, value);
        copy(&mut self.bytes, offset, value);
    }

    /// Declares which bits a client may write.
    pub(crate) fn declare_writable(&mut self, offset: usize, mask: &[u8]) {
        copy(&mut self.writable, offset, mask);
    }

    /// Declares which bits a client clears by writing 1.
    pub(crate) fn declare_write_one_to_clear(&mut self, offset: usize, mask: &[u8]) {
        copy(&mut self.write_one_to_clear, offset, mask);
    }

    /// The bytes of `range`, cut off at the end.
    pub(crate) fn bytes(&self, range: Range<usize>) -> &[u8] {
        self.bytes.get(range.start.min(SIZE)..range.end.min(SIZE)).unwrap_or_default()
    }

    pub(crate) fn u16(&self, offset: usize) -> u16 {
        let bytes = self.bytes.get(offset..).and_then(<[u8]>::first_chunk);
        bytes.copied().map_or(0, u16::from_le_bytes)
    }

    /// A client's write: changes the writable bits, clears those that a 1 clears.
    pub(crate) fn write(&mut self, offset: usize, data: &[u8]) {
        let masks = self.writable.iter().zip(&self.write_one_to_clear);
        for ((byte, (writable, clear)), value) in self.bytes.iter_mut().zip(masks).skip(offset).zip(data) {
            *byte = (*byte & !writable) | (value & writable);
            *byte &= !(value & clear);
        }
    }

    /// The function's own write: changes every bit.
    pub(crate) fn store(&mut self, offset: usize, data: &[u8]) {
        copy(&mut self.bytes, offset, data);
    }

    pub(crate) fn reset(&mut self) {
        self.bytes = self.reset;
    }

    /// Takes over bytes that differ from the reset value in writable bits only, or says where they
    /// do not.
    pub(crate) fn import(&mut self, bytes: &[u8; SIZE]) -> Result<(), usize> {
        let declared = self.reset.iter().zip(&self.writable);
        for (offset, (byte, (reset, writable))) in bytes.iter().zip(declared).enumerate() {
            if (byte ^ reset) & !writable != 0 {
                return Err(offset);
            }
        }
        self.bytes = *bytes;
        Ok(())
    }
}

/// Copies `from` to `offset`, cut off at the end.
fn copy(to: &mut [u8; SIZE], offset: usize, from: &[u8]) {
    for (to, from) in to.iter_mut().skip(offset).zip(from) {
        *to = *from;
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    #[test]
    fn each_bit_has_its_access() {
        let mut registers = Registers::new();
        registers.declare(16, &[0b1010_1010, 0xff]);
        registers.declare_writable(16, &[0b0000_1111]);
        registers.declare_write_one_to_clear(16, &[0b1100_0000]);
        // value written, value then read
        let table = [
            (0x00, 0b1010_0000),
            (0x0f, 0b1010_1111),
            (0x30, 0b1010_0000),
            (0x45, 0b1010_0101),
            (0x80, 0b0010_0000),
            (0xff, 0b0010_1111),
        ];
        for (value, expected) in table {
            registers.write(16, &[value, value]);
            assert_eq!(registers.bytes(16..18), [expected, 0xff], "{value:#x}");
        }
        registers.reset();
        assert_eq!(registers.bytes(15..19), [0, 0b1010_1010, 0xff, 0]);
    }

    #[test]
    fn writes_are_cut_off_at_the_end() {
        let mut registers = Registers::new();
        registers.declare_writable(254, &[0xff; 8]);
        registers.write(255, &[1, 2, 3]);
        registers.write(300, &[4]);
        assert_eq!(registers.bytes(254..300), [0, 1]);
    }
}
