//! Whether a step up helped: one that did not is not followed by another.

use std::time::Duration;

use jiff::Timestamp;

use super::interval::HIGH;
use super::window::Summary;
use crate::clock::elapsed;

/// A step up that leaves more than this of the latencies did not help.
const HELPED: f64 = 0.95;
/// How much of the load per worker has to have gone before a step is judged.
const LIGHTER: f64 = 0.9;
/// How much more traffic makes a judgement obsolete.
const OTHER_LOAD: f64 = 1.5;
/// How long new workers may take before a step is no longer judged.
const STEP_PATIENCE: Duration = Duration::from_secs(600);

/// A step up, and how the load was before it (or, where it is barren, after it).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct StepUp {
    at: Timestamp,
    pub(super) from: u32,
    pub(super) to: u32,
    /// The mean ratio of latencies to goals, however high.
    pub(super) ratio: f64,
    in_flight: f64,
    /// Requests in flight on each ready worker.
    per_worker: f64,
}

/// The last step up, and what became of it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Effect {
    /// A step whose workers were not at work for a whole window yet.
    pending: Option<StepUp>,
    /// A step that did not help.
    pub(super) barren: Option<StepUp>,
}

impl Effect {
    /// Notes that the size changed, while `ready` workers could serve.
    pub(super) fn resized(&mut self, from: u32, to: u32, ready: u32, summary: &Summary, at: Timestamp) {
        let Summary { ratio, in_flight, .. } = *summary;
        let per_worker = in_flight / f64::from(ready);
        let step = StepUp { at, from, to, ratio, in_flight, per_worker };
        *self = Self { pending: (to > from && ready > 0).then_some(step), barren: None };
    }

    /// Once a step's workers have been at work for a whole window: did it help?
    pub(super) fn judge(&mut self, ready: u32, summary: &Summary, now: Timestamp) {
        let is_obsolete = |barren: StepUp| {
            summary.ratio <= HIGH || summary.in_flight > barren.in_flight.max(1.0) * OTHER_LOAD
        };
        if self.barren.is_some_and(is_obsolete) {
            self.barren = None;
        }
        let Some(step) = self.pending else { return };
        if elapsed(step.at, now) > STEP_PATIENCE {
            self.pending = None;
        }
        if ready < step.to || !summary.steady || !summary.complete {
            return;
        }
        self.pending = None;
        let Summary { ratio, in_flight, .. } = *summary;
        let per_worker = in_flight / f64::from(ready.max(1));
        let helped = ratio <= HIGH || ratio < step.ratio * HELPED;
        if !helped && per_worker < step.per_worker * LIGHTER {
            self.barren = Some(StepUp { ratio, in_flight, per_worker, ..step });
        }
    }
}
