//! Looks at the revisions of a deployment, and says which of them serves.

use std::time::Duration;

use expertmesh_decide::action::Desired;
use expertmesh_decide::observation::{Observation, Seen};
use expertmesh_decide::rollout::{Revisions, Rollout, rollout};

use super::context::Context;
use super::fetch::Found;
use super::memory::SharedFleet;
use crate::apply::ApiError;
use crate::fleet::Fleet;
use crate::fleet::kubernetes::refused::frontends_refused;
use crate::objects::revision::Revision;
use crate::status::condition::{Kind, true_condition};
use crate::status::serving::serves;
use crate::validate::ValidatedDeployment;

/// How long after a promotion clients may still be sent to the old revision.
const PROMOTION_SPREADS: Duration = Duration::from_secs(10);

/// What there is of each revision that matters: of the one that the spec asks for, and, while that one is only made ready,
/// of the one that serves.
pub(super) struct Sides<T> {
    pub(super) wanted: T,
    pub(super) old: Option<T>,
}

impl<T> Sides<T> {
    /// What belongs to the revision that clients reach.
    pub(super) fn serving(&self) -> &T {
        self.old.as_ref().unwrap_or(&self.wanted)
    }

    pub(super) fn map<U>(self, each: impl Fn(T) -> U) -> Sides<U> {
        Sides { wanted: each(self.wanted), old: self.old.map(each) }
    }
}

/// One revision, and what is seen of it.
pub(super) struct Observed {
    pub(super) revision: Revision,
    pub(super) fleet: SharedFleet,
    pub(super) seen: Observation,
}

impl Observed {
    async fn new(
        context: &Context,
        found: &Found,
        desired: &Desired,
        mut revision: Revision,
    ) -> Result<Self, ApiError> {
        let fleet = context.fleet(&found.owner, &revision);
        let mut seen = fleet.lock().await.observe().await?;
        let missing = found.frontends(&revision.hash).and_then(frontends_refused);
        seen.frontends.extend(missing.map(|failure| Seen {
            name: found.owner.of_revision(&revision.hash),
            failure: Some(failure),
            ..Seen::default()
        }));
        revision.is_proven |= serves(desired, &seen) || was_ready(found, &revision.hash);
        revision.is_tried |= seen.ready_workers() > 0;
        revision.commit = seen.commit.known().map(str::to_owned).or(revision.commit);
        Ok(Self { revision, fleet, seen })
    }
}

impl Observed {
    /// Whether a pod of it has yet to start.
    pub(super) fn is_starting(&self) -> bool {
        self.seen.members().any(|(_, process)| !process.is_started)
    }
}

/// Whether the status calls this revision Ready.
fn was_ready(found: &Found, hash: &str) -> bool {
    let status = found.status();
    status.revision.as_deref() == Some(hash) && true_condition(&status, Kind::Ready).is_some()
}

/// What is seen of the revisions, and what is to become of each.
pub(super) async fn observe(
    context: &Context,
    found: &Found,
    deployment: &ValidatedDeployment,
    wanted: Revision,
) -> Result<(Sides<Observed>, Rollout), ApiError> {
    let wanted = Observed::new(context, found, &deployment.desired, wanted).await?;
    let before = found.serving.as_ref().filter(|serving| **serving != wanted.revision.hash);
    let before = match before.and_then(|serving| found.recorded(serving)) {
        Some(serving) => Some(Observed::new(context, found, &deployment.desired, serving).await?),
        None => None,
    };
    let paused = deployment.desired.paused;
    let plan = rollout(Revisions {
        wanted: &wanted.revision.hash,
        serving: found.serving.as_deref(),
        running: &found.running,
        serving_is_proven: paused || before.as_ref().is_none_or(|before| before.revision.is_proven),
        wanted_serves: !paused && serves(&deployment.desired, &wanted.seen),
        just_promoted: context.memory.promoted_within(&found.owner.key(), PROMOTION_SPREADS),
    });
    Ok((Sides { wanted, old: before.filter(|_| plan.next.is_some()) }, plan))
}
