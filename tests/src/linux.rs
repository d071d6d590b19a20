//! The guests' kernels: Debian's, of the flavour for clouds.
//!
//! They boot everything that a virtual machine has by what is built into them, PCI and ext4 included; modules are only
//! the block driver and, in older ones, virtio itself.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::Progress;
use crate::cache::Cache;
use crate::cpio::Archive;
use crate::debian::{Architecture, Packages, Suite, Tree};

/// Modules of the kernel's folder `kernel/drivers`, in the order in which they have to be loaded, without their
/// extension. Those that a kernel has not, it has built in.
const MODULES: [&str; 6] = [
    "virtio/virtio",
    "virtio/virtio_ring",
    "virtio/virtio_pci_legacy_dev",
    "virtio/virtio_pci_modern_dev",
    "virtio/virtio_pci",
    "block/virtio_blk",
];

/// A Linux that a guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Linux {
    /// 6.1, of bookworm.
    Bookworm,
    /// 6.12, of trixie.
    #[default]
    Trixie,
    /// The newest, of trixie-backports.
    Backports,
    /// 6.12 for 64-bit ARM, of trixie.
    Arm64,
}

impl Linux {
    pub(crate) fn architecture(self) -> Architecture {
        match self {
            Self::Bookworm | Self::Trixie | Self::Backports => Architecture::Amd64,
            Self::Arm64 => Architecture::Arm64,
        }
    }

    fn packages(self) -> Packages {
        let (name, suite): (&'static [&'static str], _) = match self {
            Self::Bookworm => (&["linux-image-cloud-amd64"], Suite::Bookworm),
            Self::Trixie => (&["linux-image-cloud-amd64"], Suite::Trixie),
            Self::Backports => (&["linux-image-cloud-amd64"], Suite::TrixieBackports),
            Self::Arm64 => (&["linux-image-cloud-arm64"], Suite::Trixie),
        };
        Packages { names: name, suite, architecture: self.architecture() }
    }
}

/// A kernel, and its modules as an archive for an initramfs.
#[derive(Debug)]
pub(crate) struct Kernel {
    entry: PathBuf,
}

impl Kernel {
    pub(crate) fn find(linux: Linux, cache: &Cache, progress: &Progress) -> Result<Self> {
        let packages = linux.packages();
        let manifest = format!("{}modules: {}\n", packages.manifest(), MODULES.join(" "));
        let entry = cache.entry("linux", &manifest, progress, |folder, downloads| {
            let root = folder.join("tree");
            extract(&packages.install(&root, downloads, progress)?, folder)?;
            fs::remove_dir_all(&root).with_context(|| format!("cannot remove {}", root.display()))
        })?;
        Ok(Self { entry })
    }

    /// The kernel as QEMU and boot loaders load it.
    pub(crate) fn image(&self) -> PathBuf {
        self.entry.join("vmlinuz")
    }

    /// The archive of its modules, in `/lib/modules`, named in the order of loading.
    pub(crate) fn modules(&self) -> PathBuf {
        self.entry.join("modules")
    }
}

/// Takes the kernel and the modules out of the packages' `tree`.
fn extract(tree: &Tree, folder: &Path) -> Result<()> {
    let modules = ["usr/lib/modules", "lib/modules"].map(|path| tree.path(path)).into_iter().find(|path| path.is_dir());
    let modules = only_entry(&modules.context("the kernel's packages have no modules")?, "")?;
    let image = match only_entry(&tree.path("boot"), "vmlinuz-") {
        Ok(image) => image,
        Err(_) => only_entry(&modules, "vmlinuz")?,
    };
    fs::copy(&image, folder.join("vmlinuz")).with_context(|| format!("cannot copy {}", image.display()))?;

    let write = || -> Result<()> {
        let mut archive = Archive::new(File::create(folder.join("modules"))?);
        for (order, module) in MODULES.iter().enumerate() {
            let (group, name) = module.split_once('/').unwrap_or_default();
            // Compressed or not.
            let Ok(file) = only_entry(&modules.join("kernel/drivers").join(group), &format!("{name}.ko")) else {
                continue;
            };
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            archive.file(&format!("lib/modules/{order}-{name}"), 0o644, &fs::read(&file)?)?;
        }
        archive.finish()?;
        Ok(())
    };
    write().context("cannot write the archive of the kernel's modules")
}

/// The one entry of `folder` whose name begins with `prefix`: kernels have their version in their names.
fn only_entry(folder: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot read {}", folder.display()))?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            found.push(entry.path());
        }
    }
    match <[PathBuf; 1]>::try_from(found) {
        Ok([path]) => Ok(path),
        Err(found) => bail!("{}: {} entries begin with {prefix:?}, not one", folder.display(), found.len()),
    }
}
