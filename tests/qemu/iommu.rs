//! A guest whose own IOMMU stands between the disk and its memory: each request maps its buffers and unmaps them.

use anyhow::Result;
use testbed::Machine;

use crate::{Disk, MIB, assert_every_queue_interrupts};

#[test]
fn a_disk_behind_the_guests_iommu_reaches_only_what_is_mapped() -> Result<()> {
    let disk = Disk::new(128 * MIB, &["--num-queues", "2"])?;
    // Strict: what a request has mapped is unmapped before the next one.
    let script = "
        device=$(readlink -f /sys/block/vda/device)
        fact platform $(cut -c 34 $device/features)
        [ -e $device/../iommu_group ] && fact domain $(cat $device/../iommu_group/type)
        mkfs.ext4 -q /dev/vda
        mount -t ext4 /dev/vda /mnt
        summed_files /mnt
        fio_verify /mnt 256k
        rm /mnt/verify*
        umount /mnt
        interrupt_facts vda";
    let machine = Machine::new()
        .device("intel-iommu,caching-mode=on")
        .kernel_argument("intel_iommu=on iommu.passthrough=0 iommu.strict=1");
    let mut guest = disk.boot(machine, script)?;
    guest.finish()?;
    assert_eq!(guest.facts("platform"), ["1"]);
    assert_eq!(guest.facts("domain"), ["DMA"]);
    assert_eq!(guest.facts("fio-errors"), ["0"]);
    assert_every_queue_interrupts(&guest, 2)?;
    disk.assert_summed_files(0)
}
