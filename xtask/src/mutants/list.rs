//! The mutants.

use super::Mutant;
use crate::models::Suite;

const RING: &str = "virtio/src/queue/ring/split.rs";
const PACKED_RING: &str = "virtio/src/queue/ring/packed.rs";
const SPLIT: &str = "virtio/src/queue/split.rs";
const PACKED: &str = "virtio/src/queue/packed.rs";
const EVENT_IDX: &str = "virtio/src/queue/event_idx.rs";
const WAKEUP: &str = "server/src/worker/wakeup.rs";
const VECTOR: &str = "pci/src/interrupts/vector.rs";
const INTX: &str = "pci/src/interrupts/intx.rs";

const VIRTIO_MODELS: &[Suite] = &[Suite::Models("virtio")];
const ARITHMETIC: &[Suite] = &[Suite::EventIdx];
const WORKER_MODELS: &[Suite] = &[Suite::Models("vfio-user-blk")];
const PCI_MODELS: &[Suite] = &[Suite::Models("pci")];

/// What kvmtool had in place of the full barrier, and its other half.
pub(super) const WRITE_BARRIERS: [&str; 4] = [
    "publish: fence becomes Release",
    "arm: fence becomes Release",
    "packed publish: fence becomes Release",
    "packed arm: fence becomes Release",
];

/// A full barrier.
struct Fence {
    name: &'static str,
    file: &'static str,
    function: &'static str,
    text: &'static str,
    /// Our store, if it is in the same function.
    store: Option<&'static str>,
    killers: &'static [Suite],
}

const FENCES: [Fence; 8] = [
    Fence {
        name: "publish",
        file: RING,
        function: "fn publish(",
        text: "self.memory.fence(Ordering::SeqCst);",
        store: Some("self.memory.store(Field::UsedIdx, used_idx, Ordering::Release);"),
        killers: VIRTIO_MODELS,
    },
    Fence {
        name: "arm",
        file: RING,
        function: "fn arm(",
        text: "self.memory.fence(Ordering::SeqCst);",
        store: Some("if self.event_idx {"),
        killers: VIRTIO_MODELS,
    },
    Fence {
        name: "packed publish",
        file: PACKED_RING,
        function: "fn publish(",
        text: "self.memory.fence(Ordering::SeqCst);",
        store: Some("self.memory.write_used(first.index(), used(first, id, len), Ordering::Release);"),
        killers: VIRTIO_MODELS,
    },
    Fence {
        name: "packed arm",
        file: PACKED_RING,
        function: "fn arm(",
        text: "self.memory.fence(Ordering::SeqCst);",
        store: Some("self.memory.set_device_event(event);"),
        killers: VIRTIO_MODELS,
    },
    Fence {
        name: "must_wake",
        file: WAKEUP,
        function: "fn must_wake(",
        text: "fence(Ordering::SeqCst);",
        store: None,
        killers: WORKER_MODELS,
    },
    Fence {
        name: "fall_asleep",
        file: WAKEUP,
        function: "fn fall_asleep(",
        text: "fence(Ordering::SeqCst);",
        store: Some("self.asleep.swap(true, Ordering::Relaxed);"),
        killers: WORKER_MODELS,
    },
    Fence {
        name: "vector signal",
        file: VECTOR,
        function: "pub(crate) fn signal(&self) {",
        text: "fence(Ordering::SeqCst);",
        store: Some("match &seen {"),
        killers: PCI_MODELS,
    },
    Fence {
        name: "vector install",
        file: VECTOR,
        function: "fn install(&self, line: Option<Arc<Line>>) {",
        text: "fence(Ordering::SeqCst);",
        store: Some("self.slot.store(line.clone());"),
        killers: PCI_MODELS,
    },
];

pub(super) fn mutants() -> Vec<Mutant> {
    FENCES.iter().flat_map(of_fence).chain(others()).collect()
}

/// Removed, weakened, and moved to before the store.
fn of_fence(fence: &Fence) -> Vec<Mutant> {
    let Fence { name, file, function, text, store, killers } = *fence;
    let mutant = |what: &str, edits| Mutant { name: format!("{name}: fence {what}"), file, function, edits, killers };
    let mut mutants = vec![mutant("removed", vec![(text, String::new())])];
    for weaker in ["Release", "Acquire", "AcqRel"] {
        mutants.push(mutant(&format!("becomes {weaker}"), vec![(text, text.replace("SeqCst", weaker))]));
    }
    if let Some(store) = store {
        mutants.push(mutant("before the store", vec![(text, String::new()), (store, format!("{text} {store}"))]));
    }
    mutants
}

fn others() -> Vec<Mutant> {
    let mutant = |name: &str, file, function, edits: &[(&'static str, &str)], killers| {
        let edits = edits.iter().map(|(old, new)| (*old, (*new).to_owned())).collect();
        Mutant { name: name.to_owned(), file, function, edits, killers }
    };
    let fence = "self.memory.fence(Ordering::SeqCst);";
    let only_event = "if self.event_idx { self.memory.fence(Ordering::SeqCst); }";
    let only_flags = "if !self.event_idx { self.memory.fence(Ordering::SeqCst); }";
    let store = "self.memory.store(Field::UsedIdx, used_idx, Ordering::Release);";
    let decide = "if wanted { Signal::Needed } else { Signal::Suppressed }";
    let recheck =
        "if self.memory.load(Field::AvailIdx, Ordering::Relaxed) == next_avail { Armed::Sleep } else { Armed::Work }";
    let used = "self.memory.write_used(first.index(), used(first, id, len), Ordering::Release);";
    let packed_recheck = "if flags & (AVAIL | USED) == next_avail.avail() { Armed::Work } else { Armed::Sleep }";
    let decided = "let decided = std::mem::replace(&mut self.decided, self.next_used);\n        self.ring.publish(self.next_used, decided)";
    let exchange = "match self.state.compare_exchange_weak(before, after, Ordering::AcqRel, Ordering::Acquire) {";
    vec![
        // The ring.
        mutant("publish: fence with the event index only", RING, "fn publish(", &[(fence, only_event)], VIRTIO_MODELS),
        mutant("publish: fence with the flags only", RING, "fn publish(", &[(fence, only_flags)], VIRTIO_MODELS),
        mutant(
            "publish: decided before the index is published",
            RING,
            "fn publish(",
            &[(store, ""), (decide, &format!("{store}\n        {decide}"))],
            VIRTIO_MODELS,
        ),
        mutant(
            "publish: used.idx stored Relaxed",
            RING,
            "fn publish(",
            &[(store, &store.replace("Release", "Relaxed"))],
            VIRTIO_MODELS,
        ),
        mutant("arm: fence with the event index only", RING, "fn arm(", &[(fence, only_event)], VIRTIO_MODELS),
        mutant("arm: fence with the flags only", RING, "fn arm(", &[(fence, only_flags)], VIRTIO_MODELS),
        mutant("arm: no second look", RING, "fn arm(", &[(recheck, "Armed::Sleep")], VIRTIO_MODELS),
        mutant(
            "arm: asks for the entry after the next",
            RING,
            "fn arm(",
            &[("AvailEvent, next_avail,", "AvailEvent, next_avail.wrapping_add(1),")],
            VIRTIO_MODELS,
        ),
        mutant(
            "arm: leaves the flag",
            RING,
            "fn arm(",
            &[("self.memory.store(Field::UsedFlags, 0, Ordering::Relaxed);", "")],
            VIRTIO_MODELS,
        ),
        mutant(
            "pop: avail.idx loaded Relaxed",
            RING,
            "fn avail_idx(",
            &[("Ordering::Acquire", "Ordering::Relaxed")],
            VIRTIO_MODELS,
        ),
        // The packed ring.
        mutant(
            "packed publish: fence with the event index only",
            PACKED_RING,
            "fn publish(",
            &[(fence, only_event)],
            VIRTIO_MODELS,
        ),
        mutant(
            "packed publish: fence with the flags only",
            PACKED_RING,
            "fn publish(",
            &[(fence, only_flags)],
            VIRTIO_MODELS,
        ),
        mutant(
            "packed publish: decided before the first descriptor is used",
            PACKED_RING,
            "fn publish(",
            &[(used, ""), (decide, &format!("{used}\n        {decide}"))],
            VIRTIO_MODELS,
        ),
        mutant(
            "packed publish: the first descriptor's flags stored Relaxed",
            PACKED_RING,
            "fn publish(",
            &[(used, &used.replace("Release", "Relaxed"))],
            VIRTIO_MODELS,
        ),
        mutant(
            "packed complete: the first descriptor used at once",
            PACKED,
            "fn give_back(",
            &[(
                "self.first = Some(Used { position, id, written });",
                "self.first = Some(Used { position, id, written });\n            \
                 self.ring.write_used(position, id, written);",
            )],
            VIRTIO_MODELS,
        ),
        mutant(
            "packed arm: fence with the event index only",
            PACKED_RING,
            "fn arm(",
            &[(fence, only_event)],
            VIRTIO_MODELS,
        ),
        mutant("packed arm: fence with the flags only", PACKED_RING, "fn arm(", &[(fence, only_flags)], VIRTIO_MODELS),
        mutant(
            "packed arm: no second look",
            PACKED_RING,
            "fn arm(",
            &[(packed_recheck, "Armed::Sleep")],
            VIRTIO_MODELS,
        ),
        mutant(
            "packed arm: asks for the descriptor after the next",
            PACKED_RING,
            "fn arm(",
            &[("Descriptor(next_avail)", "Descriptor(next_avail.after(1, self.size()))")],
            VIRTIO_MODELS,
        ),
        mutant(
            "packed arm: asks for the descriptor a turn later",
            PACKED_RING,
            "fn arm(",
            &[("Descriptor(next_avail)", "Descriptor(next_avail.after(self.size(), self.size()))")],
            VIRTIO_MODELS,
        ),
        mutant(
            "packed arm: leaves the structure",
            PACKED_RING,
            "fn arm(",
            &[("self.memory.set_device_event(event);", "")],
            VIRTIO_MODELS,
        ),
        mutant(
            "packed pop: flags loaded Relaxed",
            PACKED_RING,
            "fn available(",
            &[("Ordering::Acquire", "Ordering::Relaxed")],
            VIRTIO_MODELS,
        ),
        // Positions and arithmetic.
        mutant(
            "decided moves with signals only",
            SPLIT,
            "fn publish(&mut self)",
            &[(
                decided,
                "let signal = self.ring.publish(self.next_used, self.decided);\n        \
                 if signal == Signal::Needed { self.decided = self.next_used; }\n        signal",
            )],
            ARITHMETIC,
        ),
        mutant("passed: one entry more", EVENT_IDX, "pub fn passed(", &[(" < ", " <= ")], ARITHMETIC),
        mutant("passed: the index itself", EVENT_IDX, "pub fn passed(", &[(".wrapping_sub(1)", "")], ARITHMETIC),
        mutant(
            "passed: without the wrap",
            EVENT_IDX,
            "pub fn passed(",
            &[("new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)", "event >= old && event < new")],
            ARITHMETIC,
        ),
        mutant(
            "passed in a ring: one descriptor more",
            EVENT_IDX,
            "pub fn passed_in_ring(",
            &[("steps_to(event) < steps_to(new)", "steps_to(event) <= steps_to(new)")],
            ARITHMETIC,
        ),
        mutant(
            "passed in a ring: without the wrap counter",
            EVENT_IDX,
            "pub fn passed_in_ring(",
            &[("if position.wrap() { 0 } else { size }", "0")],
            ARITHMETIC,
        ),
        mutant(
            "passed in a ring: an event that is not there",
            EVENT_IDX,
            "pub fn passed_in_ring(",
            &[("u32::from(event.index()) < size && ", "")],
            ARITHMETIC,
        ),
        mutant(
            "packed: the wrap counter does not change",
            PACKED_RING,
            "pub fn after(",
            &[("index as u16 | wrap ^ Self::WRAP", "index as u16 | wrap")],
            ARITHMETIC,
        ),
        // The worker.
        mutant(
            "fall_asleep: no second look",
            WAKEUP,
            "fn fall_asleep(",
            &[("let sleep = !anything_left();", "drop(anything_left);\n        let sleep = true;")],
            WORKER_MODELS,
        ),
        mutant(
            "ring: swapped Relaxed",
            WAKEUP,
            "pub(super) fn ring(",
            &[("self.0.swap(true, Ordering::AcqRel)", "self.0.swap(true, Ordering::Relaxed)")],
            WORKER_MODELS,
        ),
        mutant(
            "ring: swapped Acquire",
            WAKEUP,
            "pub(super) fn ring(",
            &[("self.0.swap(true, Ordering::AcqRel)", "self.0.swap(true, Ordering::Acquire)")],
            WORKER_MODELS,
        ),
        mutant(
            "ring: loaded, then stored",
            WAKEUP,
            "pub(super) fn ring(",
            &[(
                "!self.0.swap(true, Ordering::AcqRel)",
                "let rung = self.0.load(Ordering::Acquire);\n        self.0.store(true, Ordering::Release);\n        !rung",
            )],
            WORKER_MODELS,
        ),
        mutant("answer: swapped Relaxed", WAKEUP, "pub(super) fn answer(", &[("AcqRel", "Relaxed")], WORKER_MODELS),
        mutant("answer: swapped Release", WAKEUP, "pub(super) fn answer(", &[("AcqRel", "Release")], WORKER_MODELS),
        mutant(
            "answer: stored",
            WAKEUP,
            "pub(super) fn answer(",
            &[("self.0.swap(false, Ordering::AcqRel)", "self.0.store(false, Ordering::Release)")],
            WORKER_MODELS,
        ),
        // MSI-X.
        mutant(
            "vector signal: no second look",
            VECTOR,
            "pub(crate) fn signal(&self) {",
            &[("if same(&seen, &now) {", "if true || same(&seen, &now) {")],
            PCI_MODELS,
        ),
        mutant(
            "vector install: pending before the line is there",
            VECTOR,
            "fn install(&self, line: Option<Arc<Line>>) {",
            &[
                (
                    "self.slot.store(line.clone());",
                    "let pending = line.is_some() && self.pending.swap(false, Ordering::AcqRel);",
                ),
                ("if let Some(line) = line", "self.slot.store(line.clone());\n        if let Some(line) = line"),
                ("&& self.take_pending()", "&& pending"),
            ],
            PCI_MODELS,
        ),
        mutant(
            "vector install: pending forgotten",
            VECTOR,
            "fn install(&self, line: Option<Arc<Line>>) {",
            &[("&& self.take_pending()", "&& false")],
            PCI_MODELS,
        ),
        mutant(
            "vector signal: pending stored",
            VECTOR,
            "pub(crate) fn signal(&self) {",
            &[("self.pending.swap(true, Ordering::AcqRel)", "self.pending.store(true, Ordering::Release)")],
            PCI_MODELS,
        ),
        mutant(
            "vector signal: pending swapped Relaxed",
            VECTOR,
            "pub(crate) fn signal(&self) {",
            &[("self.pending.swap(true, Ordering::AcqRel)", "self.pending.swap(true, Ordering::Relaxed)")],
            PCI_MODELS,
        ),
        mutant("take_pending: swapped Release", VECTOR, "fn take_pending(", &[("AcqRel", "Release")], PCI_MODELS),
        mutant(
            "take_pending: taken by both",
            VECTOR,
            "fn take_pending(",
            &[("self.pending.swap(false, Ordering::AcqRel)", "self.pending.load(Ordering::Acquire)")],
            PCI_MODELS,
        ),
        mutant(
            "take_pending: dropped",
            VECTOR,
            "fn take_pending(",
            &[(
                "self.pending.swap(false, Ordering::AcqRel)",
                "{ self.pending.store(false, Ordering::Release); false }",
            )],
            PCI_MODELS,
        ),
        // INTx.
        mutant("intx: exchanged Relaxed", INTX, "fn change(", &[(exchange, &relaxed(exchange, "Relaxed"))], PCI_MODELS),
        mutant("intx: exchanged Acquire", INTX, "fn change(", &[(exchange, &relaxed(exchange, "Acquire"))], PCI_MODELS),
        mutant("intx: exchanged Release", INTX, "fn change(", &[(exchange, &relaxed(exchange, "Release"))], PCI_MODELS),
        mutant(
            "intx: stored, not exchanged",
            INTX,
            "fn change(",
            &[(
                exchange,
                "self.state.store(after, Ordering::Release);\n            \
                 match Ok::<u32, u32>(before) {",
            )],
            PCI_MODELS,
        ),
        mutant(
            "intx install: unblocked before the line is there",
            INTX,
            "fn install(",
            &[
                ("self.slot.store(line);", ""),
                (
                    "self.change(|state| state & !(AUTOMASKED | ABSENT));",
                    "self.change(|state| state & !(AUTOMASKED | ABSENT));\n            self.slot.store(line);",
                ),
            ],
            PCI_MODELS,
        ),
        mutant(
            "intx install: AUTOMASKED stays",
            INTX,
            "fn install(",
            &[("!(AUTOMASKED | ABSENT)", "!ABSENT")],
            PCI_MODELS,
        ),
        mutant(
            "intx: AUTOMASKED not set in the same step",
            INTX,
            "fn change(",
            &[("after |= AUTOMASKED;", "")],
            PCI_MODELS,
        ),
        mutant(
            "intx unmask: no delivery",
            INTX,
            "pub(crate) fn unmask(",
            &[(
                "self.change(|state| state & !(MASKED | AUTOMASKED));",
                "self.state.fetch_and(!(MASKED | AUTOMASKED), Ordering::AcqRel);",
            )],
            PCI_MODELS,
        ),
    ]
}

/// An exchange with another ordering when it succeeds.
fn relaxed(exchange: &str, ordering: &str) -> String {
    exchange.replace("AcqRel", ordering)
}
