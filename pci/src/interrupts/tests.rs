use proptest::prelude::*;

use super::testing::Counter;
use super::*;

fn pending(interrupts: &Interrupts) -> u64 {
    let mut pba = [0; 8];
    interrupts.read_msix(MSIX_PBA.into(), &mut pba).unwrap();
    u64::from_le_bytes(pba)
}

fn write_vector_control(interrupts: &Interrupts, vector: u64, value: u8) {
    interrupts.write_msix(16 * vector + 12, &[value]).unwrap();
}

/// Every way to mask vector 3, and every way back: signalled while masked it is pending, unmasked
/// it is delivered once.
#[test]
fn masked_vectors_are_pending() {
    type Act = fn(&Interrupts);
    let table: &[(&str, Act, Act)] = &[
        (
            "function mask",
            |interrupts| interrupts.set_msix_control(true, true),
            |interrupts| interrupts.set_msix_control(true, false),
        ),
        (
            "enable bit",
            |interrupts| {
                interrupts.set_msix_control(true, false);
                interrupts.set_msix_control(false, false);
            },
            |interrupts| interrupts.set_msix_control(true, false),
        ),
        (
            "table entry",
            |interrupts| write_vector_control(interrupts, 3, 1),
            |interrupts| write_vector_control(interrupts, 3, 0),
        ),
        (
            "table entry, left masked by a write to another of its fields",
            |interrupts| interrupts.write_msix(48, &[0; 4]).unwrap(),
            |interrupts| interrupts.write_msix(48, &[0; 16]).unwrap(),
        ),
        (
            "the client",
            |interrupts| interrupts.mask(Irq::Msix, 3).unwrap(),
            |interrupts| interrupts.unmask(Irq::Msix, 3).unwrap(),
        ),
    ];
    for (name, mask, unmask) in table {
        let interrupts = Interrupts::new(65);
        let line = Counter::new();
        interrupts.set_line(Irq::Msix, 3, Some(line.clone())).unwrap();
        interrupts.signal(3);
        assert_eq!((line.count(), pending(&interrupts)), (1, 0), "{name}");
        mask(&interrupts);
        interrupts.signal(3);
        interrupts.signal(3);
        assert_eq!((line.count(), pending(&interrupts)), (1, 1 << 3), "{name}");
        unmask(&interrupts);
        assert_eq!((line.count(), pending(&interrupts)), (2, 0), "{name}");
        interrupts.signal(3);
        assert_eq!((line.count(), pending(&interrupts)), (3, 0), "{name}");
    }
}

#[test]
fn one_mask_of_several_is_enough() {
    let interrupts = Interrupts::new(4);
    let line = Counter::new();
    interrupts.set_line(Irq::Msix, 0, Some(line.clone())).unwrap();
    interrupts.set_msix_control(true, true);
    interrupts.mask(Irq::Msix, 0).unwrap();
    write_vector_control(&interrupts, 0, 1);
    interrupts.signal(0);
    interrupts.set_msix_control(true, false);
    interrupts.unmask(Irq::Msix, 0).unwrap();
    assert_eq!(line.count(), 0);
    write_vector_control(&interrupts, 0, 0);
    assert_eq!(line.count(), 1);
}

/// A client with a table of its own writes none here and masks by exchanging lines.
#[test]
fn lines_alone_put_msix_in_use() {
    let interrupts = Interrupts::new(4);
    let lines = [Counter::new(), Counter::new()];
    assert!(!interrupts.msix_in_use() && !interrupts.has_line(0));
    interrupts.set_line(Irq::Msix, 0, Some(lines[0].clone())).unwrap();
    assert!(interrupts.msix_in_use());
    assert!(interrupts.has_line(0) && !interrupts.has_line(1) && !interrupts.has_line(4));
    interrupts.signal(0);
    interrupts.set_line(Irq::Msix, 0, None).unwrap();
    assert!(interrupts.msix_in_use() && !interrupts.has_line(0));
    interrupts.signal(0);
    interrupts.set_line(Irq::Msix, 0, Some(lines[1].clone())).unwrap();
    assert_eq!((lines[0].count(), lines[1].count()), (1, 1));
    interrupts.disable(Irq::Msix);
    assert!(!interrupts.msix_in_use());
    interrupts.signal(0);
    assert_eq!((lines[0].count(), lines[1].count()), (1, 1));
}

#[test]
fn a_client_that_goes_leaves_its_interrupts_pending() {
    let interrupts = Interrupts::new(4);
    let line = Counter::new();
    interrupts.set_line(Irq::Msix, 2, Some(line.clone())).unwrap();
    interrupts.mask(Irq::Msix, 2).unwrap();
    interrupts.disconnect();
    assert_eq!(Arc::strong_count(&line), 1);
    assert!(interrupts.msix_in_use());
    interrupts.signal(2);
    let next = Counter::new();
    interrupts.set_line(Irq::Msix, 2, Some(next.clone())).unwrap();
    assert_eq!((line.count(), next.count()), (0, 1));
}

#[test]
fn trigger_signals_the_lines() {
    let interrupts = Interrupts::new(4);
    let lines = [Counter::new(), Counter::new()];
    interrupts.set_line(Irq::Intx, 0, Some(lines[0].clone())).unwrap();
    interrupts.set_line(Irq::Msix, 3, Some(lines[1].clone())).unwrap();
    interrupts.trigger(Irq::Intx, 0).unwrap();
    interrupts.trigger(Irq::Msix, 3).unwrap();
    assert_eq!((lines[0].count(), lines[1].count()), (1, 1));
}

#[test]
fn disable_removes_the_masks_of_the_client() {
    let interrupts = Interrupts::new(4);
    let line = Counter::new();
    for irq in [Irq::Intx, Irq::Msix] {
        interrupts.mask(irq, 0).unwrap();
        interrupts.disable(irq);
        interrupts.set_line(irq, 0, Some(line.clone())).unwrap();
    }
    interrupts.signal(0);
    interrupts.assert_intx(1);
    assert_eq!(line.count(), 2);
}

#[test]
fn forget_drops_what_waits() {
    let interrupts = Interrupts::new(4);
    let line = Counter::new();
    interrupts.signal(0);
    interrupts.assert_intx(1);
    interrupts.forget();
    interrupts.set_line(Irq::Intx, 0, Some(line.clone())).unwrap();
    interrupts.set_line(Irq::Msix, 0, Some(line.clone())).unwrap();
    assert_eq!((line.count(), pending(&interrupts)), (0, 0));
}

#[test]
fn interrupts_that_do_not_exist() {
    let interrupts = Interrupts::new(65);
    for (irq, vector, count) in [(Irq::Intx, 1, 1), (Irq::Msix, 65, 65), (Irq::Msix, u32::MAX, 65)] {
        let error = Err(NoSuchInterrupt { irq, vector, count });
        assert_eq!(interrupts.set_line(irq, vector, None), error);
        assert_eq!(interrupts.mask(irq, vector), error);
        assert_eq!(interrupts.unmask(irq, vector), error);
        assert_eq!(interrupts.trigger(irq, vector), error);
    }
    interrupts.signal(65);
    interrupts.signal(0xffff);
    assert_eq!(pending(&interrupts), 0);
    for (asked, given) in [(0, 1), (1, 1), (256, 256), (257, 256), (u16::MAX, 256)] {
        assert_eq!(Interrupts::new(asked).count(Irq::Msix), given);
    }
}

#[test]
fn table_registers() {
    let interrupts = Interrupts::new(2);
    let mut entry = [0xee; 16];
    interrupts.read_msix(16, &mut entry).unwrap();
    assert_eq!(entry, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
    interrupts.write_msix(16, &[0xff; 16]).unwrap();
    interrupts.read_msix(16, &mut entry).unwrap();
    assert_eq!(entry, ENTRY_WRITABLE);
    // Behind the last vector, between the pages and behind the PBA is reserved space.
    interrupts.signal(1);
    interrupts.write_msix(0, &[0xff; 0x2000]).unwrap();
    let mut bar = vec![0xee; 0x2000];
    interrupts.read_msix(0, &mut bar).unwrap();
    assert_eq!(bar[..32], [ENTRY_WRITABLE, ENTRY_WRITABLE].concat());
    assert!(bar[32..0x1000].iter().all(|byte| *byte == 0));
    assert_eq!(bar[0x1000], 0b10);
    assert!(bar[0x1001..].iter().all(|byte| *byte == 0));
}

#[test]
fn the_pba_reads_in_pieces() {
    let interrupts = Interrupts::new(65);
    for vector in [0, 9, 63, 64] {
        interrupts.signal(vector);
    }
    let expected = [1, 2, 0, 0, 0, 0, 0, 0x80, 1, 0];
    for start in 0..10 {
        for end in start..10 {
            let mut data = vec![0xee; end - start];
            interrupts.read_msix(0x1000 + start as u64, &mut data).unwrap();
            assert_eq!(data, expected[start..end]);
        }
    }
}

proptest! {
    #[test]
    fn any_access(accesses in prop::collection::vec(
        (0u64..0x2100, prop::collection::vec(any::<u8>(), 0..40)), 1..50,
    )) {
        let interrupts = Interrupts::new(65);
        interrupts.signal(7);
        for (offset, mut data) in accesses {
            let within = offset + data.len() as u64 <= 0x2000;
            prop_assert_eq!(interrupts.write_msix(offset, &data).is_ok(), within);
            prop_assert_eq!(interrupts.read_msix(offset, &mut data).is_ok(), within);
            prop_assert_eq!(pending(&interrupts), 1 << 7);
        }
    }
}
