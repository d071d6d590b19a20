//! Doorbells that a client maps in place of sending messages.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use pci::Region;
use virtio::transport::VirtioPci;

/// The unit of mappings, in bytes.
const PAGE: u64 = 4096;

/// A page of memory where the notify window is: a driver that writes there wakes nobody.
///
/// It is for devices whose workers never sleep, and so look at `avail.idx` itself all the time: what lands in the page need
/// not even be read. The driver's kick is then a store, where it would be a message.
pub(crate) struct DoorbellPage {
    file: File,
    region: Region,
    offset: u64,
}

impl DoorbellPage {
    /// A page for all queues of a function.
    ///
    /// # Errors
    /// If the system refuses.
    pub(crate) fn new(function: &VirtioPci) -> io::Result<Self> {
        let (region, offset) = function.notify_address(0).ok_or(io::ErrorKind::NotFound)?;
        let offset = offset - offset % PAGE;
        let file = File::from(memfd_create(c"doorbells", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
        // A client maps the file as if it were the region: the pages before are there, and nobody ever touches them.
        file.set_len(offset + PAGE)?;
        // It is each client's in turn: none may leave more in it than there was.
        let seals = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(io::Error::from)?;
        Ok(Self { file, region, offset })
    }

    /// Where it lies in `region`, in bytes: offset and size; `None` in any other region.
    pub(crate) fn span(&self, region: Region) -> Option<(u64, u64)> {
        (region == self.region).then_some((self.offset, PAGE))
    }
}

impl AsFd for DoorbellPage {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
