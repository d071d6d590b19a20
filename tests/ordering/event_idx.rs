//! The arithmetic of the event index, all of it, against a definition that knows no modular arithmetic: an index walks
//! from `old` to `new` one by one, and passes `event` if on its way it gets to the index behind `event`.

#![allow(clippy::unwrap_used, reason = "a failure is the result of a test")]

mod rig;

use std::thread;

use client::Segment;
use rig::{BASE, Format, Packed, Rig, Split, pop};
use virtio::memory::PinnedBuffers;
use virtio::queue::event_idx::{passed, passed_in_ring};
use virtio::queue::{Position, Signal};

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

/// All positions of a packed ring.
fn positions(size: u16) -> impl Iterator<Item = Position> {
    (0..size).flat_map(|index| [index | 1 << 15, index]).map(Position::from_bits)
}

/// One event, one `old`, and every `new` that a side can get to in one decision: the walk visits each.
fn check_ring(event: Position, old: Position, size: u16) {
    let (mut new, mut walked_by) = (old, false);
    for distance in 0..=size {
        let answer = passed_in_ring(event, new, old, size);
        assert_eq!(answer, walked_by, "event {event:?}, old {old:?}, {distance} on in a ring of {size}");
        walked_by |= new == event;
        // Step by step, by the definition of the wrap counter (§2.8.1).
        let last = new.index() + 1 == size;
        let (index, wrap) = if last { (0, !new.wrap()) } else { (new.index() + 1, new.wrap()) };
        new = Position::from_bits(index | u16::from(wrap) << 15);
    }
}

#[test]
fn every_event_and_every_position_of_small_rings() {
    for size in 1..=12 {
        for old in positions(size) {
            positions(size).for_each(|event| check_ring(event, old, size));
            // Not in the ring: nobody passes it.
            for event in [size, size | 1 << 15, 0x7fff, 0xffff] {
                check_ring(Position::from_bits(event), old, size);
            }
        }
    }
}

#[test]
fn events_near_the_ends_of_large_rings() {
    for size in [255, 256, 1000, 32767, 32768] {
        let ends = || positions(size).filter(|at| at.index() < 2 || at.index() + 2 >= size || at.index() == size / 2);
        for old in ends() {
            ends().for_each(|event| check_ring(event, old, size));
        }
    }
}

/// One request there and back.
fn complete_one<Q: Format>(rig: &mut Rig<Q>) -> Signal {
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
fn a_turn_of_completions_without_a_signal<Q: Format>() {
    for event_idx in [true, false] {
        for silent in (0..10).chain(65_533..65_540).chain(131_071..131_074) {
            let mut rig = Rig::<Q>::new(4, event_idx, 0, false);
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

#[test]
fn a_turn_of_completions_without_a_signal_does_not_hide_the_next() {
    a_turn_of_completions_without_a_signal::<Split>();
}

#[test]
fn a_turn_of_completions_without_a_signal_does_not_hide_the_next_in_a_packed_ring() {
    a_turn_of_completions_without_a_signal::<Packed>();
}

/// The same, where the driver asks for each third completion and hears of each, over two turns.
fn each_completion_that_is_asked_for<Q: Format>(size: u16) {
    let mut rig = Rig::<Q>::new(size, true, 0, false);
    for n in 0..140_000u32 {
        let asked = n % 3 == 0;
        if asked {
            assert!(!rig.driver.enable_interrupts());
        } else {
            rig.driver.disable_interrupts();
        }
        let expected = if asked { Signal::Needed } else { Signal::Suppressed };
        assert_eq!(complete_one(&mut rig), expected, "completion {n}");
    }
}

#[test]
fn each_completion_that_is_asked_for_is_signalled_and_no_other() {
    each_completion_that_is_asked_for::<Split>(4);
    for size in [1, 3, 4, 256] {
        each_completion_that_is_asked_for::<Packed>(size);
    }
}
