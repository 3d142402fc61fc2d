//! How one ModelDeployment is told from another.

use kube::ResourceExt;
use kube::core::DeserializeGuard;
use kube::runtime::reflector::ObjectRef;

use crate::api::ModelDeployment;

/// A ModelDeployment as it is watched: one that cannot be read does not end the watch of the others.
pub(crate) type Watched = DeserializeGuard<ModelDeployment>;

/// A ModelDeployment by namespace and name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl Key {
    pub(crate) fn of(object: &Watched) -> Self {
        Self { namespace: object.namespace().unwrap_or_default(), name: object.name_any() }
    }

    pub(crate) fn of_object(object: &ModelDeployment) -> Self {
        Self { namespace: object.namespace().unwrap_or_default(), name: object.name_any() }
    }

    /// What a reference names.
    pub(crate) fn named(reference: &ObjectRef<Watched>) -> Self {
        Self { namespace: reference.namespace.clone().unwrap_or_default(), name: reference.name.clone() }
    }

    /// What a controller's store and queue know it by.
    pub(crate) fn reference(&self) -> ObjectRef<Watched> {
        ObjectRef::new(&self.name).within(&self.namespace)
    }
}
