//! What this process knows of the objects that it writes: whose they are, what it wrote last, and who else writes them. Losing it costs
//! requests, not correctness.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ManagedFieldsEntry, ObjectMeta, OwnerReference};
use kube::{Resource, ResourceExt};
use sha2::{Digest, Sha256};

use crate::api::ModelDeployment;
use crate::key::Key;
use crate::objects::Object;
use crate::objects::names::{EXPERTMESH, INSTANCE, MANAGED_BY};

/// How often in a row somebody must have undone what was written before it is called a conflict.
const CONFLICT: u32 = 3;
/// How long without that until it is over.
const PEACE: Duration = Duration::from_secs(600);
/// How often an object is written that somebody else writes, too; and one of which no watch tells.
const PACE: Duration = Duration::from_secs(60);

/// Whose an object is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Whose {
    Ours,
    /// Ours, and owned by nobody or by what is not the deployment.
    Lost,
    /// In words.
    Others(String),
}

/// An object is a deployment's where a ModelDeployment of its name owns it, perhaps one before this one; or where it has the deployment's
/// labels and no owner, or one that adopted it: a restore from a backup leaves such.
pub(crate) fn whose(metadata: &ObjectMeta, key: &Key, owner: &OwnerReference) -> Whose {
    let references = metadata.owner_references.iter().flatten();
    let controller = references.clone().find(|reference| reference.controller == Some(true));
    let is = |label, value: &str| {
        metadata.labels.as_ref().and_then(|labels| labels.get(label)).is_some_and(|found| found == value)
    };
    let is_labelled = is(MANAGED_BY, EXPERTMESH) && is(INSTANCE, &key.name);
    let is_model = |reference: &OwnerReference| reference.kind == ModelDeployment::kind(&());
    let is_of_this = |reference: &OwnerReference| is_model(reference) && reference.name == key.name;
    match controller {
        Some(controller) if controller.uid == owner.uid => Whose::Ours,
        Some(controller) if is_of_this(controller) => Whose::Lost,
        Some(controller) if is_model(controller) || !is_labelled => {
            Whose::Others(format!("{} {} owns it", controller.kind, controller.name))
        }
        None if !is_labelled && !references.clone().any(is_of_this) => Whose::Others(holder(metadata)),
        Some(_) | None => Whose::Lost,
    }
}

/// Who made an object that nobody owns, as far as it tells.
fn holder(metadata: &ObjectMeta) -> String {
    if let Some(manager) = metadata.labels.as_ref().and_then(|labels| labels.get(MANAGED_BY)) {
        return format!("{manager} manages it");
    }
    match other_writer(metadata) {
        Some(writer) => format!("{writer} wrote it"),
        None => "nobody owns it".into(),
    }
}

/// The last writer of an object's fields, other than this operator, by its field manager.
pub(crate) fn other_writer(metadata: &ObjectMeta) -> Option<String> {
    let entries = metadata.managed_fields.iter().flatten();
    let others = entries.filter(|entry| entry.subresource.is_none() && !is_ours(entry));
    let last = others.max_by_key(|entry| entry.time.as_ref().map(|time| time.0))?;
    last.manager.clone()
}

fn is_ours(entry: &ManagedFieldsEntry) -> bool {
    entry.manager.as_deref() == Some(EXPERTMESH)
}

/// When what we apply was last brought about, by the API server's clock: a repetition that changes nothing does not count.
fn brought_about(metadata: &ObjectMeta) -> Option<Timestamp> {
    let mut entries = metadata.managed_fields.iter().flatten();
    let ours = entries.find(|entry| {
        is_ours(entry) && entry.operation.as_deref() == Some("Apply") && entry.subresource.is_none()
    })?;
    ours.time.as_ref().map(|time| time.0)
}

/// An object, among those of a deployment.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Named {
    kind: String,
    name: String,
}

impl Named {
    pub(crate) fn new<K: Object>(name: &str) -> Self {
        Self { kind: K::kind(&()).into_owned(), name: name.into() }
    }

    fn conflict(&self, undone: &Undone) -> Conflict {
        Conflict { kind: self.kind.clone(), name: self.name.clone(), by: undone.by.clone() }
    }
}

/// SHA-256 of an object as it is to be applied.
type Content = [u8; 32];

pub(crate) fn content<K: Object>(object: &K) -> Content {
    Sha256::digest(serde_json::to_vec(object).unwrap_or_default()).into()
}

/// An object that is there and ours.
#[derive(Debug)]
struct Known {
    uid: String,
    applied: Option<Applied>,
    undone: Undone,
}

/// The objects of one deployment.
#[derive(Debug, Default)]
struct Objects {
    known: BTreeMap<Named, Known>,
    /// The version that was read, or that the watch showed last: it may show an object before the answer to its writer comes.
    shown: BTreeMap<Named, String>,
}

impl Objects {
    /// Whether an object was shown as it was written, and nothing since.
    fn is_unchanged(&self, named: &Named, applied: &Applied) -> bool {
        applied.resource_version.is_some() && applied.resource_version.as_ref() == self.shown.get(named)
    }
}

/// What was last applied.
#[derive(Debug, Clone)]
struct Applied {
    content: Content,
    at: Instant,
    resource_version: Option<String>,
    brought_about: Option<Timestamp>,
    generation: Option<i64>,
}

impl Applied {
    /// Whether somebody had changed what was applied, so that to apply it once more changed it back. Times are to the second; a
    /// generation, where there is one, has grown by their change and by ours.
    fn was_undone_before(&self, again: &Self) -> bool {
        let grown = again.generation.zip(self.generation).map_or(0, |(now, before)| now - before);
        self.brought_about != again.brought_about || grown >= 2
    }
}

/// How often somebody undid what was written.
#[derive(Debug, Default, Clone)]
struct Undone {
    times: u32,
    last: Option<Instant>,
    by: Option<String>,
}

/// Whether what was written had been undone since the last time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Undoing {
    None,
    Once,
    /// As often by now as makes it a conflict.
    Conflict(Conflict),
}

/// Somebody else who writes what this operator writes, again and again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Conflict {
    pub(crate) kind: String,
    pub(crate) name: String,
    pub(crate) by: Option<String>,
}

impl std::fmt::Display for Conflict {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let Self { kind, name, by } = self;
        match by {
            Some(by) => write!(
                f,
                "{kind} {name} is changed back again and again by {by}; let only one of the two write it"
            ),
            None => write!(
                f,
                "{kind} {name} is changed back again and again under the name of this operator; does an operator of an earlier release watch this namespace, too?"
            ),
        }
    }
}

/// What is to be done about an object that should have a content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    Write,
    /// The same, and look first who changed it: somebody has before.
    LookAndWrite,
    Leave,
}

/// The objects of all deployments.
#[derive(Debug, Default)]
pub(crate) struct Written(Mutex<HashMap<Key, Objects>>);

impl Written {
    /// The uid of an object that is known to be there, and ours.
    pub(crate) fn uid(&self, key: &Key, named: &Named) -> Option<String> {
        self.lock().get(key)?.known.get(named).map(|known| known.uid.clone())
    }

    /// An object was read, and is ours.
    pub(crate) fn claimed(&self, key: &Key, named: Named, uid: String, version: Option<String>) {
        let known = Known { uid, applied: None, undone: Undone::default() };
        let mut all = self.lock();
        let objects = all.entry(key.clone()).or_default();
        version.and_then(|version| objects.shown.insert(named.clone(), version));
        objects.known.insert(named, known);
    }

    /// What was seen of an object is not so any more, or it was deleted.
    pub(crate) fn forget(&self, key: &Key, named: &Named) {
        if let Some(objects) = self.lock().get_mut(key) {
            objects.known.remove(named);
            objects.shown.remove(named);
        }
    }

    /// A deployment is gone.
    pub(crate) fn forget_all(&self, key: &Key) {
        self.lock().remove(key);
    }

    pub(crate) fn turn(&self, key: &Key, named: &Named, content: &Content, now: Instant) -> Turn {
        let all = self.lock();
        let Some(objects) = all.get(key) else { return Turn::Write };
        let Some(known) = objects.known.get(named) else { return Turn::Write };
        let Some(applied) = known.applied.as_ref().filter(|applied| applied.content == *content) else {
            return Turn::Write;
        };
        let is_fresh = now.duration_since(applied.at) < PACE;
        let leave = objects.is_unchanged(named, applied)
            || (is_fresh && (!is_watched(named) || known.undone.is_conflict(now)));
        match (leave, known.undone.times) {
            (true, _) => Turn::Leave,
            (false, 0) => Turn::Write,
            (false, _) => Turn::LookAndWrite,
        }
    }

    /// Remembers what was applied, how the API server has it since, and where somebody had undone the same content, by whom.
    pub(crate) fn wrote(
        &self,
        key: &Key,
        named: Named,
        (content, metadata): (Content, &ObjectMeta),
        by: Option<String>,
        now: Instant,
    ) -> Undoing {
        let Some(uid) = metadata.uid.clone() else { return Undoing::None };
        let applied = Applied {
            content,
            at: now,
            resource_version: metadata.resource_version.clone(),
            brought_about: brought_about(metadata),
            generation: metadata.generation,
        };
        let mut all = self.lock();
        let objects = all.entry(key.clone()).or_default();
        let before = objects.known.remove(&named).filter(|known| known.uid == uid);
        let (earlier, mut undone) =
            before.map_or_else(Default::default, |known| (known.applied, known.undone));
        let same = earlier.filter(|earlier| earlier.content == content);
        let was_undone = same.is_some_and(|same| same.was_undone_before(&applied));
        let was_conflict = undone.is_conflict(now);
        if was_undone {
            undone.again(by, now);
        }
        let undoing = match was_undone {
            true if undone.is_conflict(now) && !was_conflict => Undoing::Conflict(named.conflict(&undone)),
            true => Undoing::Once,
            false => Undoing::None,
        };
        objects.known.insert(named, Known { uid, applied: Some(applied), undone });
        undoing
    }

    /// A watch shows an object, or that it is gone.
    pub(crate) fn saw<K: Object>(&self, object: &K) {
        let metadata = object.meta();
        let (Some(instance), Some(namespace)) = (object.labels().get(INSTANCE), &metadata.namespace) else {
            return;
        };
        let (key, named) = (
            Key { namespace: namespace.clone(), name: instance.clone() },
            Named::new::<K>(&object.name_any()),
        );
        if let (Some(objects), Some(version)) = (self.lock().get_mut(&key), &metadata.resource_version) {
            objects.shown.insert(named, version.clone());
        }
    }

    /// A conflict about one of the deployment's objects.
    pub(crate) fn conflict(&self, key: &Key, now: Instant) -> Option<Conflict> {
        let all = self.lock();
        let mut conflicts = all.get(key)?.known.iter().filter(|(_, known)| known.undone.is_conflict(now));
        conflicts.next().map(|(named, known)| named.conflict(&known.undone))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Objects>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a watch tells of changes of its kind.
fn is_watched(named: &Named) -> bool {
    !["ServiceAccount", "ControllerRevision"].contains(&named.kind.as_str())
}

impl Undone {
    fn again(&mut self, by: Option<String>, now: Instant) {
        if self.is_over(now) {
            self.times = 0;
        }
        self.times = self.times.saturating_add(1);
        (self.last, self.by) = (Some(now), by);
    }

    fn is_over(&self, now: Instant) -> bool {
        self.last.is_none_or(|last| now.duration_since(last) > PEACE)
    }

    fn is_conflict(&self, now: Instant) -> bool {
        self.times >= CONFLICT && !self.is_over(now)
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Service;
    use serde_json::{Value, json};

    use super::*;

    fn metadata(metadata: Value) -> ObjectMeta {
        serde_json::from_value(metadata).unwrap()
    }

    fn owner(kind: &str, name: &str, uid: &str) -> Value {
        json!([{"apiVersion": "v1", "kind": kind, "name": name, "uid": uid, "controller": true}])
    }

    #[test]
    fn an_object_is_ours_by_its_owner_or_by_labels_that_nobody_elses_owner_contradicts() {
        let key = Key { namespace: "ns".into(), name: "m".into() };
        let reference: OwnerReference =
            serde_json::from_value(owner("ModelDeployment", "m", "now")[0].clone()).unwrap();
        let whose = |object: Value| whose(&metadata(object), &key, &reference);
        let labels = |of: &str| json!({MANAGED_BY: EXPERTMESH, INSTANCE: of});
        let others = |why: &str| Whose::Others(why.into());
        assert_eq!(whose(json!({"ownerReferences": owner("ModelDeployment", "m", "now")})), Whose::Ours);
        assert_eq!(whose(json!({"ownerReferences": owner("ModelDeployment", "m", "earlier")})), Whose::Lost);
        assert_eq!(whose(json!({"labels": labels("m")})), Whose::Lost, "restored without its owner");
        let adopted = json!({"labels": labels("m"), "ownerReferences": owner("StatefulSet", "m-1", "s")});
        assert_eq!(whose(adopted), Whose::Lost);
        assert_eq!(whose(json!({"labels": labels("n")})), others("expertmesh manages it"));
        let of_another = json!({"labels": labels("m-workers"), "ownerReferences": owner("ModelDeployment", "m-workers", "x")});
        assert_eq!(whose(of_another), others("ModelDeployment m-workers owns it"));
        assert_eq!(
            whose(json!({"ownerReferences": owner("Gateway", "m", "x")})),
            others("Gateway m owns it")
        );
        assert_eq!(whose(json!({"labels": {MANAGED_BY: "Helm"}})), others("Helm manages it"));
        let fields =
            json!([{"manager": "kubectl-create", "operation": "Update", "time": "2026-01-01T00:00:00Z"}]);
        assert_eq!(whose(json!({"managedFields": fields})), others("kubectl-create wrote it"));
        assert_eq!(whose(json!({})), others("nobody owns it"));
    }

    struct Scene {
        written: Written,
        key: Key,
        named: Named,
        now: Instant,
        second: u32,
        version: u32,
        /// Who undoes what was written.
        by: Option<String>,
    }

    impl Scene {
        fn new() -> Self {
            let key = Key { namespace: "ns".into(), name: "m".into() };
            let (written, named) = (Written::default(), Named::new::<Service>("m-workers"));
            let by = Some("kubectl-edit".into());
            Self { written, key, named, now: Instant::now(), second: 0, version: 0, by }
        }

        /// Writes a content; where `undone`, the API server has to change something for it.
        fn write(&mut self, content: u8, undone: bool) {
            self.second += u32::from(undone);
            self.version += u32::from(undone);
            let fields = json!([{"manager": EXPERTMESH, "operation": "Apply", "time": format!("2026-01-01T00:00:{:02}Z", self.second)}]);
            let written = metadata(
                json!({"uid": "u", "resourceVersion": self.version.to_string(), "managedFields": fields}),
            );
            self.written.wrote(
                &self.key,
                self.named.clone(),
                ([content; 32], &written),
                self.by.clone(),
                self.now,
            );
        }

        fn see(&self, version: u32) {
            let object = json!({"metadata": {"name": "m-workers", "namespace": "ns", "uid": "u",
                "labels": {INSTANCE: "m"}, "resourceVersion": version.to_string()}});
            self.written.saw::<Service>(&serde_json::from_value(object).unwrap());
        }

        fn turn(&self, content: u8) -> Turn {
            self.written.turn(&self.key, &self.named, &[content; 32], self.now)
        }
    }

    #[test]
    fn what_the_watch_shows_as_it_was_written_is_not_written_again() {
        let mut scene = Scene::new();
        assert_eq!(scene.turn(1), Turn::Write);
        scene.write(1, true);
        assert_eq!(scene.turn(1), Turn::Write, "the watch has not shown it yet");
        scene.see(1);
        assert_eq!((scene.turn(1), scene.turn(2)), (Turn::Leave, Turn::Write));
        scene.see(2);
        assert_eq!(scene.turn(1), Turn::Write, "somebody changed it");
        scene.version = 2;
        scene.write(1, false);
        assert_eq!(scene.turn(1), Turn::Leave, "nothing of ours, and nothing since");
        scene.written.forget(&scene.key, &scene.named);
        assert_eq!(scene.turn(1), Turn::Write);
    }

    #[test]
    fn what_the_watch_shows_before_the_answer_comes_is_not_written_again() {
        let mut scene = Scene::new();
        let other = Named::new::<Service>("m");
        scene.written.claimed(&scene.key, other, "v".into(), None); // something of the deployment is known
        scene.see(1);
        scene.write(1, true);
        assert_eq!(scene.turn(1), Turn::Leave);
    }

    #[test]
    fn who_undoes_it_again_and_again_is_named_and_answered_once_a_minute() {
        let mut scene = Scene::new();
        scene.write(1, true);
        for times in 1..=3 {
            assert_eq!(scene.written.conflict(&scene.key, scene.now), None, "{times}");
            scene.see(100 + times);
            scene.write(1, true);
        }
        let conflict = scene.written.conflict(&scene.key, scene.now).unwrap().to_string();
        assert_eq!(
            conflict,
            "Service m-workers is changed back again and again by kubectl-edit; let only one of the two write it"
        );
        scene.see(200);
        assert_eq!(scene.turn(1), Turn::Leave, "within a minute");
        assert_eq!(scene.turn(2), Turn::Write, "what is new is written at once");
        scene.now += PACE;
        assert_eq!(scene.turn(1), Turn::LookAndWrite);
        scene.write(1, false);
        scene.now += PEACE + PACE;
        assert_eq!(scene.written.conflict(&scene.key, scene.now), None, "it is over");
    }

    #[test]
    fn who_undoes_it_under_our_own_name_is_taken_for_an_operator_that_knows_no_lease() {
        let mut scene = Scene { by: None, ..Scene::new() };
        for times in 0..4 {
            scene.see(100 + times);
            scene.write(1, true);
        }
        let conflict = scene.written.conflict(&scene.key, scene.now).unwrap().to_string();
        assert!(
            conflict.ends_with("does an operator of an earlier release watch this namespace, too?"),
            "{conflict}"
        );
    }

    #[test]
    fn our_own_changes_are_nobodys_conflict() {
        let mut scene = Scene::new();
        for content in 1..9 {
            scene.write(content, true);
            scene.write(content, false);
        }
        assert_eq!(scene.written.conflict(&scene.key, scene.now), None);
    }
}
