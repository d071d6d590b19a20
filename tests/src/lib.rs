//! The test bed: QEMU, a Linux guest and the server, run as child processes.
//!
//! ```text
//! cache      the folder that keeps what was fetched
//!  debian    packages unpacked into a folder, without root and without installing them
//!   qemu     a QEMU with `vfio-user-pci`: the machine's own, or Debian's
//!   image    the guest: a kernel and an initramfs
//!   tool     what measures, and what others are measured with: valgrind, fio, qemu-storage-daemon
//! process    a child that dies with us, and the log of what it prints
//!  server    `vfio-user-blk serve`
//!  guest     QEMU running a guest and a script in it; `qmp` speaks to QEMU meanwhile
//! ```
//!
//! A guest runs a shell script and tells what it sees by *facts*: lines `key value` on a serial port of their own,
//! where no kernel message can tear them apart. A test asserts on facts, never on prose.

mod cache;
mod cpio;
mod debian;
mod guest;
mod image;
mod process;
mod progress;
mod qemu;
mod qmp;
mod server;
mod tool;

use std::process::Command;

use anyhow::Result;

pub use guest::Guest;
pub use process::{Process, output};
pub use progress::{Progress, Step};
pub use qemu::{Machine, vfio_user};
pub use qmp::Qmp;
pub use server::{Server, binary};
pub use tool::Tool;

/// Everything that a guest needs, fetched and ready.
#[derive(Debug)]
pub struct Testbed {
    qemu: qemu::Qemu,
    image: image::Image,
}

impl Testbed {
    /// Finds QEMU and the guest in the cache, or fetches them.
    ///
    /// # Errors
    /// What could not be fetched, and what to do about it.
    pub fn open(progress: &Progress) -> Result<Self> {
        let cache = cache::Cache::open()?;
        Ok(Self { qemu: qemu::Qemu::find(&cache, progress)?, image: image::Image::find(&cache, progress)? })
    }

    /// Which QEMU this is: its version and where it comes from.
    #[must_use]
    pub fn qemu_version(&self) -> &str {
        self.qemu.version()
    }

    /// Boots `machine` and runs `script` in it. See [`Guest`].
    ///
    /// # Errors
    /// When QEMU can't be started.
    pub fn boot(&self, machine: &Machine, script: &str) -> Result<Guest> {
        Guest::boot(self, machine, script)
    }

    /// The shell command that boots `machine` to a shell on the terminal it is typed into.
    ///
    /// # Errors
    /// When the initramfs can't be written into `dir`, where it has to stay.
    pub fn shell_command(&self, machine: &Machine, dir: &std::path::Path) -> Result<String> {
        guest::shell_command(self, machine, dir)
    }

    /// `e2fsck` for the host, to check the image that a guest left.
    #[must_use]
    pub fn e2fsck(&self) -> Command {
        self.image.tools().command("usr/sbin/e2fsck")
    }
}
