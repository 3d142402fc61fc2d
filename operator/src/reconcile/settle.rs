//! Applies what a deployment has once, sends clients to the revision that serves, and ends what no revision needs.

use std::time::Duration;

use expertmesh_decide::rollout::Rollout;
use tracing::info;

use super::context::Context;
use super::fetch::Found;
use super::observe::Observed;
use crate::apply::ApiError;
use crate::objects;
use crate::objects::policies::Surroundings;
use crate::validate::ValidatedDeployment;

/// Settles a deployment, unless it is paused; and says when to come back, where identities wait.
pub(super) async fn settle(
    context: &Context,
    found: &Found,
    deployment: &ValidatedDeployment,
    (wanted, plan): (&Observed, &Rollout),
) -> Result<Option<Duration>, ApiError> {
    if deployment.desired.paused {
        return Ok(None);
    }
    let key = found.owner.key();
    let again = context.identities.ensure(&found.owner, wanted.is_starting()).await?;
    let serving = found.serving(&plan.serving, &wanted.revision);
    let surroundings = Surroundings {
        around: &context.around,
        operator_namespace: context.operator_namespace.as_deref(),
        collector: deployment.collector_port(),
        hubs: [
            deployment.model.hub_port(),
            found.recorded(&plan.serving).and_then(|serving| serving.hub_port()),
        ],
    };
    let objects = objects::shared(&found.owner, serving, surroundings);
    context.writer.shared(&found.owner, &objects).await?;
    let before = found.serving.as_ref().filter(|serving| **serving != plan.serving);
    if before.is_some_and(|before| !plan.retired.contains(before)) {
        context.memory.promoted(&key);
    }
    for revision in &plan.retired {
        let is_proven = found.recorded(revision).is_none_or(|revision| revision.is_proven);
        if context.writer.retire(&found.owner, revision, is_proven).await? {
            info!(
                namespace = key.namespace,
                name = key.name,
                revision,
                "ending a revision that is not needed any more"
            );
        }
    }
    for revision in found.forgettable(&wanted.revision) {
        context.writer.forget(&found.owner, &revision).await?;
    }
    let running = [Some(plan.serving.as_str()), plan.next.as_deref()];
    context.memory.keep_fleets(&key, &running.into_iter().flatten().collect::<Vec<_>>());
    Ok(again)
}
