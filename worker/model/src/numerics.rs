//! The order in which products are added: a deployment's choice, the same on every machine.

use std::fmt;
use std::str::FromStr;

listed! {
    /// How sums of bf16 products are ordered. Every instruction set computes both, bit for bit; some are slower at one.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub enum Numerics {
        /// One accumulator, pairs of K: the order of AVX-512's VDPBF16PS, which plain FMA reproduces.
        #[default]
        Pair,
        /// Two chains per 32 K, added to the accumulator: the order of AMX's TDPBF16PS.
        Tile,
    }
}

impl Numerics {
    /// The name, as `--numerics` and `serving.numerics` spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pair => "pair",
            Self::Tile => "tile",
        }
    }

    /// The name in a fingerprint. The number goes up whenever any sum, product or function may round otherwise than
    /// before, so that workers of two releases do not mix their bits.
    pub fn id(self) -> &'static str {
        match self {
            Self::Pair => "pair-1",
            Self::Tile => "tile-1",
        }
    }
}

impl fmt::Display for Numerics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Numerics {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|numerics| numerics.name() == name);
        found.ok_or_else(|| format!("{name} is none of {}", Self::ALL.map(Self::name).join(", ")))
    }
}
