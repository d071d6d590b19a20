//! Drivers that let go of a disk and take it up again: unbound and bound, removed and found, rebooted, replaced by kexec.

use std::fs::File;
use std::io::{Seek, SeekFrom, copy};

use anyhow::Result;
use testbed::{Linux, Machine};

use crate::{Disk, MIB, assert_every_queue_interrupts, image, testbed};

/// Two boots of one guest: what the first has written is whole in the second, which does more.
const SECOND: &str = "
    mount -t ext4 /dev/vda /mnt
    (cd /mnt && sha256sum -c sums)
    fio_verify /mnt 1M
    rm /mnt/verify*
    umount /mnt
    interrupt_facts vda";

#[test]
#[ignore = "long: cargo xtask guests"]
fn a_driver_is_unbound_and_bound_again() -> Result<()> {
    let disk = Disk::new(128 * MIB, &["--num-queues", "2"])?;
    // By both drivers, virtio's and PCI's, and by taking the whole function away; each time, what was written is read.
    let script = format!(
        "
        device=$(readlink -f /sys/block/vda/device)
        function=$(basename $(readlink -f $device/..))
        mkfs.ext4 -q /dev/vda
        mount -t ext4 /dev/vda /mnt
        summed_files /mnt
        umount /mnt
        gone() {{
            while [ -e /sys/block/vda ]; do usleep 10000; done
        }}
        back() {{
            while ! [ -b /dev/vda ]; do usleep 10000; done
            mount -t ext4 /dev/vda /mnt
            (cd /mnt && sha256sum -c sums)
            echo $1 >>/mnt/rounds
            umount /mnt
        }}
        for round in $(seq 1 10); do
            basename $device >/sys/bus/virtio/drivers/virtio_blk/unbind
            gone
            basename $device >/sys/bus/virtio/drivers/virtio_blk/bind
            back virtio
            echo $function >/sys/bus/pci/drivers/virtio-pci/unbind
            gone
            echo $function >/sys/bus/pci/drivers/virtio-pci/bind
            back pci
            echo 1 >/sys/bus/pci/devices/$function/remove
            gone
            echo 1 >/sys/bus/pci/rescan
            back rescan
        done
        {SECOND}
        mount -t ext4 /dev/vda /mnt
        fact rounds $(wc -l </mnt/rounds)
        umount /mnt"
    );
    let mut guest = disk.boot(Machine::new(), &script)?;
    guest.finish()?;
    assert_eq!(guest.facts("rounds"), ["30"]);
    assert_eq!(guest.facts("fio-errors"), ["0"]);
    disk.assert_summed_files(0)
}

#[test]
#[ignore = "long: cargo xtask guests"]
fn a_guest_reboots() -> Result<()> {
    let dir = tempfile::tempdir()?;
    testbed()?.write_root(Linux::Trixie, &image(dir.path()))?;
    let disk = Disk::serve(dir, &["--num-queues", "2"])?;
    let script = "
        echo boot >>/boots
        boots=$(wc -l </boots)
        if [ $boots = 1 ]; then
            summed_files /
        fi
        (cd / && sha256sum -c sums)
        mkdir -p /fio
        fio_verify /fio 1M
        sync
        [ $boots = 4 ] || reboot -f
        interrupt_facts vda";
    let machine = Machine::new().reboots().kernel_argument("root=/dev/vda");
    let mut guest = disk.boot(machine, script)?;
    guest.finish()?;
    assert_eq!(guest.facts("boot").len(), 4);
    assert_eq!(guest.facts("fio-errors"), ["0"; 4]);
    assert_every_queue_interrupts(&guest, 2)?;
    disk.assert_summed_files(0)
}

#[test]
#[ignore = "long: cargo xtask guests"]
fn kexec_starts_a_kernel_that_was_read_from_the_disk() -> Result<()> {
    // A file system of 64 MiB, and then the kernel and its initramfs, which begin anew in the next kernel.
    let (kernel_at, initramfs_at) = (64, 96);
    let script = format!(
        "
        if grep -q kexeced /proc/cmdline; then
            {SECOND}
            fact second-kernel runs
        else
            mkfs.ext4 -q /dev/vda {kernel_at}m
            mount -t ext4 /dev/vda /mnt
            summed_files /mnt
            umount /mnt
            dd if=/dev/vda of=/tmp/vmlinuz bs=1M skip={kernel_at} count={count}
            dd if=/dev/vda of=/tmp/initramfs bs=1M skip={initramfs_at}
            kexec --load /tmp/vmlinuz --initrd=/tmp/initramfs --command-line=\"$(cat /proc/cmdline) kexeced\"
            # Requests are in flight when the kernel goes.
            while true; do dd if=/dev/vda of=/dev/null bs=1M iflag=direct; done 2>/dev/null &
            while true; do dd if=/dev/vda of=/dev/null bs=4k iflag=direct; done 2>/dev/null &
            sleep 1
            kexec --exec
        fi",
        count = initramfs_at - kernel_at,
    );
    let dir = tempfile::tempdir()?;
    let (kernel, initramfs) = (dir.path().join("vmlinuz"), dir.path().join("initramfs"));
    testbed()?.write_kernel(Linux::Trixie, &script, &kernel, &initramfs)?;
    let mut disk = File::create(image(dir.path()))?;
    for (file, at) in [(&kernel, kernel_at), (&initramfs, initramfs_at)] {
        disk.seek(SeekFrom::Start(at * MIB))?;
        copy(&mut File::open(file)?, &mut disk)?;
    }
    let size = disk.metadata()?.len().next_multiple_of(MIB);
    disk.set_len(size)?;

    let disk = Disk::serve(dir, &["--num-queues", "2"])?;
    let mut guest = disk.boot(Machine::new().memory_mib(1024), &script)?;
    guest.finish()?;
    assert_eq!(guest.facts("boot").len(), 2);
    assert_eq!(guest.facts("second-kernel"), ["runs"]);
    assert_eq!(guest.facts("fio-errors"), ["0"]);
    assert_every_queue_interrupts(&guest, 2)?;
    disk.assert_summed_files(0)
}
