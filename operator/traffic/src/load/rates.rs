//! How many requests a second are due, over time: what the patterns are made of.

use std::f64::consts::{FRAC_PI_2, TAU};
use std::time::Duration;

use super::random::Random;

/// Rates are held for a second, for more where there is more than a day, and for less where there is little time.
const PIECES: usize = 86_400;
const FEWEST: usize = 100;
/// One random number stream for the rates of a seed.
const RATES: u64 = 1;

/// The rate in equal pieces of time, around a mean of 1.
#[derive(Debug, Clone)]
pub(super) struct Rates {
    pub(super) span: f64,
    pub(super) values: Vec<f64>,
}

impl Rates {
    fn new(length: Duration, rate: impl FnMut(f64) -> f64) -> Self {
        let length = length.as_secs_f64();
        let count = (length.ceil() as usize).clamp(FEWEST, PIECES);
        let span = length / count as f64;
        let mut values: Vec<f64> = (0..count).map(|at| (at as f64 + 0.5) * span).map(rate).collect();
        let mean = values.iter().sum::<f64>() / count as f64;
        values.iter_mut().for_each(|value| *value /= mean);
        Self { span, values }
    }

    pub(super) fn flat(length: Duration) -> Self {
        Self::new(length, |_| 1.0)
    }

    /// Quiet for about twenty minutes, then three times as much for about six, rising and falling within a minute and a half each;
    /// all of it shorter where there is less than an hour.
    pub(super) fn bursts(length: Duration, seed: u64) -> Self {
        let mut random = Random::new(seed, RATES);
        let short = (length.as_secs_f64() / 3600.0).min(1.0);
        let mut burst = Burst { begin: short * 600.0 * (0.5 + random.unit()), length: 0.0, height: 2.0 };
        burst.length = short * 360.0 * (0.75 + 0.5 * random.unit());
        Self::new(length, |at| {
            while at >= burst.begin + burst.length {
                burst.begin += burst.length + short * 1200.0 * (0.75 + 0.5 * random.unit());
                burst.length = short * 360.0 * (0.75 + 0.5 * random.unit());
            }
            1.0 + burst.at(at)
        })
    }

    /// A day: a quiet night, four times as much in the afternoon, noise that lasts some ten minutes, and now and then a burst of up to
    /// twice as much. Where the time is less than a day, all of it is a day.
    pub(super) fn day(length: Duration, seed: u64) -> Self {
        let mut random = Random::new(seed, RATES);
        let day = length.as_secs_f64().min(86_400.0);
        let (mut noise, mut drawn) = (0.0, 0.0);
        let mut burst = Burst { begin: day / 8.0 * random.exponential(), length: 0.0, height: 0.0 };
        Self::new(length, |at| {
            while at >= drawn {
                // An autoregression of one-minute steps whose memory is ten minutes and whose deviation is 0.1.
                noise = 0.9 * noise + 0.1 * 0.436 * random.normal();
                drawn += day / 1440.0;
            }
            while at >= burst.begin + burst.length {
                burst.begin += burst.length + day / 8.0 * random.exponential();
                burst.length = day / 288.0 * (1.0 + 2.0 * random.unit());
                burst.height = 0.3 + 0.7 * random.unit();
            }
            let sine = 1.0 + 0.6 * libm::sin(TAU * at / day - FRAC_PI_2);
            sine * libm::exp(noise) * (1.0 + burst.at(at))
        })
    }
}

/// Rises and falls within a quarter of its length each.
struct Burst {
    begin: f64,
    length: f64,
    height: f64,
}

impl Burst {
    fn at(&self, at: f64) -> f64 {
        let inside = (at - self.begin).min(self.begin + self.length - at);
        if inside <= 0.0 { 0.0 } else { self.height * (inside / (0.25 * self.length)).min(1.0) }
    }
}

/// Goes through the times at which the requests of a process with these rates come. Gaps are in units of the mean gap.
pub(super) struct Clock<'a> {
    rates: &'a Rates,
    /// Requests a second at a rate of 1.
    scale: f64,
    piece: usize,
    /// Seconds since the piece's beginning.
    at: f64,
}

impl<'a> Clock<'a> {
    pub(super) fn new(rates: &'a Rates, scale: f64) -> Self {
        Self { rates, scale, piece: 0, at: 0.0 }
    }

    /// Seconds since the beginning; none after the end.
    pub(super) fn next(&mut self, mut gap: f64) -> Option<f64> {
        loop {
            let rate = self.scale * self.rates.values.get(self.piece)?;
            let room = rate * (self.rates.span - self.at);
            if gap < room {
                self.at += gap / rate;
                return Some(self.piece as f64 * self.rates.span + self.at);
            }
            gap -= room.max(0.0);
            (self.piece, self.at) = (self.piece + 1, 0.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_time_of_any_length_is_gone_through_to_its_end() {
        for milliseconds in (100..40_000).step_by(137) {
            let length = Duration::from_millis(milliseconds);
            for rates in
                [Rates::flat(length), Rates::bursts(length, milliseconds), Rates::day(length, milliseconds)]
            {
                let (mut clock, mut last, mut count) = (Clock::new(&rates, 20.0), 0.0, 0u64);
                while let Some(at) = clock.next(1.0) {
                    assert!(at >= last && at <= length.as_secs_f64() + rates.span);
                    (last, count) = (at, count + 1);
                }
                assert!(count.abs_diff(milliseconds / 50) <= 1, "{count} in {length:?}");
            }
        }
    }
}
