//! What happens when something changed: fetch → validate → observe → decide → build → apply → act → status.
//!
//! Only `fetch`, `observe`, `apply`, `act` and the writing of the status do IO. Every step can be repeated, and one that
//! finds everything as it should be writes nothing.

mod fetch;
mod memory;
mod refuse;
mod scale;

use std::sync::Arc;
use std::time::{Duration, Instant};

use expertmesh_decide::action::{Action, Decision};
use expertmesh_decide::autoscale::autoscaler::Look;
use expertmesh_decide::observation::Observation;
use expertmesh_decide::placement::moved;
use expertmesh_decide::rollout::{Revisions, Rollout, rollout};
use expertmesh_decide::step::decide;
use jiff::Timestamp;
use kube::api::{Api, Patch, PatchParams};
use kube::core::DeserializeGuard;
use kube::runtime::controller;
use kube::runtime::reflector::ObjectRef;
use kube::{Client, Resource, ResourceExt};
use tokio::sync::mpsc;
use tracing::{debug, info, warn};

use crate::api::{ModelDeployment, ModelDeploymentStatus};
use crate::apply::{self, ApiError};
use crate::events::{self, Events};
use crate::fleet::Fleet;
use crate::fleet::kubernetes::{Caller, FleetError, KubernetesFleet};
use crate::metrics::Metrics;
use crate::objects::names::EXPERTMESH;
use crate::objects::revision::Revision;
use crate::objects::{self, Size};
use crate::status::{self, Scaling, Situation};
use crate::validate::{ValidatedDeployment, ValidationError};

use fetch::{Fetched, Found};
use memory::SharedFleet;

pub(crate) use memory::Memory;

/// As watched: one object that cannot be read does not end the watch of the others.
pub(crate) type Watched = DeserializeGuard<ModelDeployment>;

/// However slow the API server or a worker is, a reconcile ends.
const LONGEST: Duration = Duration::from_secs(30);
/// When to look again where nothing is under way. Watches and reports tell of changes at once.
const LATER: Duration = Duration::from_secs(60);
/// How long after a promotion clients may still be sent to the old revision.
const PROMOTION_SPREADS: Duration = Duration::from_secs(10);

/// A deployment by name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl Key {
    fn of(object: &Watched) -> Self {
        Self { namespace: object.namespace().unwrap_or_default(), name: object.name_any() }
    }

    fn reference(&self) -> ObjectRef<Watched> {
        ObjectRef::new(&self.name).within(&self.namespace)
    }
}

/// What every reconcile needs.
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) events: Events,
    pub(crate) metrics: Metrics,
    /// Who this process is to workers and frontends.
    pub(crate) caller: Caller,
    /// The image of pods whose spec names none.
    pub(crate) image: Option<String>,
    /// Where the operator's pods are, if it runs in this cluster.
    pub(crate) operator_namespace: Option<String>,
    /// Asks for a reconcile when a worker or frontend reports a change.
    pub(crate) trigger: mpsc::Sender<ObjectRef<Watched>>,
    pub(crate) memory: Memory,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum ReconcileError {
    #[error(transparent)]
    Invalid(#[from] ValidationError),
    #[error("the object cannot be read: {0}")]
    Malformed(String),
    #[error(
        "spec.workers.image and spec.frontend.image: one is missing, and the operator was given no --image for it"
    )]
    NoImage,
    #[error("the Service {0} is somebody else's: choose another metadata.name, or delete it")]
    NameTaken(String),
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error(transparent)]
    Fleet(#[from] FleetError),
    #[error("did not end within {}s", LONGEST.as_secs())]
    TimedOut,
}

impl ReconcileError {
    /// Stable: the metric's label and the condition's reason.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::Invalid(error) => error.reason(),
            Self::Malformed(_) => status::INVALID_SPEC,
            Self::NoImage => "NoImage",
            Self::NameTaken(_) => "NameTaken",
            Self::Api(error) => error.reason(),
            Self::Fleet(error) => error.reason(),
            Self::TimedOut => "TimedOut",
        }
    }
}

/// One deployment, once.
pub(crate) async fn reconcile(
    object: Arc<Watched>,
    context: Arc<Context>,
) -> Result<controller::Action, ReconcileError> {
    let (key, began) = (Key::of(&object), Instant::now());
    context.metrics.begun(&key.namespace, &key.name);
    let result =
        tokio::time::timeout(LONGEST, step(&context, &key)).await.unwrap_or(Err(ReconcileError::TimedOut));
    context.metrics.reconciled(result.as_ref().map(|_| ()).map_err(ReconcileError::reason), began.elapsed());
    if result.is_ok() {
        context.memory.succeeded(&key);
    }
    result
}

/// The whole story.
async fn step(context: &Context, key: &Key) -> Result<controller::Action, ReconcileError> {
    let found = match fetch::fetch(&context.client, key).await? {
        Fetched::Found(found) => found,
        Fetched::Malformed(invalid) => return refuse::malformed(context, key, &invalid).await,
        Fetched::Gone => {
            context.forget(key);
            return Ok(controller::Action::await_change());
        }
    };
    match deploy(context, key, &found).await {
        Ok(acted) => acted,
        Err(error) => {
            refuse::explain(context, &found, &error).await?;
            Err(error)
        }
    }
}

/// `Ok(Err)` where acting failed and the status tells of it, along with what was seen.
async fn deploy(
    context: &Context,
    key: &Key,
    found: &Found,
) -> Result<Result<controller::Action, ReconcileError>, ReconcileError> {
    let mut deployment = ValidatedDeployment::new(&found.object)?;
    if found.name_is_taken {
        return Err(ReconcileError::NameTaken(key.name.clone()));
    }
    let wanted = found.wanted(&deployment, context.image.as_deref()).ok_or(ReconcileError::NoImage)?;
    let mut wanted = Side::observe(context, found, wanted).await?;
    let plan = rollout(Revisions {
        wanted: &wanted.revision.hash,
        serving: found.serving.as_deref(),
        running: &found.running,
        wanted_serves: !deployment.desired.paused && status::serves(&deployment.desired, &wanted.seen),
        just_promoted: context.memory.promoted_within(key, PROMOTION_SPREADS),
    });
    let mut old = match found.recorded(&plan.serving).filter(|_| plan.next.is_some()) {
        Some(serving) => Some(Side::observe(context, found, serving).await?),
        None => None,
    };
    if !deployment.desired.paused {
        settle(context, key, found, &plan).await?;
    }
    let serving = (old.as_ref().unwrap_or(&wanted), plan.next.is_some());
    let goals = deployment.autoscaling.as_ref().map(|policy| policy.goals);
    context.metrics.aims(&key.namespace, &key.name, goals);
    let (scaling, scaled) = scale::scale(context, found, &mut deployment, serving).await;
    let mut acted = wanted.advance(context, &deployment).await;
    if let Some(old) = &mut old {
        acted = acted.and(old.advance(context, &deployment).await);
    }
    acted = acted.and(scaled.map_err(ReconcileError::from));
    let serving = old.as_ref().unwrap_or(&wanted);
    let next = old.is_some().then_some((wanted.revision.hash.as_str(), &wanted.seen));
    let told = Told { deployment: &deployment, plan: &plan, serving, next, scaling: scaling.as_ref() };
    let changed = context.tell(found, told, acted.as_ref().err()).await?;
    let settled = serving.decision.waiting_for.is_empty() && serving.decision.actions.is_empty();
    let idle = settled && plan.next.is_none() && plan.retired.is_empty() && found.running.len() <= 1;
    let pause = if idle { LATER } else { context.memory.pause(key, changed) };
    Ok(acted.map(|()| controller::Action::requeue(pause)))
}

/// What the deployment has once, the end of what it no longer needs, and whom clients reach.
async fn settle(context: &Context, key: &Key, found: &Found, plan: &Rollout) -> Result<(), ApiError> {
    let objects = objects::shared(&found.owner, &plan.serving, context.operator_namespace.as_deref());
    apply::shared(&context.client, &objects).await?;
    if found.serving.as_ref().is_some_and(|serving| *serving != plan.serving) {
        context.memory.promoted(key);
    }
    for revision in &plan.retired {
        apply::retire(&context.client, &found.owner, revision).await?;
    }
    for revision in found.forgettable(plan.next.as_ref().unwrap_or(&plan.serving)) {
        apply::forget(&context.client, &found.owner, &revision).await?;
    }
    let running = [Some(plan.serving.as_str()), plan.next.as_deref()];
    context.memory.keep_fleets(key, &running.into_iter().flatten().collect::<Vec<_>>());
    Ok(())
}

/// One revision: what it is, what is seen of it, and what was decided.
struct Side<'a> {
    found: &'a Found,
    revision: Revision,
    fleet: SharedFleet,
    seen: Observation,
    decision: Decision,
}

impl<'a> Side<'a> {
    async fn observe(context: &Context, found: &'a Found, revision: Revision) -> Result<Self, FleetError> {
        let fleet = context.fleet(found, &revision.hash);
        let seen = fleet.lock().await.observe().await?;
        Ok(Self { found, revision, fleet, seen, decision: Decision::default() })
    }

    /// Decide → build → apply → act.
    async fn advance(
        &mut self,
        context: &Context,
        deployment: &ValidatedDeployment,
    ) -> Result<(), ReconcileError> {
        self.decision = decide(&deployment.desired, &self.seen, Timestamp::now());
        if !deployment.desired.paused {
            let exists = self.seen.size > 0;
            let size = Size {
                workers: if exists { self.seen.size } else { deployment.desired.workers },
                frontends: deployment.frontends,
                placement: Some(&self.seen.placement).filter(|placement| placement.epoch() > 0),
            };
            let objects = objects::of_revision(&self.found.owner, &self.revision, size);
            apply::revision(&context.client, &objects).await?;
        }
        for action in &self.decision.actions {
            let (name, what) = (&self.found.owner.name, told(action));
            match action {
                Action::Push { .. } => debug!(name, revision = self.revision.hash, "{what}"),
                _ => info!(name, revision = self.revision.hash, "{what}"),
            }
            context.metrics.acted(kind(action));
            if let Action::Place(placement) = action {
                let bytes = self.seen.shape().map_or(0, |shape| shape.expert_bytes);
                let moved = moved(&self.seen.placement, placement);
                context.metrics.migrated((&self.found.owner.namespace, name), moved, bytes);
            }
        }
        let mut fleet = self.fleet.lock().await;
        fleet.act(&self.decision.actions).await?;
        fleet.end_overdue().await?;
        Ok(())
    }
}

/// What a status is made of.
struct Told<'a> {
    deployment: &'a ValidatedDeployment,
    plan: &'a Rollout,
    serving: &'a Side<'a>,
    next: Option<(&'a str, &'a Observation)>,
    scaling: Option<&'a Scaling>,
}

impl Context {
    fn fleet(&self, found: &Found, revision: &str) -> SharedFleet {
        let key = Key { namespace: found.owner.namespace.clone(), name: found.owner.name.clone() };
        let (trigger, reference) = (self.trigger.clone(), key.reference());
        let (metrics, of) = (self.metrics.clone(), key.clone());
        let changed = move |look: Option<&Look>| {
            if let Some(look) = look {
                metrics.looked(&of.namespace, &of.name, look);
            }
            if look.is_none_or(|look| look.is_news) {
                metrics.asked(&of.namespace, &of.name);
                // A full queue holds a request for a reconcile already.
                let _ = trigger.try_send(reference.clone());
            }
        };
        let new = || {
            let of = (found.owner.clone(), revision);
            KubernetesFleet::new(self.client.clone(), of, &self.caller, changed)
        };
        self.memory.fleet(&key, &found.owner.reference.uid, revision, new)
    }

    /// Writes the status where it changed, posts Events of what changed, and shows the figures; `failed` is why acting
    /// failed, if it did. True where the status changed.
    async fn tell(
        &self,
        found: &Found,
        Told { deployment, plan, serving, next, scaling }: Told<'_>,
        failed: Option<&ReconcileError>,
    ) -> Result<bool, ApiError> {
        let before = found.status();
        let mut after = status::status(&Situation {
            owner: &found.owner,
            generation: found.object.metadata.generation,
            desired: &deployment.desired,
            serving: &plan.serving,
            seen: &serving.seen,
            decision: &serving.decision,
            next,
            scaling,
            before: &before,
            now: Timestamp::now(),
        });
        self.metrics.show(
            &found.owner.namespace,
            &found.owner.name,
            status::figures(&deployment.desired, deployment.frontends, &serving.seen),
        );
        if let Some(error) = failed {
            after = refuse::explained(&before, after, found.object.metadata.generation, error);
        }
        self.metrics.told(&found.owner.namespace, &found.owner.name, &after.conditions);
        self.write(found, &before, &after).await?;
        Ok(before != after)
    }

    /// By server-side apply, so that a field that is left out goes away. Nothing where nothing changed.
    async fn write(
        &self,
        found: &Found,
        before: &ModelDeploymentStatus,
        after: &ModelDeploymentStatus,
    ) -> Result<(), ApiError> {
        if before == after {
            return Ok(());
        }
        let name = &found.owner.name;
        let api: Api<ModelDeployment> = Api::namespaced(self.client.clone(), &found.owner.namespace);
        let patch = refuse::status_patch(name, &serde_json::json!(after));
        let parameters = PatchParams::apply(EXPERTMESH).force();
        let written = api.patch_status(name, &parameters, &Patch::Apply(patch)).await;
        written.map_err(|error| ApiError::new::<ModelDeployment>("write the status of", name, error))?;
        self.events.post(&found.object.object_ref(&()), &events::transitions(before, after)).await;
        Ok(())
    }

    /// Ends what is remembered and shown of a deployment that is gone.
    pub(crate) fn forget(&self, key: &Key) {
        self.memory.forget(key);
        self.metrics.forget(&key.namespace, &key.name);
    }

    /// The same for all that are gone, however that was missed.
    pub(crate) fn forget_all_but(&self, living: impl Fn(&ObjectRef<Watched>) -> bool) {
        for key in self.memory.keys() {
            if !living(&key.reference()) {
                self.forget(&key);
            }
        }
    }
}

/// One line for the log.
fn told(action: &Action) -> String {
    match action {
        Action::Resize(size) => format!("running {size} workers"),
        Action::Place(placement) => format!("placing epoch {}", placement.epoch()),
        Action::Push { to, placement } => format!("telling {to:?} epoch {}", placement.epoch()),
        Action::Drain { slot } => format!("draining worker {slot}"),
    }
}

fn kind(action: &Action) -> &'static str {
    match action {
        Action::Resize(_) => "resize",
        Action::Place(_) => "place",
        Action::Push { .. } => "push",
        Action::Drain { .. } => "drain",
    }
}

/// When to try again.
pub(crate) fn after_error(
    object: Arc<Watched>,
    error: &ReconcileError,
    context: Arc<Context>,
) -> controller::Action {
    let key = Key::of(&object);
    if matches!(error, ReconcileError::Invalid(_) | ReconcileError::Malformed(_)) {
        return controller::Action::await_change(); // only its author can help
    }
    let wait = context.memory.failed(&key);
    warn!(
        namespace = key.namespace,
        name = key.name,
        reason = error.reason(),
        "{error}; next attempt in {wait:?}"
    );
    controller::Action::requeue(wait)
}
