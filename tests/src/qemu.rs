//! QEMU with the device `vfio-user-pci`, and the machines that it runs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::Linux;
use crate::Progress;
use crate::cache::Cache;
use crate::debian::{Architecture, Packages, Suite, Tree};
use crate::process::output;

/// A QEMU that has `vfio-user-pci`.
#[derive(Debug)]
pub(crate) struct Qemu {
    place: Place,
    version: String,
}

#[derive(Debug)]
enum Place {
    Installed(PathBuf),
    Fetched(Tree, &'static str),
}

/// The program that emulates machines of `architecture`, the variable that names another one, and Debian's package.
fn program(architecture: Architecture) -> (&'static str, &'static str, Packages) {
    let (program, variable, names): (_, _, &'static [&'static str]) = match architecture {
        Architecture::Amd64 => ("qemu-system-x86_64", "QEMU", &["qemu-system-x86"]),
        Architecture::Arm64 => ("qemu-system-aarch64", "QEMU_AARCH64", &["qemu-system-arm"]),
    };
    (program, variable, Packages { names, suite: Suite::TrixieBackports, architecture: Architecture::Amd64 })
}

impl Qemu {
    /// The one that `$QEMU` (or `$QEMU_AARCH64`) names, or the installed one if it is new enough, or Debian's.
    pub(crate) fn find(architecture: Architecture, cache: &Cache, progress: &Progress) -> Result<Self> {
        let (program, variable, packages) = program(architecture);
        if let Some(program) = std::env::var_os(variable).filter(|program| !program.is_empty()) {
            // QEMU runs in another folder than we do.
            let path = PathBuf::from(program);
            let path = if path.components().count() > 1 { std::path::absolute(path)? } else { path };
            return Self::at(Place::Installed(path))
                .with_context(|| format!("${variable} names a QEMU that will not do; unset it to have one fetched"));
        }
        if let Ok(qemu) = Self::at(Place::Installed(program.into())) {
            return Ok(qemu);
        }
        let entry = cache
            .entry("qemu", &packages.manifest(), progress, |folder, downloads| {
                let tree = packages.install(folder, downloads, progress)?;
                Self::at(Place::Fetched(tree, program)).context("Debian's QEMU will not do").map(drop)
            })
            .with_context(|| {
                format!("cannot fetch QEMU; one that is installed (10.1 or newer) is used if ${variable} names it")
            })?;
        Self::at(Place::Fetched(Tree::new(&entry), program))
    }

    fn at(place: Place) -> Result<Self> {
        let mut qemu = Self { place, version: String::new() };
        let devices = output(qemu.command().args(["-machine", "none", "-device", "help"]))?;
        ensure!(devices.contains("\"vfio-user-pci\""), "it has no device vfio-user-pci, which QEMU has since 10.1");
        // "QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1~bpo13+1)"
        let version = output(qemu.command().arg("--version"))?;
        let Some(version) = version.lines().next().and_then(|line| line.split("version ").nth(1)) else {
            bail!("it does not tell its version: {version:?}")
        };
        version.clone_into(&mut qemu.version);
        Ok(qemu)
    }

    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    pub(crate) fn command(&self) -> Command {
        match &self.place {
            Place::Installed(program) => Command::new(program),
            Place::Fetched(tree, program) => {
                let mut command = tree.command(&format!("usr/bin/{program}"));
                for firmware in ["usr/share/qemu", "usr/share/seabios"] {
                    command.arg("-L").arg(tree.path(firmware));
                }
                command.env("QEMU_MODULE_DIR", tree.path("usr/lib/x86_64-linux-gnu/qemu"));
                command
            }
        }
    }
}

/// QEMU's device for the vfio-user server on the UNIX socket `socket`, as `device_add` takes it.
#[must_use]
pub fn vfio_user(socket: &Path) -> Value {
    json!({ "driver": "vfio-user-pci", "socket": { "type": "unix", "path": socket.to_string_lossy() } })
}

/// Where a machine's first instructions come from, before any operating system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Firmware {
    /// The BIOS: it loads the master boot record of a disk.
    SeaBios,
    /// UEFI (OVMF, or AAVMF for 64-bit ARM): it loads a program of a disk's EFI system partition.
    Uefi,
    /// U-Boot: it does what is typed on its console.
    UBoot,
}

/// What a machine starts from.
pub(crate) enum Start {
    /// QEMU loads a kernel and its initramfs into memory.
    Kernel(PathBuf, PathBuf),
    /// The machine's own firmware, SeaBIOS.
    Disk,
    /// A firmware of this file.
    Bios(PathBuf),
}

/// A virtual machine: q35, or virt for 64-bit ARM; emulated (TCG), its memory shared with the server.
#[derive(Debug, Clone)]
pub struct Machine {
    linux: Linux,
    firmware: Option<Firmware>,
    cpus: u32,
    memory_mib: u32,
    /// How much memory may be plugged in.
    more_memory_mib: u32,
    memory: &'static str,
    reboots: bool,
    kernel_arguments: String,
    /// Names and values of options, in the order that QEMU takes them in.
    devices: Vec<(&'static str, String)>,
}

impl Default for Machine {
    fn default() -> Self {
        Self {
            linux: Linux::default(),
            firmware: None,
            cpus: 2,
            memory_mib: 512,
            more_memory_mib: 0,
            memory: "memory-backend-memfd,share=on",
            reboots: false,
            kernel_arguments: String::new(),
            devices: Vec::new(),
        }
    }
}

impl Machine {
    /// Two processors and 512 MiB, no device.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// That runs `linux`, on the processors that it is made for.
    #[must_use]
    pub fn linux(mut self, linux: Linux) -> Self {
        self.linux = linux;
        self
    }

    /// That starts from its disks by this firmware, and not from a kernel that QEMU loads: from
    /// [`Testbed::write_boot_disk`](crate::Testbed::write_boot_disk)'s.
    #[must_use]
    pub fn firmware(mut self, firmware: Firmware) -> Self {
        self.firmware = Some(firmware);
        self
    }

    /// With `cpus` processors.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// With `mib` MiB of memory.
    #[must_use]
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// With slots for `mib` MiB of memory that may be plugged in.
    #[must_use]
    pub fn more_memory_mib(mut self, mib: u32) -> Self {
        self.more_memory_mib = mib;
        self
    }

    /// With memory in a file that only QEMU writes: what an operator gets who forgets `share=on`.
    #[must_use]
    pub fn private_memory(mut self) -> Self {
        self.memory = "memory-backend-memfd,share=off";
        self
    }

    /// With memory that is no file, so that the server gets none of it.
    #[must_use]
    pub fn anonymous_memory(mut self) -> Self {
        self.memory = "memory-backend-ram";
        self
    }

    /// That boots again when its guest asks for that; otherwise QEMU ends then.
    #[must_use]
    pub fn reboots(mut self) -> Self {
        self.reboots = true;
        self
    }

    /// With one more argument for the kernel. `root=/dev/vda` makes a [root file system](crate::Testbed::write_root) on
    /// the first disk the guest's own.
    #[must_use]
    pub fn kernel_argument(mut self, argument: &str) -> Self {
        self.kernel_arguments = format!("{} {argument}", self.kernel_arguments);
        self
    }

    /// With the device that a vfio-user server has on the UNIX socket `socket`.
    #[must_use]
    pub fn vfio_user(self, socket: &Path) -> Self {
        self.device(&vfio_user(socket).to_string())
    }

    /// With a device, in the words of QEMU's option `-device`.
    #[must_use]
    pub fn device(mut self, device: &str) -> Self {
        self.devices.push(("-device", device.to_owned()));
        self
    }

    /// With QEMU's own virtio-blk on `image`: direct I/O by io_uring, and as many queues as there are processors. The
    /// image may be that of a server, as long as only one of both is used at a time; `serial` tells the guest which is
    /// which.
    #[must_use]
    pub fn qemu_disk(mut self, image: &Path, serial: &str) -> Self {
        let node = format!("disk{}", self.devices.len());
        let disk = json!({
            "driver": "raw", "node-name": node, "cache": { "direct": true },
            "file": {
                "driver": "file", "filename": image.to_string_lossy(), "aio": "io_uring", "locking": "off",
                "cache": { "direct": true },
            },
        });
        self.devices.push(("-blockdev", disk.to_string()));
        self.device(&format!("virtio-blk-pci,drive={node},serial={serial}"))
    }

    pub(crate) fn started_by(&self) -> (Linux, Option<Firmware>) {
        (self.linux, self.firmware)
    }

    /// The arguments for QEMU, without its serial ports.
    pub(crate) fn arguments(&self, start: &Start) -> Vec<String> {
        let mut arguments: Vec<String> =
            ["-no-user-config", "-nodefaults", "-display", "none"].map(str::to_owned).into();
        if !self.reboots {
            arguments.push("-no-reboot".to_owned());
        }
        let mut option = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
        let machine = match self.linux.architecture() {
            Architecture::Amd64 => "q35",
            // With an interrupt translation service, which message-signalled interrupts go through.
            Architecture::Arm64 => "virt,gic-version=3",
        };
        option("-machine", format!("{machine},memory-backend=mem"));
        option("-accel", "tcg,thread=multi".to_owned());
        option("-cpu", "max".to_owned());
        option("-smp", self.cpus.to_string());
        option(
            "-m",
            match self.more_memory_mib {
                0 => format!("{}M", self.memory_mib),
                more => format!("{}M,slots=8,maxmem={}M", self.memory_mib, self.memory_mib + more),
            },
        );
        option("-object", format!("{},id=mem,size={}M", self.memory, self.memory_mib));
        match start {
            Start::Kernel(kernel, initramfs) => {
                option("-kernel", kernel.to_string_lossy().into_owned());
                option("-initrd", initramfs.to_string_lossy().into_owned());
                option("-append", format!("{}{}", kernel_arguments(self.linux), self.kernel_arguments));
            }
            Start::Disk => {}
            Start::Bios(file) => option("-bios", file.to_string_lossy().into_owned()),
        }
        for (name, value) in &self.devices {
            option(name, value.clone());
        }
        arguments
    }
}

/// What every kernel is told.
pub(crate) fn kernel_arguments(linux: Linux) -> String {
    let more = match linux.architecture() {
        // On a busy host, an emulated timer is so late that Linux gives up: "IO-APIC + timer doesn't work".
        Architecture::Amd64 => "console=ttyS0 no_timer_check",
        Architecture::Arm64 => "console=ttyAMA0",
    };
    format!("{more} quiet panic=-1")
}
