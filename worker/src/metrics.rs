//! Every metric of the worker and of the frontend, declared once.

use std::time::Duration;

use expertmesh_metrics::Registry;
use prometheus::{
    Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, core::Collector,
};

/// Registers a collector. Two metrics of one name are a mistake of this file, which its test finds.
fn registered<C: Collector + Clone + 'static>(
    registry: &Registry,
    collector: Result<C, prometheus::Error>,
) -> C {
    let collector = collector.expect("a metric's name and labels are valid");
    registry.add(collector).expect("a metric's name is its own")
}

/// Their part of `docs/metrics.md`.
pub(crate) fn sections() -> String {
    let (worker, frontend) = (Registry::new(), Registry::new());
    let _ = (WorkerMetrics::new(&worker), FrontendMetrics::new(&frontend, ""));
    worker.section("Worker") + &frontend.section("Frontend")
}

/// From 0.1 ms to 26 s.
fn seconds(name: &str, help: &str) -> HistogramOpts {
    let buckets = (0..10).map(|step| 1e-4 * 4f64.powi(step)).collect();
    HistogramOpts::new(name, help).buckets(buckets)
}

/// vLLM's bounds of the time to the first token, in seconds, with more below 1 ms.
const FIRST_TOKEN: [f64; 25] = [
    0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0,
    7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
/// vLLM's bounds of the time per token, in seconds, with more below 10 ms.
const PER_TOKEN: [f64; 24] = [
    0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];

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
    pub(crate) expert_loads: IntCounterVec,
    pub(crate) expert_loaded_bytes: IntCounter,
    pub(crate) placement_epoch: IntGauge,
    pub(crate) peers: IntGauge,
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
        let sequences = counters(
            "expertmesh_worker_sequences_total",
            "Sequences that ended, by outcome: stop, length, move, cancelled, failed, refused.",
            &["outcome"],
        );
        // At zero before the first of a kind ends: a rate needs both ends of a step.
        for outcome in ["stop", "length", "move", "cancelled", "failed", "refused"] {
            sequences.with_label_values(&[outcome]);
        }
        let expert_loads = counters(
            "expertmesh_worker_expert_loads_total",
            "Experts loaded, by cause: the placement wants them here, or a row's owner elected this worker.",
            &["cause"],
        );
        for cause in ["placement", "elected"] {
            expert_loads.with_label_values(&[cause]);
        }
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
            sequences,
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
            expert_loads,
            expert_loaded_bytes: counter(
                "expertmesh_worker_expert_loaded_bytes_total",
                "Bytes of the experts loaded.",
            ),
            placement_epoch: gauge(
                "expertmesh_worker_placement_epoch",
                "Epoch of the placement that is followed.",
            ),
            peers: gauge("expertmesh_worker_peers", "Peers that the placement names."),
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

/// What a frontend exports.
#[derive(Clone)]
pub(crate) struct FrontendMetrics {
    first_token: Histogram,
    inter_token: Histogram,
    per_token: Histogram,
    requests: IntCounterVec,
    request_seconds: HistogramVec,
    prompt_tokens: IntCounter,
    generated_tokens: IntCounter,
    in_flight: IntGauge,
    resumes: IntCounterVec,
    errors: IntCounterVec,
    queue: IntGauge,
    eligible_workers: IntGauge,
}

/// Counted in a gauge until it is dropped.
pub(crate) struct Counted(IntGauge);

impl Counted {
    fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl FrontendMetrics {
    /// The latencies carry `model_name`, which dashboards made for vLLM select by.
    pub(crate) fn new(registry: &Registry, model: &str) -> Self {
        let gauge = |name: &str, help: &str| registered(registry, IntGauge::new(name, help));
        let counter = |name: &str, help: &str| registered(registry, IntCounter::new(name, help));
        let counters = |name: &str, help: &str, labels: &[&str]| {
            registered(registry, IntCounterVec::new(Opts::new(name, help), labels))
        };
        let latency = |name: &str, help: &str, bounds: &[f64]| {
            let options = HistogramOpts::new(name, help).buckets(bounds.to_vec());
            let family = registered(registry, HistogramVec::new(options, &["model_name"]));
            family.with_label_values(&[model])
        };
        let request = HistogramOpts::new(
            "expertmesh_frontend_request_duration_seconds",
            "From a request's arrival to the last byte of its answer.",
        );
        let request = request.buckets((0..12).map(|step| 1e-3 * 3f64.powi(step)).collect());
        Self {
            first_token: latency(
                "vllm:time_to_first_token_seconds",
                "From a request's arrival to the first token of each of its choices.",
                &FIRST_TOKEN,
            ),
            inter_token: latency(
                "vllm:inter_token_latency_seconds",
                "Between two tokens of a choice, where the client keeps up.",
                &PER_TOKEN,
            ),
            per_token: latency(
                "vllm:request_time_per_output_token_seconds",
                "The mean time between a choice's tokens, observed at its end.",
                &PER_TOKEN,
            ),
            requests: counters(
                "expertmesh_frontend_requests_total",
                "Requests answered, by endpoint and HTTP status; 499 where the client left.",
                &["endpoint", "code"],
            ),
            request_seconds: registered(registry, HistogramVec::new(request, &["endpoint"])),
            prompt_tokens: counter("expertmesh_frontend_prompt_tokens_total", "Tokens of accepted prompts."),
            generated_tokens: counter(
                "expertmesh_frontend_generated_tokens_total",
                "Tokens received from workers.",
            ),
            in_flight: gauge("expertmesh_frontend_requests_in_flight", "Requests that are being answered."),
            resumes: counters(
                "expertmesh_frontend_resumes_total",
                "Sequences that went on to another try, by what ended the one before.",
                &["reason"],
            ),
            errors: counters(
                "expertmesh_frontend_errors_total",
                "Requests that failed, also in mid-stream, by reason.",
                &["reason"],
            ),
            queue: gauge("expertmesh_frontend_queue_length", "Sequences that wait for a worker."),
            eligible_workers: gauge(
                "expertmesh_frontend_eligible_workers",
                "Workers that can take a sequence.",
            ),
        }
    }

    pub(crate) fn first_token(&self, since: Duration) {
        self.first_token.observe(since.as_secs_f64());
    }

    pub(crate) fn inter_token(&self, since: Duration) {
        self.inter_token.observe(since.as_secs_f64());
    }

    pub(crate) fn per_token(&self, mean: Duration) {
        self.per_token.observe(mean.as_secs_f64());
    }

    pub(crate) fn prompt_tokens(&self, count: usize) {
        self.prompt_tokens.inc_by(count as u64);
    }

    pub(crate) fn generated_token(&self) {
        self.generated_tokens.inc();
    }

    /// Both labels come from the source, not from the request.
    pub(crate) fn answered(&self, endpoint: &'static str, code: &str, took: Duration) {
        self.requests.with_label_values(&[endpoint, code]).inc();
        self.request_seconds.with_label_values(&[endpoint]).observe(took.as_secs_f64());
    }

    pub(crate) fn in_flight(&self) -> Counted {
        Counted::new(&self.in_flight)
    }

    pub(crate) fn resumed(&self, reason: &'static str) {
        self.resumes.with_label_values(&[reason]).inc();
    }

    pub(crate) fn failed(&self, reason: &'static str) {
        self.errors.with_label_values(&[reason]).inc();
    }

    pub(crate) fn queued(&self) -> Counted {
        Counted::new(&self.queue)
    }

    pub(crate) fn eligible_workers(&self, count: usize) {
        self.eligible_workers.set(count as i64);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_page_of_metrics_is_the_one_that_the_code_makes() {
        assert!(include_str!("../../docs/metrics.md").ends_with(&super::sections()), "run `make generated`");
    }
}
