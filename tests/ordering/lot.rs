//! Chance that is the same in each run.

/// A generator (SplitMix64) of which each thread has its own.
pub(crate) struct Lot(u64);

impl Lot {
    pub(crate) fn new(seed: u64) -> Self {
        Lot(seed)
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: u32) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (((mixed >> 32) * u64::from(end)) >> 32) as u32
    }

    /// One time in `n`.
    pub(crate) fn one_in(&mut self, n: u32) -> bool {
        self.below(n) == 0
    }

    /// Up to a few hundred nanoseconds, most often few.
    pub(crate) fn dawdle(&mut self) {
        let scale = 1 << self.below(9);
        for step in 0..self.below(scale) {
            std::hint::black_box(step);
        }
    }
}
