use std::time::Instant;

use virtio::memory::PinnedBuffers;

use super::*;
use crate::backend::contract::{Rig, pattern};
use crate::backend::memory::MemoryStore;

const MIB: u64 = 1 << 20;
const MS: u64 = 1_000_000;

fn fabric(round_trip: u64, bandwidth: u64, credits: u16) -> Fabric {
    Fabric {
        round_trip: Duration::from_millis(round_trip),
        bandwidth: NonZeroU64::new(bandwidth),
        credits: NonZeroU16::new(credits),
        ..Fabric::default()
    }
}

fn store(fabric: Fabric) -> DistantStore {
    DistantStore::new(Arc::new(MemoryStore::new(MIB).unwrap()), fabric)
}

#[test]
fn messages_leave_one_after_the_other_each_way() {
    let wire = Wire::new(fabric(10, 1_000_000, 0));
    let mut rig = Rig::new(&MemoryStore::new(MIB).unwrap());
    let mut io = |op, len| Io::new(0, op, rig.guest.buffers(&[(0, len)]));
    let write = io(Op::Write { offset: 0, durable: false }, 4000);
    let read = io(Op::Read { offset: 0 }, 8000);
    // 4 ms of data, half of 10 ms of way.
    assert_eq!([wire.request(&write, 0), wire.request(&write, 0)], [9 * MS, 13 * MS]);
    // A request without data leaves behind what leaves before it.
    assert_eq!(wire.request(&read, 0), 13 * MS);
    assert_eq!(wire.request(&read, 100 * MS), 105 * MS, "nothing is left of that");
    // The other way has been free all the time.
    assert_eq!(wire.response(write.op, 4000, 0), 5 * MS);
    assert_eq!([wire.response(read.op, 8000, 0), wire.response(Op::Flush, 0, 0)], [13 * MS, 13 * MS]);
}

#[test]
fn the_same_seed_gives_the_same_jitter() {
    let jitters = |seed| {
        let wire = Wire::new(Fabric { jitter: Duration::from_millis(2), seed, ..Fabric::default() });
        let io = Io::new(0, Op::Flush, PinnedBuffers::default());
        (0..10_000).map(|_| wire.request(&io, 0)).collect::<Vec<_>>()
    };
    assert_eq!(jitters(1), jitters(1));
    assert_ne!(jitters(1), jitters(2));
    let mut all = jitters(3);
    let mean = all.iter().sum::<u64>() / all.len() as u64;
    assert!((MS * 95 / 100..MS * 105 / 100).contains(&mean), "half of two milliseconds each way: {mean}");
    all.sort_unstable();
    // The median of an exponential distribution is ln 2 of its mean.
    assert!((MS * 65 / 100..MS * 74 / 100).contains(&all[5000]), "{}", all[5000]);
    assert!(*all.last().unwrap() <= 10 * MS);
}

#[test]
fn it_takes_as_long_as_the_fabric_says() {
    let mut rig = Rig::new(&store(fabric(20, MIB, 0)));
    let (begun, calls) = (Instant::now(), rig.ring.system_calls());
    rig.write(0, &pattern(1, 65536), false);
    assert_eq!(rig.read(0, 65536), pattern(1, 65536));
    // Twice there and back, and an eighth of a second for the data.
    let least = Duration::from_millis(40 + 125);
    assert!(begun.elapsed() >= least && begun.elapsed() < 5 * least, "{:?}", begun.elapsed());
    assert!(rig.ring.system_calls() - calls < 40, "it looked all the time");
}

#[test]
fn credits_bound_what_is_on_its_way_and_come_back_in_order() {
    let mut rig = Rig::new(&store(Fabric { jitter: Duration::from_millis(2), ..fabric(1, 0, 8) }));
    let mut next = 0;
    for _ in 0..10 {
        while rig
            .submit(
                Op::WriteZeroes { offset: next * 512, len: 512, unmap: true, durable: false },
                PinnedBuffers::default(),
            )
            .is_ok()
        {
            next += 1;
        }
        assert_eq!(rig.backend.in_flight(), 8);
        let offsets: Vec<_> = rig
            .finish()
            .iter()
            .map(|done| match done.io.op {
                Op::WriteZeroes { offset, .. } => offset / 512,
                _ => u64::MAX,
            })
            .collect();
        assert_eq!(offsets, (next - 8..next).collect::<Vec<_>>());
    }
}

#[test]
fn who_has_to_end_does_not_wait() {
    let mut rig = Rig::new(&store(fabric(10_000, 1, 0)));
    let begun = Instant::now();
    let buffers = rig.guest.buffers(&[(0, 4096)]);
    rig.submit(Op::Write { offset: 0, durable: false }, buffers).unwrap();
    rig.submit(Op::Flush, PinnedBuffers::default()).unwrap();
    rig.backend.stop();
    assert_eq!(rig.finish().len(), 2);
    assert!(begun.elapsed() < Duration::from_secs(5));
}
