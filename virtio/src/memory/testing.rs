//! Guest memory for the tests of this crate.

use std::fs::File;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{Access, GuestMemory, Mapping, MemoryFile, SharedTable};

/// A memory file of `len` zero bytes.
pub(crate) fn memory_file(len: u64) -> Arc<MemoryFile> {
    let file = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    Arc::new(MemoryFile::map(file).unwrap())
}

/// Guest memory of `len` bytes at `iova`, writable.
pub(crate) fn guest_memory(iova: u64, len: u64) -> GuestMemory {
    let shared = Arc::new(SharedTable::default());
    shared.map(Mapping::of_file(iova, len, Access::READ_WRITE, memory_file(len), 0).unwrap()).unwrap();
    GuestMemory::new(shared)
}
