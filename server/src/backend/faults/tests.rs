use std::time::Instant;

use virtio::memory::PinnedBuffers;

use super::*;
use crate::backend::Op;
use crate::backend::contract::{Rig, pattern};
use crate::backend::memory::MemoryStore;

const MIB: u64 = 1 << 20;

fn rule(fault: Fault) -> Rule {
    Rule::always(fault)
}

fn store(rules: Vec<Rule>) -> FaultyStore {
    FaultyStore::new(Arc::new(MemoryStore::new(MIB).unwrap()), Faults::new(7, rules))
}

fn zeroes(offset: u64, len: u64) -> Io {
    let op = Op::WriteZeroes { offset, len, unmap: true, durable: false };
    Io::new(0, op, PinnedBuffers::default())
}

const KINDS: [Fault; 9] = [
    Fault::Latency(Latency::Fixed(Duration::from_millis(1))),
    Fault::Latency(Latency::Uniform(Duration::ZERO, Duration::from_secs(1))),
    Fault::Latency(Latency::LogNormal { median: Duration::from_millis(5), sigma: 1.0 }),
    Fault::Error(libc::EIO),
    Fault::Torn,
    Fault::Lost,
    Fault::Stuck,
    Fault::Interrupt(Delivery::Late(Latency::Uniform(Duration::ZERO, MAX_LATENCY))),
    Fault::LostKick,
];

#[test]
fn the_same_seed_gives_the_same_sequence() {
    for fault in KINDS {
        let sequence = |seed| {
            let faults = Faults::new(seed, vec![Rule { when: When::Probability(0.5), ..rule(fault) }]);
            // One that comes and goes is not missed.
            let other = faults.add(rule(Fault::Lost)).unwrap();
            faults.remove(|number| number == other);
            // By whatever queues they come.
            let fates = (0..200).map(|nth| {
                let queue = nth % 3;
                (faults.judge(queue, &zeroes(0, MIB)), faults.deliver(queue), faults.loses_kick(queue))
            });
            fates.collect::<Vec<_>>()
        };
        assert_eq!(sequence(1), sequence(1));
        let differ = sequence(1).iter().zip(sequence(2)).filter(|(one, other)| **one != *other).count();
        assert!(differ > 60, "{fault:?}: {differ}");
    }
}

#[test]
fn a_rule_counts_what_it_concerns() {
    let every = Rule {
        kinds: vec![Kind::WriteZeroes],
        sectors: Some(8..=15),
        when: When::Every(3),
        queue: Some(2),
        ..rule(Fault::Lost)
    };
    let faults = Faults::new(0, vec![every]);
    // From, sectors, whether it is concerned.
    let places = [(0, 8, false), (0, 9, true), (7, 1, false), (15, 1, true), (16, 100, false), (10, 1, true)];
    let mut concerned = 0;
    for (first, sectors, is) in places.into_iter().cycle().take(60) {
        let lost = faults.judge(2, &zeroes(first * SECTOR, sectors * SECTOR)).1 == Fate::Lost;
        assert_eq!(lost, is && concerned % 3 == 0, "{first} {sectors}");
        concerned += u64::from(is);
        let discard = Op::Discard { offset: 8 * SECTOR, len: SECTOR };
        assert_eq!(faults.judge(2, &Io { op: discard, ..zeroes(0, 0) }).1, Fate::Done, "of another kind");
        assert_eq!(faults.judge(1, &zeroes(8 * SECTOR, SECTOR)).1, Fate::Done, "of another queue");
        assert_eq!(faults.rules()[0].counts(), (concerned, concerned.div_ceil(3)));
    }
}

#[test]
fn a_burst_strikes_as_many_in_a_row() {
    let strikes = |when, burst| {
        let rule = Rule { when, burst, ..rule(Fault::Lost) };
        (0..100_000).map(|nth| rule.strikes(3, 1, nth).is_some()).collect::<Vec<_>>()
    };
    for (nth, struck) in strikes(When::Every(100), 7).into_iter().enumerate() {
        assert_eq!(struck, nth % 100 < 7, "{nth}");
    }
    let by_lot = strikes(When::Probability(0.1), 50);
    let rows: Vec<_> = by_lot.chunks(50).collect();
    assert!(rows.iter().all(|row| row.iter().all(|struck| *struck == row[0])));
    let struck = rows.iter().filter(|row| row[0]).count();
    assert!((150..250).contains(&struck), "{struck} of 2000");
}

#[test]
fn what_is_stuck_goes_on_when_it_is_let_go() {
    let read = |sectors| Rule { kinds: vec![Kind::Write], sectors: Some(sectors), ..rule(Fault::Stuck) };
    let store = store(vec![read(0..=0), read(1..=1)]);
    let mut rig = Rig::new(&store);
    let data = pattern(1, SECTOR);
    let write = |rig: &mut Rig, sector| {
        let buffers = rig.guest.buffers(&[(sector * SECTOR, SECTOR)]);
        buffers.fill(data[0]);
        rig.submit(Op::Write { offset: sector * SECTOR, durable: false }, buffers).unwrap();
    };
    (0..3).for_each(|sector| write(&mut rig, sector));
    assert_eq!(rig.reap().len(), 1, "what no rule holds passes");
    assert!(rig.reap().is_empty() && rig.backend.in_flight() == 2);
    assert_eq!(store.faults.release(|number| number == 1), [1]);
    assert_eq!(rig.reap().len(), 1);
    write(&mut rig, 0);
    assert!(rig.reap().is_empty(), "it holds what comes after");
    assert_eq!(store.faults.remove(|_| true), [1, 2]);
    let done = rig.reap();
    assert!(done.len() == 2 && done.iter().all(|done| done.result.is_ok()));
    assert_eq!(rig.read(SECTOR, SECTOR), vec![data[0]; 512], "late, but done");
    assert_eq!(rig.backend.in_flight(), 0);
}

#[test]
fn nothing_that_waits_is_waited_for_at_the_end() {
    let late = Fault::Latency(Latency::Fixed(MAX_LATENCY));
    let all = [Kind::Write, Kind::Read].map(|kind| vec![kind]);
    let rules = vec![
        Rule { kinds: all[0].clone(), ..rule(Fault::Stuck) },
        Rule { kinds: all[1].clone(), ..rule(late) },
        Rule { kinds: all[1].clone(), when: When::Every(2), ..rule(Fault::Stuck) },
    ];
    let mut rig = Rig::new(&store(rules));
    let begun = Instant::now();
    let buffers = rig.guest.buffers(&[(0, SECTOR)]);
    rig.submit(Op::Write { offset: 0, durable: false }, buffers).unwrap();
    for _ in 0..2 {
        let buffers = rig.guest.buffers(&[(0, SECTOR)]);
        rig.submit(Op::Read { offset: 0 }, buffers).unwrap();
    }
    assert!(rig.reap().is_empty());
    rig.backend.stop();
    let mut done = rig.finish();
    assert!(begun.elapsed() < MAX_LATENCY / 4);
    done.sort_by_key(|done| matches!(done.io.op, Op::Read { .. }));
    let results: Vec<_> =
        done.iter().map(|done| done.result.as_ref().err().and_then(io::Error::raw_os_error)).collect();
    assert_eq!(results[0], Some(libc::EIO), "the write was stuck");
    assert_eq!(
        results[1..].iter().filter(|result| result.is_some()).count(),
        1,
        "one read was late, one got stuck late"
    );
}

#[test]
fn without_rules_nothing_is_in_the_way() {
    let store = store(vec![]);
    let mut rig = Rig::new(&store);
    store.faults.add(rule(Fault::Error(libc::EIO))).unwrap();
    let read = |rig: &mut Rig| {
        let buffers = rig.guest.buffers(&[(0, SECTOR)]);
        rig.one(Op::Read { offset: 0 }, buffers).result.is_ok()
    };
    assert!(read(&mut rig), "what is attached before the first rule does not ask for any");
    rig.backend = store.attach(&rig.ring, 0).unwrap();
    assert!(!read(&mut rig));
    store.faults.remove(|_| true);
    assert!(read(&mut rig));
    store.faults.add(rule(Fault::Error(libc::EIO))).unwrap();
    assert!(!read(&mut rig), "what was attached with one asks for those that come later");
}

#[test]
fn there_are_only_so_many_rules() {
    let faults = Faults::new(0, vec![]);
    let numbers: Vec<_> = (0..MAX_RULES).map(|_| faults.add(rule(Fault::Lost)).unwrap()).collect();
    assert_eq!(faults.add(rule(Fault::Lost)), None);
    faults.remove(|number| number == numbers[3]);
    assert_eq!(faults.add(rule(Fault::Lost)), Some(MAX_RULES as u32 + 1), "no number is used again");
}

#[test]
fn chances_and_latencies_are_what_they_are_said_to_be() {
    let draws = |latency: Latency| {
        let mut draws: Vec<_> = (0..10_000).map(|nth| latency.draw(&mut Random::new(3, 0, nth))).collect();
        draws.sort();
        draws
    };
    let tenth = Rule { when: When::Probability(0.1), ..rule(Fault::Lost) };
    let strikes = (0..10_000).filter(|nth| tenth.strikes(3, 0, *nth).is_some()).count();
    assert!((850..1150).contains(&strikes), "{strikes}");
    let ms = Duration::from_millis;
    let uniform = draws(Latency::Uniform(ms(2), ms(10)));
    assert!(uniform[0] >= ms(2) && uniform[9999] <= ms(10));
    assert!(uniform[2500] > ms(3) && uniform[2500] < ms(5) && uniform[7500] > ms(7) && uniform[7500] < ms(9));
    let normal = draws(Latency::LogNormal { median: ms(10), sigma: 1.0 });
    assert!(normal[5000] > ms(9) && normal[5000] < ms(11), "{:?}", normal[5000]);
    // The 84th of a hundred is one deviation up: e times the median.
    assert!(normal[8413] > ms(25) && normal[8413] < ms(30), "{:?}", normal[8413]);
    let wild = draws(Latency::LogNormal { median: Duration::from_secs(50), sigma: 900.0 });
    assert_eq!(wild[9999], MAX_LATENCY);
}

#[test]
fn an_operation_that_fails_has_done_nothing() {
    let faulty =
        store(vec![Rule { kinds: vec![Kind::Write], sectors: Some(8..=8), ..rule(Fault::Error(libc::ENOSPC)) }]);
    let mut rig = Rig::new(&faulty);
    let buffers = rig.guest.buffers(&[(0, 8192)]);
    buffers.fill(1);
    let error = rig.one(Op::Write { offset: 0, durable: true }, buffers).result.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    assert_eq!(rig.read(0, 8192), vec![0; 8192]);
    rig.write(9 * SECTOR, &pattern(1, 8192), false);
    assert_eq!(rig.read(9 * SECTOR, 8192), pattern(1, 8192));
}

#[test]
fn what_is_lost_or_torn_is_said_to_be_done() {
    let mut rig = Rig::new(&store(vec![Rule { kinds: vec![Kind::Write], ..rule(Fault::Lost) }]));
    rig.write(0, &pattern(1, 4096), true);
    assert_eq!(rig.read(0, 4096), vec![0; 4096]);

    let mut rig = Rig::new(&store(vec![Rule { kinds: vec![Kind::Write, Kind::WriteZeroes], ..rule(Fault::Torn) }]));
    let data = pattern(2, 64 * SECTOR);
    let mut places = std::collections::BTreeSet::new();
    for at in 0..16 {
        let offset = at * 64 * SECTOR;
        // The rig checks that the operation comes back as it was.
        rig.write(offset, &data, false);
        let read = rig.read(offset, 64 * SECTOR);
        let torn = read.chunks(512).position(|sector| sector == [0; 512]).unwrap();
        assert!(
            torn > 0 && read[..torn * 512] == data[..torn * 512] && read[torn * 512..].iter().all(|byte| *byte == 0)
        );
        places.insert(torn);
        let op = zeroes(offset, torn as u64 * SECTOR).op;
        rig.one(op, PinnedBuffers::default()).result.unwrap();
        let left = rig.read(offset, torn as u64 * SECTOR);
        assert!(
            left[..512] == [0; 512] && (torn == 1 || left[(torn - 1) * 512..] == data[(torn - 1) * 512..torn * 512])
        );
    }
    assert!(places.len() > 8, "not always in the same place: {places:?}");
    rig.write(0, &pattern(3, SECTOR), false);
    assert_eq!(rig.read(0, SECTOR), pattern(3, SECTOR), "a sector is never torn");
}

#[test]
fn what_is_late_is_overtaken_and_keeps_its_thread_asleep() {
    let late = Duration::from_millis(40);
    let latency = Rule { kinds: vec![Kind::Read], ..rule(Fault::Latency(Latency::Fixed(late))) };
    let mut rig = Rig::new(&store(vec![latency.clone(), latency]));
    let (begun, calls) = (Instant::now(), rig.ring.system_calls());
    for sector in 0..100 {
        let buffers = rig.guest.buffers(&[(0, 512)]);
        rig.submit(Op::Read { offset: sector * SECTOR }, buffers).unwrap();
    }
    rig.submit(Op::Flush, PinnedBuffers::default()).unwrap();
    let first = rig.reap();
    assert!(first.len() == 1 && first[0].io.op == Op::Flush, "{first:?}");
    assert_eq!(rig.finish().len(), 100);
    assert!(begun.elapsed() >= 2 * late, "of two rules both count");
    assert!(rig.ring.system_calls() - calls < 250, "it looked for them all the time");
}
