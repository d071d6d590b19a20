//! Who is told of what, and when: the event index and the flags, end to end.

use std::time::Instant;

use client::{BlockOptions, BlockRequest, NotifyMethod, RequestType};
use vfio_user_blk::config::{Cache, PollPolicy};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use crate::rig::{LIMIT, Machine, OK, Rig, count, signalled, until};

const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const FLUSH: BlockRequest<'_> = BlockRequest { kind: RequestType::Flush, sector: 0, data: &[] };

fn options(event_idx: bool) -> BlockOptions {
    let features = if event_idx { BlockOptions::FEATURES } else { BlockOptions::FEATURES & !EVENT_IDX };
    BlockOptions { features, queues: 1, ..BlockOptions::default() }
}

/// One interrupt for each completion that asked for it, none for the others.
#[test]
fn an_interrupt_comes_when_asked_for_and_only_then() {
    let rig = Rig::ram();
    for event_idx in [true, false] {
        let client = rig.client();
        let mut machine = Machine::new(client, &options(event_idx));
        let queue = &mut machine.queues[0];
        let mut expected = 0;
        let mut heard = 0;
        for round in 0..3000u32 {
            let asks = round % 7 < 3;
            if asks {
                assert!(!queue.ring_mut().enable_interrupts());
            } else {
                queue.ring_mut().disable_interrupts();
            }
            queue.submit(&FLUSH).unwrap();
            queue.publish().unwrap();
            if asks {
                let signals = signalled(queue.interrupt().unwrap());
                assert_eq!(signals, 1, "round {round}");
                heard += signals;
                expected += 1;
            }
            until("a completion", || queue.ring().has_used());
            assert_eq!(queue.poll().unwrap().unwrap().status, OK);
        }
        // Signals of completions that did not ask for them would have come by now: a request is taken up only after the
        // one before was signalled.
        heard += count(queue.interrupt().unwrap());
        assert_eq!(heard, expected, "event index: {event_idx}");
    }
}

/// With the event index a driver names the completion that it wants to hear of: no other signals.
#[test]
fn the_used_event_names_the_completion_to_hear_of() {
    let rig = Rig::ram();
    let mut machine = rig.boot_with(&options(true));
    let queue = &mut machine.queues[0];
    for ahead in [0u16, 1, 2, 5, 9] {
        let from = queue.ring().split().unwrap().used_idx();
        queue.ring().split().unwrap().set_used_event(from.wrapping_add(ahead));
        for at in 0..10u16 {
            // One after the other, so that each is a decision of its own.
            queue.submit(&FLUSH).unwrap();
            queue.publish().unwrap();
            until("a completion", || queue.ring().has_used());
            queue.poll().unwrap().unwrap();
            if at == ahead {
                assert_eq!(signalled(queue.interrupt().unwrap()), 1);
            }
        }
        queue.ring_mut().disable_interrupts();
        queue.submit(&FLUSH).unwrap();
        queue.publish().unwrap();
        until("a completion", || queue.ring().has_used());
        queue.poll().unwrap().unwrap();
        assert_eq!(count(queue.interrupt().unwrap()), 0, "{ahead}");
    }
}

/// A driver that sleeps after each request is woken each time, in all modes.
#[test]
fn a_sleeping_driver_is_always_woken() {
    sleep_for_each(&Rig::ram(), 10_000);
    // A store that takes its time: driver and worker both sleep.
    sleep_for_each(&Rig::file(Cache::None), 1500);
}

fn sleep_for_each(rig: &Rig, rounds: u32) {
    for event_idx in [true, false] {
        for notify in [NotifyMethod::Posted, NotifyMethod::IoEventFd, NotifyMethod::Message] {
            let mut machine = Machine::new(rig.client(), &BlockOptions { notify, ..options(event_idx) });
            let data = [machine.memory.allocate(4096, 4096).unwrap().segment(0, 4096).unwrap()];
            let read = BlockRequest { kind: RequestType::Read, sector: 0, data: &data };
            let queue = &mut machine.queues[0];
            for round in 0..rounds {
                queue.submit(&read).unwrap();
                queue.publish().unwrap();
                let begun = Instant::now();
                assert!(queue.wait(LIMIT).unwrap());
                assert!(begun.elapsed() < LIMIT, "{notify:?}, event index {event_idx}: round {round} hung");
                assert_eq!(queue.poll().unwrap().unwrap().status, OK);
            }
        }
    }
}

/// Batches of changing sizes with pauses of changing lengths: the device falls asleep at every moment that there is.
#[test]
fn a_device_that_falls_asleep_misses_nothing() {
    let rig = Rig::ram();
    for event_idx in [true, false] {
        let mut machine =
            Machine::new(rig.client(), &BlockOptions { notify: NotifyMethod::IoEventFd, ..options(event_idx) });
        let queue = &mut machine.queues[0];
        let mut random = crate::rig::Random::new(7);
        for _ in 0..4000 {
            let batch = 1 + random.below(8);
            for _ in 0..batch {
                queue.submit(&FLUSH).unwrap();
                if random.below(2) == 0 {
                    queue.publish().unwrap();
                }
                for _ in 0..random.below(300) {
                    std::hint::spin_loop();
                }
            }
            queue.publish().unwrap();
            for _ in 0..batch {
                assert_eq!(crate::rig::completion(queue).status, OK);
            }
        }
        assert!(queue.kicks() > 0);
    }
}

/// While its worker is awake a queue asks for no kicks: there are none but those before the worker has seen the first.
#[test]
fn a_queue_whose_worker_is_awake_is_not_kicked() {
    const DEPTH: u64 = 128;
    let rig = Rig::with(|device| device.poll = Some(PollPolicy::Always));
    for event_idx in [true, false] {
        let mut machine = Machine::new(rig.client(), &BlockOptions { interrupts: false, ..options(event_idx) });
        let queue = &mut machine.queues[0];
        let (mut submitted, mut completed) = (0u64, 0u64);
        let begun = Instant::now();
        while completed < 20_000 {
            while submitted < completed + DEPTH {
                queue.submit(&FLUSH).unwrap();
                queue.publish().unwrap();
                submitted += 1;
            }
            while queue.poll().unwrap().is_some() {
                completed += 1;
            }
            assert!(begun.elapsed() < LIMIT);
        }
        assert!(queue.kicks() <= DEPTH, "{} kicks for {submitted} requests", queue.kicks());
        until("the rest", || {
            while queue.poll().unwrap().is_some() {
                completed += 1;
            }
            completed == submitted
        });
    }
}
