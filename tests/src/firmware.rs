//! Firmware, and a disk that it boots from.
//!
//! The disk is laid out as an installer does it, by hand and without root: GRUB's boot sector in the master boot record,
//! GRUB's core behind it (in the gap before the first partition), an EFI system partition, a root file system.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::Testbed;
use crate::debian::{Architecture, Packages, Suite, Tree};
use crate::guest::files;
use crate::image::Image;
use crate::linux::{Kernel, Linux};
use crate::process::run;
use crate::qemu::{Firmware, Start, kernel_arguments};

/// Firmware, boot loaders and the tools to make a disk for them, for our architecture.
const PACKAGES: Packages = Packages {
    names: &[
        "dosfstools",
        "grub-common",
        "grub-efi-amd64-bin",
        "grub-pc-bin",
        "mtools",
        "ovmf",
        "qemu-efi-aarch64",
        "u-boot-qemu",
    ],
    suite: Suite::Trixie,
    architecture: Architecture::Amd64,
};

/// GRUB's modules for 64-bit ARM.
const ARM64_GRUB: Packages =
    Packages { names: &["grub-efi-arm64-bin"], suite: Suite::Trixie, architecture: Architecture::Arm64 };

/// What GRUB needs to find and load a kernel from the EFI system partition.
const GRUB_MODULES: [&str; 6] = ["part_msdos", "fat", "normal", "linux", "echo", "search"];

const SECTOR: u64 = 512;
/// Where the EFI system partition begins, and where it ends and the root file system begins: in MiB.
const ESP: (u64, u64) = (1, 97);
const MIB: u64 = 1 << 20;

/// Where the root file system of a [boot disk](crate::Testbed::write_boot_disk) begins, in bytes.
pub const ROOT_OFFSET: u64 = ESP.1 * MIB;

fn tree(testbed: &Testbed, packages: Packages) -> Result<Tree> {
    let entry = testbed.cache.entry("firmware", &packages.manifest(), &testbed.progress, |folder, downloads| {
        let tree = packages.install(folder, downloads, &testbed.progress)?;
        // The same once more, padded to the size of flash memory: 385 MiB.
        let padded = tree.path("usr/share/AAVMF");
        if padded.is_dir() {
            fs::remove_dir_all(&padded).with_context(|| format!("cannot remove {}", padded.display()))?;
        }
        Ok(())
    })?;
    Ok(Tree::new(&entry))
}

/// What a machine of `architecture` starts from.
pub(crate) fn start(testbed: &Testbed, architecture: Architecture, firmware: Firmware) -> Result<Start> {
    let file = match (firmware, architecture) {
        (Firmware::SeaBios, _) => return Ok(Start::Disk),
        (Firmware::Uefi, Architecture::Amd64) => "usr/share/ovmf/OVMF.fd",
        (Firmware::Uefi, Architecture::Arm64) => "usr/share/qemu-efi-aarch64/QEMU_EFI.fd",
        (Firmware::UBoot, Architecture::Amd64) => "usr/lib/u-boot/qemu-x86_64/u-boot.rom",
        (Firmware::UBoot, Architecture::Arm64) => "usr/lib/u-boot/qemu_arm64/u-boot.bin",
    };
    let path = tree(testbed, PACKAGES)?.path(file);
    ensure!(path.is_file(), "{} is not in Debian's package", path.display());
    Ok(Start::Bios(path))
}

pub(crate) fn write_boot_disk(testbed: &Testbed, linux: Linux, script: &str, path: &Path) -> Result<()> {
    let dir = tempfile::tempdir().context("cannot make a temporary folder")?;
    let tools = tree(testbed, PACKAGES)?;
    let root = dir.path().join("root");
    testbed.write_root(linux, &root)?;
    let esp = write_esp(testbed, &tools, linux, script, dir.path())?;

    let write = || -> Result<()> {
        let mut disk = File::create(path)?;
        let root_size = fs::metadata(&root)?.len();
        disk.set_len(ROOT_OFFSET + root_size)?;
        copy_to(&mut disk, ESP.0 * MIB, &esp)?;
        copy_to(&mut disk, ROOT_OFFSET, &root)?;
        let boot_sector = match linux.architecture() {
            Architecture::Amd64 => {
                let core = grub(&tools, &tools, "i386-pc", &["biosdisk"], dir.path())?;
                copy_to(&mut disk, SECTOR, &core)?;
                fs::read(tools.path("usr/lib/grub/i386-pc/boot.img"))?
            }
            Architecture::Arm64 => vec![0; SECTOR as usize],
        };
        disk.seek(SeekFrom::Start(0))?;
        disk.write_all(&master_boot_record(&boot_sector, (ROOT_OFFSET + root_size) / SECTOR))?;
        Ok(())
    };
    write().with_context(|| format!("cannot write the disk {}", path.display()))
}

/// The first sector of a disk of `sectors` sectors: the code of `boot_sector`, and the table of the two partitions.
fn master_boot_record(boot_sector: &[u8], sectors: u64) -> [u8; SECTOR as usize] {
    let mut record = [0; SECTOR as usize];
    for (to, from) in record.iter_mut().zip(boot_sector).take(440) {
        *to = *from;
    }
    let (esp, root) = (ESP.0 * MIB / SECTOR, ROOT_OFFSET / SECTOR);
    for (index, (active, kind, start, end)) in
        [(0x80, 0xef, esp, root), (0, 0x83, root, sectors)].into_iter().enumerate()
    {
        let entry = &mut record[446 + 16 * index..][..16];
        // The addresses by cylinder, head and sector (bytes 1 to 3 and 5 to 7) are of use to nobody.
        entry[0] = active;
        entry[4] = kind;
        entry[8..12].copy_from_slice(&(start as u32).to_le_bytes());
        entry[12..].copy_from_slice(&((end - start) as u32).to_le_bytes());
    }
    record[510..].copy_from_slice(&[0x55, 0xaa]);
    record
}

fn write_esp(testbed: &Testbed, tools: &Tree, linux: Linux, script: &str, dir: &Path) -> Result<PathBuf> {
    let kernel = Kernel::find(linux, &testbed.cache, &testbed.progress)?;
    let image = Image::find(linux.architecture(), &testbed.cache, &testbed.progress)?;
    let initrd = dir.join("initrd");
    image.write_busybox_initramfs(&kernel, &initrd, &files(script))?;
    let config = dir.join("grub.cfg");
    let arguments = kernel_arguments(linux);
    fs::write(&config, format!("linux /vmlinuz {arguments} root=/dev/vda2 rw\ninitrd /initrd\nboot\n"))?;
    let (loader, name) = match linux.architecture() {
        Architecture::Amd64 => (grub(tools, tools, "x86_64-efi", &[], dir)?, "BOOTX64.EFI"),
        Architecture::Arm64 => (grub(tools, &tree(testbed, ARM64_GRUB)?, "arm64-efi", &["fdt"], dir)?, "BOOTAA64.EFI"),
    };

    let esp = dir.join("esp");
    File::create(&esp)?.set_len((ESP.1 - ESP.0) * MIB)?;
    // Both programs convert names, by a table that the C library finds in its own release's folder.
    let command = |program: &str| {
        let mut command = tools.command(program);
        command.env("GCONV_PATH", tools.path("usr/lib/x86_64-linux-gnu/gconv")).env("LC_ALL", "C");
        command
    };
    let run = |command: &mut Command| run(command, |_| {}).context("cannot make the EFI system partition");
    run(command("usr/sbin/mkfs.vfat").args(["-F", "32"]).arg(&esp))?;
    run(command("usr/bin/mtools").args(["-c", "mmd", "-i"]).arg(&esp).args(["::/EFI", "::/EFI/BOOT", "::/grub"]))?;
    for (from, to) in [
        (kernel.image().as_path(), "::/vmlinuz".to_owned()),
        (&initrd, "::/initrd".to_owned()),
        (&config, "::/grub/grub.cfg".to_owned()),
        (&loader, format!("::/EFI/BOOT/{name}")),
    ] {
        run(command("usr/bin/mtools").args(["-c", "mcopy", "-i"]).arg(&esp).arg(from).arg(to))?;
    }
    Ok(esp)
}

/// GRUB's core for `platform`, from the `modules` of a package.
fn grub(tools: &Tree, modules: &Tree, platform: &str, more: &[&str], dir: &Path) -> Result<PathBuf> {
    let core = dir.join(platform);
    let mut command = tools.command("usr/bin/grub-mkimage");
    command.args(["-O", platform, "-p", "(,msdos1)/grub", "-o"]).arg(&core);
    command.arg("-d").arg(modules.path("usr/lib/grub").join(platform)).args(GRUB_MODULES).args(more);
    run(&command, |_| {}).with_context(|| format!("cannot make GRUB's core for {platform}"))?;
    Ok(core)
}

/// Copies what is not zero of the file `from` to `disk`, from byte `at` on.
fn copy_to(disk: &mut File, at: u64, from: &Path) -> Result<()> {
    let mut file = File::open(from).with_context(|| format!("cannot read {}", from.display()))?;
    let mut chunk = Vec::new();
    let mut position = at;
    while Read::by_ref(&mut file).take(MIB).read_to_end(&mut chunk)? > 0 {
        if chunk.iter().any(|byte| *byte != 0) {
            disk.seek(SeekFrom::Start(position))?;
            disk.write_all(&chunk)?;
        }
        position += chunk.len() as u64;
        chunk.clear();
    }
    Ok(())
}
