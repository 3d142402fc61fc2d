//! Computes the status of what was seen and done, writes it where it changed, and posts Events of what changed.

use std::time::Duration;

use expertmesh_decide::observation::{Observation, Seen};
use expertmesh_decide::rollout::Rollout;
use jiff::Timestamp;
use kube::api::{Api, Patch, PatchParams};
use kube::{Resource, ResourceExt};
use serde_json::{Value, json};

use super::act::{Acted, Decided};
use super::context::Context;
use super::error::ReconcileError;
use super::explain::obstacle;
use super::fetch::Found;
use crate::api::{ModelDeployment, ModelDeploymentStatus};
use crate::apply::ApiError;
use crate::events;
use crate::objects::names::EXPERTMESH;
use crate::status::situation::{NextRevision, Scaling, Situation};
use crate::status::{figures, status, unseen};
use crate::validate::ValidatedDeployment;

/// When to look again where nothing is under way. Watches and reports tell of changes at once.
const LATER: Duration = Duration::from_secs(600);
/// When to look again where somebody else writes the same objects.
const CONFLICTED: Duration = Duration::from_secs(60);

/// What a status is made of.
pub(super) struct Tale<'a> {
    pub(super) deployment: &'a ValidatedDeployment,
    pub(super) plan: &'a Rollout,
    pub(super) acted: &'a Acted,
    /// Why the spec is not carried out.
    pub(super) mistake: Option<&'a ReconcileError>,
    pub(super) scaling: Option<&'a Scaling>,
    /// Whether pods still have to learn of this operator's authority.
    pub(super) authority_follows: bool,
}

/// Tells how the deployment is, and says when to look again.
pub(super) async fn tell(context: &Context, found: &Found, tale: Tale<'_>) -> Result<Duration, ApiError> {
    let Tale { deployment, plan, acted, mistake, scaling, authority_follows } = tale;
    let key = found.owner.key();
    let Decided { observed: serving, decision } = acted.sides.serving();
    let wanted = &acted.sides.wanted.observed;
    let next = NextRevision { hash: &wanted.revision.hash, seen: &wanted.seen };
    let before = found.status();
    let failure = mistake.or(acted.result.as_ref().err());
    let obstacle = failure.and_then(|failure| obstacle(failure, context.memory.fails(&key)));
    let other_writer = context.writer.conflict(&key);
    let after = status(&Situation {
        owner: &found.owner,
        generation: found.object.metadata.generation,
        desired: &deployment.desired,
        serving: &plan.serving,
        model: serving.revision.model(),
        is_identified: serving.revision.is_identified(),
        authority_follows,
        url: found.owner.url(serving.revision.is_encrypted()),
        seen: &serving.seen,
        is_tried: serving.revision.is_tried,
        decision,
        next: plan.next.is_some().then_some(next),
        obstacle: obstacle.as_ref(),
        is_written: acted.result.is_ok(),
        scaling,
        other_writer: other_writer.as_ref(),
        before: &before,
        now: Timestamp::now(),
    });
    let is_told = before.conditions.is_empty() || obstacle.is_some() || plan.next.is_some();
    let is_unseen = authority_follows
        && serving.revision.is_identified()
        && !is_told
        && has_silent(&serving.seen)
        && !has_failed(&serving.seen);
    let after = if is_unseen { unseen(&before, &after) } else { after };
    if !is_unseen {
        let figures = figures(&deployment.desired, deployment.frontends, &serving.seen);
        context.metrics.deployments.show(&key, figures);
    }
    context.metrics.deployments.show_conditions(&key, &after.conditions);
    write(context, &found.object, &before, &after).await?;
    let settled = decision.waiting_for.is_empty() && decision.actions.is_empty();
    let is_idle = settled && plan.next.is_none() && plan.retired.is_empty() && found.running.len() <= 1;
    if is_idle {
        context.memory.rests(&key);
        return Ok(if other_writer.is_some() { CONFLICTED } else { LATER });
    }
    Ok(context.memory.pause(&key, before != after))
}

/// Whether a pod tells of a failure.
fn has_failed(seen: &Observation) -> bool {
    seen.workers.values().chain(&seen.frontends).any(|seen| seen.failure.is_some())
}

/// Whether a process says nothing, though it runs, as far as its pod tells.
fn has_silent(seen: &Observation) -> bool {
    let is_silent = |seen: &Seen| seen.is_started && seen.report.is_none();
    seen.workers.values().chain(&seen.frontends).any(is_silent)
}

/// Writes a status where it changed, by server-side apply, so that a field that is left out goes away.
pub(super) async fn write(
    context: &Context,
    object: &ModelDeployment,
    before: &ModelDeploymentStatus,
    after: &ModelDeploymentStatus,
) -> Result<(), ApiError> {
    if before == after {
        return Ok(());
    }
    let (name, namespace) = (&object.name_any(), object.namespace().unwrap_or_default());
    let api: Api<ModelDeployment> = Api::namespaced(context.client.clone(), &namespace);
    let patch = status_patch(name, &json!(after));
    let parameters = PatchParams::apply(EXPERTMESH).force();
    let written = api.patch_status(name, &parameters, &Patch::Apply(patch)).await;
    written.map_err(|error| ApiError::new::<ModelDeployment>("write the status of", name, error))?;
    context.events.post(&object.object_ref(&()), &events::transitions(before, after)).await;
    Ok(())
}

/// What is applied in order to write a status.
pub(super) fn status_patch(name: &str, status: &Value) -> Value {
    json!({
        "apiVersion": ModelDeployment::api_version(&()),
        "kind": ModelDeployment::kind(&()),
        "metadata": {"name": name},
        "status": status,
    })
}
