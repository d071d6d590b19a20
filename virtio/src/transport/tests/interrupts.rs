//! Which line an interrupt takes.

use super::*;

#[test]
fn interrupts_by_msix() {
    let (mut pci, _) = running();
    let lines = lines(&pci, Irq::Msix);
    let queue = pci.queue_interrupt(1).unwrap();
    queue.signal();
    assert_eq!(counts(&lines), [0, 0, 1, 0]);
    let _ = write(&mut pci, QUEUE_SELECT, 1u16);
    let _ = write(&mut pci, QUEUE_MSIX_VECTOR, 3u16);
    queue.signal();
    assert_eq!(counts(&lines), [0, 0, 1, 1]);
    let _ = write(&mut pci, QUEUE_MSIX_VECTOR, 0xffffu16);
    queue.signal();
    pci.config_interrupt().signal();
    assert_eq!(counts(&lines), [0, 0, 1, 1], "no vector");
    let _ = write(&mut pci, CONFIG_MSIX_VECTOR, 0u16);
    pci.config_interrupt().signal();
    assert_eq!(counts(&lines), [1, 0, 1, 1]);
    assert_eq!(read(&mut pci, ISR, 1), 0);
    assert!(pci.queue_interrupt(QUEUES).is_none());
}

#[test]
fn interrupts_by_intx() {
    let (mut pci, _) = running();
    let line = lines(&pci, Irq::Intx).remove(0);
    pci.queue_interrupt(1).unwrap().signal();
    pci.config_interrupt().signal();
    assert_eq!(line.count(), 1);
    let mut config = [0; 256];
    pci.read(Region::Config, 0, &mut config).unwrap();
    assert_eq!(config[6], 0x18);
    assert_eq!(read(&mut pci, ISR, 4), 3);
    assert_eq!(read(&mut pci, ISR, 1), 0);
    pci.interrupts().unmask(Irq::Intx, 0).unwrap();
    assert_eq!(line.count(), 1, "reading the ISR deasserted the level");
    pci.queue_interrupt(0).unwrap().signal();
    assert_eq!(line.count(), 2);
    pci.read(Region::Bar2, ISR + 1, &mut [0; 8]).unwrap();
    assert_eq!(read(&mut pci, ISR, 1), 1);
}
