//! The guest: Debian's cloud kernel, and an initramfs of busybox, mkfs.ext4, fio and what the kernel lacks.
//!
//! The cloud kernel boots everything that a virtual machine has by what is built into it, virtio-pci and ext4 included;
//! only the block driver is a module. The initramfs has no /init: each guest appends an archive with its own.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::Progress;
use crate::cache::Cache;
use crate::cpio::Archive;
use crate::debian::{Packages, Tree};

const PACKAGES: Packages =
    Packages { names: &["busybox-static", "e2fsprogs", "fio", "linux-image-cloud-amd64"], backports: false };

/// What goes into /bin, besides busybox.
const PROGRAMS: [&str; 2] = ["usr/bin/fio", "usr/sbin/mkfs.ext4"];

/// Modules of the kernel's `kernel/` folder, in the order in which they have to be loaded. They need no others.
const MODULES: [&str; 1] = ["drivers/block/virtio_blk.ko.xz"];

/// The folders that the guest's /init mounts something on, or a script may.
const FOLDERS: [&str; 6] = ["proc", "sys", "dev", "tmp", "mnt", "var/log"];

#[derive(Debug)]
pub(crate) struct Image {
    tools: Tree,
    kernel: PathBuf,
    initramfs: PathBuf,
}

impl Image {
    pub(crate) fn find(cache: &Cache, progress: &Progress) -> Result<Self> {
        let contents = [PROGRAMS.as_slice(), &MODULES, &FOLDERS].concat().join(" ");
        let manifest = format!("{}initramfs: {contents}\n", PACKAGES.manifest());
        let entry = cache.entry("guest", &manifest, progress, |folder, downloads| {
            let tree = PACKAGES.install(&folder.join("tree"), downloads, progress)?;
            let step = progress.step("making the guest's initramfs");
            let kernel = only_entry(&tree.path("boot"), "vmlinuz-")?;
            fs::copy(&kernel, folder.join("vmlinuz")).context("cannot copy the guest's kernel")?;
            write_initramfs(&tree, &folder.join("initramfs"))?;
            step.done("done");
            Ok(())
        })?;
        Ok(Self {
            tools: Tree::new(&entry.join("tree")),
            kernel: entry.join("vmlinuz"),
            initramfs: entry.join("initramfs"),
        })
    }

    /// The guest's packages, whose programs run on the host too.
    pub(crate) fn tools(&self) -> &Tree {
        &self.tools
    }

    pub(crate) fn kernel(&self) -> &Path {
        &self.kernel
    }

    /// Writes an initramfs to `path` in which `files` (path, permissions, text) are added to what every guest has.
    pub(crate) fn write_initramfs(&self, path: &Path, files: &[(&str, u32, &str)]) -> Result<()> {
        let write = || {
            fs::copy(&self.initramfs, path)?;
            let mut archive = Archive::new(File::options().append(true).open(path)?);
            for (name, permissions, text) in files {
                archive.file(name, *permissions, text.as_bytes())?;
            }
            archive.finish()
        };
        write().with_context(|| format!("cannot write {}", path.display())).map(drop)
    }
}

fn write_initramfs(tree: &Tree, path: &Path) -> Result<()> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    let mut archive = Archive::new(BufWriter::new(file));
    for folder in FOLDERS {
        archive.folder(folder)?;
    }
    archive.file("bin/busybox", 0o755, &read(&tree.path("usr/bin/busybox"))?)?;
    archive.link("bin/sh", "busybox")?;
    let mut libraries = std::collections::BTreeMap::new();
    for program in PROGRAMS {
        let name = program.rsplit('/').next().unwrap_or(program);
        archive.file(&format!("bin/{name}"), 0o755, &read(&tree.path(program))?)?;
        libraries.extend(tree.libraries(program)?);
    }
    for (name, path) in &libraries {
        // The programs name their loader by its path; the loader looks for the libraries in /lib.
        let folder = if name.starts_with("ld-linux") { "lib64" } else { "lib" };
        archive.file(&format!("{folder}/{name}"), 0o755, &read(path)?)?;
    }
    let modules = only_entry(&tree.path("usr/lib/modules"), "")?.join("kernel");
    for (order, module) in MODULES.iter().enumerate() {
        let name = module.rsplit('/').next().unwrap_or(module);
        archive.file(&format!("lib/modules/{order}-{name}"), 0o644, &read(&modules.join(module))?)?;
    }
    archive.finish().with_context(|| format!("cannot write {}", path.display()))?;
    Ok(())
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
