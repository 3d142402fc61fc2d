//! Who a process is to the others of its deployment, and whose calls it takes.

use expertmesh_model::fingerprint::ModelFingerprint;
use expertmesh_proto::incarnation::Incarnation;
use expertmesh_proto::slot::Slot;
use expertmesh_proto::trust::identity::Component;
use expertmesh_proto::trust::{Callee, Trust};
use expertmesh_proto::v1;
use tonic::Status;

/// A worker's process, as its messages name it.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) name: String,
    pub(crate) slot: Slot,
    pub(crate) incarnation: Incarnation,
    pub(crate) fingerprint: ModelFingerprint,
    /// By what others know that it is who it says; none where everybody is believed.
    pub(crate) trust: Option<Trust>,
}

impl Identity {
    /// The workers of the same deployment, where there are identities.
    pub(crate) fn peer(&self) -> Option<Callee> {
        self.trust.as_ref()?.sibling(Component::Worker)
    }

    pub(crate) fn caller(&self, attempt: u32) -> v1::Caller {
        v1::Caller {
            name: self.name.clone(),
            incarnation: self.incarnation.0,
            attempt,
            fingerprint: Some(fingerprint_message(&self.fingerprint)),
        }
    }

    /// Refuses a caller that computes with another model or other numerics. One without a fingerprint does not compute.
    pub(crate) fn admit(&self, caller: Option<&v1::Caller>) -> Result<(), Status> {
        let caller = caller.ok_or_else(|| Status::invalid_argument("caller: missing"))?;
        let Some(theirs) = &caller.fingerprint else { return Ok(()) };
        match self.fingerprint.difference(&fingerprint_of(theirs)) {
            None => Ok(()),
            Some(difference) => {
                let message =
                    format!("{} and {} do not serve the same model: {difference}", self.name, caller.name);
                Err(Status::failed_precondition(message))
            }
        }
    }

    /// Refuses a peer as [`Self::admit`] does, and one that does not say what it computes, too: its rows would become
    /// this worker's.
    pub(crate) fn admit_peer(&self, caller: Option<&v1::Caller>) -> Result<(), Status> {
        self.admit(caller)?;
        match caller.and_then(|caller| caller.fingerprint.as_ref()) {
            Some(_) => Ok(()),
            None => Err(Status::invalid_argument("caller.fingerprint: missing")),
        }
    }
}

pub(crate) fn fingerprint_message(fingerprint: &ModelFingerprint) -> v1::ModelFingerprint {
    let ModelFingerprint { architecture, weights, format, numerics } = fingerprint.clone();
    v1::ModelFingerprint { architecture, weights, format, numerics }
}

pub(crate) fn fingerprint_of(message: &v1::ModelFingerprint) -> ModelFingerprint {
    let v1::ModelFingerprint { architecture, weights, format, numerics } = message.clone();
    ModelFingerprint { architecture, weights, format, numerics }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(weights: &str) -> Identity {
        let part = |text: &str| text.to_string();
        let fingerprint = ModelFingerprint {
            architecture: part("a"),
            weights: part(weights),
            format: part("bf16"),
            numerics: part("f32"),
        };
        Identity {
            name: part("worker-0"),
            slot: Slot(0),
            incarnation: Incarnation(1),
            fingerprint,
            trust: None,
        }
    }

    #[test]
    fn another_model_is_refused_and_the_difference_named() {
        let us = identity("w1");
        us.admit(Some(&identity("w1").caller(0))).unwrap();
        us.admit(Some(&v1::Caller::default())).unwrap();
        let refused = us.admit(Some(&identity("w2").caller(0))).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
        assert!(refused.message().contains("weights"), "{}", refused.message());
        assert_eq!(us.admit(None).unwrap_err().code(), tonic::Code::InvalidArgument);
        us.admit_peer(Some(&identity("w1").caller(0))).unwrap();
        assert!(us.admit_peer(Some(&identity("w2").caller(0))).is_err());
        let silent = us.admit_peer(Some(&v1::Caller::default())).unwrap_err();
        assert_eq!(silent.code(), tonic::Code::InvalidArgument);
    }
}
