//! What ours is compared with: a fixed size, and the thresholds of a HorizontalPodAutoscaler.

use std::collections::VecDeque;

use super::requests::Micros;
use super::run::{Scaler, Seen};

const SECOND: Micros = 1_000_000;
/// The defaults of kube-controller-manager and of autoscaling/v2.
const SYNC: Micros = 15 * SECOND;
const TOLERANCE: f64 = 0.1;
const STABILIZATION: Micros = 300 * SECOND;
/// Upwards in each sync's time: twice as many or four more, whichever is more. Downwards all may go.
const PODS: u32 = 4;

/// A size that is always the same.
pub(crate) struct Fixed(pub(crate) u32);

impl Scaler for Fixed {
    fn period(&self) -> Option<Micros> {
        None
    }

    fn look(&mut self, _: &Seen<'_>) -> u32 {
        self.0
    }
}

/// A HorizontalPodAutoscaler with the external metric sum(running + waiting) and an AverageValue. It sees the metric without delay.
pub(crate) struct Threshold {
    /// Sequences per worker, running and waiting.
    target: f64,
    bounds: (u32, u32),
    /// Of the last five minutes.
    recommended: VecDeque<(Micros, u32)>,
}

impl Threshold {
    pub(crate) fn new(target: f64, bounds: (u32, u32)) -> Self {
        Self { target, bounds: (bounds.0.max(1), bounds.1), recommended: VecDeque::new() }
    }

    fn recommend(&self, sequences: u32, workers: u32) -> u32 {
        let ratio = f64::from(sequences) / (self.target * f64::from(workers.max(1)));
        match (ratio - 1.0).abs() <= TOLERANCE {
            true => workers,
            false => (f64::from(sequences) / self.target).ceil() as u32,
        }
    }
}

impl Scaler for Threshold {
    fn period(&self) -> Option<Micros> {
        Some(SYNC)
    }

    fn look(&mut self, seen: &Seen<'_>) -> u32 {
        let load = seen.load;
        let recommended = self.recommend(load.running + load.waiting, load.desired);
        while self.recommended.front().is_some_and(|(at, _)| at + STABILIZATION < seen.now) {
            self.recommended.pop_front();
        }
        self.recommended.push_back((seen.now, recommended));
        let highest = self.recommended.iter().map(|(_, workers)| *workers).max().unwrap_or(recommended);
        let stabilized = if recommended < load.desired { highest.min(load.desired) } else { recommended };
        let fastest = load.desired.saturating_add(load.desired.max(PODS));
        stabilized.min(fastest).clamp(self.bounds.0, self.bounds.1)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use expertmesh_decide::autoscale::policy::Goals;

    use super::super::fleet::{Fleet, Load};
    use super::super::requests::Requests;
    use super::super::service::{DEFAULT, ServiceModel};
    use super::*;
    use crate::load::trace::Trace;

    /// What is decided at (second, sequences, desired).
    fn looks(target: f64, all: &[(u64, u32, u32)]) -> Vec<u32> {
        let goals = Goals { ttft: Duration::from_secs(1), tpot: Duration::from_secs(1) };
        let requests = Requests::new(&Trace::new(vec![], Duration::from_secs(1)), goals, 1);
        let model = ServiceModel::parse(DEFAULT).unwrap();
        let (fleet, mut scaler) = (Fleet::new(1, &model), Threshold::new(target, (1, 20)));
        let mut look = |&(second, sequences, desired): &(u64, u32, u32)| {
            let load = Load { desired, ready: desired, running: sequences, waiting: 0, held: 0 };
            scaler.look(&Seen { now: second * SECOND, load, fleet: &fleet, requests: &requests })
        };
        all.iter().map(&mut look).collect()
    }

    #[test]
    fn more_come_at_once_by_the_ratio_within_limits() {
        assert_eq!(looks(8.0, &[(0, 33, 4)]), [4], "within the tolerance");
        assert_eq!(looks(8.0, &[(0, 40, 4)]), [5]);
        assert_eq!(looks(8.0, &[(0, 900, 2), (15, 900, 6), (30, 900, 12)]), [6, 12, 20]);
    }

    #[test]
    fn fewer_come_after_five_minutes_in_which_fewer_were_enough() {
        assert_eq!(
            looks(8.0, &[(0, 40, 5), (15, 8, 5), (300, 8, 5), (301, 16, 5), (316, 8, 5)]),
            [5, 5, 5, 2, 2]
        );
        assert_eq!(looks(8.0, &[(0, 0, 3), (301, 0, 3)]), [1, 1], "nothing was recommended before");
    }
}
