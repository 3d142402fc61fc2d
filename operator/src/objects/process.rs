//! What the pods of a process are made from, whichever part of them is made.

use k8s_openapi::api::core::v1::VolumeMount;

use super::names::Component;
use crate::api::PodFields;
use crate::validate::ValidatedDeployment;

/// Where the ConfigMap of a revision is mounted: its placement, and its model's commit.
pub(super) const PLACEMENT_FOLDER: &str = "/etc/expertmesh";

/// What a pod of workers or of frontends is made from.
pub(crate) struct Process<'a> {
    pub(crate) component: Component,
    pub(crate) deployment: &'a ValidatedDeployment,
    pub(crate) fields: &'a PodFields,
    pub(crate) image: &'a str,
}

impl Process<'_> {
    /// The time to drain in whole seconds, rounded up.
    pub(super) fn drain_seconds(&self) -> u64 {
        self.deployment.desired.drain_timeout.as_millis().div_ceil(1000).try_into().unwrap_or(u64::MAX)
    }
}

/// A volume at a path in the container.
pub(super) fn mount(name: &str, path: &str, read_only: bool) -> VolumeMount {
    VolumeMount {
        name: name.into(),
        mount_path: path.into(),
        read_only: Some(read_only),
        ..VolumeMount::default()
    }
}
