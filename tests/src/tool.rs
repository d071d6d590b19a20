//! Programs that measure, or that are measured beside the server: the machine's own, or Debian's.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::Progress;
use crate::cache::Cache;
use crate::debian::{Architecture, Packages, Suite, Tree};
use crate::process::output;

/// One of Debian's programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tool {
    /// Valgrind, with callgrind.
    Valgrind,
    /// fio, the load generator.
    Fio,
    /// qemu-storage-daemon, which exports disks by vhost-user.
    QemuStorageDaemon,
    /// qemu-nbd, which exports images by NBD.
    QemuNbd,
    /// nbdkit, which exports anything by NBD; its plugins and filters are [`files`](Tool::file).
    Nbdkit,
    /// nbd-server, the oldest of them.
    NbdServer,
    /// qemu-img, which makes, checks and converts images.
    QemuImg,
    /// systemd-analyze, which says what is wrong with a unit.
    SystemdAnalyze,
}

impl Tool {
    /// The program, ready for its arguments: the installed one, or one that is fetched into the cache.
    ///
    /// # Errors
    /// When it is not installed and can't be fetched.
    pub fn command(self, progress: &Progress) -> Result<Command> {
        let name = self.name();
        if output(Command::new(name).arg("--version")).is_ok() {
            return Ok(Command::new(name));
        }
        let (tree, program) = (self.tree(progress)?, self.package().1);
        let mut command = tree.command(program);
        match self {
            // The launcher starts its tools from there.
            Self::Valgrind => command.env("VALGRIND_LIB", tree.path("usr/libexec/valgrind")),
            Self::QemuStorageDaemon | Self::QemuNbd | Self::QemuImg => {
                command.env("QEMU_MODULE_DIR", tree.path("usr/lib/x86_64-linux-gnu/qemu"))
            }
            Self::Fio | Self::Nbdkit | Self::NbdServer | Self::SystemdAnalyze => &mut command,
        };
        Ok(command)
    }

    /// A file of its package, by its path from the root: the machine's own if the program is.
    ///
    /// # Errors
    /// As [`command`](Self::command).
    pub fn file(self, path: &str, progress: &Progress) -> Result<PathBuf> {
        if output(Command::new(self.name()).arg("--version")).is_ok() {
            return Ok(Path::new("/").join(path));
        }
        Ok(self.tree(progress)?.path(path))
    }

    fn tree(self, progress: &Progress) -> Result<Tree> {
        let (name, packages) = (self.name(), self.package().0);
        let cache = Cache::open()?;
        let entry = cache
            .entry(name, &packages.manifest(), progress, |folder, downloads| {
                packages.install(folder, downloads, progress).map(drop)
            })
            .with_context(|| format!("{name} is not installed, and cannot be fetched from Debian"))?;
        Ok(Tree::new(&entry))
    }

    /// Its first line of `--version`.
    ///
    /// # Errors
    /// As [`command`](Self::command).
    pub fn version(self, progress: &Progress) -> Result<String> {
        let version = output(self.command(progress)?.arg("--version"))?;
        Ok(version.lines().next().unwrap_or_default().to_owned())
    }

    fn name(self) -> &'static str {
        match self {
            Self::Valgrind => "valgrind",
            Self::Fio => "fio",
            Self::QemuStorageDaemon => "qemu-storage-daemon",
            Self::QemuNbd => "qemu-nbd",
            Self::Nbdkit => "nbdkit",
            Self::NbdServer => "nbd-server",
            Self::QemuImg => "qemu-img",
            Self::SystemdAnalyze => "systemd-analyze",
        }
    }

    fn package(self) -> (Packages, &'static str) {
        let (names, suite, program): (&'static [&'static str], _, _) = match self {
            // What is called valgrind is a script that starts this one.
            Self::Valgrind => (&["valgrind"], Suite::Trixie, "usr/bin/valgrind.bin"),
            Self::Fio => (&["fio"], Suite::Trixie, "usr/bin/fio"),
            Self::QemuStorageDaemon => (&["qemu-utils"], Suite::TrixieBackports, "usr/bin/qemu-storage-daemon"),
            Self::QemuNbd => (&["qemu-utils"], Suite::TrixieBackports, "usr/bin/qemu-nbd"),
            Self::Nbdkit => (&["nbdkit"], Suite::Trixie, "usr/bin/nbdkit"),
            Self::NbdServer => (&["nbd-server"], Suite::Trixie, "usr/bin/nbd-server"),
            Self::QemuImg => (&["qemu-utils"], Suite::Trixie, "usr/bin/qemu-img"),
            Self::SystemdAnalyze => (&["systemd"], Suite::Trixie, "usr/bin/systemd-analyze"),
        };
        (Packages { names, suite, architecture: Architecture::Amd64 }, program)
    }
}
