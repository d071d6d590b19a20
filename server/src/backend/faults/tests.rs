use std::time::Instant;

use virtio::memory::PinnedBuffers;

use super::*;
use crate::backend::contract::{Rig, pattern};
use crate::backend::memory::MemoryStore;

const MIB: u64 = 1 << 20;

fn rule(fault: Fault) -> Rule {
    Rule { kinds: Vec::new(), sectors: None, when: When::Always, fault }
}

fn store(rules: Vec<Rule>) -> FaultyStore {
    FaultyStore::new(Arc::new(MemoryStore::new(MIB).unwrap()), rules, 7)
}

fn zeroes(offset: u64, len: u64) -> Io {
    let op = Op::WriteZeroes { offset, len, unmap: true, durable: false };
    Io { token: 0, op, buffers: PinnedBuffers::default() }
}

#[test]
fn the_same_seed_gives_the_same_sequence() {
    let sequence = |seed| {
        let latency = Fault::Latency(Latency::LogNormal { median: Duration::from_millis(5), sigma: 1.0 });
        let torn = Rule { when: When::Probability(0.3), ..rule(Fault::Torn) };
        let rules = vec![rule(latency), torn].into_iter().map(|rule| (rule, AtomicU64::new(0))).collect();
        let rules = Rules { rules, seed };
        (0..100).map(|_| rules.judge(&zeroes(0, MIB))).collect::<Vec<_>>()
    };
    assert_eq!(sequence(1), sequence(1));
    let differ = sequence(1).iter().zip(sequence(2)).filter(|(one, other)| **one != *other).count();
    assert!(differ > 90, "{differ}");
}

#[test]
fn a_rule_counts_what_it_concerns() {
    let every =
        Rule { kinds: vec![Kind::WriteZeroes], sectors: Some(8..=15), when: When::Every(3), fault: Fault::Lost };
    let rules = Rules { rules: vec![(every, AtomicU64::new(0))], seed: 0 };
    // From, sectors, whether it is concerned.
    let places = [(0, 8, false), (0, 9, true), (7, 1, false), (15, 1, true), (16, 100, false), (10, 1, true)];
    let mut concerned = 0;
    for (first, sectors, is) in places.into_iter().cycle().take(60) {
        let lost = rules.judge(&zeroes(first * SECTOR, sectors * SECTOR)).1 == Fate::Lost;
        assert_eq!(lost, is && concerned % 3 == 0, "{first} {sectors}");
        concerned += u32::from(is);
        let discard = Op::Discard { offset: 8 * SECTOR, len: SECTOR };
        assert_eq!(rules.judge(&Io { op: discard, ..zeroes(0, 0) }).1, Fate::Done, "of another kind");
    }
}

#[test]
fn chances_and_latencies_are_what_they_are_said_to_be() {
    let draws = |latency: Latency| {
        let mut draws: Vec<_> = (0..10_000).map(|nth| latency.draw(&mut Random::new(3, 0, nth))).collect();
        draws.sort();
        draws
    };
    let strikes = (0..10_000).filter(|nth| When::Probability(0.1).strikes(*nth, &mut Random::new(3, 0, *nth))).count();
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
