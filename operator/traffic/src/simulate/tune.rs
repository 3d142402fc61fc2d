//! The cheapest fixed size and the cheapest threshold that reach an attainment, found by trying.

use super::run::{Outcome, World, run};
use super::scalers::{Fixed, Threshold};

/// More workers than any deployment may have.
const MOST_WORKERS: u32 = 1024;
/// Sequences per worker, each about 1.2 times the one before; then parts of the interval between the first that is enough and the
/// next higher.
const TARGETS: [f64; 26] = [
    64.0, 53.0, 44.0, 37.0, 31.0, 26.0, 22.0, 18.0, 15.0, 12.5, 10.5, 9.0, 7.5, 6.3, 5.3, 4.4, 3.7, 3.1, 2.6,
    2.2, 1.8, 1.5, 1.2, 1.0, 0.7, 0.5,
];
const PARTS: [f64; 4] = [0.8, 0.6, 0.4, 0.2];

/// A policy's parameter, and what it came to.
#[derive(Debug, Clone)]
pub(crate) struct Tuned {
    pub(crate) parameter: f64,
    pub(crate) outcome: Outcome,
}

/// How many requests may miss their goals.
pub(crate) fn patience(world: World<'_>, attainment: f64) -> usize {
    let count = world.trace.requests.len() as f64;
    ((1.0 - attainment) * count + 1e-6).floor() as usize
}

/// The smallest fixed size with which as many requests are within their goals.
pub(crate) fn fixed(world: World<'_>, attainment: f64) -> Option<Tuned> {
    let patience = patience(world, attainment);
    let with = |workers: u32| run(world, workers, &mut Fixed(workers), patience);
    let mut high = 1;
    let mut best = loop {
        match with(high) {
            Some(outcome) => break outcome,
            None if high >= MOST_WORKERS => return None,
            None => high *= 2,
        }
    };
    let mut low = high / 2; // too few
    while high - low > 1 {
        let middle = low.midpoint(high);
        match with(middle) {
            Some(outcome) => (high, best) = (middle, outcome),
            None => low = middle,
        }
    }
    Some(Tuned { parameter: f64::from(high), outcome: best })
}

/// The highest threshold, or of those near it the one that costs least.
pub(crate) fn threshold(world: World<'_>, start: u32, bounds: (u32, u32), attainment: f64) -> Option<Tuned> {
    let patience = patience(world, attainment);
    let with = |target: f64| {
        let outcome = run(world, start, &mut Threshold::new(target, bounds), patience)?;
        Some(Tuned { parameter: target, outcome })
    };
    let at = TARGETS.iter().position(|&target| with(target).is_some())?;
    let higher = TARGETS[at.saturating_sub(1)];
    let between = |part: &f64| TARGETS[at] + part * (higher - TARGETS[at]);
    let near = PARTS.iter().map(between).chain([TARGETS[at]]);
    let lower = TARGETS.get(at + 1..at + 3).unwrap_or_default();
    let enough = near.chain(lower.iter().copied()).filter_map(with);
    enough.min_by(|one, other| one.outcome.worker_hours.total_cmp(&other.outcome.worker_hours))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use expertmesh_decide::autoscale::policy::Goals;

    use super::super::service::{DEFAULT, ServiceModel};
    use super::*;
    use crate::load::lengths::Lengths;
    use crate::load::patterns::{Pattern, Recipe};

    #[test]
    fn the_smallest_that_is_enough_is_found() {
        let (prompt, output) = (Lengths::Always(100), Lengths::Always(60));
        let length = Duration::from_secs(1800);
        let recipe = Recipe { pattern: Pattern::Poisson, rate: 2.0, length, prompt, output, seed: 1 };
        let (trace, model) = (recipe.make().unwrap(), ServiceModel::parse(DEFAULT).unwrap());
        let goals = Goals { ttft: Duration::from_secs(2), tpot: Duration::from_millis(100) };
        let world = World { trace: &trace, model: &model, goals, frontends: 1 };
        let best = fixed(world, 0.95).unwrap();
        let workers = best.parameter as u32;
        assert!((2..=5).contains(&workers) && best.outcome.attainment >= 0.95, "{workers}");
        assert!(run(world, workers - 1, &mut Fixed(workers - 1), patience(world, 0.95)).is_none());
        let scaled = threshold(world, workers, (1, 20), 0.95).unwrap();
        assert!(scaled.outcome.attainment >= 0.95);
        let impossible = World { goals: Goals { ttft: Duration::from_millis(1), ..goals }, ..world };
        assert!(fixed(impossible, 0.95).is_none() && threshold(impossible, 1, (1, 20), 0.95).is_none());
    }
}
