//! A Debian that debootstrap has fetched and not yet installed: its second stage is for a guest, on the disk itself.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::Testbed;
use crate::debian::{Architecture, KEYRING, Packages, Suite, mirrors};
use crate::process::run;

const PACKAGES: Packages =
    Packages { names: &["debootstrap"], suite: Suite::Trixie, architecture: Architecture::Amd64 };

/// What a Debian needs to boot to a login, besides what it always has.
const INCLUDE: &str = "systemd-sysv,udev";

const SIZE: &str = "1536M";

/// Fetches, and makes a file system.
const FIRST_STAGE: &str = include_str!("first-stage.sh");

/// Installs what has been fetched, keeps the packages for a second time, and gives root no password.
const SECOND_STAGE: &str = include_str!("guest/second-stage.sh");

/// An ext4 image (of a file) with the first stage of debootstrap, and the program `/second-stage`.
pub(crate) fn first_stage(testbed: &Testbed) -> Result<PathBuf> {
    let manifest = format!("{}{INCLUDE} {SIZE}\n{FIRST_STAGE}{SECOND_STAGE}", PACKAGES.manifest());
    let entry = testbed.cache.entry("debootstrap", &manifest, &testbed.progress, |folder, downloads| {
        let tree = PACKAGES.install(&folder.join("tree"), downloads, &testbed.progress)?;
        let step = testbed.progress.step("fetching a Debian by debootstrap");
        fs::write(folder.join("second-stage"), SECOND_STAGE).context("cannot write the second stage")?;
        let mkfs = testbed.tools.command("usr/sbin/mkfs.ext4");
        let mut failures = String::new();
        for mirror in mirrors()? {
            // Owners other than us are for root, or for those who make believe that they are.
            let mut command = if nix::unistd::geteuid().is_root() {
                Command::new("sh")
            } else {
                let mut command = Command::new("fakeroot");
                command.arg("sh");
                command
            };
            command
                .args(["-euc", FIRST_STAGE, "first-stage"])
                .args([KEYRING, INCLUDE, &mirror, SIZE])
                .arg(mkfs.get_program())
                .args(mkfs.get_args())
                .env("DEBOOTSTRAP_DIR", tree.path("usr/share/debootstrap"))
                .env("DEBOOTSTRAP", tree.path("usr/sbin/debootstrap"))
                .current_dir(folder);
            match run(&command, |line| step.note(line)) {
                Ok(()) => {
                    step.done("done");
                    fs::remove_dir_all(folder.join("tree")).context("cannot remove what was unpacked")?;
                    return Ok(());
                }
                Err(error) => failures = format!("{failures}\n{mirror}: {error}"),
            }
        }
        bail!("debootstrap has not fetched a Debian (without root, it needs the package fakeroot):{failures}")
    })?;
    Ok(entry.join("root.ext4"))
}
