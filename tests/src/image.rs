//! The guests' user space: busybox, e2fsprogs, fio and kexec, as an initramfs and as a root file system.
//!
//! The initramfs has no /init: each guest appends archives with its kernel's modules, its own /init and its script. A
//! guest of another architecture than ours has only busybox in it, and all else in its root file system.

use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::Progress;
use crate::cache::Cache;
use crate::cpio::Archive;
use crate::debian::{Architecture, Packages, Suite, Tree};
use crate::linux::Kernel;
use crate::process::run;

const PACKAGES: &[&str] = &["busybox-static", "e2fsprogs", "fio", "kexec-tools"];

/// What goes into the initramfs' /bin, besides busybox.
const PROGRAMS: [&str; 3] = ["usr/bin/fio", "usr/sbin/kexec", "usr/sbin/mkfs.ext4"];

/// The folders that the guest's /init mounts something on, or a script may.
const FOLDERS: [&str; 6] = ["proc", "sys", "dev", "tmp", "mnt", "var/log"];

/// The links of a merged /usr, which programs name their loader by.
const LINKS: [&str; 4] = ["bin", "lib", "lib64", "sbin"];

/// The size of a root file system: its contents, and about 300 MiB for a script.
const ROOT_SIZE: &str = "640M";

#[derive(Debug)]
pub(crate) struct Image {
    architecture: Architecture,
    entry: PathBuf,
}

impl Image {
    pub(crate) fn find(architecture: Architecture, cache: &Cache, progress: &Progress) -> Result<Self> {
        let packages = Packages { names: PACKAGES, suite: Suite::Trixie, architecture };
        let programs = match architecture {
            Architecture::Amd64 => PROGRAMS.as_slice(),
            // Which libraries they need, only their loader tells.
            Architecture::Arm64 => &[],
        };
        let contents = [programs, &FOLDERS].concat().join(" ");
        let manifest = format!("{}initramfs: {contents}\n", packages.manifest());
        let entry = cache.entry("guest", &manifest, progress, |folder, downloads| {
            let tree = packages.install(&folder.join("tree"), downloads, progress)?;
            write_initramfs(&tree, &[], &folder.join("busybox"))?;
            write_initramfs(&tree, programs, &folder.join("initramfs"))
        })?;
        Ok(Self { architecture, entry })
    }

    /// The packages. The programs of those for our architecture run on the host too.
    pub(crate) fn tools(&self) -> Tree {
        Tree::new(&self.entry.join("tree"))
    }

    /// Writes an initramfs for `kernel` to `path`, with `files` (path, permissions, text).
    pub(crate) fn write_initramfs(&self, kernel: &Kernel, path: &Path, files: &[(&str, u32, &str)]) -> Result<()> {
        append(&self.entry.join("initramfs"), kernel, path, files)
    }

    /// Writes a small one, for a guest that only looks for its root file system.
    pub(crate) fn write_busybox_initramfs(
        &self,
        kernel: &Kernel,
        path: &Path,
        files: &[(&str, u32, &str)],
    ) -> Result<()> {
        append(&self.entry.join("busybox"), kernel, path, files)
    }

    /// A root file system (ext4, in a file) of the packages, for a guest that has the script from its initramfs. `tools`
    /// are those for the host.
    pub(crate) fn root(&self, tools: &Tree, cache: &Cache, progress: &Progress) -> Result<PathBuf> {
        let packages = self.entry.file_name().unwrap_or_default().to_string_lossy();
        let manifest = format!("{packages}\n{ROOT_SIZE} {FOLDERS:?} {LINKS:?}\n");
        let name = match self.architecture {
            Architecture::Amd64 => "root-amd64",
            Architecture::Arm64 => "root-arm64",
        };
        let entry = cache.entry(name, &manifest, progress, |folder, _| {
            let step = progress.step("making a root file system");
            let tree = self.tools();
            for path in FOLDERS {
                fs::create_dir_all(tree.path(path)).context("cannot complete the packages' tree")?;
            }
            for link in LINKS.into_iter().filter(|link| !tree.path(link).exists()) {
                fs::create_dir_all(tree.path("usr").join(link))?;
                symlink(format!("usr/{link}"), tree.path(link)).context("cannot complete the packages' tree")?;
            }
            let mut mkfs: Command = tools.command("usr/sbin/mkfs.ext4");
            mkfs.arg("-q").arg("-d").arg(tree.path("")).arg(folder.join("root.ext4")).arg(ROOT_SIZE);
            run(&mkfs, |_| {}).context("cannot make a root file system")?;
            step.done("done");
            Ok(())
        })?;
        Ok(entry.join("root.ext4"))
    }
}

/// Writes `initramfs`, the kernel's modules and `files` to `path`.
fn append(initramfs: &Path, kernel: &Kernel, path: &Path, files: &[(&str, u32, &str)]) -> Result<()> {
    let write = || {
        fs::copy(initramfs, path)?;
        let mut out = File::options().append(true).open(path)?;
        io::copy(&mut File::open(kernel.modules())?, &mut out)?;
        let mut archive = Archive::new(out);
        for (name, permissions, text) in files {
            archive.file(name, *permissions, text.as_bytes())?;
        }
        archive.finish()
    };
    write().with_context(|| format!("cannot write {}", path.display())).map(drop)
}

fn write_initramfs(tree: &Tree, programs: &[&str], path: &Path) -> Result<()> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    let mut archive = Archive::new(BufWriter::new(file));
    for folder in FOLDERS {
        archive.folder(folder)?;
    }
    archive.file("bin/busybox", 0o755, &read(&tree.path("usr/bin/busybox"))?)?;
    archive.link("bin/sh", "busybox")?;
    let mut libraries = std::collections::BTreeMap::new();
    for program in programs {
        let name = program.rsplit('/').next().unwrap_or(program);
        archive.file(&format!("bin/{name}"), 0o755, &read(&tree.path(program))?)?;
        libraries.extend(tree.libraries(program)?);
    }
    for (name, path) in &libraries {
        // The programs name their loader by its path; the loader looks for the libraries in /lib.
        let folder = if name.starts_with("ld-linux") { "lib64" } else { "lib" };
        archive.file(&format!("{folder}/{name}"), 0o755, &read(path)?)?;
    }
    archive.finish().with_context(|| format!("cannot write {}", path.display()))?;
    Ok(())
}
