//! A device that is plugged into a running guest.
//!
//! Pulling it out again is not tested: QEMU 11.1 aborts on that with any vfio-user device that has MSI-X, for it removes
//! a memory region twice (`vfio_user_msix_teardown`, when the device's regions are gone already).

use anyhow::Result;
use serde_json::json;
use testbed::{Machine, vfio_user};

use crate::{Disk, MIB, assert_every_queue_interrupts, testbed};

#[test]
fn a_disk_is_plugged_in() -> Result<()> {
    let disk = Disk::new(128 * MIB, &["--num-queues", "2"])?;
    let machine = Machine::new().device("pcie-root-port,id=root-port,chassis=1");
    let script = "
        fact waiting
        while ! [ -b /dev/vda ]; do usleep 100000; done 2>/dev/null
        files_survive_remount vda /mnt
        fio_verify /mnt 1M
        umount /mnt
        interrupt_facts vda";
    let mut guest = testbed()?.boot(&machine, script)?;
    guest.fact("waiting")?;
    let mut device = vfio_user(&disk.socket());
    device["bus"] = json!("root-port");
    guest.qmp()?.execute("device_add", device)?;
    guest.finish()?;
    assert_eq!(guest.facts("fio-errors"), ["0"]);
    assert_every_queue_interrupts(&guest, 2)
}
