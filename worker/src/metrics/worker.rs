//! The metrics of a worker, in groups by who changes them.

use std::time::Duration;

use expertmesh_metrics::Registry;
use expertmesh_metrics::declare::{Declare, geometric};
use expertmesh_proto::slot::Slot;
use prometheus::{Gauge, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge};

use super::labels::{LoadCause, PeerFailure, Reroute, SequenceOutcome};

/// Bounds of a step's and of an exchange's time, in seconds: 0.1 ms to 26 s.
fn seconds() -> Vec<f64> {
    geometric(1e-4, 4.0, 10)
}

/// A label's values, as a metric's help lists them.
fn listed<const N: usize>(names: [&str; N]) -> String {
    names.join(", ")
}

/// All metrics that a worker exports.
pub(crate) struct WorkerMetrics {
    pub(crate) engine: EngineMetrics,
    pub(crate) experts: ExpertMetrics,
    pub(crate) mesh: MeshMetrics,
}

impl WorkerMetrics {
    pub(crate) fn new(registry: &Registry) -> Self {
        let declare = Declare(registry);
        Self {
            engine: EngineMetrics::new(&declare),
            experts: ExpertMetrics::new(&declare),
            mesh: MeshMetrics::new(&declare),
        }
    }
}

/// What the engine's thread computes, and for which sequences.
pub(crate) struct EngineMetrics {
    pub(crate) running: IntGauge,
    pub(crate) waiting: IntGauge,
    pub(crate) kv_usage: Gauge,
    pub(crate) prompt_tokens: IntCounter,
    pub(crate) generated_tokens: IntCounter,
    pub(crate) preemptions: IntCounter,
    pub(crate) step_seconds: Histogram,
    sequences: IntCounterVec,
}

impl EngineMetrics {
    fn new(declare: &Declare<'_>) -> Self {
        Self {
            running: declare.gauge("vllm:num_requests_running", "Sequences in the batch."),
            waiting: declare
                .gauge("vllm:num_requests_waiting", "Sequences that wait for a place in the batch."),
            kv_usage: declare
                .share("vllm:kv_cache_usage_perc", "Share of the latent cache's blocks in use, 0 to 1."),
            prompt_tokens: declare.counter("expertmesh_worker_prompt_tokens_total", "Tokens prefilled."),
            generated_tokens: declare.counter("expertmesh_worker_generated_tokens_total", "Tokens sampled."),
            preemptions: declare.counter(
                "expertmesh_worker_preemptions_total",
                "Sequences that gave their cache to an older one.",
            ),
            step_seconds: declare.histogram(
                "expertmesh_worker_step_seconds",
                "Time of one step: all layers of the rows in the batch.",
                &seconds(),
            ),
            sequences: sequences(declare),
        }
    }

    pub(crate) fn ended(&self, outcome: SequenceOutcome) {
        self.sequences.with_label_values(&[outcome.name()]).inc();
    }
}

/// Each outcome has a series before the first sequence of its kind ends: a rate needs both ends of a step.
fn sequences(declare: &Declare<'_>) -> IntCounterVec {
    let outcomes = SequenceOutcome::ALL.map(SequenceOutcome::name);
    let help = format!("Sequences that ended, by outcome: {}.", listed(outcomes));
    let sequences = declare.counters("expertmesh_worker_sequences_total", &help, &["outcome"]);
    for outcome in outcomes {
        sequences.with_label_values(&[outcome]);
    }
    sequences
}

/// Which experts are in this worker's memory, and why they were loaded.
pub(crate) struct ExpertMetrics {
    pub(crate) resident: IntGauge,
    pub(crate) resident_bytes: IntGauge,
    pub(crate) missing: IntGauge,
    pub(crate) drawn: IntCounter,
    pub(crate) fetched: IntCounter,
    loads: IntCounterVec,
    loaded_bytes: IntCounter,
}

impl ExpertMetrics {
    fn new(declare: &Declare<'_>) -> Self {
        let loads = declare.counters(
            "expertmesh_worker_expert_loads_total",
            "Experts loaded, by cause: the placement wants them here, a row's owner elected this worker, or a peer that holds them leaves.",
            &["cause"],
        );
        for cause in LoadCause::ALL {
            loads.with_label_values(&[cause.name()]);
        }
        Self {
            resident: declare
                .gauge("expertmesh_worker_experts_resident", "Pairs of layer and expert that are resident."),
            resident_bytes: declare
                .gauge("expertmesh_worker_experts_resident_bytes", "Bytes of the resident experts."),
            missing: declare.gauge(
                "expertmesh_worker_experts_missing",
                "Pairs of layer and expert that the placement wants here and that are not resident yet.",
            ),
            drawn: declare.counter(
                "expertmesh_worker_drawn_bytes_total",
                "Bytes of weights drawn from where the model is, headers of files included; 0 where all is in the cache.",
            ),
            fetched: declare.counter(
                "expertmesh_worker_fetched_bytes_total",
                "Bytes of packed weights that other workers gave from their caches.",
            ),
            loads,
            loaded_bytes: declare
                .counter("expertmesh_worker_expert_loaded_bytes_total", "Bytes of the experts loaded."),
        }
    }

    pub(crate) fn loaded(&self, cause: LoadCause, bytes: u64) {
        self.loads.with_label_values(&[cause.name()]).inc();
        self.loaded_bytes.inc_by(bytes);
    }
}

/// What travels between this worker and its peers. A peer's label is its slot, which bounds the series by the
/// deployment's size; a pair is a row and one expert of it.
pub(crate) struct MeshMetrics {
    pub(crate) placement_epoch: IntGauge,
    pub(crate) peers: IntGauge,
    pub(crate) peers_alive: IntGauge,
    pub(crate) doubted: IntGauge,
    dispatched: IntCounterVec,
    served: IntCounterVec,
    rerouted: IntCounterVec,
    exchange_seconds: HistogramVec,
    failures: IntCounterVec,
}

impl MeshMetrics {
    fn new(declare: &Declare<'_>) -> Self {
        let failures = listed(PeerFailure::OF_STREAMS.map(PeerFailure::name));
        Self {
            placement_epoch: declare
                .gauge("expertmesh_worker_placement_epoch", "Epoch of the placement that is followed."),
            peers: declare.gauge("expertmesh_worker_peers", "Peers that the placement names."),
            peers_alive: declare.gauge("expertmesh_worker_peers_alive", "Peers whose stream is up."),
            doubted: declare.gauge(
                "expertmesh_worker_weights_doubted",
                "Workers, this one included, whose copy of the weights differs from another's and is not believed.",
            ),
            dispatched: declare.counters(
                "expertmesh_worker_rows_dispatched_total",
                "Pairs of row and expert sent to a peer.",
                &["peer"],
            ),
            served: declare.counters(
                "expertmesh_worker_rows_served_total",
                "Pairs of row and expert computed for a peer.",
                &["peer"],
            ),
            rerouted: declare.counters(
                "expertmesh_worker_rows_rerouted_total",
                "Pairs of row and expert sent again, by what became of the first try.",
                &["reason"],
            ),
            exchange_seconds: declare.histograms(
                "expertmesh_worker_exchange_seconds",
                "From dispatching rows to a peer to its answer.",
                "peer",
                &seconds(),
            ),
            failures: declare.counters(
                "expertmesh_worker_peer_failures_total",
                &format!("Streams to a peer that ended, by reason: {failures}."),
                &["peer", "reason"],
            ),
        }
    }

    pub(crate) fn dispatched(&self, slot: Slot, pairs: u64) {
        self.dispatched.with_label_values(&[&slot.to_string()]).inc_by(pairs);
    }

    pub(crate) fn served(&self, slot: Slot, pairs: u64) {
        self.served.with_label_values(&[&slot.to_string()]).inc_by(pairs);
    }

    pub(crate) fn rerouted(&self, reason: Reroute, pairs: u64) {
        self.rerouted.with_label_values(&[reason.name()]).inc_by(pairs);
    }

    pub(crate) fn answered(&self, slot: Slot, took: Duration) {
        self.exchange_seconds.with_label_values(&[&slot.to_string()]).observe(took.as_secs_f64());
    }

    pub(crate) fn failed(&self, slot: Slot, failure: PeerFailure) {
        self.failures.with_label_values(&[&slot.to_string(), failure.name()]).inc();
    }
}
