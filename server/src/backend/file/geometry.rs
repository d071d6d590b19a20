//! What a file or a block device says of itself.

use std::fs::{self, File, Metadata};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use nix::sys::stat::{major, minor};

use crate::backend::SECTOR;

/// Bytes of the largest block that we move past the page cache.
pub(in crate::backend) const MAX_ALIGNMENT: usize = 4096;

/// As many bytes as the largest alignment, aligned like that.
#[derive(Clone)]
#[repr(C, align(4096))]
pub(in crate::backend) struct Page(pub(in crate::backend) [u8; MAX_ALIGNMENT]);

impl Page {
    pub(in crate::backend) const ZERO: Self = Self([0; MAX_ALIGNMENT]);
}

mod ioctl {
    //! From linux/fs.h.
    nix::ioctl_read!(blkgetsize64, 0x12, 114, libc::size_t);
    nix::ioctl_read_bad!(blksszget, nix::request_code_none!(0x12, 104), libc::c_int);
    nix::ioctl_read_bad!(blkpbszget, nix::request_code_none!(0x12, 123), libc::c_uint);
    nix::ioctl_read_bad!(blkioopt, nix::request_code_none!(0x12, 121), libc::c_uint);
}

/// A block device.
pub(in crate::backend) struct Device {
    /// Bytes.
    pub(in crate::backend) capacity: u64,
    /// Bytes.
    pub(super) logical_block_size: u32,
    /// Bytes.
    pub(super) physical_block_size: u32,
    /// Bytes; 0 if it has none.
    pub(super) optimal_io_size: u32,
    /// Whether it can free blocks such that they read as zeroes.
    pub(super) frees: bool,
    /// Whether it can free blocks such that they read as anything.
    pub(super) discards: bool,
}

impl Device {
    pub(in crate::backend) fn of(file: &File, metadata: &Metadata) -> io::Result<Self> {
        let (fd, capacity) = (file.as_raw_fd(), device_capacity(file)?);
        let (mut logical, mut physical, mut optimal) = (512, 512, 0);
        // SAFETY: each writes a number of the type that it is declared with, to a variable of that type.
        unsafe {
            ioctl::blksszget(fd, &raw mut logical)?;
            ioctl::blkpbszget(fd, &raw mut physical)?;
            ioctl::blkioopt(fd, &raw mut optimal)?;
        }
        Ok(Self {
            capacity,
            logical_block_size: u32::try_from(logical).unwrap_or(SECTOR as u32),
            physical_block_size: physical,
            optimal_io_size: optimal,
            frees: has_limit(metadata.rdev(), "write_zeroes_max_bytes"),
            discards: has_limit(metadata.rdev(), "discard_max_bytes"),
        })
    }
}

/// Bytes that a block device has by now.
pub(super) fn device_capacity(file: &File) -> io::Result<u64> {
    let mut capacity = 0u64;
    // SAFETY: it writes a size_t, which on 64-bit machines, and vm-memory needs one, is a u64, to a variable of that type.
    unsafe { ioctl::blkgetsize64(file.as_raw_fd(), (&raw mut capacity).cast())? };
    Ok(capacity)
}

/// Whether the device does at least something of what this is the limit of. A hole that is punched in it reaches it as
/// "write zeroes, and unmap".
fn has_limit(device: u64, name: &str) -> bool {
    queue_attribute(device, name).is_some_and(|bytes| bytes > 0)
}

/// Whether the device has polled queues; `None` if it does not say, as file systems with devices of their own do not.
pub(super) fn has_polled_queues(device: u64) -> Option<bool> {
    queue_attribute(device, "io_poll").map(|polled| polled > 0)
}

/// What the kernel says of a block device's queue.
fn queue_attribute(device: u64, name: &str) -> Option<u64> {
    let device = format!("/sys/dev/block/{}:{}", major(device), minor(device));
    // A partition has no queue of its own.
    ["queue", "../queue"]
        .iter()
        .find_map(|queue| fs::read_to_string(format!("{device}/{queue}/{name}")).ok()?.trim().parse().ok())
}

/// What direct I/O on a file asks for; powers of two, in bytes, up to [`MAX_ALIGNMENT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::backend) struct Alignment {
    /// Of addresses in memory.
    pub(in crate::backend) memory: usize,
    /// Of offsets in the file and lengths, each piece's too.
    pub(in crate::backend) offset: usize,
}

impl Alignment {
    /// Of a file that was opened for direct I/O; `None` if that does not work in blocks as small as ours.
    pub(in crate::backend) fn of(file: &File, capacity: u64) -> Option<Self> {
        let alignment = Self::told(file).unwrap_or_else(|| Self::tried(file, capacity))?;
        // Requests have whole sectors. Blocks between a sector and a page are taken for a page: see the module `file`
        // for what must not share one.
        let offset =
            if alignment.offset <= SECTOR as usize { SECTOR as usize } else { alignment.offset.max(MAX_ALIGNMENT) };
        let possible = |bytes: usize| bytes.is_power_of_two() && bytes <= MAX_ALIGNMENT;
        (possible(alignment.memory) && possible(offset)).then_some(Self { offset, ..alignment })
    }

    /// Whether memory can be moved as it lies.
    pub(super) fn fits(self, pieces: &[libc::iovec]) -> bool {
        let (memory, len) = (self.memory - 1, self.offset - 1);
        pieces.iter().fold(0, |bits, piece| bits | piece.iov_base.addr() & memory | piece.iov_len & len) == 0
    }

    /// As the file system tells; `None` if it does not (before Linux 6.1), `Some(None)` if it has no direct I/O.
    fn told(file: &File) -> Option<Option<Self>> {
        let mut statx = MaybeUninit::<libc::statx>::zeroed();
        // SAFETY: the path is a C string, empty as AT_EMPTY_PATH wants it; the result goes to a struct of that type.
        let result = unsafe {
            libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, statx.as_mut_ptr())
        };
        // SAFETY: it consists of integers, which were zeroed, and perhaps written.
        let statx = unsafe { statx.assume_init() };
        if result != 0 || statx.stx_mask & libc::STATX_DIOALIGN == 0 {
            return None;
        }
        let (memory, offset) = (statx.stx_dio_mem_align as usize, statx.stx_dio_offset_align as usize);
        Some((memory > 0 && offset > 0).then_some(Self { memory, offset }))
    }

    /// The smallest with which a read is not refused.
    fn tried(file: &File, capacity: u64) -> Option<Self> {
        let mut pages = [Page::ZERO, Page::ZERO];
        [512, 1024, 2048, MAX_ALIGNMENT]
            .into_iter()
            .find(|align| {
                // At an address and an offset that have this alignment and, but for the last, no greater one.
                let [first, second] = &mut pages;
                let piece = first.0.get_mut(*align..2 * align).unwrap_or(&mut second.0);
                let offset = if capacity >= 2 * *align as u64 { *align as u64 } else { 0 };
                // Other errors are the storage's, which took no offence at the alignment.
                !matches!(file.read_at(piece, offset), Err(error) if error.raw_os_error() == Some(libc::EINVAL))
            })
            .map(|align| Self { memory: align, offset: align })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;

    #[test]
    fn trying_agrees_with_being_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        fs::write(&path, [7; 16384]).unwrap();
        let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).unwrap();
        let tried = Alignment::tried(&file, 16384).unwrap();
        if let Some(told) = Alignment::told(&file) {
            let told = told.unwrap();
            assert_eq!(tried.offset, told.offset.max(told.memory));
        }
    }

    #[test]
    fn each_piece_has_to_fit() {
        let piece =
            |address: usize, len| libc::iovec { iov_base: std::ptr::without_provenance_mut(address), iov_len: len };
        let alignment = Alignment { memory: 4, offset: 512 };
        assert!(alignment.fits(&[]));
        assert!(alignment.fits(&[piece(4, 512), piece(4096, 4096)]));
        assert!(!alignment.fits(&[piece(4096, 4096), piece(2, 512)]), "address");
        assert!(!alignment.fits(&[piece(4096, 256), piece(4, 256)]), "length");
    }
}
