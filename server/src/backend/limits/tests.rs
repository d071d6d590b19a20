use std::time::{Duration, Instant};

use virtio::memory::PinnedBuffers;

use super::*;
use crate::backend::contract::{Rig, pattern};
use crate::backend::memory::MemoryStore;
use crate::backend::timer::until;

const MIB: u64 = 1 << 20;

fn rate(per_second: u64, burst: u64) -> Option<Rate> {
    NonZeroU64::new(per_second).map(|per_second| Rate { per_second, burst })
}

fn of_all(all: Option<Rate>) -> Budget {
    Budget { all, ..Budget::default() }
}

fn store(limits: &Limits) -> LimitedStore {
    LimitedStore::new(Arc::new(MemoryStore::new(MIB).unwrap()), limits)
}

fn io(op: Op) -> Io {
    Io::new(0, op, PinnedBuffers::default())
}

#[test]
fn each_limit_counts_what_it_is_for() {
    let limiter = Limiter::new(&Limits {
        operations: Budget { all: rate(1000, 1), reads: rate(10, 1), writes: rate(100, 1) },
        bytes: Budget { all: None, reads: rate(1000, 1), writes: rate(2000, 0) },
    });
    let wait = |op: Op| {
        limiter.take(&io(op), 0);
        let wait = until(limiter.take(&io(op), 0), 0).as_millis();
        limiter.buckets.iter().for_each(|limit| limit.bucket.empty(0));
        wait
    };
    limiter.buckets.iter().for_each(|limit| limit.bucket.empty(0));
    assert_eq!(wait(Op::Read { offset: 0 }), 100);
    assert_eq!(wait(Op::Flush), 10);
    assert_eq!(wait(Op::Discard { offset: 0, len: 1 << 30 }), 10);
    assert_eq!(wait(Op::WriteZeroes { offset: 0, len: 2000, unmap: true, durable: false }), 1000);
}

#[test]
fn of_each_queue_one_waits_and_the_rest_are_not_taken() {
    let store = store(&Limits { operations: of_all(rate(50, 2)), ..Limits::default() });
    let mut rig = Rig::new(&store);
    let begun = Instant::now();
    let mut taken = 0;
    while rig.submit(Op::Flush, PinnedBuffers::default()).is_ok() {
        taken += 1;
    }
    assert_eq!(taken, 3, "the burst, and the next");
    assert!(rig.backend.is_dormant() || !rig.reap().is_empty());
    let calls = rig.ring.system_calls();
    let done = rig.finish();
    assert!(done.len() <= 3 && begun.elapsed() >= Duration::from_millis(17), "{:?}", begun.elapsed());
    assert!(rig.ring.system_calls() - calls < 10, "it looked all the time");
    assert!(!rig.backend.is_dormant());
}

/// Without a clock: as many queues, each of which has one that waits all the time.
#[test]
fn those_who_wait_have_their_turns_in_the_order_in_which_they_asked() {
    let limiter = Limiter::new(&Limits { operations: of_all(rate(1000, 1)), ..Limits::default() });
    let mut turns = vec![0u32; 5];
    let mut waiting: Vec<_> = (0..5).map(|queue| (limiter.take(&io(Op::Flush), 0), queue)).collect();
    for _ in 0..1000 {
        waiting.sort_unstable();
        let (now, queue) = waiting[0];
        turns[queue] += 1;
        waiting[0].0 = limiter.take(&io(Op::Flush), now);
    }
    assert!(turns.iter().all(|turns| *turns == 200), "{turns:?}");
}

#[test]
fn a_queue_with_much_to_do_does_not_starve_another() {
    let store = store(&Limits { operations: of_all(rate(200, 1)), ..Limits::default() });
    let mut greedy = Rig::new(&store);
    let mut modest = Rig::new(&store);
    modest.backend = store.attach(&greedy.ring, 0).unwrap();
    modest.ring = Rc::clone(&greedy.ring);
    let (mut of_greedy, mut of_modest) = (0, 0);
    while of_greedy + of_modest < 60 {
        while greedy.submit(Op::Flush, PinnedBuffers::default()).is_ok() {}
        if modest.backend.in_flight() == 0 {
            modest.submit(Op::Flush, PinnedBuffers::default()).unwrap();
        }
        greedy.ring.wait().unwrap();
        of_greedy += greedy.reap().len();
        of_modest += modest.reap().len();
    }
    // Half of them, but for bursts of the greedy one's on a machine that is slow.
    assert!(of_modest >= 15, "{of_modest} to {of_greedy}");
}

#[test]
fn bytes_are_limited_and_arrive_as_they_were() {
    let bytes = of_all(rate(MIB, 64 << 10));
    let mut rig = Rig::new(&store(&Limits { bytes, ..Limits::default() }));
    let begun = Instant::now();
    for n in 0..8 {
        rig.write(n * 32768, &pattern(n, 32768), false);
    }
    for n in 0..8 {
        assert_eq!(rig.read(n * 32768, 32768), pattern(n, 32768));
    }
    // Half a MiB, of which the burst and one more are not waited for.
    let least = Duration::from_millis(1000 * (512 - 64 - 32) / 1024);
    assert!(begun.elapsed() >= least, "{:?}", begun.elapsed());
}

#[test]
fn who_has_to_end_does_not_wait_for_its_turn_and_pays_later() {
    let store = store(&Limits { operations: of_all(rate(2, 1)), ..Limits::default() });
    let mut rig = Rig::new(&store);
    let begun = Instant::now();
    for _ in 0..2 {
        rig.submit(Op::Flush, PinnedBuffers::default()).unwrap();
    }
    rig.backend.stop();
    for _ in 0..10 {
        rig.submit(Op::Flush, PinnedBuffers::default()).unwrap();
    }
    assert_eq!(rig.finish().len(), 12);
    assert!(begun.elapsed() < Duration::from_secs(2), "nobody waits for all of them");
    // Another queue of the same device: the twelve have to be paid for first.
    let now = store.limiter.clock.now();
    assert!(until(store.limiter.take(&io(Op::Flush), now), now) > Duration::from_secs(4));
}

#[test]
fn what_waits_when_its_queue_goes_lets_go_of_memory() {
    let store = store(&Limits { operations: of_all(rate(1, 1)), ..Limits::default() });
    let mut rig = Rig::new(&store);
    for _ in 0..2 {
        let buffers = rig.guest.buffers(&[(0, 4096)]);
        rig.submit(Op::Read { offset: 0 }, buffers).unwrap();
    }
    let Rig { ring, backend, guest, .. } = rig;
    let release = guest.release();
    drop(backend);
    assert!(release.wait(Instant::now()));
    let begun = Instant::now();
    drop(ring);
    assert!(begun.elapsed() < Duration::from_secs(2), "its timer is not waited for");
}
