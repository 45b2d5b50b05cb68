//! Numbers that look random, the same in each run.

/// Draws them (xorshift).
#[derive(Debug)]
pub struct Draw(u64);

impl Draw {
    /// From a seed other than 0.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number but 0.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u32) -> u32 {
        u32::try_from(self.number() % u64::from(bound)).unwrap_or(0)
    }

    /// One of `choices`.
    pub fn of<'a>(&mut self, choices: &[&'a str]) -> &'a str {
        let index = self.below(u32::try_from(choices.len()).unwrap_or(1));
        choices[index as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_differ_and_stay_within_their_bounds() {
        let mut draw = Draw::new(1);
        let numbers: Vec<u64> = (0..100).map(|_| draw.number()).collect();
        assert!((1..numbers.len()).all(|at| !numbers[..at].contains(&numbers[at])));
        assert!((0..100).all(|_| draw.below(3) < 3));
        let seen: Vec<&str> = (0..100).map(|_| draw.of(&["a", "b"])).collect();
        assert!(seen.contains(&"a") && seen.contains(&"b"));
    }
}
