//! What a client asks of the server.

use nix::errno::Errno;

use crate::fields::{Fields, put_u32s};
use crate::{
    Command, DeviceInfo, DmaMap, DmaUnmap, IrqInfo, RegionData, RegionInfo, RegionIoFds, RegionSpan, RegionWrites,
    SetIrqs, Version,
};

/// A command from the client to the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request<'a> {
    /// Agree on a version and on capabilities.
    Version(Version),
    /// Map a range of DMA addresses.
    DmaMap(DmaMap),
    /// Unmap ranges of DMA addresses.
    DmaUnmap(DmaUnmap),
    /// Say what the device is.
    DeviceGetInfo,
    /// Say what a region is.
    DeviceGetRegionInfo {
        /// The largest reply payload that the client takes; at least 32.
        argsz: u32,
        /// The region.
        index: u32,
    },
    /// Give the file descriptors of a region.
    DeviceGetRegionIoFds {
        /// The largest reply payload that the client takes; at least 16.
        argsz: u32,
        /// The region.
        index: u32,
    },
    /// Say what an interrupt index is.
    DeviceGetIrqInfo {
        /// The interrupt index.
        index: u32,
    },
    /// Configure, mask, unmask or trigger interrupts.
    DeviceSetIrqs(SetIrqs<'a>),
    /// Read from a region.
    RegionRead(RegionSpan),
    /// Write to a region.
    RegionWrite(RegionData<'a>),
    /// Write to regions several times.
    RegionWriteMulti(RegionWrites<'a>),
    /// Reset the device.
    DeviceReset,
}

impl<'a> Request<'a> {
    /// Reads the payload of a command.
    ///
    /// # Errors
    /// ENOTSUP for a command that is not the client's to send, that the specification does not have,
    /// or that needs migration; EINVAL (or the errno that the layout names) for a payload that is
    /// too short or contradicts itself. Bytes behind a layout of fixed size are ignored.
    pub fn decode(command: u16, payload: &'a [u8]) -> Result<Request<'a>, Errno> {
        let command = Command::from_number(command).ok_or(Errno::ENOTSUP)?;
        Ok(match command {
            Command::Version => Request::Version(Version::decode(payload)?),
            Command::DmaMap => Request::DmaMap(DmaMap::decode(payload)?),
            Command::DmaUnmap => Request::DmaUnmap(DmaUnmap::decode(payload)?),
            Command::DeviceGetInfo => {
                decode_query(payload, DeviceInfo::SIZE)?;
                Request::DeviceGetInfo
            }
            Command::DeviceGetRegionInfo => {
                let (argsz, index) = decode_query(payload, RegionInfo::SIZE)?;
                Request::DeviceGetRegionInfo { argsz, index }
            }
            Command::DeviceGetRegionIoFds => {
                let (argsz, index) = decode_query(payload, RegionIoFds::SIZE)?;
                Request::DeviceGetRegionIoFds { argsz, index }
            }
            Command::DeviceGetIrqInfo => {
                let (_argsz, index) = decode_query(payload, IrqInfo::SIZE)?;
                Request::DeviceGetIrqInfo { index }
            }
            Command::DeviceSetIrqs => Request::DeviceSetIrqs(SetIrqs::decode(payload)?),
            Command::RegionRead => Request::RegionRead(RegionSpan::decode(payload)?),
            Command::RegionWrite => Request::RegionWrite(RegionData::decode(payload)?),
            Command::RegionWriteMulti => Request::RegionWriteMulti(RegionWrites::decode(payload)?),
            Command::DeviceReset => Request::DeviceReset,
            Command::DmaRead
            | Command::DmaWrite
            | Command::DeviceFeature
            | Command::MigDataRead
            | Command::MigDataWrite => return Err(Errno::ENOTSUP),
        })
    }

    /// The command that carries this request.
    pub fn command(&self) -> Command {
        match self {
            Request::Version(_) => Command::Version,
            Request::DmaMap(_) => Command::DmaMap,
            Request::DmaUnmap(_) => Command::DmaUnmap,
            Request::DeviceGetInfo => Command::DeviceGetInfo,
            Request::DeviceGetRegionInfo { .. } => Command::DeviceGetRegionInfo,
            Request::DeviceGetRegionIoFds { .. } => Command::DeviceGetRegionIoFds,
            Request::DeviceGetIrqInfo { .. } => Command::DeviceGetIrqInfo,
            Request::DeviceSetIrqs(_) => Command::DeviceSetIrqs,
            Request::RegionRead(_) => Command::RegionRead,
            Request::RegionWrite(_) => Command::RegionWrite,
            Request::RegionWriteMulti(_) => Command::RegionWriteMulti,
            Request::DeviceReset => Command::DeviceReset,
        }
    }

    /// Appends the payload.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Request::Version(version) => version.encode(out),
            Request::DmaMap(map) => map.encode(out),
            Request::DmaUnmap(unmap) => unmap.encode(out),
            Request::DeviceGetInfo => put_u32s(out, &[DeviceInfo::SIZE, 0, 0, 0]),
            Request::DeviceGetRegionInfo { argsz, index } => {
                put_u32s(out, &[*argsz, 0, *index, 0, 0, 0, 0, 0]);
            }
            Request::DeviceGetRegionIoFds { argsz, index } => {
                put_u32s(out, &[*argsz, 0, *index, 0]);
            }
            Request::DeviceGetIrqInfo { index } => put_u32s(out, &[IrqInfo::SIZE, 0, *index, 0]),
            Request::DeviceSetIrqs(set) => set.encode(out),
            Request::RegionRead(span) => span.encode(out),
            Request::RegionWrite(data) => data.encode(out),
            Request::RegionWriteMulti(writes) => writes.encode(out),
            Request::DeviceReset => {}
        }
    }
}

/// Reads the front that all queries share: `argsz`, flags (reserved) and an index. The payload must
/// be as long as the structure that the query names, and `argsz` leave room for it in the reply.
fn decode_query(payload: &[u8], size: u32) -> Result<(u32, u32), Errno> {
    let mut fields = Fields::new(payload);
    let argsz = fields.argsz(size)?;
    let (_flags, index) = (fields.u32()?, fields.u32()?);
    if payload.len() < size as usize {
        return Err(Errno::EINVAL);
    }
    Ok((argsz, index))
}
