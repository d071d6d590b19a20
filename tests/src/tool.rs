//! Programs that measure, or that are measured beside the server: the machine's own, or Debian's.

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
    /// qemu-img, which makes, checks and converts images.
    QemuImg,
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
        let (packages, program) = self.package();
        let cache = Cache::open()?;
        let entry = cache
            .entry(name, &packages.manifest(), progress, |folder, downloads| {
                packages.install(folder, downloads, progress).map(drop)
            })
            .with_context(|| format!("{name} is not installed, and cannot be fetched from Debian"))?;
        let tree = Tree::new(&entry);
        let mut command = tree.command(program);
        match self {
            // The launcher starts its tools from there.
            Self::Valgrind => command.env("VALGRIND_LIB", tree.path("usr/libexec/valgrind")),
            Self::QemuStorageDaemon | Self::QemuImg => {
                command.env("QEMU_MODULE_DIR", tree.path("usr/lib/x86_64-linux-gnu/qemu"))
            }
            Self::Fio => &mut command,
        };
        Ok(command)
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
            Self::QemuImg => "qemu-img",
        }
    }

    fn package(self) -> (Packages, &'static str) {
        let (names, suite, program): (&'static [&'static str], _, _) = match self {
            // What is called valgrind is a script that starts this one.
            Self::Valgrind => (&["valgrind"], Suite::Trixie, "usr/bin/valgrind.bin"),
            Self::Fio => (&["fio"], Suite::Trixie, "usr/bin/fio"),
            Self::QemuStorageDaemon => (&["qemu-utils"], Suite::TrixieBackports, "usr/bin/qemu-storage-daemon"),
            Self::QemuImg => (&["qemu-utils"], Suite::Trixie, "usr/bin/qemu-img"),
        };
        (Packages { names, suite, architecture: Architecture::Amd64 }, program)
    }
}
