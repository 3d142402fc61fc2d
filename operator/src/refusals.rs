//! Which pods the API server refuses to a StatefulSet, and what kubelets lack to start one. Neither is in any object's status: Events
//! tell, and a watch of just these Events keeps them here, so that a look at a deployment asks for none.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use futures::StreamExt;
use futures::stream::select_all;
use jiff::Timestamp;
use k8s_openapi::api::events::v1::Event;
use kube::api::Api;
use kube::runtime::watcher::{self, watcher};
use kube::runtime::{WatchStreamExt, reflector::ObjectRef};

use crate::key::Watched;

/// How many objects are remembered for what was refused to them: the latest.
const MOST: usize = 4096;
/// What controllers and kubelets post: (reason, kind of the object).
const WATCHED: [(&str, &str); 3] =
    [("FailedCreate", "StatefulSet"), ("FailedMount", "Pod"), ("FailedCreatePodSandBox", "Pod")];

/// What was refused to one object, the last time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) reason: String,
    pub(crate) message: String,
    /// To the second, as Events are.
    pub(crate) at: Timestamp,
}

/// The refusals, by the uid of whom they concern.
#[derive(Debug, Default)]
pub(crate) struct Refusals(Mutex<HashMap<String, Refusal>>);

impl Refusals {
    pub(crate) fn of(&self, uid: &str) -> Option<Refusal> {
        self.lock().get(uid).cloned()
    }

    /// Remembers the Event, where it is not earlier than what is known; true where it says something new.
    fn note(&self, event: &Event) -> bool {
        let Some((uid, refusal)) = refusal(event) else { return false };
        let mut all = self.lock();
        let known = all.get(uid);
        if known.is_some_and(|known| known.at > refusal.at) {
            return false;
        }
        let is_news = known.is_none_or(|known| known.message != refusal.message);
        all.insert(uid.into(), refusal);
        if all.len() > MOST {
            let earliest = all.iter().min_by_key(|(_, refusal)| refusal.at).map(|(uid, _)| uid.clone());
            earliest.map(|uid| all.remove(&uid));
        }
        is_news
    }

    /// Forgets an Event that is gone, as all are after an hour.
    fn forget(&self, event: &Event) {
        if let Some((uid, refusal)) = refusal(event) {
            self.lock().remove(uid).filter(|known| known.at > refusal.at);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Refusal>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn refusal(event: &Event) -> Option<(&str, Refusal)> {
    let uid = event.regarding.as_ref()?.uid.as_deref()?;
    let (reason, message) = (event.reason.clone()?, event.note.clone()?);
    let series = event.series.as_ref().map(|series| series.last_observed_time.0);
    let last = event.deprecated_last_timestamp.as_ref().map(|time| time.0);
    let first = event.event_time.as_ref().map(|time| time.0);
    let at = [series, last, first].into_iter().flatten().max()?;
    Some((uid, Refusal { reason, message, at }))
}

/// Follows the Events for ever. `refused` is called with the deployment of a StatefulSet to which something new was refused, `failed` where
/// the watch broke, which is then begun again.
pub(crate) async fn follow(
    refusals: &Refusals,
    events: &Api<Event>,
    refused: impl Fn(ObjectRef<Watched>),
    failed: impl Fn(&watcher::Error),
) {
    let watches = WATCHED.map(|(reason, kind)| {
        let fields = format!("reason={reason},regarding.kind={kind}");
        let config = watcher::Config::default().fields(&fields);
        watcher(events.clone(), config).default_backoff().boxed()
    });
    let mut events = select_all(watches);
    while let Some(event) = events.next().await {
        match event {
            Ok(watcher::Event::Apply(event) | watcher::Event::InitApply(event)) => {
                if refusals.note(&event) {
                    deployment_of(&event).into_iter().for_each(&refused);
                }
            }
            Ok(watcher::Event::Delete(event)) => refusals.forget(&event),
            Ok(watcher::Event::Init | watcher::Event::InitDone) => {}
            Err(error) => failed(&error),
        }
    }
}

/// The deployment whose StatefulSet `<name>-<rev8>` an Event concerns, if it is one of ours.
fn deployment_of(event: &Event) -> Option<ObjectRef<Watched>> {
    let regarding =
        event.regarding.as_ref().filter(|regarding| regarding.kind.as_deref() == Some("StatefulSet"))?;
    let (name, revision) = regarding.name.as_ref()?.rsplit_once('-')?;
    let is_revision = revision.len() == 8 && revision.chars().all(|digit| digit.is_ascii_hexdigit());
    is_revision.then_some(ObjectRef::new(name).within(regarding.namespace.as_ref()?))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(uid: &str, name: &str, second: i64) -> Event {
        let time = Timestamp::from_second(second).unwrap().to_string();
        serde_json::from_value(json!({
            "metadata": {"name": "e"}, "eventTime": null, "reason": "FailedCreate", "note": format!("refused at {second}"),
            "deprecatedLastTimestamp": time,
            "regarding": {"kind": "StatefulSet", "namespace": "ns", "name": name, "uid": uid},
        }))
        .unwrap()
    }

    #[test]
    fn the_last_refusal_counts_until_its_event_is_gone() {
        let refusals = Refusals::default();
        assert!(refusals.note(&event("a", "m-1a2b3c4d", 20)));
        assert!(!refusals.note(&event("a", "m-1a2b3c4d", 20)), "nothing new");
        assert!(!refusals.note(&event("a", "m-1a2b3c4d", 10)), "an earlier one");
        assert_eq!(refusals.of("a").map(|refusal| refusal.message).as_deref(), Some("refused at 20"));
        refusals.forget(&event("a", "m-1a2b3c4d", 20));
        assert_eq!(refusals.of("a"), None);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let refusals = Refusals::default();
        for second in 0..MOST as i64 + 10 {
            refusals.note(&event(&second.to_string(), "m-1a2b3c4d", second));
        }
        assert_eq!(refusals.lock().len(), MOST);
        assert!(refusals.of("0").is_none() && refusals.of("20").is_some(), "the earliest go");
    }

    #[test]
    fn only_what_is_called_as_ours_asks_for_a_reconcile() {
        let of = |name: &str| deployment_of(&event("a", name, 1)).map(|reference| reference.name);
        assert_eq!(of("my-model-1a2b3c4d").as_deref(), Some("my-model"));
        assert_eq!((of("web"), of("web-frontend")), (None, None));
    }
}
