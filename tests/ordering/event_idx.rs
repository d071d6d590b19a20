//! The arithmetic of the event index, all of it, against a definition that knows no modular arithmetic: an index walks
//! from `old` to `new` one by one, and passes `event` if on its way it gets to the index behind `event`.

#![allow(clippy::unwrap_used, reason = "a failure is the result of a test")]

mod rig;

use std::thread;

use client::Segment;
use rig::{BASE, Rig, pop};
use virtio::memory::PinnedBuffers;
use virtio::queue::Signal;
use virtio::queue::event_idx::passed;

/// One event, one `old`, and every `new`: the walk visits each.
fn check_all_new(event: u16, old: u16) {
    let behind = event.wrapping_add(1);
    let (mut new, mut walked_by, mut differs) = (old, false, false);
    loop {
        differs |= passed(event, new, old) != walked_by;
        new = new.wrapping_add(1);
        if new == old {
            break;
        }
        walked_by |= new == behind;
    }
    assert!(!differs, "event {event:#x}, old {old:#x}: a new index is wrong");
}

#[test]
fn every_event_and_every_new_index() {
    thread::scope(|scope| {
        for first in [0, 1] {
            scope.spawn(move || (first..=u16::MAX).step_by(2).for_each(|event| check_all_new(event, 0)));
        }
    });
}

#[test]
fn from_any_old_index() {
    // Weyl's sequence: far apart, and the same in each run.
    let mut random = 0u32;
    for _ in 0..2048 {
        random = random.wrapping_add(0x9e37_79b9);
        let (event, old) = ((random >> 16) as u16, (random.wrapping_mul(0x85eb_ca6b) >> 16) as u16);
        check_all_new(event, old);
        check_all_new(old, old);
        check_all_new(old.wrapping_sub(1), old);
    }
}

/// A move by 2^16 looks like none. That is why a decision is due at least once a queue's size.
#[test]
fn a_whole_turn_passes_nothing() {
    for event in 0..=u16::MAX {
        assert!(!passed(event, 0, 0) && !passed(event, event, event));
    }
}

/// One request there and back.
fn complete_one(rig: &mut Rig) -> Signal {
    rig.driver.add(&[Segment { iova: BASE, len: 1 }], &[]).unwrap();
    let _kick = rig.driver.publish();
    let head = pop(&mut rig.queue, &mut rig.memory, &mut PinnedBuffers::default()).unwrap().unwrap();
    rig.queue.complete(head, 0);
    let signal = rig.queue.publish();
    assert!(rig.driver.take().unwrap().is_some(), "not shown to the driver");
    signal
}

/// The decisions that said no move the index of the last decision too: were it left behind, then after a whole turn
/// the next completion would look like none.
#[test]
fn a_turn_of_completions_without_a_signal_does_not_hide_the_next() {
    for event_idx in [true, false] {
        for silent in (0..4).chain(65_533..65_540).chain(131_071..131_074) {
            let mut rig = Rig::new(4, event_idx, 0);
            for n in 0..silent {
                rig.driver.disable_interrupts();
                assert_eq!(complete_one(&mut rig), Signal::Suppressed, "completion {n} of {silent}");
            }
            assert!(!rig.driver.enable_interrupts(), "nothing is there");
            assert_eq!(complete_one(&mut rig), Signal::Needed, "after {silent} without a signal");
            assert_eq!(rig.queue.publish(), Signal::Idle);
        }
    }
}

/// The same, where the driver asks for each completion and hears of each, over two turns.
#[test]
fn each_completion_that_is_asked_for_is_signalled_and_no_other() {
    let mut rig = Rig::new(4, true, 0);
    for n in 0..140_000u32 {
        let asked = n % 3 == 0;
        if asked {
            assert!(!rig.driver.enable_interrupts());
        }
        let expected = if asked { Signal::Needed } else { Signal::Suppressed };
        assert_eq!(complete_one(&mut rig), expected, "completion {n}");
    }
}
