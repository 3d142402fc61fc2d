//! Who we are to others, and whom we let in.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use expertmesh_engine::ModelFingerprint;
use expertmesh_proto::v1;
use tonic::Status;

/// This process, as every message names it.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) name: String,
    pub(crate) slot: u32,
    pub(crate) incarnation: u64,
    pub(crate) fingerprint: ModelFingerprint,
}

impl Identity {
    pub(crate) fn caller(&self, attempt: u32) -> v1::Caller {
        v1::Caller {
            name: self.name.clone(),
            incarnation: self.incarnation,
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

    /// Refuses a peer that does not say what it computes, too: its rows would become ours.
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

/// The latest incarnation seen of every slot: a twin that wakes up late is fenced.
#[derive(Debug, Default)]
pub(crate) struct Fence(Mutex<BTreeMap<u32, u64>>);

impl Fence {
    pub(crate) fn admit(&self, slot: u32, incarnation: u64) -> Result<(), Status> {
        let mut latest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = latest.entry(slot).or_insert(incarnation);
        if incarnation < *known {
            let message = format!("slot {slot} has a later incarnation, {known}; {incarnation} is fenced");
            return Err(Status::failed_precondition(message));
        }
        *known = incarnation;
        Ok(())
    }
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
        Identity { name: part("worker-0"), slot: 0, incarnation: 1, fingerprint }
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

    #[test]
    fn a_twin_that_wakes_up_late_is_fenced() {
        let fence = Fence::default();
        fence.admit(3, 20).unwrap();
        fence.admit(3, 20).unwrap();
        assert!(fence.admit(3, 19).is_err());
        fence.admit(2, 19).unwrap();
        fence.admit(3, 21).unwrap();
        assert!(fence.admit(3, 20).is_err());
    }
}
