//! Firmware: drivers that poll, and that meet the disk before any operating system does.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use anyhow::Result;
use serde_json::json;
use testbed::{Console, Firmware, Linux, Machine, vfio_user};

use crate::{Disk, MIB, cannot_run, image, testbed};

/// Boots Linux from the disk, through what the firmware, GRUB and the kernel read of it; on its root file system, files
/// are written, and found by another boot, whose sums are then compared with those of the files in the image.
fn boots_from_the_disk(firmware: Firmware, linux: Linux) -> Result<()> {
    let script = "
        disk_facts vda
        [ -d /sys/firmware/efi ] && fact firmware uefi || fact firmware bios
        if [ -e /sums ]; then
            cd / && sha256sum -c sums
            fact boots second
        else
            summed_files /
            fact boots first
        fi";
    let dir = tempfile::tempdir()?;
    testbed()?.write_boot_disk(linux, script, &image(dir.path()))?;
    let disk = Disk::serve(dir, &["--num-queues", "2", "--serial", "boot"])?;
    let mut device = vfio_user(&disk.socket());
    device["bootindex"] = json!(0);
    let machine = Machine::new().linux(linux).firmware(firmware).device(&device.to_string());
    let found = if firmware == Firmware::SeaBios { "bios" } else { "uefi" };
    for boot in ["first", "second"] {
        let mut guest = testbed()?.boot(&machine, "")?;
        guest.finish()?;
        assert_eq!(guest.facts("boots"), [boot]);
        assert_eq!(guest.facts("firmware"), [found]);
        assert_eq!(guest.facts("serial"), ["boot"]);
        assert_eq!(guest.facts("root"), ["ext4"]);
    }
    disk.assert_summed_files(testbed::ROOT_OFFSET)
}

#[test]
fn seabios_boots_linux_from_the_master_boot_record() -> Result<()> {
    boots_from_the_disk(Firmware::SeaBios, Linux::Trixie)
}

#[test]
#[ignore = "long: cargo xtask guests"]
fn uefi_boots_linux_from_the_efi_system_partition() -> Result<()> {
    boots_from_the_disk(Firmware::Uefi, Linux::Trixie)
}

/// U-Boot's prompt on `machine`.
fn u_boot(machine: Machine) -> Result<Console> {
    let mut console = testbed()?.console(&machine.firmware(Firmware::UBoot))?;
    // A key that comes before U-Boot has set its serial port up can keep later ones out. This is the last thing that it
    // does before its count-down, which a key ends; another one is as good as none.
    console.line("Net:")?;
    console.answer("\r", "=> ")?;
    Ok(console)
}

/// Without interrupts: a file is read, and written to where no file system is, for the host to find.
#[test]
fn u_boot_reads_and_writes() -> Result<()> {
    let linux = Linux::Arm64;
    let dir = tempfile::tempdir()?;
    let (kernel, initramfs) = (dir.path().join("vmlinuz"), dir.path().join("initramfs"));
    testbed()?.write_kernel(linux, "", &kernel, &initramfs)?;
    let kernel = fs::read(kernel)?;
    testbed()?.write_boot_disk(linux, "", &image(dir.path()))?;
    let disk = File::options().write(true).open(image(dir.path()))?;
    let (at, sectors) = (disk.metadata()?.len(), kernel.len().div_ceil(512));
    disk.set_len(at + 512 * sectors as u64)?;

    let disk = Disk::serve(dir, &["--num-queues", "2"])?;
    let mut console = u_boot(Machine::new().linux(linux).vfio_user(&disk.socket()))?;
    console.type_line("virtio scan; virtio info")?;
    console.line("1af4 VirtIO Block Device")?;
    console.type_line("load virtio 0:1 ${kernel_addr_r} vmlinuz")?;
    console.line(&format!("{} bytes read", kernel.len()))?;
    console.type_line(&format!("virtio write ${{kernel_addr_r}} {:x} {sectors:x}", at / 512))?;
    console.line(&format!("{sectors} blocks written: OK"))?;
    console.process().kill()?;

    let mut found = vec![0; kernel.len()];
    File::open(disk.image())?.read_exact_at(&mut found, at)?;
    assert!(found == kernel, "what U-Boot has read or written is not the file");
    Ok(())
}

/// Debian's U-Boot for x86-64 finds no virtio device at all, QEMU's own as little as ours.
#[test]
#[ignore = "long: cargo xtask guests"]
fn u_boot_on_x86_64_finds_the_disk() -> Result<()> {
    let disk = Disk::new(16 * MIB, &[])?;
    let found = |machine: Machine| -> Result<bool> {
        let mut console = u_boot(machine)?;
        console.type_line("virtio scan; virtio info; echo all of them")?;
        // What is typed is shown, too.
        console.line("echo all of them")?;
        console.line("all of them")?;
        Ok(console.process().log().contains("VirtIO Block Device"))
    };
    if !found(Machine::new().vfio_user(&disk.socket()))? {
        assert!(!found(Machine::new().qemu_disk(&disk.image(), "own"))?, "U-Boot finds QEMU's own disk, and not ours");
        cannot_run("Debian's U-Boot for x86-64 finds no virtio device, QEMU's own virtio-blk-pci neither");
    }
    Ok(())
}

#[test]
#[ignore = "long: cargo xtask guests"]
fn uefi_boots_arm64_linux_from_the_efi_system_partition() -> Result<()> {
    boots_from_the_disk(Firmware::Uefi, Linux::Arm64)
}
