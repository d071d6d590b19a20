//! The ratios of what is measured, and the bars that they have to reach.

use super::plan::Results;

/// The value in the middle; the mean of two for an even number.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match (values.get(middle), middle.checked_sub(1).and_then(|below| values.get(below))) {
        (Some(above), Some(below)) if values.len().is_multiple_of(2) => (above + below) / 2.0,
        (Some(value), _) => *value,
        (None, _) => f64::NAN,
    }
}

/// What a ratio has to be.
#[derive(Debug, Clone, Copy)]
pub(super) enum Bar {
    AtMost(f64),
    AtLeast(f64),
}

impl Bar {
    pub(super) fn is_reached(self, ratio: f64) -> bool {
        match self {
            Self::AtMost(bar) => ratio <= bar,
            Self::AtLeast(bar) => ratio >= bar,
        }
    }
}

/// The values of one turn, by the names of their subjects.
type Values<'a> = dyn Fn(&str) -> f64 + 'a;

/// One ratio: how it is made of one turn's values.
struct Ratio {
    title: &'static str,
    bar: Option<Bar>,
    of: fn(&Values<'_>) -> f64,
}

/// Nanoseconds of a request at this rate.
fn time(rate: f64) -> f64 {
    1e9 / rate
}

const RATIOS: [Ratio; 25] = [
    Ratio {
        title: "null, always polling, depth 1: time a request over the cache-line round trip",
        bar: Some(Bar::AtMost(2.5)),
        of: |value| time(value("null-always-1")) / value("null-floor-1"),
    },
    Ratio {
        title: "null, always polling, depth 32: the same",
        bar: Some(Bar::AtMost(0.70)),
        of: |value| time(value("null-always-32")) / value("null-floor-32"),
    },
    Ratio {
        title: "memory, depth 32: rate over the one-core random 4 KiB copy rate",
        bar: Some(Bar::AtLeast(0.75)),
        of: |value| value("memory-always-32") / time(value("copy")),
    },
    Ratio {
        title: "memory, depth 1: time over (2.5 round trips + one copy)",
        bar: Some(Bar::AtMost(1.2)),
        of: |value| time(value("memory-always-1")) / (2.5 * value("memory-floor") + value("copy")),
    },
    Ratio {
        title: "file, direct, read, depth 1: rate over fio",
        bar: Some(Bar::AtLeast(0.97)),
        of: |value| value("file-read-1") / value("file-read-fio-1"),
    },
    Ratio {
        title: "file, direct, read, depth 32: rate over fio",
        bar: Some(Bar::AtLeast(0.97)),
        of: |value| value("file-read-32") / value("file-read-fio-32"),
    },
    Ratio {
        title: "file, direct, write, depth 1: rate over fio",
        bar: Some(Bar::AtLeast(0.97)),
        of: |value| value("file-write-1") / value("file-write-fio-1"),
    },
    Ratio {
        title: "file, direct, write, depth 32: rate over fio",
        bar: Some(Bar::AtLeast(0.97)),
        of: |value| value("file-write-32") / value("file-write-fio-32"),
    },
    Ratio {
        title: "adaptive over always, null, depth 32",
        bar: Some(Bar::AtLeast(0.95)),
        of: |value| value("null-adaptive-32") / value("null-always-32"),
    },
    Ratio {
        title: "adaptive over always, memory, depth 32",
        bar: Some(Bar::AtLeast(0.95)),
        of: |value| value("memory-adaptive-32") / value("memory-always-32"),
    },
    Ratio {
        title: "driver sleeping on eventfds, null, depth 32: rate over qemu-storage-daemon",
        bar: Some(Bar::AtLeast(1.5)),
        of: |value| value("null-event-32") / value("null-event-qsd-32"),
    },
    Ratio {
        title: "two devices, the other at depth 256: p99 at depth 1 over alone",
        bar: Some(Bar::AtMost(2.0)),
        of: |value| value("beside-flooded") / value("beside-idle"),
    },
    Ratio {
        title: "NBD, read, depth 32: rate over qemu-storage-daemon with the same export",
        bar: Some(Bar::AtLeast(1.2)),
        of: |value| value("nbd-read-32") / value("nbd-read-qsd-32"),
    },
    Ratio {
        title: "NBD, write, depth 32: the same",
        bar: Some(Bar::AtLeast(1.2)),
        of: |value| value("nbd-write-32") / value("nbd-write-qsd-32"),
    },
    Ratio {
        title: "NBD, read, depth 32: rate over fio with the same export",
        bar: None,
        of: |value| value("nbd-read-32") / value("nbd-read-fio-32"),
    },
    Ratio {
        title: "NBD, write, depth 32: the same",
        bar: None,
        of: |value| value("nbd-write-32") / value("nbd-write-fio-32"),
    },
    Ratio {
        title: "driver sleeping on eventfds, null, depth 1: rate over qemu-storage-daemon",
        bar: None,
        of: |value| value("null-event-1") / value("null-event-qsd-1"),
    },
    Ratio {
        title: "driver polling, null, depth 1: rate (adaptive) over qemu-storage-daemon",
        bar: None,
        of: |value| value("null-adaptive-1") / value("null-qsd-1"),
    },
    Ratio {
        title: "driver polling, null, depth 32: rate (adaptive) over qemu-storage-daemon",
        bar: None,
        of: |value| value("null-adaptive-32") / value("null-qsd-32"),
    },
    Ratio {
        title: "file, direct, read, depth 32: rate over qemu-storage-daemon",
        bar: None,
        of: |value| value("file-read-32") / value("file-read-qsd-32"),
    },
    Ratio {
        title: "file, direct, write, depth 32: rate over qemu-storage-daemon",
        bar: None,
        of: |value| value("file-write-32") / value("file-write-qsd-32"),
    },
    Ratio {
        title: "packed over split, null, depth 1: rate",
        bar: None,
        of: |value| value("null-packed-1") / value("null-always-1"),
    },
    Ratio {
        title: "packed over split, null, depth 32: rate",
        bar: None,
        of: |value| value("null-packed-32") / value("null-always-32"),
    },
    Ratio {
        title: "in order over split, null, depth 1: rate",
        bar: None,
        of: |value| value("null-in-order-1") / value("null-always-1"),
    },
    Ratio {
        title: "in order over split, null, depth 32: rate",
        bar: None,
        of: |value| value("null-in-order-32") / value("null-always-32"),
    },
];

/// A ratio that was measured.
pub(super) struct Measured {
    pub(super) title: String,
    pub(super) bar: Option<Bar>,
    /// The ratio of each round.
    pub(super) ratios: Vec<f64>,
    /// What comes after the number.
    pub(super) unit: &'static str,
}

/// The ratios whose values are all there: of each turn its own, since only they were measured side by side, and the median of those
/// for a round.
pub(super) fn ratios(results: &Results) -> Vec<Measured> {
    let rounds = results.values().map(Vec::len).min().unwrap_or(0);
    RATIOS
        .iter()
        .map(|ratio| {
            let ratios = (0..rounds).map(|round| median(&of_turns(results, round, ratio.of))).collect();
            Measured { title: ratio.title.to_owned(), bar: ratio.bar, ratios, unit: "" }
        })
        .filter(|measured: &Measured| measured.ratios.iter().all(|ratio| ratio.is_finite()))
        .collect()
}

/// Where the two processors lay in a turn, by how many nanoseconds a cache line took to the other and back, in words.
const PLACES: [(&str, std::ops::Range<f64>); 3] =
    [("less than 50 ns", 0.0..50.0), ("50 to 150 ns", 50.0..150.0), ("150 ns and more", 150.0..f64::INFINITY)];

/// What the turns have in common that had the processors at one place.
pub(super) struct AtPlace {
    pub(super) place: &'static str,
    /// The part of all turns.
    pub(super) share: f64,
    /// Nanoseconds of the floor, and of a request; medians.
    pub(super) floor: f64,
    pub(super) request: f64,
    /// The median of their ratios.
    pub(super) ratio: f64,
}

/// What `rate` came to beside `floor`, which are measured in turns, by the place of the processors; those that there were.
pub(super) fn by_place(results: &Results, rate: &str, floor: &str) -> Vec<AtPlace> {
    let turns = |name: &str| results.get(name).into_iter().flatten().flatten().copied();
    let all: Vec<_> = turns(floor).zip(turns(rate).map(time)).collect();
    let at_place = |(place, range): (&'static str, std::ops::Range<f64>)| {
        let there = || all.iter().filter(|(floor, _)| range.contains(floor));
        let median_of = |of: fn(&(f64, f64)) -> f64| median(&there().map(of).collect::<Vec<_>>());
        AtPlace {
            place,
            share: there().count() as f64 / all.len() as f64,
            floor: median_of(|(floor, _)| *floor),
            request: median_of(|(_, request)| *request),
            ratio: median_of(|(floor, request)| request / floor),
        }
    };
    PLACES.map(at_place).into_iter().filter(|at| at.share > 0.0).collect()
}

/// What `of` makes of each turn of a round, as long as all that it names had a turn.
fn of_turns(results: &Results, round: usize, of: fn(&Values<'_>) -> f64) -> Vec<f64> {
    let value = |name: &str, turn: usize| {
        let turns = results.get(name).and_then(|rounds| rounds.get(round));
        turns.and_then(|turns| turns.get(turn)).copied().unwrap_or(f64::NAN)
    };
    (0..).map(|turn| of(&|name| value(name, turn))).take_while(|ratio| ratio.is_finite()).collect()
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::super::plan::groups;
    use super::*;

    #[test]
    fn each_ratio_is_made_of_one_group() {
        let groups = groups(1 << 30);
        let group_of =
            |name: &str| groups.iter().position(|group| group.subjects.iter().any(|subject| subject.name == name));
        for ratio in RATIOS {
            let of = RefCell::new(Vec::new());
            (ratio.of)(&|name| {
                of.borrow_mut().push(group_of(name).unwrap_or_else(|| panic!("nothing is called {name}")));
                1.0
            });
            let of = of.into_inner();
            assert!(of.iter().all(|group| *group == of[0]), "{}", ratio.title);
        }
    }

    #[test]
    fn a_ratio_is_of_one_turn_and_its_rounds_are_medians() {
        let mut results = Results::from([
            ("memory-always-32", vec![vec![1e9, 4e9, 2e9], vec![8e9]]),
            ("copy", vec![vec![1.0, 1.0, 1.0], vec![1.0]]),
        ]);
        let measured = ratios(&results);
        assert_eq!(measured.len(), 1);
        assert_eq!(measured[0].ratios, [2.0, 8.0]);
        results.remove("copy");
        assert!(ratios(&results).is_empty());
    }

    #[test]
    fn the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }
}
