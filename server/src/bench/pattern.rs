//! Where the next request goes, and what it writes.

/// A part of the disk, counted in blocks of a request's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) first: u64,
    pub(super) blocks: u64,
    pub(super) sectors_per_block: u64,
}

impl Region {
    /// Cuts it into as many parts, of which the last may be a bit larger.
    pub(super) fn split(self, parts: u16) -> Vec<Region> {
        let parts = u64::from(parts.max(1));
        let each = self.blocks / parts;
        (0..parts)
            .map(|part| Region {
                first: self.first + part * each,
                blocks: if part + 1 == parts { self.blocks - part * each } else { each },
                ..self
            })
            .collect()
    }

    /// The first sector of a block of this part.
    pub(super) fn sector(self, block: u64) -> u64 {
        (self.first + block) * self.sectors_per_block
    }
}

/// A fast sequence of numbers without a pattern (xorshift64*). Quality is no matter here, speed is.
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`, every one nearly as likely as any other.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
}

/// Fills a block with what its `version`th write puts there: the sector and the version at the head of each sector, then
/// numbers that follow from both, so that no two sectors and no two versions are alike anywhere.
pub(super) fn fill(block: &mut [u8], sector: u64, version: u32) {
    for (piece, sector) in block.chunks_mut(512).zip(sector..) {
        let mut numbers = Random::new(sector ^ u64::from(version) << 40);
        let head = [sector, version.into()];
        for (at, word) in piece.chunks_mut(8).enumerate() {
            let value = head.get(at).copied().unwrap_or_else(|| numbers.next());
            word.copy_from_slice(&value.to_le_bytes()[..word.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_the_region_without_overlap() {
        let region = Region { first: 0, blocks: 103, sectors_per_block: 8 };
        let parts = region.split(4);
        let mut next = 0;
        for part in &parts {
            assert_eq!(part.first, next);
            next += part.blocks;
        }
        assert_eq!(next, 103);
    }

    #[test]
    fn random_blocks_reach_every_part() {
        let mut random = Random::new(7);
        let mut seen = [0u32; 10];
        for _ in 0..10_000 {
            seen[random.below(10) as usize] += 1;
        }
        assert!(seen.iter().all(|count| (800..1200).contains(count)), "{seen:?}");
    }

    #[test]
    fn contents_tell_sectors_and_versions_apart() {
        let block = |sector, version| {
            let mut block = vec![0; 1024];
            fill(&mut block, sector, version);
            block
        };
        assert_eq!(block(5, 1), block(5, 1));
        assert_eq!(block(5, 1)[512..], block(6, 1)[..512]);
        for other in [block(6, 1), block(5, 2)] {
            let same = block(5, 1).chunks(8).zip(other.chunks(8)).filter(|(a, b)| a == b).count();
            assert!(same <= 2, "only a head's sector or version may be equal: {same}");
        }
    }
}
