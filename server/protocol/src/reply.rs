//! What the server answers.

use crate::fields::put_u64s;
use crate::{DeviceInfo, DmaUnmap, IrqInfo, RegionData, RegionInfo, RegionIoFds, RegionSpan, Version};

/// The payload of a reply that says "done". An error reply has no payload, see
/// [`Sender::refuse`](crate::Sender::refuse). Each layout has its own `decode`, for clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply<'a> {
    /// To DMA_MAP, DEVICE_SET_IRQS and DEVICE_RESET.
    Done,
    /// To VERSION. QEMU refuses a reply that is larger than its request.
    Version(&'a Version),
    /// To DMA_UNMAP: echoes the request.
    DmaUnmap(DmaUnmap),
    /// To DEVICE_GET_INFO.
    DeviceInfo(DeviceInfo),
    /// To DEVICE_GET_REGION_INFO. A client that offers too small an `argsz` gets the fixed part with
    /// the size to ask again with.
    RegionInfo {
        /// The region.
        info: &'a RegionInfo,
        /// The `argsz` of the request.
        argsz: u32,
    },
    /// To DEVICE_GET_REGION_IO_FDS; `argsz` as above. The file descriptors go with the message, and
    /// only when [`RegionIoFds::argsz`] fits.
    RegionIoFds {
        /// The sub-regions.
        io_fds: &'a RegionIoFds,
        /// The `argsz` of the request.
        argsz: u32,
    },
    /// To DEVICE_GET_IRQ_INFO.
    IrqInfo(IrqInfo),
    /// To REGION_READ.
    RegionRead(RegionData<'a>),
    /// To REGION_WRITE: what was written, without the data.
    RegionWrite(RegionSpan),
    /// To REGION_WRITE_MULTI: how many writes were done.
    RegionWriteMulti {
        /// The number of writes.
        wr_cnt: u64,
    },
}

impl Reply<'_> {
    /// Appends the payload.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Reply::Done => {}
            Reply::Version(version) => version.encode(out),
            Reply::DmaUnmap(unmap) => unmap.encode(out),
            Reply::DeviceInfo(info) => info.encode(out),
            Reply::RegionInfo { info, argsz } => info.encode(*argsz, out),
            Reply::RegionIoFds { io_fds, argsz } => io_fds.encode(*argsz, out),
            Reply::IrqInfo(info) => info.encode(out),
            Reply::RegionRead(data) => data.encode(out),
            Reply::RegionWrite(span) => span.encode(out),
            Reply::RegionWriteMulti { wr_cnt } => put_u64s(out, &[*wr_cnt]),
        }
    }
}
