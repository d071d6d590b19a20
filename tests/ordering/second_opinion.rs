//! Our split queue and rust-vmm's `virtio-queue`, operation by operation, on the same histories. Each has memory and a
//! driver of its own; whatever the one answers or writes, the other must.
//!
//! # Where they differ
//! Most differences are of shape, and [`Pair`] makes the calls of the one from those of the other:
//! - Theirs shows each used element to the driver at once, ours a whole batch with `publish`. So theirs gets the batch
//!   when ours is published. What the driver may observe in between is less with ours, never more.
//! - Theirs turns kicks off when it is told to. Ours does so itself, with the first request after `arm`.
//! - Theirs hands out a chain as an iterator, which ends early where it is broken; ours is two lists or an error.
//!
//! Three are differences of behaviour:
//! - Without the event index theirs always wants an interrupt: "VRING_AVAIL_F_NO_INTERRUPT isn't supported yet". Ours
//!   heeds the flag (virtio 1.3 §2.7.7.2: without the event index, a device SHOULD NOT send one when it is set).
//! - With nothing new, theirs without the event index still wants an interrupt; ours says that there is nothing.
//! - A driver that breaks the rules: theirs drops a bad `avail.idx` without a word to the device and hands out heads
//!   that don't exist or are in flight already. Ours refuses all three
//!   ([`what_a_broken_driver_gets`](what_a_broken_driver_gets)).

#![allow(clippy::unwrap_used, reason = "a failure is the result of a test")]

mod rig;

use std::fs::File;

use client::{Ring, Segment};
use nix::libc::iovec;
use proptest::collection::vec;
use proptest::prelude::*;
use rig::{BASE, Format, LEN, Rig, Split, pop};
use virtio::memory::PinnedBuffers;
use virtio::queue::{Armed, Head, QueueError, Signal, Virtqueue};
use virtio_queue::{Queue, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

const SIZE: u16 = 8;

/// What the device or the driver does next.
#[derive(Clone, Debug)]
enum Step {
    /// The driver adds a chain of so many segments to read and to write, if it fits.
    Add(usize, usize),
    /// The driver shows what it has added.
    Kick,
    /// The device takes a chain.
    Pop,
    /// The device gives back one that is in flight, by lot, with so many bytes written.
    Complete(prop::sample::Index, u32),
    /// The device shows what it has given back.
    Signal,
    /// The device asks for kicks.
    Arm,
    /// The driver takes a chain that was given back.
    Take,
    /// The driver asks for interrupts.
    Enable,
    /// The driver asks for none.
    Disable,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..3usize, 0..3usize).prop_map(|(readable, writable)| Step::Add(readable, writable)),
        3 => Just(Step::Kick),
        4 => Just(Step::Pop),
        4 => (any::<prop::sample::Index>(), any::<u32>()).prop_map(|(which, written)| Step::Complete(which, written)),
        3 => Just(Step::Signal),
        1 => Just(Step::Arm),
        4 => Just(Step::Take),
        1 => Just(Step::Enable),
        1 => Just(Step::Disable),
    ]
}

/// rust-vmm's queue, and the driver that it is used by.
struct Theirs {
    queue: Queue,
    memory: GuestMemoryMmap,
    driver: Ring,
}

impl Theirs {
    fn new(event_idx: bool, indirect: u16) -> Self {
        let guest = client::GuestMemory::new(LEN, BASE).unwrap();
        let driver = Split::driver(&guest, SIZE, event_idx, indirect, false);
        let file = FileOffset::new(File::from(guest.fd().try_clone_to_owned().unwrap()), 0);
        let memory = GuestMemoryMmap::from_ranges_with_files([(GuestAddress(BASE), LEN, Some(file))]).unwrap();
        let mut queue = Queue::new(SIZE).unwrap();
        let [desc, avail, used] = driver.areas().map(|area| (Some(area as u32), Some((area >> 32) as u32)));
        queue.set_desc_table_address(desc.0, desc.1);
        queue.set_avail_ring_address(avail.0, avail.1);
        queue.set_used_ring_address(used.0, used.1);
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        assert!(queue.is_valid(&memory));
        Theirs { queue, memory, driver }
    }
}

/// Both, in step.
struct Pair {
    ours: Rig<Split>,
    theirs: Theirs,
    buffers: PinnedBuffers,
    event_idx: bool,
    in_flight: Vec<Head>,
    /// Given back to ours, not yet shown, and so not yet given back to theirs.
    completed: Vec<(u16, u32)>,
    /// As ours sees it: zeroed memory asks for kicks from the first.
    armed: bool,
    /// For chains that differ from each other.
    tag: u64,
}

impl Pair {
    fn new(event_idx: bool, indirect: u16) -> Self {
        let (ours, theirs) = (Rig::new(SIZE, event_idx, indirect, false), Theirs::new(event_idx, indirect));
        let (in_flight, completed) = (Vec::new(), Vec::new());
        Pair { ours, theirs, buffers: PinnedBuffers::default(), event_idx, in_flight, completed, armed: true, tag: 0 }
    }

    /// Goes through `requests` one by one, so that indices come near their wrap.
    fn advance(&mut self, requests: u32) {
        for _ in 0..requests {
            for step in [Step::Add(1, 0), Step::Kick, Step::Pop] {
                self.step(&step);
            }
            self.complete(0, 1);
            self.step(&Step::Signal);
            self.step(&Step::Take);
        }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Add(readable, writable) => self.add(*readable, *writable),
            Step::Kick => assert_eq!(self.ours.driver.publish(), self.theirs.driver.publish(), "a kick"),
            Step::Pop => self.pop(),
            Step::Complete(which, written) if !self.in_flight.is_empty() => {
                self.complete(which.index(self.in_flight.len()), *written);
            }
            Step::Complete(..) => {}
            Step::Signal => self.signal(),
            Step::Arm => {
                let work = self.theirs.queue.enable_notification(&self.theirs.memory).unwrap();
                assert_eq!(self.ours.queue.arm(), if work { Armed::Work } else { Armed::Sleep });
                self.armed = true;
            }
            Step::Take => assert_eq!(self.ours.driver.take().unwrap(), self.theirs.driver.take().unwrap()),
            Step::Enable => {
                assert_eq!(self.ours.driver.enable_interrupts(), self.theirs.driver.enable_interrupts());
            }
            Step::Disable => {
                self.ours.driver.disable_interrupts();
                self.theirs.driver.disable_interrupts();
            }
        }
    }

    fn add(&mut self, readable: usize, writable: usize) {
        let mut segments = Vec::new();
        for _ in 0..readable + writable {
            self.tag += 1;
            segments.push(Segment { iova: BASE + (self.tag * 0x310) % 0xfc00, len: self.tag as u32 % 512 + 1 });
        }
        let (readable, writable) = segments.split_at(readable);
        let head = self.ours.driver.add(readable, writable);
        assert_eq!(head, self.theirs.driver.add(readable, writable));
    }

    fn pop(&mut self) {
        let head = pop(&mut self.ours.queue, &mut self.ours.memory, &mut self.buffers).unwrap();
        let chain = self.theirs.queue.pop_descriptor_chain(&self.theirs.memory);
        assert_eq!(head.as_ref().map(Head::id), chain.as_ref().map(|chain| chain.head_index()));
        let (Some(head), Some(chain)) = (head, chain) else {
            return;
        };
        let place = |piece: &iovec| BASE + self.buffers.file().unwrap().offset_of(piece).unwrap();
        let ours = |pieces: &[iovec], write| -> Vec<_> {
            pieces.iter().map(|piece| (place(piece), piece.iov_len as u32, write)).collect()
        };
        let theirs: Vec<_> = chain.map(|buffer| (buffer.addr().0, buffer.len(), buffer.is_write_only())).collect();
        let [readable, writable] = self.buffers.pieces();
        assert_eq!([ours(&readable, false), ours(&writable, true)].concat(), theirs);
        self.in_flight.push(head);
        if std::mem::take(&mut self.armed) {
            self.theirs.queue.disable_notification(&self.theirs.memory).unwrap();
        }
    }

    fn complete(&mut self, which: usize, written: u32) {
        let head = self.in_flight.swap_remove(which);
        self.completed.push((head.id(), written));
        self.ours.queue.complete(head, written);
    }

    fn signal(&mut self) {
        let nothing = self.completed.is_empty();
        for (head, written) in self.completed.drain(..) {
            self.theirs.queue.add_used(&self.theirs.memory, head, written).unwrap();
        }
        let ours = self.ours.queue.publish();
        let theirs = self.theirs.queue.needs_notification(&self.theirs.memory).unwrap();
        let flag = self.ours.driver.split().unwrap().avail_flags();
        let expected = match (nothing, self.event_idx) {
            (true, _) => {
                assert_eq!(theirs, !self.event_idx);
                Signal::Idle
            }
            (false, true) if theirs => Signal::Needed,
            (false, true) => Signal::Suppressed,
            (false, false) => {
                assert!(theirs);
                if flag == 0 { Signal::Needed } else { Signal::Suppressed }
            }
        };
        assert_eq!(ours, expected);
    }

    /// All that the device has written is the same.
    fn compare(&self) {
        let [ours, theirs] = [&self.ours.driver, &self.theirs.driver].map(|driver| {
            let memory = driver.split().unwrap();
            let elements: Vec<_> = (0..SIZE).map(|slot| memory.used_entry(slot)).collect();
            (memory.used_flags(), memory.avail_event(), memory.used_idx(), elements)
        });
        if self.completed.is_empty() {
            assert_eq!(ours, theirs);
        }
        assert_eq!((ours.0, ours.1, ours.2), (theirs.0, theirs.1, theirs.2));
        assert_eq!(self.ours.queue.state().next_avail, self.theirs.queue.next_avail());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    #[test]
    fn the_same_history_gives_the_same_answers(
        event_idx: bool,
        indirect in prop_oneof![Just(0u16), Just(4)],
        before in prop_oneof![4 => Just(0u32), 1 => 65_500..65_540u32],
        steps in vec(step(), 1..400),
    ) {
        let mut pair = Pair::new(event_idx, indirect);
        pair.advance(before);
        for step in &steps {
            pair.step(step);
            pair.compare();
        }
    }
}

/// What ours refuses, and what theirs makes of it.
#[test]
fn what_a_broken_driver_gets() {
    let pair = |heads: &[u16], idx: u16| {
        let pair = Pair::new(true, 0);
        for driver in [&pair.ours.driver, &pair.theirs.driver] {
            for (slot, head) in (0..).zip(heads) {
                driver.split().unwrap().set_avail_entry(slot, *head);
            }
            driver.split().unwrap().set_avail_idx(idx);
        }
        pair
    };
    let mut ahead = pair(&[], SIZE + 1);
    assert!(ahead.theirs.queue.pop_descriptor_chain(&ahead.theirs.memory).is_none());
    assert_eq!(
        ahead.ours.queue.pop_head(),
        Err(QueueError::AvailIdx { avail_idx: SIZE + 1, next_avail: 0, size: SIZE })
    );

    let mut beyond = pair(&[SIZE], 1);
    let chain = beyond.theirs.queue.pop_descriptor_chain(&beyond.theirs.memory).unwrap();
    assert_eq!((chain.head_index(), chain.count()), (SIZE, 0));
    assert_eq!(beyond.ours.queue.pop_head(), Err(QueueError::Head { head: SIZE, size: SIZE }));

    let mut twice = pair(&[3, 3], 2);
    for _ in 0..2 {
        assert_eq!(twice.theirs.queue.pop_descriptor_chain(&twice.theirs.memory).unwrap().head_index(), 3);
    }
    let _first = twice.ours.queue.pop_head().unwrap().unwrap();
    assert_eq!(twice.ours.queue.pop_head(), Err(QueueError::HeadInFlight(3)));
}
