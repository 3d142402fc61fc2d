//! Every metric of the worker and of the frontend, declared once.

use prometheus::{
    Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry,
    core::Collector,
};

/// Registers a collector. Two metrics of one name are a mistake of this file, which its test finds.
fn registered<C: Collector + Clone + 'static>(
    registry: &Registry,
    collector: Result<C, prometheus::Error>,
) -> C {
    let collector = collector.expect("a metric's name and labels are valid");
    registry.register(Box::new(collector.clone())).expect("a metric's name is its own");
    collector
}

/// From 0.1 ms to 26 s.
fn seconds(name: &str, help: &str) -> HistogramOpts {
    let buckets = (0..10).map(|step| 1e-4 * 4f64.powi(step)).collect();
    HistogramOpts::new(name, help).buckets(buckets)
}

/// What a worker exports. A peer's label is its slot, which bounds the series by the deployment's size.
pub(crate) struct WorkerMetrics {
    pub(crate) running: IntGauge,
    pub(crate) waiting: IntGauge,
    pub(crate) kv_usage: Gauge,
    pub(crate) prompt_tokens: IntCounter,
    pub(crate) generated_tokens: IntCounter,
    pub(crate) sequences: IntCounterVec,
    pub(crate) preemptions: IntCounter,
    pub(crate) step_seconds: Histogram,
    pub(crate) experts_resident: IntGauge,
    pub(crate) experts_resident_bytes: IntGauge,
    pub(crate) experts_missing: IntGauge,
    pub(crate) placement_epoch: IntGauge,
    pub(crate) peers_alive: IntGauge,
    pub(crate) rows_dispatched: IntCounterVec,
    pub(crate) rows_served: IntCounterVec,
    pub(crate) rows_rerouted: IntCounterVec,
    pub(crate) exchange_seconds: HistogramVec,
    pub(crate) peer_failures: IntCounterVec,
}

impl WorkerMetrics {
    pub(crate) fn new(registry: &Registry) -> Self {
        let gauge = |name: &str, help: &str| registered(registry, IntGauge::new(name, help));
        let counter = |name: &str, help: &str| registered(registry, IntCounter::new(name, help));
        let counters = |name: &str, help: &str, labels: &[&str]| {
            registered(registry, IntCounterVec::new(Opts::new(name, help), labels))
        };
        let step = seconds(
            "expertmesh_worker_step_seconds",
            "Time of one step: all layers of the rows in the batch.",
        );
        let exchange =
            seconds("expertmesh_worker_exchange_seconds", "From dispatching rows to a peer to its answer.");
        Self {
            running: gauge("vllm:num_requests_running", "Sequences in the batch."),
            waiting: gauge("vllm:num_requests_waiting", "Sequences that wait for a place in the batch."),
            kv_usage: registered(
                registry,
                Gauge::new("vllm:kv_cache_usage_perc", "Share of the latent cache's blocks in use, 0 to 1."),
            ),
            prompt_tokens: counter("expertmesh_worker_prompt_tokens_total", "Tokens prefilled."),
            generated_tokens: counter("expertmesh_worker_generated_tokens_total", "Tokens sampled."),
            sequences: counters(
                "expertmesh_worker_sequences_total",
                "Sequences that ended, by outcome: stop, length, move, cancelled, failed, refused.",
                &["outcome"],
            ),
            preemptions: counter(
                "expertmesh_worker_preemptions_total",
                "Sequences that gave their cache to an older one.",
            ),
            step_seconds: registered(registry, Histogram::with_opts(step)),
            experts_resident: gauge(
                "expertmesh_worker_experts_resident",
                "Pairs of layer and expert that are resident.",
            ),
            experts_resident_bytes: gauge(
                "expertmesh_worker_experts_resident_bytes",
                "Bytes of the resident experts.",
            ),
            experts_missing: gauge(
                "expertmesh_worker_experts_missing",
                "Pairs of layer and expert that the placement wants here and that are not resident yet.",
            ),
            placement_epoch: gauge(
                "expertmesh_worker_placement_epoch",
                "Epoch of the placement that is followed.",
            ),
            peers_alive: gauge("expertmesh_worker_peers_alive", "Peers whose stream is up."),
            rows_dispatched: counters(
                "expertmesh_worker_rows_dispatched_total",
                "Pairs of row and expert sent to a peer.",
                &["peer"],
            ),
            rows_served: counters(
                "expertmesh_worker_rows_served_total",
                "Pairs of row and expert computed for a peer.",
                &["peer"],
            ),
            rows_rerouted: counters(
                "expertmesh_worker_rows_rerouted_total",
                "Pairs of row and expert sent again, by what became of the first try.",
                &["reason"],
            ),
            exchange_seconds: registered(registry, HistogramVec::new(exchange, &["peer"])),
            peer_failures: counters(
                "expertmesh_worker_peer_failures_total",
                "Streams to a peer that ended, by reason: left, unavailable, silent, stuck, fenced, invalid, damaged.",
                &["peer", "reason"],
            ),
        }
    }
}
