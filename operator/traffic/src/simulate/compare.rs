//! Ours beside the cheapest fixed size and the cheapest threshold that do as well.

use std::fmt;
use std::thread;

use expertmesh_decide::autoscale::policy::Policy;
use serde::Serialize;

use super::ours::Ours;
use super::requests::Micros;
use super::run::{Outcome, World, run};
use super::service::ServiceModel;
use super::tune::{self, Tuned};
use crate::load::percentiles::Percentiles;
use crate::load::trace::Trace;

/// What the others have to reach too, beside what ours reached.
const EXPECTED: f64 = 0.99;

/// The trace, the workers and the policy that are compared.
pub(crate) struct Setting<'a> {
    pub(crate) trace: &'a Trace,
    pub(crate) model: &'a ServiceModel,
    pub(crate) policy: &'a Policy,
    pub(crate) frontends: u32,
    /// Workers at the beginning, of ours and of the threshold's.
    pub(crate) start: u32,
    /// Workers that hold every expert: never fewer.
    pub(crate) at_least: u32,
}

/// How one policy did over the trace.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    pub(crate) policy: Kind,
    /// Workers, or sequences per worker.
    pub(crate) parameter: Option<f64>,
    /// The attainment that it was tuned to.
    pub(crate) tuned_to: Option<f64>,
    pub(crate) attainment: f64,
    pub(crate) worker_hours: f64,
    pub(crate) mean_workers: f64,
    pub(crate) most_workers: u32,
    pub(crate) changes: u32,
    /// Seconds to the first token of all requests that ended.
    pub(crate) ttft: Percentiles,
    pub(crate) tpot: Percentiles,
    #[serde(skip)]
    pub(crate) outcome: Outcome,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    Ours,
    Fixed,
    Threshold,
}

pub(crate) struct Comparison {
    /// A row for each policy, ours first.
    pub(crate) rows: Vec<Row>,
    /// Of ours: s at each look.
    pub(crate) loads: Vec<(Micros, f64)>,
}

/// Runs ours, and tunes the others to what it reaches and to 99 %.
pub(crate) fn compare(setting: &Setting<'_>) -> Comparison {
    let Setting { trace, model, policy, frontends, start, at_least } = *setting;
    let world = World { trace, model, goals: policy.goals, frontends };
    let mut scaler = Ours::new(policy.clone(), at_least);
    let ours = run(world, start, &mut scaler, usize::MAX);
    let mut rows: Vec<Row> =
        ours.into_iter().map(|outcome| Row::new(Kind::Ours, None, None, outcome)).collect();
    let reached = rows.first().map_or(EXPECTED, |ours| ours.attainment);
    let bounds = (policy.min.max(at_least), policy.max);
    thread::scope(|threads| {
        let fixed = threads.spawn(|| tuned(Kind::Fixed, reached, |bar| tune::fixed(world, bar)));
        let threshold = tuned(Kind::Threshold, reached, |bar| tune::threshold(world, start, bounds, bar));
        rows.extend(fixed.join().into_iter().flatten());
        rows.extend(threshold);
    });
    Comparison { rows, loads: scaler.loads }
}

/// Tuned to what ours reached, and to 99 % where that is something else.
fn tuned(kind: Kind, reached: f64, tune: impl Fn(f64) -> Option<Tuned>) -> Vec<Row> {
    let row = |bar: f64| tune(bar).map(|best| Row::new(kind, Some(best.parameter), Some(bar), best.outcome));
    let mut rows: Vec<Row> = row(reached).into_iter().collect();
    let other = if (reached - EXPECTED).abs() > 5e-4 { row(EXPECTED) } else { None };
    rows.extend(other.filter(|other| rows.iter().all(|row| row.parameter != other.parameter)));
    rows
}

impl Row {
    fn new(policy: Kind, parameter: Option<f64>, tuned_to: Option<f64>, outcome: Outcome) -> Self {
        Self {
            policy,
            parameter,
            tuned_to,
            attainment: outcome.attainment,
            worker_hours: outcome.worker_hours,
            mean_workers: outcome.mean_workers,
            most_workers: outcome.history.most(),
            changes: outcome.history.actions,
            ttft: outcome.ttft,
            tpot: outcome.tpot,
            outcome,
        }
    }

    pub(crate) fn name(&self) -> String {
        match (self.policy, self.parameter) {
            (Kind::Ours, _) | (_, None) => "ours".into(),
            (Kind::Fixed, Some(workers)) => format!("fixed, {workers:.0} workers"),
            (Kind::Threshold, Some(target)) => format!("threshold, {target:.1} per worker"),
        }
    }
}

impl Comparison {
    /// The cheapest of a kind of those that are as good as `bar`.
    pub(crate) fn best(&self, kind: Kind, bar: f64) -> Option<&Row> {
        let rows = self.rows.iter().filter(|row| row.policy == kind && row.attainment >= bar);
        rows.min_by(|one, other| one.worker_hours.total_cmp(&other.worker_hours))
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        writeln!(
            formatter,
            "{:28}{:>10}{:>10}{:>9}{:>7}{:>6}{:>9}   {:>8}{:>8}   {:>8}{:>8}",
            "",
            "tuned to",
            "in goal",
            "worker-h",
            "mean",
            "most",
            "changes",
            "TTFT p90",
            "p99",
            "TPOT p90",
            "p99"
        )?;
        for row in &self.rows {
            let [ttft90, ttft99, tpot90, tpot99] =
                [row.ttft.p90, row.ttft.p99, row.tpot.p90, row.tpot.p99].map(time);
            writeln!(
                formatter,
                "{:28}{:>10}{:>10}{:>9.2}{:>7.2}{:>6}{:>9}   {ttft90:>8}{ttft99:>8}   {tpot90:>8}{tpot99:>8}",
                row.name(),
                row.tuned_to.map(percent).unwrap_or_default(),
                percent(row.attainment),
                row.worker_hours,
                row.mean_workers,
                row.most_workers,
                row.changes,
            )?;
        }
        for (kind, what) in [(Kind::Fixed, "fixed size"), (Kind::Threshold, "threshold")] {
            if !self.rows.iter().any(|row| row.policy == kind) {
                writeln!(formatter, "no {what} reaches it")?;
            }
        }
        Ok(())
    }
}

fn percent(share: f64) -> String {
    format!("{:.2} %", 1e2 * share)
}

/// A time as the table tells it: "1.24s", "61ms".
fn time(seconds: f64) -> String {
    if seconds < 0.9995 { format!("{:.0}ms", seconds * 1e3) } else { format!("{seconds:.2}s") }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use expertmesh_decide::autoscale::limits::Rules;
    use expertmesh_decide::autoscale::policy::Goals;

    use super::*;
    use crate::load::lengths::Lengths;
    use crate::load::patterns::{Pattern, Recipe};
    use crate::simulate::service::DEFAULT;

    fn policy() -> Policy {
        Policy {
            min: 1,
            max: 16,
            goals: Goals { ttft: Duration::from_secs(2), tpot: Duration::from_millis(150) },
            idle_after: Duration::from_secs(600),
            advisory: false,
            up: Rules::up(),
            down: Rules::down(),
            schedules: vec![],
        }
    }

    fn compared(recipe: &Recipe, policy: &Policy) -> Comparison {
        let (trace, model) = (recipe.make().unwrap(), ServiceModel::parse(DEFAULT).unwrap());
        compare(&Setting { trace: &trace, model: &model, policy, frontends: 2, start: 1, at_least: 1 })
    }

    const DAY: Recipe = Recipe {
        pattern: Pattern::Diurnal,
        rate: 2.0,
        length: Duration::from_secs(86_400),
        prompt: Lengths::LogNormal { median: 100, sigma: 0.6 },
        output: Lengths::LogNormal { median: 80, sigma: 0.6 },
        seed: 1,
    };

    #[test]
    fn on_a_day_the_autoscaler_meets_the_goals_with_fewer_worker_hours_than_a_fixed_size_and_thresholds() {
        let comparison = compared(&DAY, &policy());
        let ours = comparison.rows[0].clone();
        assert!(ours.policy == Kind::Ours && ours.attainment >= 0.99, "{comparison}");
        for kind in [Kind::Fixed, Kind::Threshold] {
            let other = comparison.best(kind, ours.attainment).unwrap();
            assert!(ours.worker_hours < other.worker_hours, "{comparison}");
        }
    }

    #[test]
    fn a_day_that_is_all_night_needs_no_worker_for_most_of_it() {
        let policy = Policy { min: 0, ..policy() };
        let recipe = Recipe { rate: 0.002, length: Duration::from_secs(6 * 3600), ..DAY };
        let comparison = compared(&recipe, &policy);
        let ours = &comparison.rows[0];
        assert!(ours.worker_hours < 5.0 && ours.most_workers <= 2, "{comparison}");
        assert!(ours.ttft.max < 20.0, "{comparison}");
    }
}
