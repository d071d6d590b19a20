//! A store that fails on purpose, as its device's description says.

use std::time::{Duration, Instant};

use client::RequestType;
use vfio_user_blk::config::{FaultConfig, FaultKind, FaultOn, Sectors, Wait};

use crate::rig::{IOERR, OK, Rig, execute, exercise};

fn fault(fault: FaultKind) -> FaultConfig {
    FaultConfig::always(fault)
}

#[test]
fn bad_sectors_fail_and_others_do_not() {
    let rig = Rig::with(|device| {
        let bad = FaultConfig { on: vec![FaultOn::Read], sectors: Some(Sectors(100..=107)), ..fault(FaultKind::Eio) };
        let full = FaultConfig { every: Some(3), ..fault(FaultKind::Enospc) };
        device.faults = vec![bad, full];
    });
    let mut machine = rig.boot();
    let buffer = machine.memory.allocate(4096, 4096).unwrap();
    let data = [buffer.segment(0, 4096).unwrap()];
    let queue = &mut machine.queues[0];
    for (sector, status) in [(92, OK), (93, IOERR), (107, IOERR), (108, OK)] {
        assert_eq!(execute(queue, RequestType::Read, sector, &data).status, status, "sector {sector}");
    }
    for status in [IOERR, OK, OK, IOERR, OK, OK] {
        assert_eq!(execute(queue, RequestType::Write, 100, &data).status, status);
    }
}

#[test]
fn a_late_answer_lets_others_pass() {
    let late = Duration::from_millis(200);
    let rig = Rig::with(|device| {
        let latency = Some(Wait::Fixed(late));
        device.faults = vec![FaultConfig { sectors: Some(Sectors(0..=0)), latency, ..fault(FaultKind::Latency) }];
        device.in_order = Some(false);
    });
    let mut machine = rig.boot();
    let begun = Instant::now();
    let buffer = machine.memory.allocate(4096, 4096).unwrap();
    let data = [buffer.segment(0, 4096).unwrap()];
    let (first, others) = machine.queues.split_first_mut().unwrap();
    let read = client::BlockRequest { kind: RequestType::Read, sector: 0, data: &data };
    first.submit(&read).unwrap();
    first.publish().unwrap();
    // On the same worker, or on another.
    for queue in others {
        let mut bytes = [1; 512];
        queue.read(1, &mut bytes).unwrap();
    }
    let done = crate::rig::completion(first);
    assert_eq!(done.status, OK);
    assert!(begun.elapsed() >= late);
    drop(machine);
    // Whoever goes while something is late leaves nothing behind.
    let mut machine = rig.boot();
    machine.queues[0].submit(&client::BlockRequest { kind: RequestType::Flush, sector: 0, data: &[] }).unwrap();
    machine.queues[0].publish().unwrap();
    drop(machine);
    let mut machine = rig.boot();
    exercise(&mut machine.queues[1..2]);
}
