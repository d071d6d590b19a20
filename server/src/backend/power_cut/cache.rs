//! What a disk has taken and not put on stable storage yet.

use std::collections::VecDeque;
use std::ops::Range;

use serde::Serialize;

use super::PowerCut;
use crate::backend::SECTOR;
use crate::backend::random::Random;

/// What a write counts for besides its bytes, so that those without any are bounded too.
const OVERHEAD: u64 = 256;

/// What a write makes of its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Content {
    Data(Box<[u8]>),
    /// Zeroes; the store may free them.
    Zeroes {
        unmap: bool,
    },
}

/// A write that has been completed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unflushed {
    /// Its first byte in the store.
    offset: u64,
    content: Content,
    /// The bytes of the store that it still changes: of the rest, something newer is there already.
    live: Vec<Range<u64>>,
}

impl Unflushed {
    pub(super) fn new(offset: u64, len: u64, content: Content) -> Self {
        Self { offset, content, live: std::iter::once(offset..offset.saturating_add(len)).collect() }
    }

    fn cost(&self) -> u64 {
        let bytes = if let Content::Data(data) = &self.content { data.len() as u64 } else { 0 };
        bytes.saturating_add(OVERHEAD)
    }

    /// The parts of it that are left: where, and what.
    pub(super) fn parts(&self) -> impl Iterator<Item = (Range<u64>, Part<'_>)> {
        self.live.iter().filter_map(|range| {
            let part = match &self.content {
                Content::Zeroes { unmap } => Part::Zeroes { unmap: *unmap },
                Content::Data(data) => {
                    let from = usize::try_from(range.start.checked_sub(self.offset)?).ok()?;
                    let to = usize::try_from(range.end.checked_sub(self.offset)?).ok()?;
                    Part::Data(data.get(from..to)?)
                }
            };
            Some((range.clone(), part))
        })
    }

    /// Leaves only the sectors that `keep` wants.
    fn tear(&mut self, mut keep: impl FnMut() -> bool) {
        let mut left: Vec<Range<u64>> = Vec::new();
        for range in std::mem::take(&mut self.live) {
            for sector in range.step_by(SECTOR as usize) {
                if keep() {
                    match left.last_mut() {
                        Some(last) if last.end == sector => last.end = sector.saturating_add(SECTOR),
                        _ => left.push(sector..sector.saturating_add(SECTOR)),
                    }
                }
            }
        }
        self.live = left;
    }

    fn sectors(&self) -> u64 {
        self.live.iter().map(|range| (range.end - range.start) / SECTOR).sum()
    }
}

/// A piece of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part<'a> {
    Data(&'a [u8]),
    Zeroes { unmap: bool },
}

/// What a power cut has left of the writes that were not on stable storage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Survivors {
    /// Writes that were completed and not on stable storage.
    pub unflushed: u64,
    /// How many of them are there as a whole.
    pub whole: u64,
    /// Sectors that are there of the one that was torn, if one was.
    pub torn_sectors: Option<u64>,
}

/// Writes in the order in which they were completed. Where they overlap the newer counts.
#[derive(Debug)]
pub(super) struct Cache {
    writes: VecDeque<Unflushed>,
    bytes: u64,
    limit: u64,
}

impl Cache {
    pub(super) fn new(limit: u64) -> Self {
        Self { writes: VecDeque::new(), bytes: 0, limit }
    }

    /// Whether there is room for a write of so many bytes, or would be if there were no others.
    pub(super) fn room(&self, bytes: u64) -> Room {
        let cost = bytes.saturating_add(OVERHEAD);
        match () {
            () if cost > self.limit => Room::Never,
            () if self.bytes.saturating_add(cost) > self.limit => Room::Later,
            () => Room::Now,
        }
    }

    pub(super) fn push(&mut self, write: Unflushed) {
        self.bytes = self.bytes.saturating_add(write.cost());
        self.writes.push_back(write);
    }

    pub(super) fn oldest(&self) -> Option<&Unflushed> {
        self.writes.front()
    }

    pub(super) fn pop(&mut self) -> Option<Unflushed> {
        let write = self.writes.pop_front()?;
        self.bytes = self.bytes.saturating_sub(write.cost());
        Some(write)
    }

    /// Something newer is in the store below: no write of before changes that any more.
    pub(super) fn supersede(&mut self, bytes: &Range<u64>) {
        for write in &mut self.writes {
            let overlaps = |live: &Range<u64>| live.start < bytes.end && bytes.start < live.end;
            if write.live.iter().any(overlaps) {
                let cut = |live: &Range<u64>| {
                    let before = live.start..live.end.min(bytes.start);
                    let after = live.start.max(bytes.end)..live.end;
                    [before, after].into_iter().filter(|range| range.start < range.end)
                };
                write.live = write.live.iter().flat_map(cut).collect();
            }
        }
    }

    /// What lies in the cache of these bytes, the oldest first.
    pub(super) fn overlaying(&self, bytes: &Range<u64>) -> impl Iterator<Item = (Range<u64>, Part<'_>)> {
        self.writes.iter().flat_map(Unflushed::parts).filter_map(move |(range, part)| {
            let (start, end) = (range.start.max(bytes.start), range.end.min(bytes.end));
            if start >= end {
                return None;
            }
            let part = match part {
                Part::Data(data) => Part::Data(data.get((start - range.start) as usize..(end - range.start) as usize)?),
                zeroes @ Part::Zeroes { .. } => zeroes,
            };
            Some((start..end, part))
        })
    }

    /// Takes everything, and leaves what survives: the same each time for the same writes and the same seed.
    pub(super) fn cut(&mut self, cut: PowerCut, seed: u64) -> Survivors {
        let writes = std::mem::take(&mut self.writes);
        self.bytes = 0;
        let mut survivors = Survivors { unflushed: writes.len() as u64, ..Survivors::default() };
        let torn = match cut {
            PowerCut::Tear if !writes.is_empty() => Some(Random::new(seed, 0, 0).below(writes.len() as u64)),
            _ => None,
        };
        for (index, mut write) in (0..).zip(writes) {
            let mut random = Random::new(seed, 1, index);
            let survives = match cut {
                PowerCut::Drop => false,
                PowerCut::Tear => torn.is_some_and(|torn| index <= torn),
                PowerCut::Reorder => random.unit() < 0.5,
            };
            if !survives {
                continue;
            }
            if torn == Some(index) {
                write.tear(|| random.unit() < 0.5);
                survivors.torn_sectors = Some(write.sectors());
            } else {
                survivors.whole += 1;
            }
            self.push(write);
        }
        survivors
    }
}

/// Whether something fits in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    Now,
    /// If the oldest go.
    Later,
    Never,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(sector: u64, sectors: u64, byte: u8) -> Unflushed {
        let len = sectors * SECTOR;
        Unflushed::new(sector * SECTOR, len, Content::Data(vec![byte; len as usize].into()))
    }

    /// Ten sectors as a reader finds them, over dots.
    fn seen(cache: &Cache) -> String {
        let mut sectors = [b'.'; 10];
        for (range, part) in cache.overlaying(&(0..10 * SECTOR)) {
            let byte = if let Part::Data(data) = part { data[0] } else { b'0' };
            sectors[(range.start / SECTOR) as usize..(range.end / SECTOR) as usize].fill(byte);
        }
        String::from_utf8(sectors.to_vec()).unwrap()
    }

    fn filled() -> Cache {
        let mut cache = Cache::new(1 << 20);
        cache.push(write(0, 6, b'a'));
        cache.push(write(4, 4, b'b'));
        cache.push(Unflushed::new(5 * SECTOR, SECTOR, Content::Zeroes { unmap: true }));
        cache
    }

    #[test]
    fn the_newest_counts() {
        let mut cache = filled();
        assert_eq!(seen(&cache), "aaaab0bb..");
        cache.supersede(&(SECTOR..2 * SECTOR));
        cache.supersede(&(4 * SECTOR..7 * SECTOR));
        assert_eq!(seen(&cache), "a.aa...b..");
        assert_eq!(cache.pop().unwrap().live, [0..SECTOR, 2 * SECTOR..4 * SECTOR]);
        assert_eq!(seen(&cache), ".......b..");
        let part: Vec<_> = cache.overlaying(&(7 * SECTOR + 100..9 * SECTOR)).map(|(range, _)| range).collect();
        assert!(part.len() == 1 && part[0] == (7 * SECTOR + 100..8 * SECTOR), "{part:?}");
    }

    #[test]
    fn it_has_a_bound() {
        let mut cache = Cache::new(2048);
        assert_eq!(cache.room(2048), Room::Never);
        for sector in 0..2 {
            assert_eq!(cache.room(512), Room::Now);
            cache.push(write(sector, 1, b'a'));
        }
        assert_eq!(cache.room(512), Room::Later);
        assert_eq!(cache.oldest().unwrap().offset, 0);
        cache.pop();
        assert_eq!(cache.room(512), Room::Now);
        // Zeroes take room too.
        while cache.room(0) == Room::Now {
            cache.push(Unflushed::new(0, 512, Content::Zeroes { unmap: false }));
        }
        assert!(cache.writes.len() < 10);
    }

    #[test]
    fn nothing_survives_a_drop_and_a_part_the_others() {
        let mut dropped = filled();
        assert_eq!(dropped.cut(PowerCut::Drop, 1), Survivors { unflushed: 3, ..Survivors::default() });
        assert!(dropped.writes.is_empty() && dropped.bytes == 0);
        let all = |cut| {
            let outcome = |seed| {
                let mut cache = Cache::new(1 << 20);
                (0..5).for_each(|index| cache.push(write(2 * index, 2, b'1' + index as u8)));
                let survivors = cache.cut(cut, seed);
                (seen(&cache), survivors)
            };
            assert!((0..50).all(|seed| outcome(seed) == outcome(seed)), "the same seed, the same outcome");
            (0..200).map(outcome).collect::<Vec<_>>()
        };
        let mut torn_inside = 0;
        for (seen, survivors) in all(PowerCut::Tear) {
            // Whole ones, then the torn one, then nothing.
            let whole = survivors.whole as usize;
            assert_eq!(seen[..2 * whole], "1122334455"[..2 * whole]);
            assert!(seen[2 * whole + 2..].chars().all(|sector| sector == '.'), "{seen}");
            let of_torn = seen[2 * whole..].chars().filter(|sector| *sector != '.').count() as u64;
            assert_eq!(survivors.torn_sectors, Some(of_torn));
            torn_inside += u32::from(of_torn == 1);
        }
        assert!(torn_inside > 50, "{torn_inside}");
        let mut gaps = 0;
        for (seen, survivors) in all(PowerCut::Reorder) {
            let kept: Vec<_> = seen.as_bytes().chunks(2).map(|pair| pair[0] != b'.').collect();
            assert!(seen.as_bytes().chunks(2).all(|pair| pair[0] == pair[1]), "no write is torn: {seen}");
            assert_eq!(kept.iter().filter(|kept| **kept).count() as u64, survivors.whole);
            gaps += u32::from(kept.windows(2).any(|pair| pair == [false, true]));
        }
        assert!(gaps > 100, "later ones survive without earlier ones: {gaps}");
    }
}
