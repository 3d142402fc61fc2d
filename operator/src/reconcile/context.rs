//! The clients, settings and memory that every reconcile needs.

use std::sync::Arc;

use expertmesh_decide::autoscale::autoscaler::Look;
use kube::Client;
use kube::runtime::reflector::ObjectRef;
use tokio::sync::mpsc;

use super::memory::{Memory, SharedFleet};
use crate::apply::Writer;
use crate::events::Events;
use crate::fleet::kubernetes::KubernetesFleet;
use crate::fleet::kubernetes::streams::Caller;
use crate::identities::Identities;
use crate::key::{Key, Watched};
use crate::metrics::Metrics;
use crate::namespaces::Namespaces;
use crate::objects::names::Owner;
use crate::objects::policies::Around;
use crate::objects::revision::Revision;
use crate::refusals::Refusals;

/// What all reconciles of this process share.
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) writer: Writer,
    pub(crate) identities: Arc<Identities>,
    /// Those that this operator works in.
    pub(crate) namespaces: Namespaces,
    pub(crate) events: Events,
    pub(crate) metrics: Metrics,
    /// Who this process is to workers and frontends.
    pub(crate) caller: Caller,
    /// The image of pods whose spec names none.
    pub(crate) image: Option<String>,
    /// The namespace of the operator's pods, if it runs in this cluster.
    pub(crate) operator_namespace: Option<String>,
    /// Whom the pods of deployments let in, and what they may reach.
    pub(crate) around: Around,
    /// Asks for a reconcile when a worker or frontend reports a change.
    pub(crate) trigger: mpsc::Sender<ObjectRef<Watched>>,
    pub(crate) memory: Memory,
    pub(crate) refusals: Arc<Refusals>,
}

impl Context {
    /// The fleet of a deployment's revision. What its processes report asks for a reconcile.
    pub(super) fn fleet(&self, owner: &Owner, revision: &Revision) -> SharedFleet {
        let key = owner.key();
        let new = || {
            let (metrics, trigger, key) = (self.metrics.clone(), self.trigger.clone(), key.clone());
            let changed = move |look: Option<&Look>| {
                if let Some(look) = look {
                    metrics.autoscaling.looked(&key, look);
                }
                if look.is_none_or(|look| look.is_news) {
                    metrics.reconciles.asked(&key);
                    // A full queue holds a request for a reconcile already.
                    let _ = trigger.try_send(key.reference());
                }
            };
            let (writer, refusals) = (self.writer.clone(), self.refusals.clone());
            let trusted = revision.is_identified().then(|| self.identities.trusted(owner));
            let caller = Caller { trusted, ..self.caller.clone() };
            KubernetesFleet::new(writer, owner.clone(), revision, refusals, &caller, changed)
        };
        self.memory.fleet(&key, &owner.reference.uid, &revision.hash, new)
    }

    /// Ends what is remembered and shown of a deployment that is gone.
    pub(super) fn forget(&self, key: &Key) {
        self.let_go(key);
        self.namespaces.forget(key);
    }

    /// Ends what is remembered and shown of a deployment that is another operator's.
    pub(crate) fn let_go(&self, key: &Key) {
        self.memory.forget(key);
        self.writer.forget_all(key);
        self.identities.forget(key);
        self.metrics.forget(key);
    }

    /// Ends what is remembered and shown of all deployments that are gone, however that was missed.
    pub(crate) fn forget_all_but(&self, living: impl Fn(&ObjectRef<Watched>) -> bool) {
        for key in self.memory.keys().into_iter().chain(self.namespaces.keys()) {
            if !living(&key.reference()) {
                self.forget(&key);
            }
        }
    }
}
