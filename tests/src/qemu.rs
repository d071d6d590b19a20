//! QEMU with the device `vfio-user-pci`, and the machines that it runs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::Progress;
use crate::cache::Cache;
use crate::debian::{Packages, Tree};
use crate::process::output;

const PROGRAM: &str = "qemu-system-x86_64";
const PACKAGES: Packages = Packages { names: &["qemu-system-x86"], backports: true };

/// A QEMU that has `vfio-user-pci`.
#[derive(Debug)]
pub(crate) struct Qemu {
    place: Place,
    version: String,
}

#[derive(Debug)]
enum Place {
    Installed(PathBuf),
    Fetched(Tree),
}

impl Qemu {
    /// The one that `$QEMU` names, or the installed one if it is new enough, or Debian's.
    pub(crate) fn find(cache: &Cache, progress: &Progress) -> Result<Self> {
        if let Some(program) = std::env::var_os("QEMU").filter(|program| !program.is_empty()) {
            // QEMU runs in another folder than we do.
            let path = PathBuf::from(program);
            let path = if path.components().count() > 1 { std::path::absolute(path)? } else { path };
            let place = Place::Installed(path);
            return Self::at(place).context("$QEMU names a QEMU that will not do; unset it to have one fetched");
        }
        if let Ok(qemu) = Self::at(Place::Installed(PROGRAM.into())) {
            return Ok(qemu);
        }
        let entry = cache
            .entry("qemu", &PACKAGES.manifest(), progress, |folder, downloads| {
                let tree = PACKAGES.install(folder, downloads, progress)?;
                Self::at(Place::Fetched(tree)).context("Debian's QEMU will not do").map(drop)
            })
            .context("cannot fetch QEMU; one that is installed (10.1 or newer) is used if $QEMU names it")?;
        Self::at(Place::Fetched(Tree::new(&entry)))
    }

    fn at(place: Place) -> Result<Self> {
        let mut qemu = Self { place, version: String::new() };
        let devices = output(qemu.command().args(["-device", "help"]))?;
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
            Place::Fetched(tree) => {
                let mut command = tree.command(&format!("usr/bin/{PROGRAM}"));
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

/// A virtual machine: q35, emulated (TCG), its memory shared with the server.
#[derive(Debug, Clone)]
pub struct Machine {
    cpus: u32,
    memory_mib: u32,
    memory: &'static str,
    kernel_arguments: String,
    devices: Vec<String>,
}

impl Default for Machine {
    fn default() -> Self {
        Self {
            cpus: 2,
            memory_mib: 512,
            memory: "memory-backend-memfd,share=on",
            kernel_arguments: "console=ttyS0 quiet panic=-1".to_owned(),
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

    /// With `cpus` processors.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
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

    /// With one more argument for the kernel.
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
        self.devices.push(device.to_owned());
        self
    }

    /// The arguments for QEMU, without its serial ports.
    pub(crate) fn arguments(&self, kernel: &Path, initramfs: &Path) -> Vec<String> {
        let mut arguments: Vec<String> =
            ["-no-user-config", "-nodefaults", "-no-reboot", "-display", "none"].map(str::to_owned).into();
        let mut option = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
        option("-machine", "q35,memory-backend=mem".to_owned());
        option("-accel", "tcg,thread=multi".to_owned());
        option("-cpu", "max".to_owned());
        option("-smp", self.cpus.to_string());
        option("-m", format!("{}M", self.memory_mib));
        option("-object", format!("{},id=mem,size={}M", self.memory, self.memory_mib));
        option("-kernel", kernel.to_string_lossy().into_owned());
        option("-initrd", initramfs.to_string_lossy().into_owned());
        option("-append", self.kernel_arguments.clone());
        for device in &self.devices {
            option("-device", device.clone());
        }
        arguments
    }
}
