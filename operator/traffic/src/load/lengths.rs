//! How many tokens prompts and answers have.

use std::fmt;
use std::str::FromStr;

use super::random::Random;

/// The longest sequence that any model here is made for, with room.
pub(crate) const MAX_TOKENS: u32 = 1 << 22;
/// A log-normal has no longest value; this many medians are.
const LONGEST: f64 = 8.0;

/// A distribution of lengths, written `256`, `100-400` or `200~0.7`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Lengths {
    Always(u32),
    /// Every length between, both ends included, alike.
    Between(u32, u32),
    /// Log-normal: many short ones, few long ones, 1 to 8 medians.
    LogNormal {
        median: u32,
        sigma: f64,
    },
}

impl Lengths {
    pub(crate) fn draw(self, random: &mut Random) -> u32 {
        match self {
            Self::Always(tokens) => tokens,
            Self::Between(low, high) => random.between(low, high),
            Self::LogNormal { median, sigma } => {
                let median = f64::from(median);
                (random.log_normal(median, sigma).clamp(1.0, LONGEST * median) as u32).min(MAX_TOKENS)
            }
        }
    }
}

impl FromStr for Lengths {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let lengths = if let Some((low, high)) = text.split_once('-') {
            Self::Between(tokens(low)?, tokens(high)?)
        } else if let Some((median, sigma)) = text.split_once('~') {
            let number = sigma.parse().ok().filter(|sigma| (0.0..=3.0).contains(sigma));
            let sigma = number.ok_or_else(|| format!("{sigma:?} is not a deviation from 0 to 3"))?;
            Self::LogNormal { median: tokens(median)?, sigma }
        } else {
            Self::Always(tokens(text)?)
        };
        match lengths {
            Self::Between(low, high) if low > high => Err(format!("{low} is more than {high}")),
            lengths => Ok(lengths),
        }
    }
}

fn tokens(text: &str) -> Result<u32, String> {
    let number = text.parse().ok().filter(|tokens| (1..=MAX_TOKENS).contains(tokens));
    number.ok_or_else(|| {
        format!("{text:?} is not a number from 1 to {MAX_TOKENS}; expected 256, 100-400 or 200~0.7")
    })
}

impl fmt::Display for Lengths {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Always(tokens) => write!(formatter, "{tokens}"),
            Self::Between(low, high) => write!(formatter, "{low}-{high}"),
            Self::LogNormal { median, sigma } => write!(formatter, "{median}~{sigma}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_spellings_are_read_and_written_alike() {
        for text in ["256", "100-400", "200~0.7"] {
            assert_eq!(text.parse::<Lengths>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_length_is_named() {
        for (text, problem) in [
            ("0", "\"0\" is not"),
            ("400-100", "400 is more"),
            ("9~x", "\"x\" is not a dev"),
            ("", "\"\" is"),
        ] {
            let error = text.parse::<Lengths>().unwrap_err();
            assert!(error.starts_with(problem), "{error}");
        }
    }

    #[test]
    fn drawn_lengths_stay_within_their_bounds() {
        let mut random = Random::new(7, 0);
        let mut drawn = |text: &str| {
            let lengths: Lengths = text.parse().unwrap();
            let mut all: Vec<u32> = (0..20_001).map(|_| lengths.draw(&mut random)).collect();
            all.sort_unstable();
            (all[0], all[10_000], all[20_000])
        };
        assert_eq!(drawn("7"), (7, 7, 7));
        let (least, _, most) = drawn("10-20");
        assert_eq!((least, most), (10, 20));
        let (least, median, most) = drawn("200~1.5");
        assert!(least >= 1 && (190..=210).contains(&median) && most <= 1600, "{least} {median} {most}");
    }
}
