//! What a process counts of the identities that it meets.

use expertmesh_metrics::Registry;
use expertmesh_metrics::declare::Declare;
use expertmesh_proto::trust::{Notice, Refusal};
use prometheus::{IntCounter, IntCounterVec};

#[derive(Clone)]
pub(crate) struct TrustMetrics {
    refused: IntCounterVec,
    expired: IntCounter,
}

impl TrustMetrics {
    pub(crate) fn new(registry: &Registry) -> Self {
        let declare = Declare(registry);
        let refused = declare.counters(
            "expertmesh_calls_refused_total",
            "Calls between parts that were refused: in plain text, nameless, unverified, or forbidden to that caller.",
            &["reason"],
        );
        for refusal in Refusal::ALL {
            refused.with_label_values(&[refusal.name()]);
        }
        let expired = declare.counter(
            "expertmesh_expired_certificates_total",
            "Connections with a certificate whose time is over: taken all the same, for the operator may be away.",
        );
        Self { refused, expired }
    }

    pub(crate) fn count(&self, notice: Notice) {
        match notice {
            Notice::Refused(refusal) => self.refused.with_label_values(&[refusal.name()]).inc(),
            Notice::Expired => self.expired.inc(),
        }
    }
}
