//! What a client and its guest do next. Read from the front of the input, a byte for the kind and a few for the rest, so
//! that a step that is changed, cut out or copied leaves the others as they are.

use libfuzzer_sys::arbitrary::{Arbitrary, Result, Unstructured};

/// Something that a client, or a guest through it, does.
#[derive(Debug)]
pub enum Step {
    /// Memory, a working driver, queues: all that comes before the first request.
    Boot { features: u8, queue_size: u8, layout: u8, flags: u8 },
    /// A request with its chain, shown to the device.
    Request { queue: u8, kind: u8, sector: u8, len: u16, shape: u8, fault: u8 },
    /// Kicks a queue: by a message, one that is answered, or an eventfd.
    Kick { queue: u8, how: u8 },
    /// Waits until the worker has looked at everything.
    Settle,
    /// One descriptor of a queue, or of the indirect table.
    Descriptor { queue: u8, index: u8, address: u16, len: u16, flags: u8, next: u8 },
    /// Shows heads to the device, whether there is a chain or not.
    Avail { queue: u8, head: u8, ahead: u8 },
    /// Writes a word somewhere in guest memory.
    Poke { address: u16, value: u32 },
    /// `used_event`, and the flags of the available ring.
    Events { queue: u8, used_event: u16, flags: u8 },
    /// A write to a region.
    Write { place: Place, len: u8, value: u64, wait: bool },
    /// A read of a region.
    Read { place: Place, count: u16 },
    /// Several writes in one message.
    WriteMulti { writes: [(Place, u8, u64); 2], count: u8, wait: bool },
    /// DMA_MAP.
    Map { page: u8, pages: u8, offset: u8, access: u8, file: u8 },
    /// DMA_UNMAP.
    Unmap { page: u8, pages: u8, all: bool },
    /// DEVICE_SET_IRQS.
    SetIrqs { index: u8, flags: u8, start: u8, count: u8, files: u8 },
    /// One of the questions, with whatever room for the answer.
    Ask { what: u8, index: u8, argsz: u16 },
    /// DEVICE_RESET.
    Reset,
    /// VERSION once more, or at last.
    Version { major: u8, minor: u8, text: u8 },
    /// Any command with any payload and files.
    Message { command: u8, flags: u8, payload: Vec<u8>, files: u8 },
}

/// Where in which region.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    pub region: u32,
    pub offset: u64,
}

/// BAR 2 has the windows of virtio, a page each.
const BAR: u32 = 2;
const PAGE: u64 = 0x1000;

impl<'a> Arbitrary<'a> for Place {
    fn arbitrary(input: &mut Unstructured<'a>) -> Result<Self> {
        let (kind, offset): (u8, u8) = (input.arbitrary()?, input.arbitrary()?);
        let offset = u64::from(offset);
        let (region, offset) = match kind % 9 {
            // The common configuration, 64 bytes.
            0 | 1 => (BAR, offset % 72),
            2 => (BAR, PAGE + offset % 8),
            3 => (BAR, 2 * PAGE + offset % 72),
            4 => (BAR, 3 * PAGE + offset % 16),
            // The MSI-X table, and a page later the pending bits.
            5 => (0, (offset & 1) * PAGE + (offset >> 1)),
            6 | 7 => (7, offset),
            _ => (u32::from(kind) / 9 % 11, input.arbitrary::<u16>()?.into()),
        };
        Ok(Place { region, offset })
    }
}

impl<'a> Arbitrary<'a> for Step {
    fn arbitrary(input: &mut Unstructured<'a>) -> Result<Self> {
        let u = input;
        Ok(match u.arbitrary::<u8>()? % 24 {
            0 => Step::Boot {
                features: u.arbitrary()?,
                queue_size: u.arbitrary()?,
                layout: u.arbitrary()?,
                flags: u.arbitrary()?,
            },
            1..=3 => Step::Request {
                queue: u.arbitrary()?,
                kind: u.arbitrary()?,
                sector: u.arbitrary()?,
                len: u.arbitrary()?,
                shape: u.arbitrary()?,
                fault: u.arbitrary()?,
            },
            4 | 5 => Step::Kick { queue: u.arbitrary()?, how: u.arbitrary()? },
            6 => Step::Settle,
            7 | 8 => Step::Descriptor {
                queue: u.arbitrary()?,
                index: u.arbitrary()?,
                address: u.arbitrary()?,
                len: u.arbitrary()?,
                flags: u.arbitrary()?,
                next: u.arbitrary()?,
            },
            9 => Step::Avail { queue: u.arbitrary()?, head: u.arbitrary()?, ahead: u.arbitrary()? },
            10 => Step::Poke { address: u.arbitrary()?, value: u.arbitrary()? },
            11 => Step::Events { queue: u.arbitrary()?, used_event: u.arbitrary()?, flags: u.arbitrary()? },
            12 | 13 => {
                Step::Write { place: u.arbitrary()?, len: u.arbitrary()?, value: u.arbitrary()?, wait: u.arbitrary()? }
            }
            14 => Step::Read { place: u.arbitrary()?, count: u.arbitrary()? },
            15 => Step::WriteMulti {
                writes: [
                    (u.arbitrary()?, u.arbitrary()?, u.arbitrary()?),
                    (u.arbitrary()?, u.arbitrary()?, u.arbitrary()?),
                ],
                count: u.arbitrary()?,
                wait: u.arbitrary()?,
            },
            16 | 17 => Step::Map {
                page: u.arbitrary()?,
                pages: u.arbitrary()?,
                offset: u.arbitrary()?,
                access: u.arbitrary()?,
                file: u.arbitrary()?,
            },
            18 => Step::Unmap { page: u.arbitrary()?, pages: u.arbitrary()?, all: u.arbitrary()? },
            19 => Step::SetIrqs {
                index: u.arbitrary()?,
                flags: u.arbitrary()?,
                start: u.arbitrary()?,
                count: u.arbitrary()?,
                files: u.arbitrary()?,
            },
            20 => Step::Ask { what: u.arbitrary()?, index: u.arbitrary()?, argsz: u.arbitrary()? },
            21 => Step::Reset,
            22 => Step::Version { major: u.arbitrary()?, minor: u.arbitrary()?, text: u.arbitrary()? },
            _ => {
                let (command, flags, files) = (u.arbitrary()?, u.arbitrary()?, u.arbitrary()?);
                let len = usize::from(u.arbitrary::<u8>()? % 80).min(u.len());
                Step::Message { command, flags, files, payload: u.bytes(len)?.to_vec() }
            }
        })
    }
}
