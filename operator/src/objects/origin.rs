//! How pods come by their model: arguments, variables, volumes, and the claims of workers.

use k8s_openapi::api::apps::v1::StatefulSetPersistentVolumeClaimRetentionPolicy;
use k8s_openapi::api::core::v1::{
    EmptyDirVolumeSource, EnvVar, EnvVarSource, ImageVolumeSource, PersistentVolumeClaim,
    PersistentVolumeClaimSpec, PersistentVolumeClaimVolumeSource, PodSecurityContext, SecretKeySelector,
    Volume, VolumeMount, VolumeResourceRequirements,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::names::{COMMIT_KEY, Component};
use super::process::{PLACEMENT_FOLDER, Process, mount};
use crate::api::{Cache, Retain};
use crate::model::{ENDPOINT, MOUNTED, Origin};

/// The volume that weights are packed into, and where it is mounted.
const CACHE: &str = "cache";
const CACHE_FOLDER: &str = "/var/cache/expertmesh";
/// The volume that is the model.
const MODEL_VOLUME: &str = "model";
/// The group that may write into a claim's volume.
const GROUP: i64 = 65532;
/// What a frontend draws: tokenizer and templates.
const SMALL: &str = "2Gi";

/// Which model, and where to pack it.
pub(super) fn arguments(process: &Process) -> Vec<String> {
    let model = &process.deployment.model;
    let mut arguments = vec!["--model".into(), model.argument()];
    if has_cache(process) {
        arguments.extend(["--cache".into(), CACHE_FOLDER.into()]);
    }
    if model.is_floating() {
        arguments.extend(["--commit".into(), format!("{PLACEMENT_FOLDER}/{COMMIT_KEY}")]);
    }
    arguments
}

/// Which hub is asked, and by whom.
pub(super) fn environment(process: &Process) -> Vec<EnvVar> {
    let model = &process.deployment.model;
    let endpoint = model.endpoint.clone().map(|endpoint| EnvVar {
        name: ENDPOINT.into(),
        value: Some(endpoint),
        ..EnvVar::default()
    });
    let token = model.token.clone().map(|token| {
        let key = SecretKeySelector { name: token.name, key: token.key, optional: None };
        EnvVar {
            name: "HF_TOKEN".into(),
            value_from: Some(EnvVarSource { secret_key_ref: Some(key), ..EnvVarSource::default() }),
            ..EnvVar::default()
        }
    });
    endpoint.into_iter().chain(token).collect()
}

pub(super) fn mounts(process: &Process) -> Vec<VolumeMount> {
    let cache = has_cache(process).then(|| mount(CACHE, CACHE_FOLDER, false));
    let model = matches!(process.deployment.model.origin, Origin::Claim { .. } | Origin::Image(_));
    cache.into_iter().chain(model.then(|| mount(MODEL_VOLUME, MOUNTED, true))).collect()
}

pub(super) fn volumes(process: &Process) -> Vec<Volume> {
    let model = &process.deployment.model;
    let claimed = process.component == Component::Worker && model.cache.is_some();
    let cache = (has_cache(process) && !claimed).then(|| {
        let size_limit = (process.component == Component::Frontend).then(|| Quantity(SMALL.into()));
        let empty = EmptyDirVolumeSource { size_limit, ..EmptyDirVolumeSource::default() };
        Volume { name: CACHE.into(), empty_dir: Some(empty), ..Volume::default() }
    });
    let of = |volume: Volume| Volume { name: MODEL_VOLUME.into(), ..volume };
    let mounted = match &model.origin {
        Origin::Directory(_) | Origin::Hub(_) => None,
        Origin::Claim { name, .. } => {
            let claim = PersistentVolumeClaimVolumeSource { claim_name: name.clone(), read_only: Some(true) };
            Some(of(Volume { persistent_volume_claim: Some(claim), ..Volume::default() }))
        }
        Origin::Image(reference) => {
            let image = ImageVolumeSource {
                reference: Some(reference.clone()),
                pull_policy: Some("IfNotPresent".into()),
            };
            Some(of(Volume { image: Some(image), ..Volume::default() }))
        }
    };
    cache.into_iter().chain(mounted).collect()
}

/// Whose a claim's volume is: a fresh one is root's, whom no pod runs as.
pub(super) fn security(process: &Process) -> PodSecurityContext {
    let claimed = process.component == Component::Worker && process.deployment.model.cache.is_some();
    PodSecurityContext {
        fs_group: claimed.then_some(GROUP),
        fs_group_change_policy: claimed.then(|| "OnRootMismatch".into()),
        ..PodSecurityContext::default()
    }
}

/// The claim of each worker.
pub(super) fn claim(cache: &Cache) -> PersistentVolumeClaim {
    let requests = [("storage".to_string(), cache.size.clone())].into();
    PersistentVolumeClaim {
        metadata: ObjectMeta { name: Some(CACHE.into()), ..ObjectMeta::default() },
        spec: Some(PersistentVolumeClaimSpec {
            access_modes: Some(vec!["ReadWriteOnce".into()]),
            storage_class_name: cache.storage_class_name.clone(),
            resources: Some(VolumeResourceRequirements { requests: Some(requests), limits: None }),
            ..PersistentVolumeClaimSpec::default()
        }),
        ..PersistentVolumeClaim::default()
    }
}

/// Claims of workers that are scaled away stay for those that come back.
pub(super) fn retention(cache: &Cache) -> StatefulSetPersistentVolumeClaimRetentionPolicy {
    StatefulSetPersistentVolumeClaimRetentionPolicy {
        when_deleted: Some(cache.retain.as_str().into()),
        when_scaled: Some(Retain::Retain.as_str().into()),
    }
}

/// A frontend packs nothing, and draws what is small of a hub's model.
fn has_cache(process: &Process) -> bool {
    let model = &process.deployment.model;
    let is_worker = process.component == Component::Worker;
    matches!(model.origin, Origin::Hub(_)) || (is_worker && model.cache.is_some())
}
