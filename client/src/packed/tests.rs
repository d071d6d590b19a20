use std::collections::{BTreeMap, VecDeque};

use proptest::prelude::*;

use super::*;

/// The device's side: takes lists and gives them back in any order.
struct Device {
    memory: PackedMemory,
    avail: Place,
    used: Place,
    /// For each list that it has taken, its descriptors.
    len: BTreeMap<u16, u16>,
}

impl Device {
    fn new(driver: &PackedDriver) -> Device {
        Device { memory: driver.memory().clone(), avail: Place::START, used: Place::START, len: BTreeMap::new() }
    }

    /// The next list: its buffer ID, what the device reads and what it writes.
    fn pop(&mut self, guest: &GuestMemory) -> Option<(u16, Vec<Segment>, Vec<Segment>)> {
        let mut pieces = [Vec::new(), Vec::new()];
        let mut push = |descriptor: PackedDescriptor| {
            let writable = usize::from(descriptor.flags & WRITE != 0);
            pieces[writable].push(Segment { iova: descriptor.addr, len: descriptor.len });
        };
        if self.memory.flags(self.avail.index) & (AVAIL | USED) != self.avail.avail() {
            return None;
        }
        let mut len = 0;
        let id = loop {
            let descriptor = self.memory.descriptor(self.avail.index);
            assert_eq!(descriptor.flags & (AVAIL | USED), self.avail.avail(), "all flags of a list are set");
            self.avail = self.avail.after(1, self.memory.size());
            len += 1;
            if descriptor.flags & INDIRECT != 0 {
                assert_eq!((descriptor.flags & (NEXT | WRITE), len), (0, 1));
                let table = guest.at((descriptor.addr - guest.base()) as usize, descriptor.len as usize).unwrap();
                let words = table.fields::<AtomicU64>(0, descriptor.len as usize / 8).unwrap();
                for pair in words.chunks(2) {
                    let entry = PackedDescriptor::from_words([0, 1].map(|at: usize| pair[at].load(Ordering::Relaxed)));
                    assert_eq!(entry.flags & !WRITE, 0);
                    push(entry);
                }
                break descriptor.id;
            }
            push(descriptor);
            if descriptor.flags & NEXT == 0 {
                break descriptor.id;
            }
        };
        self.len.insert(id, len);
        let [readable, writable] = pieces;
        Some((id, readable, writable))
    }

    /// Gives back the list `id` and those before it that are skipped.
    fn give_back(&mut self, id: u16, len: u32, skipped: &[u16]) {
        let flags = self.used.used();
        self.memory.set_descriptor(self.used.index, PackedDescriptor { addr: 0, len, id, flags });
        for id in skipped.iter().chain([&id]) {
            let len = self.len.remove(id).unwrap_or(1);
            self.used = self.used.after(len, self.memory.size());
        }
    }
}

fn driver(size: u16, event_idx: bool, indirect: u16) -> (GuestMemory, PackedDriver) {
    let memory = GuestMemory::new(1 << 20, 0x10_0000).unwrap();
    let driver = PackedDriver::new(&memory, size, event_idx, indirect).unwrap();
    (memory, driver)
}

fn segments(count: usize, tag: u64) -> Vec<Segment> {
    (0..count as u64).map(|i| Segment { iova: tag << 16 | i, len: 1 + i as u32 }).collect()
}

#[test]
fn areas_have_the_layout_of_the_specification() {
    let (memory, driver) = driver(3, false, 0);
    let ring = driver.memory();
    let descriptor = PackedDescriptor { addr: 0x0102_0304_0506_0708, len: 0x090a_0b0c, id: 0x0d0e, flags: 0x0f10 };
    ring.set_descriptor(1, descriptor);
    ring.set_driver_event(EventSuppression { flags: 2, desc: 0x8003 });
    ring.set_device_event(EventSuppression { flags: 1, desc: 5 });
    let [table, driver_area, device] = ring.areas().map(|area| (area - memory.base()) as usize);
    let bytes = memory.at(table + 16, 16).unwrap().to_vec();
    assert_eq!(bytes, [8, 7, 6, 5, 4, 3, 2, 1, 12, 11, 10, 9, 14, 13, 16, 15]);
    assert_eq!((ring.descriptor(1), ring.flags(1)), (descriptor, 0x0f10));
    assert_eq!(memory.at(driver_area, 4).unwrap().to_vec(), [3, 0x80, 2, 0]);
    assert_eq!(memory.at(device, 4).unwrap().to_vec(), [5, 0, 1, 0]);
    ring.clear();
    assert!(memory.at(0, memory.size()).unwrap().to_vec().iter().all(|byte| *byte == 0));
}

#[test]
fn sizes_need_be_no_power_of_two() {
    let memory = GuestMemory::new(1 << 20, 0x10_0000).unwrap();
    for size in [0, MAX_SIZE + 1, u16::MAX] {
        assert!(matches!(PackedDriver::new(&memory, size, false, 0), Err(Error::Device(_))));
    }
    for size in [1, 3, 1000, MAX_SIZE] {
        assert!(PackedDriver::new(&memory, size, false, 0).is_ok(), "{size}");
    }
}

#[test]
fn a_batch_becomes_visible_at_once() {
    let (memory, mut driver) = driver(4, false, 0);
    let mut device = Device::new(&driver);
    for tag in 0..3 {
        driver.add(&segments(1, tag), &[]).unwrap();
        assert_eq!(device.pop(&memory), None);
    }
    assert!(driver.publish());
    assert!(!driver.publish(), "nothing to notify of");
    for _ in 0..3 {
        assert!(device.pop(&memory).is_some());
    }
}

/// Against a side that walks, for all places of a small ring.
#[test]
fn an_event_is_passed_exactly_between_old_and_new() {
    const SIZE: u16 = 5;
    let places = || (0..SIZE).flat_map(|index| [true, false].map(|wrap| Place { index, wrap }));
    for old in places() {
        let mut walked = Vec::new();
        for step in 0..=SIZE {
            let new = old.after(step, SIZE);
            for event in places() {
                // A whole turn and none differ by the wrap counter.
                assert_eq!(passed(event, new, old), walked.contains(&event), "{event:?} {new:?} {old:?}");
            }
            walked.push(new);
        }
    }
}

#[test]
fn notification_follows_the_device_event() {
    let at = |index, wrap| EventSuppression::at(Place { index, wrap });
    for (event, with, without) in [
        (EventSuppression::ENABLE, [true; 4], [true; 4]),
        (EventSuppression::DISABLE, [false; 4], [false; 4]),
        (at(1, true), [false, true, false, false], [true; 4]),
        (at(1, false), [false, false, false, true], [true; 4]),
    ] {
        for (event_idx, expected) in [(true, with), (false, without)] {
            let (memory, mut driver) = driver(3, event_idx, 0);
            let mut device = Device::new(&driver);
            let mut kicks = Vec::new();
            for steps in [1, 1, 1, 2] {
                for _ in 0..steps {
                    driver.add(&segments(1, 0), &[]).unwrap();
                }
                device.memory.set_device_event(event);
                kicks.push(driver.publish());
                while let Some((id, ..)) = device.pop(&memory) {
                    device.give_back(id, 0, &[]);
                    driver.take().unwrap().unwrap();
                }
            }
            assert_eq!(kicks, expected, "{event:?} {event_idx}");
        }
    }
}

#[test]
fn interrupts_are_asked_for_and_checked_again() {
    for (event_idx, asked) in [(true, EventSuppression::at(Place::START)), (false, EventSuppression::ENABLE)] {
        let (memory, mut driver) = driver(4, event_idx, 0);
        let mut device = Device::new(&driver);
        driver.add(&segments(1, 0), &[]).unwrap();
        let _ = driver.publish();
        assert!(!driver.enable_interrupts());
        assert_eq!(device.memory.driver_event(), asked);
        let (id, ..) = device.pop(&memory).unwrap();
        device.give_back(id, 0, &[]);
        assert!(driver.enable_interrupts(), "there is a chain to take");
        driver.disable_interrupts();
        assert_eq!(device.memory.driver_event(), EventSuppression::DISABLE);
    }
}

#[test]
fn what_the_device_does_not_have_it_cannot_give_back() {
    for id in [1, 4, u16::MAX] {
        let (_memory, mut driver) = driver(4, false, 0);
        let mut device = Device::new(&driver);
        assert_eq!(driver.add(&segments(2, 0), &[]), Some(0));
        device.give_back(id, 0, &[]);
        assert!(matches!(driver.take(), Err(Error::Device(_))), "{id}");
    }
}

#[test]
fn restart_forgets() {
    let (_memory, mut driver) = driver(4, false, 0);
    driver.add(&segments(3, 0), &[]).unwrap();
    let _ = driver.publish();
    driver.restart();
    assert_eq!((driver.in_flight(), driver.memory().flags(0)), (0, 0));
    assert!(driver.add(&segments(4, 0), &[]).is_some());
}

/// One used descriptor tells of several chains.
#[test]
fn a_batch_is_taken_chain_by_chain() {
    let (memory, driver) = driver(5, false, 0);
    let mut driver = driver.in_order();
    let mut device = Device::new(&driver);
    for round in 0..20 {
        let ids: Vec<u16> =
            (1..=2).map(|count| driver.add(&segments(1, round), &segments(count, 7)).unwrap()).collect();
        let _ = driver.publish();
        let popped: Vec<u16> = (0..2).map(|_| device.pop(&memory).unwrap().0).collect();
        assert_eq!(popped, ids);
        device.give_back(ids[1], 9, &ids[..1]);
        assert_eq!(driver.take().unwrap(), Some(Used { head: ids[0], written: 1 }), "all of it");
        assert!(driver.has_used());
        assert_eq!(driver.take().unwrap(), Some(Used { head: ids[1], written: 9 }));
        assert!(!driver.has_used());
        assert_eq!((driver.take().unwrap(), driver.in_flight()), (None, 0));
    }
}

proptest! {
    /// Chains of any shape arrive as they were added and come back in any order, however often
    /// the ring wraps.
    #[test]
    fn chains_survive_the_ring(
        size in 3u16..9,
        event_idx: bool,
        indirect in 0u16..5,
        steps in proptest::collection::vec((0usize..4, 0usize..4, any::<proptest::sample::Index>()), 1..300),
    ) {
        let (memory, mut driver) = driver(size, event_idx, indirect);
        let mut device = Device::new(&driver);
        let mut added = VecDeque::new();
        let mut held = BTreeMap::new();
        for (tag, (readable, writable, pick)) in steps.into_iter().enumerate() {
            let tag = tag as u64;
            let chain = (segments(readable, tag), segments(writable, tag));
            let expected_head = driver.next_head();
            if let Some(head) = driver.add(&chain.0, &chain.1) {
                prop_assert_eq!(Some(head), expected_head);
                added.push_back((head, chain));
            }
            let _ = driver.publish();
            while let Some((head, readable, writable)) = device.pop(&memory) {
                prop_assert_eq!((head, (readable, writable)), added.pop_front().unwrap());
                prop_assert!(held.insert(head, tag).is_none());
            }
            prop_assert_eq!(usize::from(driver.in_flight()), held.len());
            if !held.is_empty() {
                let head = *held.keys().nth(pick.index(held.len())).unwrap();
                held.remove(&head);
                device.give_back(head, head.into(), &[]);
                prop_assert_eq!(driver.take().unwrap(), Some(Used { head, written: head.into() }));
            }
            prop_assert_eq!(driver.take().unwrap(), None);
        }
    }
}
