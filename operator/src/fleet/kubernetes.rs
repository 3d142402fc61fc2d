//! One revision of a deployment on Kubernetes: a StatefulSet of workers, frontends, and the streams to both.

mod nodes;
mod pods;
pub(crate) mod refused;
pub(crate) mod streams;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use expertmesh_decide::action::Action;
use expertmesh_decide::autoscale::autoscaler::Look;
use expertmesh_decide::autoscale::limits::Change;
use expertmesh_decide::autoscale::policy::{Policy, Size};
use expertmesh_decide::autoscale::verdict::Verdict;
use expertmesh_decide::observation::{Commit, Failure, Member, Observation, Seen};
use expertmesh_decide::report::State;
use expertmesh_proto::placement::Placement;
use expertmesh_proto::slot::Slot;
use expertmesh_source::located::is_commit;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod};
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, Preconditions};
use tracing::{info, warn};

use super::Fleet;
use crate::apply::{ApiError, Writer};
use crate::objects::Object;
use crate::objects::names::{COMMIT_KEY, COMPONENT, Component, EXPERTMESH, Owner, PLACEMENT_KEY, query};
use crate::objects::revision::Revision;
use crate::objects::workloads::config_map;
use crate::refusals::Refusals;

use nodes::Nodes;
use streams::{Caller, SharedAutoscaler, Streams};

pub(crate) struct KubernetesFleet {
    writer: Writer,
    owner: Owner,
    revision: String,
    refusals: Arc<Refusals>,
    nodes: Nodes,
    streams: Streams,
    autoscaler: SharedAutoscaler,
    /// Whether the first process finds out which commit the model is at.
    is_floating: bool,
    commit: Commit,
    /// The commit that was ever known.
    recorded: Option<String>,
    /// The written placement, as of the last observation.
    placement: Placement,
    /// Whether nothing was observed yet.
    fresh: bool,
    /// Pods that should have ended long ago, with their nodes, as of the last observation.
    overdue: Vec<Overdue>,
}

struct Overdue {
    pod: String,
    uid: Option<String>,
    node: String,
}

impl fmt::Debug for KubernetesFleet {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "KubernetesFleet({}/{})", self.owner.namespace, self.name())
    }
}

impl KubernetesFleet {
    /// `changed` is called, some moments later, when a process reports something that a decision could depend on, and with
    /// every look of the autoscaler.
    pub(crate) fn new(
        writer: Writer,
        owner: Owner,
        revision: &Revision,
        refusals: Arc<Refusals>,
        caller: &Caller,
        changed: impl Fn(Option<&Look>) + Send + 'static,
    ) -> Self {
        let autoscaler = SharedAutoscaler::default();
        let streams = Streams::new(caller, autoscaler.clone(), changed);
        Self {
            writer,
            owner,
            revision: revision.hash.clone(),
            is_floating: revision.is_floating(),
            commit: Commit::Given,
            recorded: revision.commit.clone(),
            placement: Placement::default(),
            refusals,
            nodes: Nodes::default(),
            streams,
            autoscaler,
            fresh: true,
            overdue: Vec::new(),
        }
    }

    /// What it is to scale, and what it says to that now; none without a policy.
    pub(crate) fn autoscale(
        &self,
        policy: Option<&Policy>,
        size: Size,
        changes: Vec<Change>,
        now: Timestamp,
    ) -> Option<Verdict> {
        let mut autoscaler = streams::locked(&self.autoscaler);
        autoscaler.set(policy, size, changes, now);
        autoscaler.verdict(now)
    }

    /// Deletes pods for good that should have ended long ago and whose node is gone: nobody else does, and a StatefulSet
    /// starts no successor before.
    pub(crate) async fn end_overdue(&mut self) -> Result<(), ApiError> {
        for Overdue { pod, uid, node } in std::mem::take(&mut self.overdue) {
            let nodes: Api<Node> = Api::all(self.writer.client.clone());
            let found = nodes
                .get_metadata_opt(&node)
                .await
                .map_err(|error| ApiError::new::<Node>("get", &node, error))?;
            if found.is_some() {
                continue; // its kubelet may still run the pod: two with one name must not be
            }
            info!(pod, node, "its node is gone: deleting it for good");
            let preconditions = Preconditions { uid, resource_version: None };
            let parameters = DeleteParams {
                preconditions: Some(preconditions),
                ..DeleteParams::default().grace_period(0)
            };
            if let Err(error) = self.api::<Pod>().delete(&pod, &parameters).await {
                warn!("{}", ApiError::new::<Pod>("delete", &pod, error)); // seen again with the next observation
            }
        }
        Ok(())
    }

    fn name(&self) -> String {
        self.owner.of_revision(&self.revision)
    }

    fn api<K: Object>(&self) -> Api<K> {
        Api::namespaced(self.writer.client.clone(), &self.owner.namespace)
    }

    async fn get<K: Object>(&self, name: &str) -> Result<Option<K>, ApiError> {
        self.api::<K>().get_opt(name).await.map_err(|error| ApiError::new::<K>("get", name, error))
    }

    /// The written placement; of no epoch where there is none, or none that can be read: whoever follows one reports its
    /// epoch. Takes note of the written commit.
    async fn placement(&mut self) -> Result<Placement, ApiError> {
        let map: Option<ConfigMap> = self.get(&self.name()).await?;
        let mut data = map.and_then(|map| map.data).unwrap_or_default();
        if self.is_floating {
            // Of a revision that ran before, its record knows.
            let known =
                data.remove(COMMIT_KEY).filter(|commit| is_commit(commit)).or_else(|| self.recorded.clone());
            self.recorded.clone_from(&known);
            self.commit = known.map_or(Commit::Wanted, Commit::Known);
        }
        let text = data.remove(PLACEMENT_KEY).unwrap_or_default();
        if text.is_empty() {
            return Ok(Placement::default());
        }
        Ok(serde_json::from_str(&text).unwrap_or_else(|error| {
            warn!(
                config_map = self.name(),
                "{PLACEMENT_KEY} is no placement and will be written anew: {error}"
            );
            Placement::default()
        }))
    }

    /// Those of workers, and those of frontends.
    async fn pods(&self) -> Result<(Vec<Pod>, Vec<Pod>), ApiError> {
        let ours = ListParams::default().labels(&query(&self.owner.selector_of_revision(&self.revision)));
        let found = self.api::<Pod>().list(&ours).await;
        let found = found.map_err(|error| ApiError::new::<Pod>("list", &self.name(), error))?.items;
        let is = |pod: &Pod, component: Component| {
            pod.labels().get(COMPONENT).is_some_and(|found| found == component.as_str())
        };
        let found =
            found.into_iter().filter(|pod| is(pod, Component::Worker) || is(pod, Component::Frontend));
        Ok(found.partition(|pod| is(pod, Component::Worker)))
    }

    fn worker(&self, slot: Slot, pod: Option<&Pod>, refused: Option<&Failure>) -> Seen {
        let name = self.owner.worker_pod(&self.revision, slot);
        let addresses = pods::addresses(&self.owner, Component::Worker, &name, pod);
        let failure = pod.map_or_else(|| refused.cloned(), |pod| self.failure(pod));
        Seen { name, addresses, is_started: pod.is_some_and(pods::is_started), failure, ..Seen::default() }
    }

    fn frontend(&self, pod: &Pod) -> Seen {
        let name = pod.name_any();
        let addresses = pods::addresses(&self.owner, Component::Frontend, &name, Some(pod));
        let (is_started, failure) = (pods::is_started(pod), self.failure(pod));
        Seen { name, addresses, is_started, failure, ..Seen::default() }
    }

    fn failure(&self, pod: &Pod) -> Option<Failure> {
        let unprepared = || refused::unprepared(pod, Timestamp::now(), |uid| self.refusals.of(uid));
        pods::failure(pod).or_else(|| (!pods::is_started(pod)).then(unprepared).flatten())
    }

    async fn write(&self, what: (Option<&Placement>, Option<&str>)) -> Result<(), ApiError> {
        self.writer.apply(&self.owner, &config_map(&self.owner, &self.revision, what)).await
    }

    async fn resize(&self, size: u32) -> Result<(), ApiError> {
        let name = self.name();
        let patch = Patch::Merge(serde_json::json!({"spec": {"replicas": size}}));
        let parameters = PatchParams { field_manager: Some(EXPERTMESH.into()), ..PatchParams::default() };
        let scaled = self.api::<StatefulSet>().patch_scale(&name, &parameters, &patch).await;
        scaled.map_err(|error| ApiError::new::<StatefulSet>("scale", &name, error))?;
        Ok(())
    }
}

/// What processes do not take is no error: it is told again.
impl Fleet for KubernetesFleet {
    type Error = ApiError;

    async fn observe(&mut self) -> Result<Observation, ApiError> {
        let set: Option<StatefulSet> = self.get(&self.name()).await?;
        let refusal = set.as_ref().and_then(|set| self.refusals.of(set.metadata.uid.as_ref()?));
        let size =
            set.and_then(|set| set.spec?.replicas).and_then(|size| u32::try_from(size).ok()).unwrap_or(0);
        let placement = self.placement().await?;
        self.placement = placement.clone();
        let (workers, frontends) = self.pods().await?;
        let now = Timestamp::now();
        self.overdue = workers.iter().filter(|pod| pods::is_overdue(pod, now)).filter_map(overdue).collect();
        let refused = refusal.and_then(|refusal| refused::still_refused(refusal, &workers));
        // One that ends is seen no more: what it still says is no promise.
        let lives = |pod: &&Pod| !pods::is_terminating(pod) && !pods::has_ended(pod);
        let by_slot: BTreeMap<Slot, &Pod> =
            workers.iter().filter(lives).filter_map(|pod| Some((pods::slot(pod)?, pod))).collect();
        // Until one that ends has ended, none is made in its place.
        let ending: BTreeSet<Slot> = workers.iter().filter_map(pods::slot).collect();
        let missing = |slot: Slot| refused.as_ref().filter(|_| !ending.contains(&slot));
        let mut seen = Observation {
            placement,
            commit: self.commit.clone(),
            size,
            workers: Slot::first(size)
                .map(|slot| (slot, self.worker(slot, by_slot.get(&slot).copied(), missing(slot))))
                .collect(),
            frontends: frontends.iter().filter(lives).map(|pod| self.frontend(pod)).collect(),
        };
        let runs = |slot| by_slot.contains_key(&slot);
        self.streams.complete(&mut seen, runs).await;
        if std::mem::take(&mut self.fresh) {
            // Who serves already must not be taken for silent because this process has only just begun to listen.
            let workers =
                by_slot.iter().filter(|(_, pod)| pods::is_ready(pod)).map(|(&slot, _)| Member::Worker(slot));
            let frontends = frontends.iter().filter(lives).filter(|pod| pods::is_ready(pod));
            let ready: Vec<_> =
                workers.chain(frontends.map(|pod| Member::Frontend(pod.name_any()))).collect();
            self.streams.hear(&ready).await;
            self.streams.complete(&mut seen, runs).await;
        }
        let all: Vec<&Pod> = workers.iter().chain(&frontends).collect();
        self.nodes.blame(&self.writer.client, &mut seen, &all).await?;
        let reached: BTreeSet<_> =
            frontends.iter().filter(|pod| pods::is_ready(pod)).map(ResourceExt::name_any).collect();
        for frontend in seen.frontends.iter_mut().filter(|frontend| !reached.contains(&frontend.name)) {
            // Ready as it may be, the Service sends nobody there before its kubelet says so.
            if let Some(report) = &mut frontend.report {
                report.state = State::Loading;
            }
        }
        Ok(seen)
    }

    async fn act(&mut self, actions: &[Action]) -> Result<(), ApiError> {
        let mut pushes: Vec<(&Member, &Placement)> = Vec::new();
        for action in actions {
            match action {
                Action::Resize(size) => self.resize(*size).await?,
                Action::Place(placement) => self.write((Some(placement), self.commit.known())).await?,
                Action::Pin(commit) => {
                    let placement = Some(&self.placement).filter(|placement| !placement.epoch().is_none());
                    self.write((placement, Some(commit))).await?;
                }
                Action::Push { to, placement } => pushes.push((to, placement)),
                Action::Drain { slot } => self.streams.drain(*slot).await,
            }
        }
        // All at once, for one that does not answer must not keep the others waiting.
        self.streams.tell(pushes).await;
        Ok(())
    }
}

fn overdue(pod: &Pod) -> Option<Overdue> {
    Some(Overdue { pod: pod.name_any(), uid: pod.uid(), node: pods::node(pod)?.to_string() })
}
