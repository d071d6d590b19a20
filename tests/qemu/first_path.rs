//! The way that everybody takes first: a disk, a filesystem, files.

use anyhow::Result;
use testbed::Machine;

use crate::{Disk, MIB, assert_every_queue_interrupts, testbed};

#[test]
fn a_guest_makes_a_filesystem_and_keeps_its_files() -> Result<()> {
    let disk = Disk::new(256 * MIB, &["--num-queues", "2", "--serial", "first-path"])?;
    let script = "
        disk_facts vda
        files_survive_remount vda /mnt
        fio_verify /mnt 4M
        umount /mnt
        interrupt_facts vda";
    let mut guest = disk.boot(Machine::new(), script)?;
    guest.finish()?;
    assert_eq!(guest.facts("capacity"), [(256 * MIB).to_string()]);
    assert_eq!(guest.facts("serial"), ["first-path"]);
    assert_eq!(guest.facts("read-only"), ["0"]);
    assert_eq!(guest.facts("queues"), ["2"]);
    assert_eq!(guest.facts("fio-errors"), ["0"]);
    assert_every_queue_interrupts(&guest, 2)?;

    let (socket, image) = (disk.socket(), disk.image());
    let Disk { dir: _dir, server } = disk;
    assert!(socket.exists());
    let log = server.process().log();
    let status = server.stop()?;
    assert!(status.success(), "the server ended with {status}; its log:\n{log}");
    assert!(!socket.exists(), "the server left its socket behind");

    let check = testbed()?.e2fsck().arg("-fn").arg(image).output()?;
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    Ok(())
}
