//! Debian packages unpacked into a folder: no root, nothing installed.
//!
//! apt-get resolves and downloads into a state of its own, `dpkg-deb -x` unpacks, and the programs run by the folder's
//! own dynamic loader, so that a program of a newer release runs on an older one. The mirror is the one that this
//! machine's apt uses; which of its sources is Debian's, the signature of Debian's archive decides.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::Progress;
use crate::process::{output, run};
use crate::progress::Step;

pub(crate) const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const LOADER: &str = "usr/lib64/ld-linux-x86-64.so.2";
/// Ceph keeps some of its libraries, which fio needs, to itself; and so does systemd.
const LIBRARIES: [&str; 3] =
    ["usr/lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/ceph", "usr/lib/x86_64-linux-gnu/systemd"];

/// A part of Debian's archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Suite {
    Bookworm,
    Trixie,
    TrixieBackports,
}

impl Suite {
    fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
            Self::TrixieBackports => "trixie-backports",
        }
    }

    /// The suites that packages of this one may depend on, besides itself.
    fn sources(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie | Self::TrixieBackports => "trixie trixie-backports",
        }
    }
}

/// What the programs of a package run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Architecture {
    Amd64,
    Arm64,
}

impl Architecture {
    fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }
}

/// The packages of a tree, with all that they depend on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Packages {
    pub(crate) names: &'static [&'static str],
    pub(crate) suite: Suite,
    pub(crate) architecture: Architecture,
}

impl Packages {
    /// What the tree is made of.
    pub(crate) fn manifest(&self) -> String {
        let architecture = match self.architecture {
            Architecture::Amd64 => String::new(),
            other => format!(" {}", other.name()),
        };
        format!("{}{architecture}: {}\n", self.suite.name(), self.names.join(" "))
    }

    /// Fetches the packages and unpacks them into `tree`. `downloads` holds what a later run can use again.
    pub(crate) fn install(&self, tree: &Path, downloads: &Path, progress: &Progress) -> Result<Tree> {
        ensure!(cfg!(target_arch = "x86_64"), "the packages are for x86-64 machines, and this is none");
        let apt = Apt::update(downloads, self, progress)?;
        let step = progress.step(format!("fetching {} from Debian {}", self.names.join(", "), self.suite.name()));
        apt.download(self, &step)?;
        step.done("done");
        let archives = apt.archives()?;
        let step = progress.step(format!("unpacking {} packages", archives.len()));
        for (done, archive) in archives.iter().enumerate() {
            step.advance(done as u64, archives.len() as u64);
            run(Command::new("dpkg-deb").arg("-x").arg(archive).arg(tree), |_| {})?;
        }
        // They have served their purpose, and are as large as the tree is.
        for archive in &archives {
            fs::remove_file(archive).with_context(|| format!("cannot remove {}", archive.display()))?;
        }
        step.done("done");
        Ok(Tree::new(tree))
    }
}

/// A folder that packages were unpacked into.
#[derive(Debug)]
pub(crate) struct Tree {
    root: PathBuf,
}

impl Tree {
    pub(crate) fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// Runs the tree's `program` with the tree's libraries.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = self.loader();
        command.arg(self.path(program));
        command
    }

    /// The libraries that `program` loads: the name it asks for, and the file.
    pub(crate) fn libraries(&self, program: &str) -> Result<Vec<(String, PathBuf)>> {
        let listing = output(self.loader().arg("--list").arg(self.path(program)))?;
        // "libz.so.1 => /tree/usr/lib/x86_64-linux-gnu/libz.so.1 (0x00007f0f3c2e1000)"; others are not files.
        let library = |line: &str| {
            let (name, rest) = line.trim().split_once(" => ")?;
            let (path, _address) = rest.rsplit_once(" (")?;
            let name = name.rsplit('/').next()?;
            Some((name.to_owned(), PathBuf::from(path)))
        };
        Ok(listing.lines().filter_map(library).collect())
    }

    fn loader(&self) -> Command {
        let mut command = Command::new(self.path(LOADER));
        let libraries = LIBRARIES.map(|path| self.path(path).to_string_lossy().into_owned());
        command.arg("--library-path").arg(libraries.join(":"));
        command
    }
}

/// apt-get with a state of its own.
struct Apt {
    root: PathBuf,
    architecture: &'static str,
}

impl Apt {
    /// Reads the package lists from the first of this machine's mirrors that has Debian's.
    fn update(root: &Path, packages: &Packages, progress: &Progress) -> Result<Self> {
        ensure!(Path::new(KEYRING).exists(), "{KEYRING} is missing: install the package debian-archive-keyring");
        for folder in ["state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(root.join(folder)).with_context(|| format!("cannot create {}", root.display()))?;
        }
        fs::write(root.join("status"), "").context("cannot write apt's status file")?;
        let architecture = packages.architecture.name();
        let suites = packages.suite.sources();
        let apt = Self { root: root.to_owned(), architecture };
        let step = progress.step("reading Debian's package lists");
        let mut failures = String::new();
        for mirror in mirrors()? {
            let sources = format!(
                "Types: deb\nURIs: {mirror}\nSuites: {suites}\nComponents: main\n\
                 Architectures: {architecture}\nSigned-By: {KEYRING}\nTargets: Packages\n"
            );
            fs::write(apt.sources(), sources).context("cannot write apt's sources")?;
            match run(apt.get("update").arg("--error-on=any"), |_| {}) {
                Ok(()) => {
                    step.done("done");
                    return Ok(apt);
                }
                Err(error) => failures = format!("{failures}\n{mirror}: {error}"),
            }
        }
        bail!("no mirror of this machine's apt configuration gave Debian {suites}: is the network up?{failures}")
    }

    fn download(&self, packages: &Packages, step: &Step) -> Result<()> {
        let mut command = self.get("install");
        command
            .args(["--yes", "--download-only", "--no-install-recommends", "-o", "APT::Status-Fd=1"])
            .args(["--target-release", packages.suite.name()])
            .args(packages.names);
        // "dlstatus:1:43.2100:Retrieving file 3 of 90"
        run(&command, |line| {
            let percent = line.strip_prefix("dlstatus:").and_then(|rest| rest.split(':').nth(1)?.parse::<f64>().ok());
            if let Some(percent) = percent {
                step.advance(percent as u64, 100);
            }
        })
        .with_context(|| format!("cannot fetch {} from Debian", packages.names.join(", ")))
    }

    fn archives(&self) -> Result<Vec<PathBuf>> {
        let folder = self.root.join("cache/archives");
        let entries = fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
        let mut archives = Vec::new();
        for entry in entries {
            let path = entry.with_context(|| format!("cannot read {}", folder.display()))?.path();
            if path.extension().is_some_and(|extension| extension == "deb") {
                archives.push(path);
            }
        }
        Ok(archives)
    }

    fn sources(&self) -> PathBuf {
        self.root.join("debian.sources")
    }

    fn get(&self, action: &str) -> Command {
        let mut command = Command::new("apt-get");
        let path = |name: &str| self.root.join(name).to_string_lossy().into_owned();
        let options = [
            ("Dir::State", path("state")),
            ("Dir::State::status", path("status")),
            ("Dir::Cache", path("cache")),
            ("Dir::Etc::SourceList", self.sources().to_string_lossy().into_owned()),
            ("Dir::Etc::SourceParts", "/dev/null".to_owned()),
            // This machine's pins and default release are about other packages.
            ("Dir::Etc::Preferences", "/dev/null".to_owned()),
            ("Dir::Etc::PreferencesParts", "/dev/null".to_owned()),
            ("APT::Architecture", self.architecture.to_owned()),
            ("APT::Architectures", self.architecture.to_owned()),
            ("Acquire::Languages", "none".to_owned()),
            // Root's apt downloads as the user _apt, who may not enter root's home.
            ("APT::Sandbox::User", "root".to_owned()),
        ];
        command.env("LC_ALL", "C").arg("-q");
        for (name, value) in options {
            command.arg("-o").arg(format!("{name}={value}"));
        }
        command.arg(action);
        command
    }
}

/// The mirrors in this machine's apt configuration that may be Debian's, the likeliest first.
pub(crate) fn mirrors() -> Result<Vec<String>> {
    let mut command = Command::new("apt-get");
    command.args(["indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Identifier: Packages"]);
    let targets = output(command.env("LC_ALL", "C")).context(
        "cannot read apt's configuration. Without apt the guest cannot be fetched: use a Debian machine or container, \
         or copy its ~/.cache/vfio-user-blk here",
    )?;
    let mirrors = candidates(&targets);
    ensure!(
        !mirrors.is_empty(),
        "apt's configuration (/etc/apt/sources.list, /etc/apt/sources.list.d) names no mirror"
    );
    Ok(mirrors)
}

fn candidates(targets: &str) -> Vec<String> {
    let mirror = |line: &str| {
        let mut fields = line.split(' ');
        let (uri, release, component) = (fields.next()?, fields.next()?, fields.next()?);
        // The archive of a release is beside those of its updates (bookworm-updates), not of its security updates.
        let archive = component == "main" && !release.contains(['-', '/']) && !uri.starts_with("cdrom:");
        archive.then(|| uri.to_owned())
    };
    let mirrors: BTreeSet<String> = targets.lines().filter_map(mirror).collect();
    let (debian, other): (Vec<_>, Vec<_>) =
        mirrors.into_iter().partition(|uri| uri.trim_end_matches('/').ends_with("/debian"));
    [debian, other].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mirror_is_where_a_release_is_and_neither_its_security_updates_nor_a_stranger() {
        let targets = "https://packages.example/linux nodistro main\n\
                       http://mirror.example/debian-security/ bookworm-security main\n\
                       cdrom://[Debian 12]/ bookworm main\n\
                       http://mirror.example/debian/ bookworm main\n\
                       http://mirror.example/debian/ bookworm-updates main\n\
                       http://mirror.example/debian/ bookworm contrib\n\
                       https://packages.example/tools bookworm stable\n\
                       https://packages.example/flat ./ \n";
        assert_eq!(candidates(targets), ["http://mirror.example/debian/", "https://packages.example/linux"]);
    }

    #[test]
    fn the_manifest_tells_one_set_of_packages_from_another() {
        let one = Packages { names: &["a", "b"], suite: Suite::Trixie, architecture: Architecture::Amd64 };
        assert_eq!(one.manifest(), "trixie: a b\n");
        assert_ne!(one.manifest(), Packages { suite: Suite::TrixieBackports, ..one }.manifest());
        assert_ne!(one.manifest(), Packages { architecture: Architecture::Arm64, ..one }.manifest());
        assert_ne!(one.manifest(), Packages { names: &["a"], ..one }.manifest());
    }
}
