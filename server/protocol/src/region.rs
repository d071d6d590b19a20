//! Regions: what they are (DEVICE_GET_REGION_INFO, DEVICE_GET_REGION_IO_FDS) and access to them
//! (REGION_READ, REGION_WRITE, REGION_WRITE_MULTI).

use nix::errno::Errno;
use vfio_bindings::bindings::vfio::{VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_FLAG_CAPS};

use crate::fields::{Fields, length, put_u32s, put_u64s};

/// A part of a region that the client may map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SparseMmapArea {
    /// Where the part starts in the region.
    pub offset: u64,
    /// The size of the part.
    pub size: u64,
}

/// The reply to DEVICE_GET_REGION_INFO (section "VFIO_USER_DEVICE_GET_REGION_INFO").
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionInfo {
    /// `VFIO_REGION_INFO_FLAG_READ`, `_WRITE` and `_MMAP`. `_CAPS` is not kept here: it follows from
    /// [`sparse_mmap`](RegionInfo::sparse_mmap).
    pub flags: u32,
    /// The region, `VFIO_PCI_*_REGION_INDEX`.
    pub index: u32,
    /// The size of the region; 0 when the device does not have it.
    pub size: u64,
    /// Where the region starts in the file descriptor that comes with the reply.
    pub offset: u64,
    /// The parts that can be mapped when not all of the region can; empty otherwise. Sent as the
    /// capability `VFIO_REGION_INFO_CAP_SPARSE_MMAP`.
    pub sparse_mmap: Vec<SparseMmapArea>,
}

impl RegionInfo {
    /// The size of the request, and of the reply without capabilities.
    pub const SIZE: u32 = 32;

    const CAP_VERSION: u16 = 1;
    const CAP_HEADER_SIZE: usize = 8;

    /// The size of the whole reply payload: what a client must offer as `argsz` to get it all.
    pub fn argsz(&self) -> u32 {
        match length(self.sparse_mmap.len()) {
            0 => RegionInfo::SIZE,
            areas => areas.saturating_mul(16).saturating_add(RegionInfo::SIZE + 16),
        }
    }

    /// Appends the reply to a client that takes `argsz` bytes: without the capabilities when they do
    /// not fit, but always with the size that they need (section "Message sizes").
    pub(crate) fn encode(&self, argsz: u32, out: &mut Vec<u8>) {
        let has_caps = !self.sparse_mmap.is_empty();
        let fits = has_caps && self.argsz() <= argsz;
        let caps = if has_caps { VFIO_REGION_INFO_FLAG_CAPS } else { 0 };
        let flags = self.flags & !VFIO_REGION_INFO_FLAG_CAPS | caps;
        let cap_offset = if fits { RegionInfo::SIZE } else { 0 };
        put_u32s(out, &[self.argsz(), flags, self.index, cap_offset]);
        put_u64s(out, &[self.size, self.offset]);
        if fits {
            let id = VFIO_REGION_INFO_CAP_SPARSE_MMAP as u16;
            out.extend_from_slice(&id.to_ne_bytes());
            out.extend_from_slice(&RegionInfo::CAP_VERSION.to_ne_bytes());
            let next = 0;
            put_u32s(out, &[next, length(self.sparse_mmap.len()), 0]);
            for area in &self.sparse_mmap {
                put_u64s(out, &[area.offset, area.size]);
            }
        }
    }

    /// Reads the payload of a reply: the region, and the `argsz` to ask again with when that is
    /// larger than the payload, because the capabilities were left out.
    ///
    /// # Errors
    /// EINVAL when the payload is too short or its chain of capabilities is broken.
    pub fn decode(payload: &[u8]) -> Result<(RegionInfo, u32), Errno> {
        let mut fields = Fields::new(payload);
        let argsz = fields.argsz(RegionInfo::SIZE)?;
        let (flags, index, cap_offset) = (fields.u32()?, fields.u32()?, fields.u32()?);
        let (size, offset) = (fields.u64()?, fields.u64()?);
        let has_caps = flags & VFIO_REGION_INFO_FLAG_CAPS != 0 && cap_offset != 0;
        let sparse_mmap = if has_caps { sparse_mmap_areas(payload, cap_offset)? } else { Vec::new() };
        let flags = flags & !VFIO_REGION_INFO_FLAG_CAPS;
        Ok((RegionInfo { flags, index, size, offset, sparse_mmap }, argsz))
    }
}

/// Finds the sparse mmap capability in the chain that starts at `cap_offset`.
fn sparse_mmap_areas(payload: &[u8], cap_offset: u32) -> Result<Vec<SparseMmapArea>, Errno> {
    let mut next = cap_offset;
    // A chain that visits more capabilities than fit is a loop.
    for _ in 0..payload.len() / RegionInfo::CAP_HEADER_SIZE {
        let offset = usize::try_from(next).map_err(|_| Errno::EINVAL)?;
        let mut fields = Fields::at(payload, offset)?;
        let (id, _version) = (fields.u16()?, fields.u16()?);
        next = fields.u32()?;
        if u32::from(id) == VFIO_REGION_INFO_CAP_SPARSE_MMAP {
            let (nr_areas, _reserved) = (fields.u32()?, fields.u32()?);
            // Ends with the payload: the vector is never larger than what came.
            return (0..nr_areas).map(|_| Ok(SparseMmapArea { offset: fields.u64()?, size: fields.u64()? })).collect();
        }
        if next == 0 {
            return Ok(Vec::new());
        }
    }
    Err(Errno::EINVAL)
}

/// A part of a region whose writes can be replaced by signalling an eventfd
/// (section "Sub-Region IO FD info format (ioeventfd)").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoEventFd {
    /// Where the part starts in the region.
    pub offset: u64,
    /// The width of the write that signals; 0 for any.
    pub size: u64,
    /// Which of the file descriptors of the reply to signal.
    pub fd_index: u32,
    /// `KVM_IOEVENTFD_FLAG_*`.
    pub flags: u32,
    /// The value that signals, when `flags` say that the value counts.
    pub datamatch: u64,
}

/// The reply to DEVICE_GET_REGION_IO_FDS (section "VFIO_USER_DEVICE_GET_REGION_IO_FDS"). The file
/// descriptors come with the message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionIoFds {
    /// The region, `VFIO_PCI_*_REGION_INDEX`.
    pub index: u32,
    /// Its parts.
    pub sub_regions: Vec<IoEventFd>,
}

impl RegionIoFds {
    /// The size of the request, and of the reply without sub-regions.
    pub const SIZE: u32 = 16;

    const SUB_REGION_SIZE: u32 = 40;
    const TYPE_IOEVENTFD: u32 = 0;

    /// The size of the whole reply payload: what a client must offer as `argsz` to get it all, file
    /// descriptors included.
    pub fn argsz(&self) -> u32 {
        length(self.sub_regions.len()).saturating_mul(RegionIoFds::SUB_REGION_SIZE).saturating_add(RegionIoFds::SIZE)
    }

    /// Appends the reply to a client that takes `argsz` bytes: without the sub-regions when they do
    /// not fit, but always with the size that they need.
    pub(crate) fn encode(&self, argsz: u32, out: &mut Vec<u8>) {
        put_u32s(out, &[self.argsz(), 0, self.index, length(self.sub_regions.len())]);
        if self.argsz() <= argsz {
            for sub in &self.sub_regions {
                put_u64s(out, &[sub.offset, sub.size]);
                put_u32s(out, &[sub.fd_index, RegionIoFds::TYPE_IOEVENTFD, sub.flags, 0]);
                put_u64s(out, &[sub.datamatch]);
            }
        }
    }

    /// Reads the payload of a reply: the sub-regions, and the `argsz` to ask again with when that is
    /// larger than the payload, because the sub-regions were left out.
    ///
    /// # Errors
    /// EINVAL when the payload is too short or contradicts itself; ENOTSUP for a sub-region that is
    /// not an ioeventfd.
    pub fn decode(payload: &[u8]) -> Result<(RegionIoFds, u32), Errno> {
        let mut fields = Fields::new(payload);
        let argsz = fields.argsz(RegionIoFds::SIZE)?;
        let (_flags, index, count) = (fields.u32()?, fields.u32()?, fields.u32()?);
        let mut sub_regions = Vec::new();
        // The specification lets the entries grow: their size follows from the whole.
        let stride = argsz.saturating_sub(RegionIoFds::SIZE).checked_div(count);
        if let Some(stride) = stride
            && argsz as usize <= payload.len()
        {
            if stride < RegionIoFds::SUB_REGION_SIZE {
                return Err(Errno::EINVAL);
            }
            for _ in 0..count {
                let mut sub = Fields::new(fields.bytes(stride as usize)?);
                let (offset, size) = (sub.u64()?, sub.u64()?);
                let (fd_index, io_fd_type) = (sub.u32()?, sub.u32()?);
                let (flags, _padding, datamatch) = (sub.u32()?, sub.u32()?, sub.u64()?);
                if io_fd_type != RegionIoFds::TYPE_IOEVENTFD {
                    return Err(Errno::ENOTSUP);
                }
                sub_regions.push(IoEventFd { offset, size, fd_index, flags, datamatch });
            }
        }
        Ok((RegionIoFds { index, sub_regions }, argsz))
    }
}

/// A span of a region: the request REGION_READ and the reply to REGION_WRITE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionSpan {
    /// Where the span starts in the region. `offset + count` does not overflow.
    pub offset: u64,
    /// The region, `VFIO_PCI_*_REGION_INDEX`.
    pub region: u32,
    /// The size of the span. Not yet checked against the agreed `max_data_xfer_size`.
    pub count: u32,
}

impl RegionSpan {
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        put_u64s(out, &[self.offset]);
        put_u32s(out, &[self.region, self.count]);
    }

    /// Reads the front of a payload.
    ///
    /// # Errors
    /// EINVAL when it is too short or the span ends beyond the largest offset.
    pub fn decode(payload: &[u8]) -> Result<RegionSpan, Errno> {
        RegionSpan::take(&mut Fields::new(payload))
    }

    fn take(fields: &mut Fields<'_>) -> Result<RegionSpan, Errno> {
        let (offset, region, count) = (fields.u64()?, fields.u32()?, fields.u32()?);
        offset.checked_add(u64::from(count)).ok_or(Errno::EINVAL)?;
        Ok(RegionSpan { offset, region, count })
    }
}

/// Bytes of a region: the request REGION_WRITE and the reply to REGION_READ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionData<'a> {
    /// Where the bytes lie in the region. `offset + data.len()` does not overflow.
    pub offset: u64,
    /// The region, `VFIO_PCI_*_REGION_INDEX`.
    pub region: u32,
    /// The bytes.
    pub data: &'a [u8],
}

impl<'a> RegionData<'a> {
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        self.span().encode(out);
        out.extend_from_slice(self.data);
    }

    /// Reads a whole payload.
    ///
    /// # Errors
    /// EINVAL when `count` is not the number of bytes that follow.
    pub fn decode(payload: &'a [u8]) -> Result<RegionData<'a>, Errno> {
        let mut fields = Fields::new(payload);
        let RegionSpan { offset, region, count } = RegionSpan::take(&mut fields)?;
        let data = fields.rest();
        if usize::try_from(count) != Ok(data.len()) {
            return Err(Errno::EINVAL);
        }
        Ok(RegionData { offset, region, data })
    }

    /// Where the bytes lie: what the reply to a write says.
    pub fn span(&self) -> RegionSpan {
        let count = length(self.data.len());
        RegionSpan { offset: self.offset, region: self.region, count }
    }
}

/// The request REGION_WRITE_MULTI: several small writes, in order
/// (section "VFIO_USER_REGION_WRITE_MULTI"). It stays in its form on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionWrites<'a> {
    wrs: &'a [u8],
}

impl<'a> RegionWrites<'a> {
    /// The most writes in one message: as many as QEMU sends.
    pub const MAX_COUNT: usize = 200;
    /// The most bytes of one write.
    pub const MAX_DATA: usize = 8;

    const WR_SIZE: usize = 24;

    /// Lays writes out in `buffer`, which is cleared first.
    ///
    /// # Errors
    /// E2BIG for more than [`MAX_COUNT`](RegionWrites::MAX_COUNT) writes or a write of more than
    /// [`MAX_DATA`](RegionWrites::MAX_DATA) bytes.
    pub fn new(writes: &[RegionData<'_>], buffer: &'a mut Vec<u8>) -> Result<RegionWrites<'a>, Errno> {
        if writes.len() > RegionWrites::MAX_COUNT {
            return Err(Errno::E2BIG);
        }
        buffer.clear();
        for write in writes {
            let mut data = [0; RegionWrites::MAX_DATA];
            data.get_mut(..write.data.len()).ok_or(Errno::E2BIG)?.copy_from_slice(write.data);
            write.span().encode(buffer);
            buffer.extend_from_slice(&data);
        }
        Ok(RegionWrites { wrs: buffer })
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        put_u64s(out, &[(self.wrs.len() / RegionWrites::WR_SIZE) as u64]);
        out.extend_from_slice(self.wrs);
    }

    pub(crate) fn decode(payload: &'a [u8]) -> Result<RegionWrites<'a>, Errno> {
        let mut fields = Fields::new(payload);
        let wr_cnt = usize::try_from(fields.u64()?).map_err(|_| Errno::EINVAL)?;
        let wrs = fields.rest();
        if wr_cnt > RegionWrites::MAX_COUNT || wr_cnt.checked_mul(RegionWrites::WR_SIZE) != Some(wrs.len()) {
            return Err(Errno::EINVAL);
        }
        let writes = RegionWrites { wrs };
        // All or nothing: a broken entry must not leave the writes before it done.
        if writes.iter().count() != wr_cnt {
            return Err(Errno::EINVAL);
        }
        Ok(writes)
    }

    /// The writes, in the order in which they take effect.
    pub fn iter(&self) -> impl Iterator<Item = RegionData<'a>> + use<'a> {
        // `decode` has seen that every entry is good, so the iterator ends where the bytes do.
        self.wrs.chunks_exact(RegionWrites::WR_SIZE).map_while(|wr| {
            let mut fields = Fields::new(wr);
            let RegionSpan { offset, region, count } = RegionSpan::take(&mut fields).ok()?;
            let data = fields.rest().get(..usize::try_from(count).ok()?)?;
            Some(RegionData { offset, region, data })
        })
    }
}
