//! Every metric of the worker and of the frontend, declared once.

pub(crate) mod clients;
pub(crate) mod frontend;
pub(crate) mod https;
pub(crate) mod labels;
pub(crate) mod trust;
pub(crate) mod worker;

use expertmesh_metrics::Registry;

use self::clients::ClientMetrics;
use self::frontend::FrontendMetrics;
use self::https::HttpsMetrics;
use self::trust::TrustMetrics;
use self::worker::WorkerMetrics;

/// The worker's and the frontend's sections of `docs/metrics.md`.
pub(crate) fn sections() -> String {
    let (worker, frontend) = (Registry::new(), Registry::new());
    let _ = (WorkerMetrics::new(&worker), TrustMetrics::new(&worker));
    let _ = (FrontendMetrics::new(&frontend, ""), TrustMetrics::new(&frontend));
    let _ = HttpsMetrics::new(&frontend);
    ClientMetrics::new(&frontend).of("");
    worker.section("Worker") + &frontend.section("Frontend")
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_page_of_metrics_is_the_one_that_the_code_makes() {
        assert!(include_str!("../../docs/metrics.md").ends_with(&super::sections()), "run `make generated`");
    }
}
