//! Linux with its root file system on the disk: the releases that Debian has, and what their drivers do in unusual ways.

use anyhow::Result;
use testbed::{Linux, Machine};

use crate::{Disk, MIB, assert_every_queue_interrupts, image, testbed};

/// What a guest does with its root file system on vda: files whose sums the host compares, and fio.
const WORK: &str = "
    disk_facts vda
    summed_files /
    mkdir -p /fio
    fio_verify /fio 4M
    rm -r /fio
    interrupt_facts vda";

/// The same, and another file system on vdb that is made, filled, and checked.
const MORE_WORK: &str = "
    mkfs.ext4 -q /dev/vdb
    mount -t ext4 /dev/vdb /mnt
    summed_files /mnt
    umount /mnt
    e2fsck -fn /dev/vdb
    fact fsck clean";

/// Serves a root file system for `linux`.
fn root_disk(linux: Linux, options: &[&str]) -> Result<Disk> {
    let dir = tempfile::tempdir()?;
    testbed()?.write_root(linux, &image(dir.path()))?;
    Disk::serve(dir, options)
}

/// `linux` on 4 processors works with 4 queues of its root disk, and with another disk.
fn has_its_root_on_the_disk(linux: Linux, version: &str) -> Result<()> {
    let root = root_disk(linux, &["--num-queues", "4"])?;
    let other = Disk::new(256 * MIB, &["--num-queues", "4"])?;
    let machine = Machine::new().linux(linux).cpus(4).kernel_argument("root=/dev/vda");
    let machine = machine.vfio_user(&root.socket());
    let mut guest = other.boot(machine, &format!("{WORK}\n{MORE_WORK}"))?;
    guest.finish()?;
    let kernel = guest.facts("kernel").concat();
    assert!(kernel.starts_with(version), "{kernel}");
    assert_eq!(guest.facts("root"), ["ext4"]);
    assert_eq!(guest.facts("queues"), ["4"]);
    assert_eq!(guest.facts("fio-errors"), ["0"]);
    assert_eq!(guest.facts("fsck"), ["clean"]);
    assert_every_queue_interrupts(&guest, 4)?;
    root.assert_summed_files(0)?;
    other.assert_summed_files(0)
}

#[test]
#[ignore = "long: cargo xtask guests"]
fn linux_6_1_has_its_root_on_the_disk() -> Result<()> {
    has_its_root_on_the_disk(Linux::Bookworm, "6.1.")
}

#[test]
fn linux_6_12_has_its_root_on_the_disk() -> Result<()> {
    has_its_root_on_the_disk(Linux::Trixie, "6.12.")
}

#[test]
#[ignore = "long: cargo xtask guests"]
fn linux_of_backports_has_its_root_on_the_disk() -> Result<()> {
    has_its_root_on_the_disk(Linux::Backports, "")
}

#[test]
#[ignore = "long: cargo xtask guests"]
fn linux_on_arm64_has_its_root_on_the_disk() -> Result<()> {
    has_its_root_on_the_disk(Linux::Arm64, "6.12.")
}

#[test]
fn linux_uses_packed_rings() -> Result<()> {
    let disk = Disk::new(128 * MIB, &["--num-queues", "2", "--packed"])?;
    let script = "
        fact packed $(cut -c 35 $(readlink -f /sys/block/vda/device)/features)
        mkfs.ext4 -q /dev/vda
        mount -t ext4 /dev/vda /mnt
        summed_files /mnt
        fio_verify /mnt 4M
        rm /mnt/verify*
        umount /mnt
        interrupt_facts vda";
    let mut guest = disk.boot(Machine::new(), script)?;
    guest.finish()?;
    assert_eq!(guest.facts("packed"), ["1"]);
    assert_eq!(guest.facts("fio-errors"), ["0"]);
    assert_every_queue_interrupts(&guest, 2)?;
    disk.assert_summed_files(0)
}
