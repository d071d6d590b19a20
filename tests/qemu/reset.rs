//! A guest that is reset, as by the button of a machine.

use anyhow::Result;
use testbed::Machine;

use crate::{Disk, MIB};

#[test]
fn a_reset_in_the_middle_of_writes_loses_nothing_that_was_synced() -> Result<()> {
    let disk = Disk::new(128 * MIB, &["--num-queues", "2"])?;
    // The first boot finds no filesystem, and writes until the reset. The second finds what the first has synced.
    let script = "
        if mount -t ext4 /dev/vda /mnt; then
            sha256sum -c /mnt/sums
            fio_verify /mnt 2M
            umount /mnt
            fact second-boot ok
        else
            files_survive_remount vda /mnt
            mv /tmp/vda.sums /mnt/sums
            sync
            while true; do
                dd if=/dev/zero of=/mnt/noise bs=64k count=16 conv=fsync
                fact wrote noise
            done
        fi";
    let mut guest = disk.boot(Machine::new(), script)?;
    guest.fact("wrote")?;
    guest.fact("wrote")?;
    guest.reset()?;
    guest.fact("boot")?;
    guest.fact("second-boot")?;
    guest.finish()?;
    assert_eq!(guest.facts("boot").len(), 2);
    assert_eq!(guest.facts("fio-errors"), ["0"]);
    Ok(())
}
