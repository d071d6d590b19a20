//! Numbers that look random, each from a place of its own in the sequence.

/// Numbers for one operation.
#[derive(Debug)]
pub(super) struct Random(u64);

/// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators").
fn mix(number: u64) -> u64 {
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}

impl Random {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

    /// For the `nth` operation of a rule.
    pub(super) fn new(seed: u64, rule: u64, nth: u64) -> Self {
        let of_rule = mix(seed.wrapping_add(rule.wrapping_add(1).wrapping_mul(Self::STEP)));
        Self(mix(of_rule.wrapping_add(nth.wrapping_add(1).wrapping_mul(Self::STEP))))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(Self::STEP);
        mix(self.0)
    }

    /// From 0 to below 1.
    pub(super) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Below `bound`, which is not 0.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// From the normal distribution of mean 0 and deviation 1 (Box and Muller).
    pub(super) fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }
}
