//! What a frontend tells of the certificate that it shows to clients.

use expertmesh_metrics::Registry;
use expertmesh_metrics::declare::Declare;
use prometheus::IntGauge;

#[derive(Clone)]
pub(crate) struct HttpsMetrics {
    not_before: IntGauge,
    not_after: IntGauge,
}

impl HttpsMetrics {
    pub(crate) fn new(registry: &Registry) -> Self {
        let declare = Declare(registry);
        Self {
            not_before: declare.gauge(
                "expertmesh_https_certificate_begin_timestamp_seconds",
                "From when on the certificate for clients is valid; 0 where clients speak HTTP.",
            ),
            not_after: declare.gauge(
                "expertmesh_https_certificate_end_timestamp_seconds",
                "Until when the certificate for clients is valid; 0 where clients speak HTTP.",
            ),
        }
    }

    /// The certificate that is shown from now on is valid between these, in seconds since 1970.
    pub(crate) fn shows(&self, (not_before, not_after): (u64, u64)) {
        let seconds = |seconds| i64::try_from(seconds).unwrap_or(i64::MAX);
        self.not_before.set(seconds(not_before));
        self.not_after.set(seconds(not_after));
    }
}
