//! Which sectors of an overlay are where.
//!
//! Two bits say it of each sector; a word has those of 32 sectors, a page of 512 words those of 8 MiB. Pages are made when
//! something in them is first changed: the map takes memory where the guest writes, a two-thousandth of it or, where its writes
//! are scattered, a page for each of them at most.
//!
//! There is no lock on it. A sector changes from one value to another in one step and needs nothing of its neighbours, so that
//! requests of several queues disturb each other only where they share sectors, and then any order of them is right. Who has
//! written a sector's bytes publishes it afterwards (Release), who reads looks first (Acquire).

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::backend::SECTOR;

/// Bytes of a page of the map, in memory and in a file.
pub(super) const PAGE: usize = WORDS * size_of::<u64>();
/// Words of a page.
const WORDS: usize = 512;
/// Sectors of a word.
const WORD_SECTORS: u64 = 32;
/// Sectors of a page.
const PAGE_SECTORS: u64 = WORD_SECTORS * WORDS as u64;
/// Sectors of a block, the unit in which storage is taken and freed: 4096 bytes, 16 bits of a word.
const BLOCK_SECTORS: u64 = 8;
/// Bytes of a block.
pub(super) const BLOCK: u64 = BLOCK_SECTORS * SECTOR;

// A sector whose bits are both 0 is the base's; both 1 means nothing.
/// The bit by which a sector is the overlay's own, in all places.
const OWN: u64 = 0xaaaa_aaaa_aaaa_aaaa;
/// The bit by which a sector is zero, in all places.
const ZERO: u64 = 0x5555_5555_5555_5555;

/// Where a sector's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// In the base.
    Base,
    /// Nowhere: they are zero.
    Zero,
    /// In the overlay's own storage.
    Own,
}

#[derive(Debug)]
struct Page {
    words: [AtomicU64; WORDS],
    /// Whether it is in the list of those that are to be stored; changed with that only.
    listed: AtomicBool,
    /// How many are between changing a word and having the page listed.
    changing: AtomicU32,
}

impl Page {
    fn new() -> Box<Self> {
        Box::new(Self {
            words: [const { AtomicU64::new(0) }; WORDS],
            listed: AtomicBool::new(false),
            changing: AtomicU32::new(0),
        })
    }
}

/// The map of one overlay.
#[derive(Debug)]
pub(super) struct Map {
    pages: Box<[OnceLock<Box<Page>>]>,
    /// The first sector that the base has not: from here on what was never written is zero.
    base_end: AtomicU64,
    /// Blocks with sectors of the overlay's own, and those that are about to have some.
    blocks: AtomicU64,
    /// The most blocks that there may be.
    most_blocks: u64,
    /// Pages that have changed since they were stored; `None` if they never are.
    changed: Option<Mutex<Vec<usize>>>,
}

/// Blocks that a write may take; given back when it is dropped, so that what the write has published is counted once.
#[derive(Debug)]
pub(super) struct Reservation {
    map: Arc<Map>,
    blocks: u64,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.map.blocks.fetch_sub(self.blocks, Ordering::Relaxed);
    }
}

/// A map in a file makes no sense.
#[derive(Debug)]
pub(super) struct Damaged;

/// The bits of some sectors of one word.
struct Place {
    page: usize,
    word: usize,
    /// The first sector of the word.
    sector: u64,
    /// Both bits of each.
    mask: u64,
}

/// The words that hold the bits of `bytes`.
fn places(bytes: &Range<u64>) -> impl Iterator<Item = Place> + use<> {
    let (mut at, end) = (bytes.start / SECTOR, bytes.end.div_ceil(SECTOR));
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let (word, first) = (at / WORD_SECTORS, at % WORD_SECTORS);
        let count = (WORD_SECTORS - first).min(end - at);
        at += count;
        let mask = (u64::MAX >> (64 - 2 * count)) << (2 * first);
        let (page, word_of_page) = ((word / WORDS as u64) as usize, (word % WORDS as u64) as usize);
        Some(Place { page, word: word_of_page, sector: word * WORD_SECTORS, mask })
    })
}

/// The lowest bit of each of the word's four blocks that has a bit set.
fn blocks_with(word: u64) -> u64 {
    let word = word | word >> 8;
    let word = word | word >> 4;
    let word = word | word >> 2;
    (word | word >> 1) & 0x0001_0001_0001_0001
}

/// All bits of those of the word's four blocks that `mask` has all of.
fn whole_blocks(mask: u64) -> u64 {
    (0x0001_0001_0001_0001 & !blocks_with(!mask)) * 0xffff
}

impl Map {
    /// Of a disk of `capacity` bytes, the first `base` of which a base has; with up to `limit` bytes of its own.
    pub(super) fn new(capacity: u64, base: u64, limit: u64, stored: bool) -> Self {
        let pages = Self::pages_for(capacity);
        Self {
            pages: (0..pages).map(|_| OnceLock::new()).collect(),
            base_end: AtomicU64::new(base / SECTOR),
            blocks: AtomicU64::new(0),
            most_blocks: limit / BLOCK,
            changed: stored.then(Mutex::default),
        }
    }

    /// Pages of the map of so many bytes.
    pub(super) fn pages_for(capacity: u64) -> usize {
        capacity.div_ceil(PAGE_SECTORS * SECTOR) as usize
    }

    /// Forgets everything: all is the base's. Nobody uses the map meanwhile. What is stored of it is the caller's to forget.
    pub(super) fn clear(&self) {
        drop(self.take_changed());
        for page in self.pages.iter().filter_map(OnceLock::get) {
            page.words.iter().for_each(|word| word.store(0, Ordering::Release));
        }
        self.blocks.store(0, Ordering::Relaxed);
    }

    /// The base has so many bytes from now on, more than before. Nobody uses the map meanwhile.
    pub(super) fn grow_base(&self, base: u64) {
        self.base_end.store(base / SECTOR, Ordering::Relaxed);
    }

    /// Bytes of blocks that are its own, or are about to be.
    pub(super) fn own_bytes(&self) -> u64 {
        self.blocks.load(Ordering::Relaxed) * BLOCK
    }

    /// Where the bytes from `bytes.start` on are, and how many of the range are in the same place.
    pub(super) fn source(&self, bytes: &Range<u64>) -> (Source, u64) {
        let mut found: Option<Source> = None;
        let (start, base_end) = (bytes.start / SECTOR, self.base_end.load(Ordering::Relaxed));
        for place in places(bytes) {
            let word = self.word(&place);
            let mut sector = place.sector + u64::from(place.mask.trailing_zeros()) / 2;
            let end = place.sector + u64::from(64 - place.mask.leading_zeros()) / 2;
            while sector < end {
                let shift = 2 * (sector - place.sector);
                let (source, next) = match word >> shift & 3 {
                    0 if sector < base_end => (Source::Base, base_end),
                    0 | 1 => (Source::Zero, u64::MAX),
                    _ => (Source::Own, u64::MAX),
                };
                if found.is_some_and(|found| found != source) {
                    return (found.unwrap_or(source), (sector - start) * SECTOR);
                }
                found = Some(source);
                // How many more have the same bits.
                let pattern = match word >> shift & 3 {
                    0 => 0,
                    1 => ZERO,
                    _ => OWN,
                };
                let same = u64::from(((word ^ pattern) >> shift).trailing_zeros()) / 2;
                sector = (sector + same.max(1)).min(end).min(next);
            }
        }
        (found.unwrap_or(Source::Zero), bytes.end - bytes.start)
    }

    /// Sets blocks aside for a write of `bytes`; `None` if there are not as many left.
    pub(super) fn reserve(self: &Arc<Self>, bytes: &Range<u64>) -> Option<Reservation> {
        let missing = |place: Place| blocks_with(place.mask) & !blocks_with(self.word(&place) & OWN);
        let blocks = places(bytes).map(|place| u64::from(missing(place).count_ones())).sum();
        let reservation = Reservation { map: Arc::clone(self), blocks };
        let before = self.blocks.fetch_add(blocks, Ordering::Relaxed);
        (blocks == 0 || before.saturating_add(blocks) <= self.most_blocks).then_some(reservation)
    }

    /// The overlay's own storage has `bytes` now.
    pub(super) fn publish(&self, bytes: &Range<u64>) {
        for place in places(bytes) {
            let old = self.change(&place, |word| word & !place.mask | OWN & place.mask);
            let taken = blocks_with(place.mask) & !blocks_with(old & OWN);
            self.blocks.fetch_add(u64::from(taken.count_ones()), Ordering::Relaxed);
        }
    }

    /// `bytes` are zero from now on, but for sectors of blocks that the range has not all of and that have sectors in the
    /// overlay's own storage: these are to be made zero there. Returns a range with these and with all that can be freed there, if
    /// there is any.
    pub(super) fn zero(&self, bytes: &Range<u64>) -> Option<Range<u64>> {
        let mut own: Option<Range<u64>> = None;
        for place in places(bytes) {
            let whole = whole_blocks(place.mask);
            let zero = |word: u64| {
                let parts = place.mask & !whole & ZERO & !(word >> 1);
                word & !whole | ZERO & whole | parts
            };
            let old = self.change(&place, zero);
            let freed = blocks_with(old & OWN & whole);
            self.blocks.fetch_sub(u64::from(freed.count_ones()), Ordering::Relaxed);
            let found = old & OWN & place.mask;
            if found != 0 {
                let first = (place.sector + u64::from(found.trailing_zeros()) / 2) * SECTOR;
                let end = (place.sector + u64::from(64 - found.leading_zeros()) / 2) * SECTOR;
                own = Some(own.map_or(first, |own| own.start)..end);
            }
        }
        own
    }

    /// Whether `bytes` are all in the overlay's own storage, which the list of changes knows.
    pub(super) fn is_settled(&self, bytes: &Range<u64>) -> bool {
        places(bytes).all(|place| {
            self.word(&place) & place.mask == OWN & place.mask
                && self.page(place.page).is_some_and(|page| page.changing.load(Ordering::Acquire) == 0)
        })
    }

    /// Whether no page has changed since it was taken to be stored.
    pub(super) fn is_unchanged(&self) -> bool {
        self.changed().is_none_or(|changed| changed.is_empty())
    }

    /// Takes the pages that have changed, in order; what changes in them from now on lists them anew.
    pub(super) fn take_changed(&self) -> Vec<usize> {
        let Some(mut changed) = self.changed() else { return Vec::new() };
        let mut pages = std::mem::take(&mut *changed);
        for page in pages.iter().filter_map(|page| self.page(*page)) {
            page.listed.swap(false, Ordering::AcqRel);
        }
        drop(changed);
        pages.sort_unstable();
        pages
    }

    /// A page has changed, or could not be stored.
    pub(super) fn list(&self, number: usize) {
        let Some(page) = self.page(number) else { return };
        // A swap's kin and no load: if this finds the page listed, then who takes it off the list, by a swap, sees what has
        // changed before.
        if self.changed.is_none() || page.listed.fetch_or(false, Ordering::AcqRel) {
            return;
        }
        if let Some(mut changed) = self.changed()
            && !page.listed.swap(true, Ordering::AcqRel)
        {
            changed.push(number);
        }
    }

    fn changed(&self) -> Option<MutexGuard<'_, Vec<usize>>> {
        Some(self.changed.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A page as it is stored.
    pub(super) fn copy_page(&self, number: usize, to: &mut Vec<u8>) {
        match self.page(number) {
            Some(page) => to.extend(page.words.iter().flat_map(|word| word.load(Ordering::Acquire).to_le_bytes())),
            None => to.resize(to.len() + PAGE, 0),
        }
    }

    /// Takes a page as it was stored.
    ///
    /// # Errors
    /// If no map looks like that.
    pub(super) fn load_page(&self, number: usize, from: &[u8]) -> Result<(), Damaged> {
        let (words, _) = from.as_chunks::<8>();
        if words.iter().all(|word| *word == [0; 8]) {
            return Ok(());
        }
        let page = self.pages.get(number).ok_or(Damaged)?.get_or_init(Page::new);
        for (word, bytes) in page.words.iter().zip(words) {
            let value = u64::from_le_bytes(*bytes);
            if value & value >> 1 & ZERO != 0 {
                return Err(Damaged);
            }
            word.store(value, Ordering::Relaxed);
            self.blocks.fetch_add(u64::from(blocks_with(value & OWN).count_ones()), Ordering::Relaxed);
        }
        Ok(())
    }

    fn page(&self, number: usize) -> Option<&Page> {
        Some(self.pages.get(number)?.get()?)
    }

    fn word(&self, place: &Place) -> u64 {
        let word = self.page(place.page).and_then(|page| page.words.get(place.word));
        word.map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Changes a word; returns what it was. The page is listed by the time that this returns, whoever has changed it.
    fn change(&self, place: &Place, to: impl Fn(u64) -> u64) -> u64 {
        let old = self.word(place);
        if to(old) == old {
            // Another queue may have done so just now, and be about to list the page.
            if self.page(place.page).is_some_and(|page| page.changing.load(Ordering::Acquire) > 0) {
                self.list(place.page);
            }
            return old;
        }
        let Some(page) = self.pages.get(place.page).map(|page| page.get_or_init(Page::new)) else { return old };
        let Some(word) = page.words.get(place.word) else { return old };
        page.changing.fetch_add(1, Ordering::AcqRel);
        let changed = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| Some(to(word)));
        self.list(place.page);
        page.changing.fetch_sub(1, Ordering::AcqRel);
        changed.unwrap_or_else(|word| word)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Sectors of a disk whose last word, page and block are not full.
    const SECTORS: u64 = 2 * PAGE_SECTORS + 45;
    const BASE: u64 = PAGE_SECTORS + 21;

    fn map(limit: u64) -> Arc<Map> {
        Arc::new(Map::new(SECTORS * SECTOR, BASE * SECTOR, limit, true))
    }

    fn bytes(sectors: &Range<u64>) -> Range<u64> {
        sectors.start * SECTOR..sectors.end * SECTOR
    }

    /// Ranges of all sizes, many near where words and pages meet.
    fn ranges() -> impl Strategy<Value = Range<u64>> {
        let start = prop_oneof![0..SECTORS, PAGE_SECTORS - 70..PAGE_SECTORS + 70, SECTORS - 70..SECTORS];
        let len = prop_oneof![1u64..70, Just(8), Just(PAGE_SECTORS + 33)];
        (start, len).prop_map(|(start, len)| start..(start + len).min(SECTORS))
    }

    fn sources(map: &Map) -> Vec<Source> {
        let mut sources = Vec::new();
        while sources.len() < SECTORS as usize {
            let (source, len) = map.source(&(sources.len() as u64 * SECTOR..SECTORS * SECTOR));
            assert!(len > 0 && len % SECTOR == 0);
            sources.resize(sources.len() + (len / SECTOR) as usize, source);
        }
        sources
    }

    fn own_blocks(sources: &[Source]) -> u64 {
        sources.chunks(BLOCK_SECTORS as usize).filter(|block| block.contains(&Source::Own)).count() as u64
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn behaves_like_an_array(actions in prop::collection::vec((0u8..5, ranges()), 1..24)) {
            let map = map(u64::MAX);
            let mut model: Vec<_> =
                (0..SECTORS).map(|sector| if sector < BASE { Source::Base } else { Source::Zero }).collect();
            for (kind, range) in actions {
                let before = model.clone();
                let part = &mut model[range.start as usize..range.end as usize];
                if kind < 3 {
                    let reserved = map.reserve(&bytes(&range)).unwrap();
                    map.publish(&bytes(&range));
                    part.fill(Source::Own);
                    prop_assert_eq!(reserved.blocks, own_blocks(&model) - own_blocks(&before));
                } else {
                    let own = map.zero(&bytes(&range));
                    let first = part.iter().position(|source| *source == Source::Own);
                    let last = part.iter().rposition(|source| *source == Source::Own);
                    let hull = first.zip(last).map(|(first, last)| {
                        bytes(&(range.start + first as u64..range.start + last as u64 + 1))
                    });
                    prop_assert_eq!(own, hull);
                    for (sector, source) in (range.start..).zip(part) {
                        let block = sector - sector % BLOCK_SECTORS;
                        let whole = range.start <= block && block + BLOCK_SECTORS <= range.end;
                        if whole || *source == Source::Base {
                            *source = Source::Zero;
                        }
                    }
                }
                prop_assert_eq!(map.own_bytes(), own_blocks(&model) * BLOCK);
            }
            prop_assert!(sources(&map) == model);
            // As it is after it was stored and loaded.
            let loaded = Map::new(SECTORS * SECTOR, BASE * SECTOR, u64::MAX, true);
            for page in map.take_changed() {
                let mut stored = Vec::new();
                map.copy_page(page, &mut stored);
                loaded.load_page(page, &stored).unwrap();
            }
            prop_assert!(map.is_unchanged());
            prop_assert!(sources(&loaded) == model);
            prop_assert_eq!(loaded.own_bytes(), map.own_bytes());
        }
    }

    #[test]
    fn the_limit_counts_blocks_until_they_are_freed() {
        let map = map(3 * BLOCK);
        let (first, second) = (map.reserve(&(0..BLOCK)).unwrap(), map.reserve(&(BLOCK - SECTOR..2 * BLOCK)).unwrap());
        assert!(map.reserve(&(0..SECTOR)).is_none(), "three are reserved, one of them twice");
        map.publish(&(0..BLOCK));
        drop(first);
        map.publish(&(BLOCK - SECTOR..2 * BLOCK));
        drop(second);
        assert_eq!(map.own_bytes(), 2 * BLOCK);
        assert!(map.reserve(&(0..2 * BLOCK)).is_some(), "what is there needs no room");
        assert!(map.reserve(&(0..4 * BLOCK)).is_none());
        assert!(map.reserve(&(0..3 * BLOCK)).is_some(), "what did not fit has left nothing behind");
        map.zero(&(SECTOR..2 * BLOCK));
        assert_eq!(map.own_bytes(), BLOCK, "of the first a sector is left");
    }

    #[test]
    fn a_page_is_listed_once_until_it_is_taken() {
        let map = map(u64::MAX);
        map.publish(&(0..SECTOR));
        map.publish(&(SECTOR..2 * SECTOR));
        let second = PAGE_SECTORS * SECTOR;
        map.zero(&(second..second + SECTOR));
        assert_eq!(map.take_changed(), [0, 1]);
        map.publish(&(0..2 * SECTOR));
        assert!(map.is_unchanged(), "nothing has changed by that");
        map.list(1);
        assert_eq!(map.take_changed(), [1]);
    }

    #[test]
    fn only_pages_in_use_take_memory_and_damage_is_seen() {
        let map = Map::new(1 << 40, 1 << 40, u64::MAX, false);
        assert_eq!(map.source(&(0..1 << 40)), (Source::Base, 1 << 40));
        assert!(map.pages.iter().all(|page| page.get().is_none()));
        map.load_page(7, &[0; PAGE]).unwrap();
        map.publish(&(0..512));
        assert_eq!(map.pages.iter().filter(|page| page.get().is_some()).count(), 1);
        assert!(map.load_page(1, &[3; PAGE]).is_err());
        assert!(map.load_page(map.pages.len(), &[1; PAGE]).is_err());
    }
}
