//! The test bed: QEMU, a Linux guest and the server, run as child processes.
//!
//! ```text
//! cache      the folder that keeps what was fetched
//!  debian    packages unpacked into a folder, without root and without installing them
//!   debootstrap a Debian that a guest installs
//!   qemu     a QEMU with `vfio-user-pci`: the machine's own, or Debian's
//!   linux    the guests' kernels
//!   image    the guests' user space, as an initramfs and as a root file system
//!   firmware SeaBIOS, UEFI and U-Boot, and a disk that they boot from
//!   tool     what measures, and what others are measured with: valgrind, fio, qemu-storage-daemon
//! process    a child that dies with us, and the log of what it prints
//!  server    `vfio-user-blk serve`
//!  guest     QEMU running a guest and a script in it; `qmp` speaks to QEMU meanwhile
//!  console   QEMU running something that is spoken to by its serial port
//! ```
//!
//! A guest runs a shell script and tells what it sees by *facts*: lines `key value` on a serial port of their own,
//! where no kernel message can tear them apart. A test asserts on facts, never on prose.

mod cache;
mod console;
mod cpio;
mod debian;
mod debootstrap;
mod firmware;
mod guest;
mod image;
mod linux;
mod process;
mod progress;
mod qemu;
mod qmp;
mod server;
mod tool;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

pub use console::Console;
pub use firmware::ROOT_OFFSET;
pub use guest::Guest;
pub use linux::Linux;
pub use process::{Process, output};
pub use progress::{Progress, Step};
pub use qemu::{Firmware, Machine, vfio_user};
pub use qmp::Qmp;
pub use server::{Server, binary};
pub use tool::Tool;

use cache::Cache;
use debian::{Architecture, Tree};
use image::Image;
use linux::Kernel;
use qemu::{Qemu, Start};

/// Everything that a guest needs: QEMU and a guest are ready, what only some guests need is fetched when one does.
#[derive(Debug)]
pub struct Testbed {
    cache: Cache,
    progress: Progress,
    qemu: Qemu,
    tools: Tree,
}

impl Testbed {
    /// Finds QEMU and the guest in the cache, or fetches them.
    ///
    /// # Errors
    /// What could not be fetched, and what to do about it.
    pub fn open(progress: &Progress) -> Result<Self> {
        let (cache, progress) = (Cache::open()?, *progress);
        let qemu = Qemu::find(Architecture::Amd64, &cache, &progress)?;
        Kernel::find(Linux::default(), &cache, &progress)?;
        let tools = Image::find(Architecture::Amd64, &cache, &progress)?.tools();
        Ok(Self { cache, progress, qemu, tools })
    }

    /// Which QEMU this is: its version and where it comes from.
    #[must_use]
    pub fn qemu_version(&self) -> &str {
        self.qemu.version()
    }

    /// Boots `machine` and runs `script` in it. See [`Guest`].
    ///
    /// A machine with a [`Firmware`] runs the script of the disk that it boots from.
    ///
    /// # Errors
    /// When QEMU can't be started.
    pub fn boot(&self, machine: &Machine, script: &str) -> Result<Guest> {
        Guest::boot(self, machine, script)
    }

    /// Starts `machine`, whose firmware is spoken to by its serial port.
    ///
    /// # Errors
    /// When QEMU can't be started.
    pub fn console(&self, machine: &Machine) -> Result<Console> {
        Console::start(self, machine)
    }

    /// The shell command that boots `machine` to a shell on the terminal it is typed into.
    ///
    /// # Errors
    /// When the initramfs can't be written into `dir`, where it has to stay.
    pub fn shell_command(&self, machine: &Machine, dir: &Path) -> Result<String> {
        guest::shell_command(self, machine, dir)
    }

    /// Writes an ext4 file system to `path` that is a guest's root: busybox, e2fsprogs, fio, and about 300 MiB free.
    ///
    /// # Errors
    /// When its packages can't be fetched, or it can't be written.
    pub fn write_root(&self, linux: Linux, path: &Path) -> Result<()> {
        let image = Image::find(linux.architecture(), &self.cache, &self.progress)?;
        let root = image.root(&self.tools, &self.cache, &self.progress)?;
        fs::copy(root, path).with_context(|| format!("cannot write {}", path.display())).map(drop)
    }

    /// Writes a disk to `path` with a master boot record and GRUB, an EFI system partition (the first: GRUB again,
    /// `/vmlinuz` and `/initrd`) and a root file system (the second), on which `script` is run.
    ///
    /// # Errors
    /// When its packages can't be fetched, or it can't be written.
    pub fn write_boot_disk(&self, linux: Linux, script: &str, path: &Path) -> Result<()> {
        firmware::write_boot_disk(self, linux, script, path)
    }

    /// Writes an ext4 file system to `path` on which `init=/second-stage` installs a Debian (trixie, with systemd), which
    /// then boots to a login; root has no password, and `/packages` has all packages once more.
    ///
    /// # Errors
    /// When debootstrap can't be fetched or fails, or the file can't be written.
    pub fn write_debootstrap(&self, path: &Path) -> Result<()> {
        let root = debootstrap::first_stage(self)?;
        fs::copy(root, path).with_context(|| format!("cannot write {}", path.display())).map(drop)
    }

    /// Writes `linux` to `kernel` and an initramfs with `script` for it to `initramfs`.
    ///
    /// # Errors
    /// When its packages can't be fetched, or they can't be written.
    pub fn write_kernel(&self, linux: Linux, script: &str, kernel: &Path, initramfs: &Path) -> Result<()> {
        let found = Kernel::find(linux, &self.cache, &self.progress)?;
        let image = Image::find(linux.architecture(), &self.cache, &self.progress)?;
        fs::copy(found.image(), kernel).with_context(|| format!("cannot write {}", kernel.display()))?;
        image.write_initramfs(&found, initramfs, &guest::files(script))
    }

    /// `e2fsck` for the host, to check the image that a guest left.
    #[must_use]
    pub fn e2fsck(&self) -> Command {
        self.tools.command("usr/sbin/e2fsck")
    }

    /// `debugfs` for the host, to look into the ext4 image that a guest left.
    #[must_use]
    pub fn debugfs(&self) -> Command {
        self.tools.command("usr/sbin/debugfs")
    }

    fn qemu(&self, machine: &Machine) -> Result<Qemu> {
        Qemu::find(machine.started_by().0.architecture(), &self.cache, &self.progress)
    }

    /// What `machine` starts from, with `script`. Files may be made in `dir`.
    fn start(&self, machine: &Machine, script: &str, dir: &Path) -> Result<Start> {
        let (linux, firmware) = machine.started_by();
        match firmware {
            Some(firmware) => firmware::start(self, linux.architecture(), firmware),
            None => {
                let (kernel, initramfs): (PathBuf, PathBuf) = (dir.join("vmlinuz"), dir.join("initramfs"));
                self.write_kernel(linux, script, &kernel, &initramfs)?;
                Ok(Start::Kernel(kernel, initramfs))
            }
        }
    }
}
