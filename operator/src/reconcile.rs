//! What happens when something changed: fetch → hold → validate → claim → observe → settle → scale → decide → act → tell.
//!
//! Every step can be repeated, and one that finds everything as it should be writes nothing.

mod act;
pub(crate) mod context;
pub(crate) mod error;
mod explain;
mod fetch;
pub(crate) mod memory;
mod observe;
mod refuse;
mod scale;
mod settle;
mod size;
mod tell;

use std::sync::Arc;
use std::time::{Duration, Instant};

use kube::Resource;
use kube::runtime::controller::Action;
use tracing::warn;

use crate::events::{self, Note};
use crate::key::{Key, Watched};
use crate::namespaces::HoldError;
use crate::objects::names::Owner;
use crate::objects::revision::Revision;
use crate::validate::ValidatedDeployment;

use act::{act, decide};
use context::Context;
use error::{LONGEST, ReconcileError, TELLING};
use fetch::{Fetched, Found, fetch, object, owner};
use observe::observe;
use scale::scale;
use settle::settle;
use tell::{Tale, tell};

/// How long until it is looked again whether another operator still works in a namespace.
const STANDING_BY: Duration = Duration::from_secs(15);

/// Reconciles one deployment once: bounded in time, and counted.
pub(crate) async fn reconcile(object: Arc<Watched>, context: Arc<Context>) -> Result<Action, ReconcileError> {
    let (key, began) = (Key::of(&object), Instant::now());
    if let Err(rest) = context.memory.begin(&key, object.meta().generation, began) {
        return Ok(Action::requeue(rest));
    }
    context.metrics.reconciles.begun(&key);
    let result = match tokio::time::timeout(LONGEST, step(&context, &key)).await {
        Ok(result) => result,
        Err(_) => {
            // A first apply is told of it, if that ends.
            let telling = refuse::explain_unread(&context, &key, &ReconcileError::TimedOut);
            let _ = tokio::time::timeout(TELLING, telling).await;
            Err(ReconcileError::TimedOut)
        }
    };
    let label = result.as_ref().map(|_| ()).map_err(ReconcileError::reason);
    context.metrics.reconciles.ended(label, began.elapsed());
    if result.is_ok() {
        context.memory.succeeded(&key);
    }
    result
}

async fn step(context: &Context, key: &Key) -> Result<Action, ReconcileError> {
    context.namespaces.check(&key.namespace)?;

    let found = match found(context, key).await {
        Ok(Fetched::Found(found)) => found,
        Ok(Fetched::Malformed(invalid)) => return refuse::malformed(context, key, &invalid).await,
        Ok(Fetched::Gone) => {
            context.forget(key);
            return Ok(Action::await_change());
        }
        Err(error) => {
            refuse::explain_unread(context, key, &error).await?;
            return Err(error);
        }
    };
    match deploy(context, &found).await {
        Ok(deployed) => deployed.result.map(|()| Action::requeue(deployed.again)),
        Err(error) => {
            // explain (writes the status)
            refuse::explain(context, &found.object, &error).await?;
            Err(error)
        }
    }
}

/// What there is of a deployment in a namespace that is this operator's.
async fn found(context: &Context, key: &Key) -> Result<Fetched, ReconcileError> {
    // fetch (reads from the API server)
    let object = object(&context.client, key).await?;

    // hold: the namespace is this operator's (renews a Lease, where that is due)
    if let Some(owner) = owner(key, object.as_ref()) {
        hold(context, &owner).await?;
    }
    Ok(fetch(&context.client, key, object).await?)
}

/// Where another operator works, this one writes nothing, no status either: it says so by an Event alone.
async fn hold(context: &Context, owner: &Owner) -> Result<(), ReconcileError> {
    match context.namespaces.hold(owner).await {
        Ok(()) => Ok(()),
        Err(HoldError::Another(another)) => {
            context.let_go(&owner.key());
            let note = Note::new(events::Reason::AnotherOperator, "Reconcile", another.to_string());
            context.events.post(&owner.regarding(), &[note]).await;
            Err(another.into())
        }
        Err(HoldError::Api(error)) => {
            if !context.namespaces.was_held(&owner.namespace) {
                let note = Note::new(events::Reason::NotReady, "Hold", error.to_string());
                context.events.post(&owner.regarding(), &[note]).await;
            }
            Err(error.into())
        }
    }
}

/// What came of a deployment whose status was written.
struct Deployed {
    /// Whether all could be done that was decided; the status tells of it already.
    result: Result<(), ReconcileError>,
    /// How long to wait before the next look.
    again: Duration,
}

/// The whole story, one step a line. An error is one that the status does not tell of yet.
async fn deploy(context: &Context, found: &Found) -> Result<Deployed, ReconcileError> {
    // validate, pin the revision (no IO)
    let Meant { mut deployment, revision, mistake } = validate(found, context.image.as_deref())?;

    // claim: no name is somebody else's (reads from the API server what is not known, takes back what was lost)
    claim(context, found, &deployment, &revision).await?;

    // observe (reads from the API server, and what processes reported)
    let (observed, mut plan) = observe(context, found, &deployment, revision).await?;
    if mistake.is_some() {
        plan.retired.clear(); // one of them may be what the spec asks for, once it is corrected
    }

    // settle: what the deployment has once, promotion, the end of old revisions (writes to the API server)
    let soon = settle(context, found, &deployment, (&observed.wanted, &plan)).await?;

    // scale (writes the size to the API server)
    let scaled = scale(context, found, &deployment, observed.serving(), &plan).await;
    deployment.desired.workers = scaled.workers;

    // decide (no IO)
    let decided = observed.map(|side| decide(side, &deployment.desired));

    // act: build and apply the objects, do what was decided (writes to the API server, calls processes)
    let acted = act(context, found, &deployment, decided).await.and(scaled.result);

    // tell: status, Events, metrics (writes to the API server)
    let (mistake, scaling) = (mistake.as_ref(), scaled.scaling.as_ref());
    let authority_follows = soon.is_some();
    let tale =
        Tale { deployment: &deployment, plan: &plan, acted: &acted, mistake, scaling, authority_follows };
    let again = tell(context, found, tale).await?;
    Ok(Deployed { result: acted.result, again: soon.map_or(again, |soon| soon.min(again)) })
}

/// All names are this deployment's, or free, before the first write; unless it is paused, when nothing is written.
async fn claim(
    context: &Context,
    found: &Found,
    deployment: &ValidatedDeployment,
    wanted: &Revision,
) -> Result<(), ReconcileError> {
    if deployment.desired.paused {
        return Ok(());
    }
    let recorded: Vec<Revision> = found.records.iter().filter_map(Revision::recorded).collect();
    Ok(context.writer.claim_all(&found.owner, &wanted.hash, &recorded).await?)
}

/// What a spec asks for, as far as it can be carried out.
struct Meant {
    deployment: ValidatedDeployment,
    /// As it was recorded, or a new one.
    revision: Revision,
    /// Why the spec is not carried out: the revision is then the one that serves, which is looked after meanwhile.
    mistake: Option<ReconcileError>,
}

fn validate(found: &Found, image: Option<&str>) -> Result<Meant, ReconcileError> {
    let validated = ValidatedDeployment::new(&found.object);
    let mistake = match validated {
        Ok(deployment) => match found.wanted(&deployment, image) {
            Some(revision) => return Ok(Meant { deployment, revision, mistake: None }),
            None => ReconcileError::NoImage,
        },
        Err(error) => error.into(),
    };
    let serving = found.serving.as_ref().and_then(|serving| found.recorded(serving));
    let deployment = ValidatedDeployment::as_far_as_right(&found.object);
    match (serving, deployment) {
        (Some(revision), Some(deployment)) => Ok(Meant { deployment, revision, mistake: Some(mistake) }),
        _ => Err(mistake),
    }
}

/// When to try again after a reconcile that failed: after ever longer, or not before the object is another.
pub(crate) fn after_error(object: Arc<Watched>, error: &ReconcileError, context: Arc<Context>) -> Action {
    let key = Key::of(&object);
    if matches!(error, ReconcileError::Invalid(_) | ReconcileError::Malformed(_)) {
        return Action::await_change(); // only its author can help
    }
    if matches!(error, ReconcileError::AnotherOperator(_)) {
        return Action::requeue(STANDING_BY); // an Event tells
    }
    let wait = context.memory.failed(&key);
    let reason = error.reason().name();
    warn!(namespace = key.namespace, name = key.name, reason, "{error}; next attempt in {wait:?}");
    Action::requeue(wait)
}
