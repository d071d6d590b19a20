//! Interrupts other than one MSI-X vector for each queue.

use anyhow::Result;
use testbed::Machine;

use crate::{Disk, MIB, interrupts};

#[test]
fn a_guest_without_msi_uses_the_interrupt_pin() -> Result<()> {
    let disk = Disk::new(128 * MIB, &["--num-queues", "2"])?;
    let script = "
        files_survive_remount vda /mnt
        fio_verify /mnt 1M
        umount /mnt
        interrupt_facts vda";
    let mut guest = disk.boot(Machine::new().kernel_argument("pci=nomsi"), script)?;
    guest.finish()?;
    assert_eq!(guest.facts("fio-errors"), ["0"]);
    let interrupts = interrupts(&guest)?;
    let [interrupt] = interrupts.as_slice() else { panic!("not one interrupt: {interrupts:?}") };
    assert_eq!(interrupt.chip, "IO-APIC");
    assert!(interrupt.count > 0, "{interrupt:?}");
    Ok(())
}
