//! Turns what changes into reconciles: ModelDeployments, what they own, their pods, and what their processes report.

use std::collections::HashSet;
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{join_all, pending};
use futures::{FutureExt, Stream, StreamExt};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::runtime::controller::{self, Controller};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher;
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::BroadcastStream;
use tracing::{debug, warn};

use crate::key::{Key, Watched};
use crate::metrics::labels::WatchFailure;
use crate::objects::Object;
use crate::objects::names::{EXPERTMESH, INSTANCE, MANAGED_BY};
use crate::reconcile::context::Context;
use crate::reconcile::error::ReconcileError;
use crate::reconcile::{after_error, reconcile};
use crate::refusals::follow;

/// Deployments that are reconciled at the same time.
const CONCURRENCY: u16 = 8;
/// Reports that come within this time make one reconcile.
const PACE: Duration = Duration::from_millis(200);
/// How many deployments can wait to be reconciled for a report; beyond, the regular look has to do.
const WAITING: usize = 4096;
/// How often to look for deployments that are gone.
const SWEEP: Duration = Duration::from_secs(5);

pub(crate) type Reference = ObjectRef<Watched>;

/// Requests for reconciles that come from reports, paced.
pub(crate) struct Triggers(broadcast::Sender<Reference>);

impl Triggers {
    /// The sender that takes requests, and the paced triggers that come of them.
    pub(crate) fn new() -> (mpsc::Sender<Reference>, Self) {
        let (sender, receiver) = mpsc::channel(WAITING);
        let (paced, _) = broadcast::channel(WAITING);
        tokio::spawn(pace(receiver, paced.clone()));
        (sender, Self(paced))
    }

    /// The requests for deployments of one namespace, or of all.
    fn of(&self, namespace: Option<&str>) -> impl Stream<Item = Reference> + Send + use<> {
        let namespace = namespace.map(ToString::to_string);
        let wanted = move |reference: &Reference| namespace.is_none() || reference.namespace == namespace;
        BroadcastStream::new(self.0.subscribe())
            .filter_map(move |sent| std::future::ready(sent.ok().filter(&wanted)))
    }
}

async fn pace(mut requests: mpsc::Receiver<Reference>, paced: broadcast::Sender<Reference>) {
    while let Some(first) = requests.recv().await {
        tokio::time::sleep(PACE).await;
        let mut distinct = HashSet::from([first]);
        while let Ok(request) = requests.try_recv() {
            distinct.insert(request);
        }
        for request in distinct {
            let _ = paced.send(request); // fails where no controller listens yet
        }
    }
}

/// Reconciles until `stop`, and then until the reconciles under way have ended. Calls `synced` once every
/// ModelDeployment was read.
pub(crate) async fn watch(
    context: Arc<Context>,
    namespaces: &[String],
    triggers: Triggers,
    stop: impl Future<Output = ()> + Send + Sync + 'static,
    synced: impl FnOnce(),
) {
    let stop = stop.shared();
    let scopes = if namespaces.is_empty() {
        vec![None]
    } else {
        namespaces.iter().map(|name| Some(name.as_str())).collect()
    };
    let controllers: Vec<_> = scopes.iter().map(|&scope| controller(&context, scope, &triggers)).collect();
    let stores: Vec<_> = controllers.iter().map(Controller::store).collect();
    let following = scopes.iter().map(|scope| follow_refusals(&context, *scope)).collect::<Vec<_>>();
    let running = controllers.into_iter().map(|controller| {
        let results =
            controller.graceful_shutdown_on(stop.clone()).run(reconcile, after_error, context.clone());
        let context = context.clone();
        results.for_each(move |result| {
            log(&context, result);
            std::future::ready(())
        })
    });
    tokio::select! {
        _ = join_all(running) => {}
        () = sweep(&context, &stores, synced) => {}
        _ = join_all(following) => {}
    }
}

/// Hears for ever which pods are refused, and why.
async fn follow_refusals(context: &Context, namespace: Option<&str>) {
    let refused = |reference: Reference| {
        // A full queue holds a request for a reconcile already.
        let _ = context.trigger.try_send(reference);
    };
    let failed = |error: &watcher::Error| {
        context.metrics.reconciles.watch_failed(WatchFailure::WatchFailed);
        warn!("the watch of refusals broke and is begun again: {error}");
    };
    follow(&context.refusals, &scoped(&context.client, namespace), refused, failed).await;
}

fn controller(context: &Arc<Context>, namespace: Option<&str>, triggers: &Triggers) -> Controller<Watched> {
    let (client, asked) = (&context.client, context.clone());
    let asked = move |reference: &Reference| asked.memory.asked(&Key::named(reference));
    let ours = watcher::Config::default().labels(&format!("{MANAGED_BY}={EXPERTMESH}"));
    Controller::new(scoped(client, namespace), watcher::Config::default())
        .with_config(controller::Config::default().concurrency(CONCURRENCY))
        .watches::<StatefulSet, _>(scoped(client, namespace), ours.clone(), changed(context))
        .watches::<Deployment, _>(scoped(client, namespace), ours.clone(), changed(context))
        .watches::<ConfigMap, _>(scoped(client, namespace), ours.clone(), changed(context))
        .watches::<Service, _>(scoped(client, namespace), ours.clone(), changed(context))
        .watches::<PodDisruptionBudget, _>(scoped(client, namespace), ours.clone(), changed(context))
        .watches::<NetworkPolicy, _>(scoped(client, namespace), ours.clone(), changed(context))
        .watches::<Pod, _>(scoped(client, namespace), ours, |pod| deployment_of(&pod))
        .reconcile_on(triggers.of(namespace).inspect(asked))
}

fn scoped<K>(client: &Client, namespace: Option<&str>) -> Api<K>
where
    K: Resource<Scope = NamespaceResourceScope> + DeserializeOwned + Debug + Clone,
    K::DynamicType: Default + Hash + Eq,
{
    match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

/// What a change of an object that is ours asks for: its deployment's reconcile, whoever owns the object by now.
fn changed<K: Object>(context: &Context) -> impl Fn(K) -> Option<Reference> + Send + Sync + 'static {
    let writer = context.writer.clone();
    move |object| {
        writer.saw(&object);
        deployment_of(&object)
    }
}

fn deployment_of<K: Object>(object: &K) -> Option<Reference> {
    let name = object.labels().get(INSTANCE)?;
    Some(ObjectRef::new(name).within(&object.namespace()?))
}

/// Waits for the first complete reading, then forgets again and again what is gone.
async fn sweep(context: &Context, stores: &[Store<Watched>], synced: impl FnOnce()) {
    let read = join_all(stores.iter().map(Store::wait_until_ready)).await;
    if read.iter().any(Result::is_err) {
        return pending().await; // the watch ended: so does what called us
    }
    synced();
    loop {
        context.forget_all_but(|reference| stores.iter().any(|store| store.get(reference).is_some()));
        tokio::time::sleep(SWEEP).await;
    }
}

type Outcome = Result<(Reference, controller::Action), controller::Error<ReconcileError, watcher::Error>>;

fn log(context: &Context, outcome: Outcome) {
    match outcome {
        Ok((reference, _)) => debug!(name = reference.name, "reconciled"),
        // Reconciles count and log their own errors, and what is gone needs none.
        Err(controller::Error::ReconcilerFailed(..) | controller::Error::ObjectNotFound(_)) => {}
        Err(error) => {
            let is_of_a_watch = matches!(error, controller::Error::QueueError(_));
            let failure = if is_of_a_watch { WatchFailure::WatchFailed } else { WatchFailure::Internal };
            context.metrics.reconciles.watch_failed(failure);
            warn!("a watch broke and is begun again: {error}");
        }
    }
}
