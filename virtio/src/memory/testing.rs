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

/// A table with `len` bytes at `iova`, writable.
pub(crate) fn guest_table(iova: u64, len: u64) -> Arc<SharedTable> {
    let shared = Arc::new(SharedTable::default());
    shared.map(Mapping::of_file(iova, len, Access::READ_WRITE, memory_file(len), 0).unwrap()).unwrap();
    shared
}

/// A view of such a table.
pub(crate) fn guest_memory(iova: u64, len: u64) -> GuestMemory {
    GuestMemory::new(guest_table(iova, len))
}
