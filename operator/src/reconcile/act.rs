//! Decides on each revision, applies its objects, and does what was decided.

use expertmesh_decide::action::{Action, Decision, Desired};
use expertmesh_decide::observation::{Commit, Seen};
use expertmesh_decide::placement::moved;
use expertmesh_decide::step;
use jiff::Timestamp;
use tracing::{debug, info};

use super::context::Context;
use super::error::ReconcileError;
use super::fetch::Found;
use super::observe::{Observed, Sides};
use crate::apply::ApiError;
use crate::fleet::Fleet;
use crate::objects::{self, Size};
use crate::validate::ValidatedDeployment;

/// One revision as it is seen, and what is to be done about it.
pub(super) struct Decided {
    pub(super) observed: Observed,
    pub(super) decision: Decision,
}

/// What was decided, and whether all of it could be done. Only this has a status.
pub(super) struct Acted {
    pub(super) sides: Sides<Decided>,
    pub(super) result: Result<(), ReconcileError>,
}

impl Acted {
    /// The same, and what else was tried: the first failure counts.
    pub(super) fn and(self, also: Result<(), ApiError>) -> Self {
        Self { result: self.result.and(also.map_err(ReconcileError::from)), ..self }
    }
}

/// Says what is to be done about a revision; reads nothing but the clock.
pub(super) fn decide(observed: Observed, desired: &Desired) -> Decided {
    let decision = step::decide(desired, &observed.seen, Timestamp::now());
    Decided { observed, decision }
}

/// Advances both revisions: a failure of the one does not keep the other from going on. The first failure is told.
pub(super) async fn act(
    context: &Context,
    found: &Found,
    deployment: &ValidatedDeployment,
    sides: Sides<Decided>,
) -> Acted {
    let mut result = advance(context, found, deployment, &sides.wanted).await;
    if let Some(old) = &sides.old {
        result = result.and(advance(context, found, deployment, old).await);
    }
    Acted { sides, result: result.map_err(ReconcileError::from) }
}

async fn advance(
    context: &Context,
    found: &Found,
    deployment: &ValidatedDeployment,
    Decided { observed, decision }: &Decided,
) -> Result<(), ApiError> {
    if !deployment.desired.paused {
        let objects = objects::of_revision(&found.owner, &observed.revision, size(deployment, observed));
        context.writer.revision(&found.owner, &objects).await?;
    }
    for action in &decision.actions {
        note(context, found, observed, action);
    }
    let mut fleet = observed.fleet.lock().await;
    fleet.act(&decision.actions).await?;
    fleet.end_overdue().await
}

/// What runs now stays as it is: sizes and placements change by actions. What does not exist yet begins with what is desired.
fn size<'a>(deployment: &ValidatedDeployment, observed: &'a Observed) -> Size<'a> {
    let (seen, desired) = (&observed.seen, deployment.desired.workers);
    let is_wanted = seen.commit == Commit::Wanted;
    let begin = if is_wanted { desired.min(1) } else { desired };
    let follows = |frontend: &Seen| frontend.report.as_ref().is_some_and(|report| !report.epoch.is_none());
    let has_served = seen.frontends.iter().any(follows);
    Size {
        workers: if seen.size > 0 { seen.size } else { begin },
        // Which commit it is one process finds out: a frontend, where no worker is to run.
        frontends: match is_wanted && !has_served {
            true => u32::from(desired == 0 || !seen.frontends.is_empty()),
            false => deployment.frontends,
        },
        commit: seen.commit.known(),
        placement: Some(&seen.placement).filter(|placement| !placement.epoch().is_none()),
    }
}

/// Logs and counts what is about to be done.
fn note(context: &Context, found: &Found, observed: &Observed, action: &Action) {
    let (name, revision) = (&found.owner.name, &observed.revision.hash);
    match action {
        Action::Push { .. } => debug!(name, revision, "{action}"),
        Action::Resize(_) | Action::Place(_) | Action::Pin(_) | Action::Drain { .. } => {
            info!(name, revision, "{action}")
        }
    }
    context.metrics.reconciles.acted(action.kind());
    if let Action::Place(placement) = action {
        let bytes = observed.seen.shape().map_or(0, |shape| shape.expert_bytes);
        let moved = moved(&observed.seen.placement, placement);
        context.metrics.deployments.migrated(&found.owner.key(), moved, bytes);
    }
}
