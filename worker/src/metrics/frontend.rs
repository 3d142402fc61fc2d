//! The metrics of a frontend, in groups by what they tell.

use std::time::Duration;

use expertmesh_metrics::Registry;
use expertmesh_metrics::declare::{Declare, geometric};
use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge};

use super::labels::{ConnectionEnd, Endpoint, RequestFailure, SetbackCause};

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

/// All metrics that a frontend exports; clones share them.
#[derive(Clone)]
pub(crate) struct FrontendMetrics {
    latencies: Latencies,
    requests: Requests,
    sequences: Sequences,
}

impl FrontendMetrics {
    /// The latencies carry `model_name`, which dashboards made for vLLM select by.
    pub(crate) fn new(registry: &Registry, model: &str) -> Self {
        let declare = Declare(registry);
        Self {
            latencies: Latencies::new(&declare, model),
            requests: Requests::new(&declare),
            sequences: Sequences::new(&declare),
        }
    }

    pub(crate) fn first_token(&self, since: Duration) {
        self.latencies.first_token.observe(since.as_secs_f64());
    }

    pub(crate) fn inter_token(&self, since: Duration) {
        self.latencies.inter_token.observe(since.as_secs_f64());
    }

    pub(crate) fn per_token(&self, mean: Duration) {
        self.latencies.per_token.observe(mean.as_secs_f64());
    }

    pub(crate) fn prompt_tokens(&self, count: usize) {
        self.sequences.prompt_tokens.inc_by(count as u64);
    }

    pub(crate) fn generated_token(&self) {
        self.sequences.generated_tokens.inc();
    }

    /// Counts an answer with the HTTP status `code`.
    pub(crate) fn answered(&self, endpoint: Endpoint, code: u16, took: Duration) {
        self.requests.answered.with_label_values(&[endpoint.name(), &code.to_string()]).inc();
        self.requests.seconds.with_label_values(&[endpoint.name()]).observe(took.as_secs_f64());
    }

    pub(crate) fn in_flight(&self) -> Counted {
        Counted::new(&self.requests.in_flight)
    }

    /// A connection that is open, until the result is dropped.
    pub(crate) fn connection(&self) -> Counted {
        Counted::new(&self.requests.connections)
    }

    pub(crate) fn connection_ended(&self, end: ConnectionEnd) {
        self.requests.connections_ended.with_label_values(&[end.name()]).inc();
    }

    pub(crate) fn resumed(&self, cause: SetbackCause) {
        self.sequences.resumes.with_label_values(&[cause.name()]).inc();
    }

    pub(crate) fn failed(&self, failure: RequestFailure) {
        self.requests.errors.with_label_values(&[failure.name()]).inc();
    }

    pub(crate) fn queued(&self) -> Counted {
        Counted::new(&self.sequences.queue)
    }

    /// A worker said nothing any more; its sequences go on elsewhere.
    pub(crate) fn silent(&self) {
        self.sequences.silences.inc();
    }

    pub(crate) fn eligible_workers(&self, count: usize) {
        self.sequences.eligible_workers.set(count as i64);
    }
}

/// A place in a gauge, given back when it is dropped.
#[derive(Debug)]
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

/// When tokens came, under the names that vLLM gives them.
#[derive(Clone)]
struct Latencies {
    first_token: Histogram,
    inter_token: Histogram,
    per_token: Histogram,
}

impl Latencies {
    fn new(declare: &Declare<'_>, model: &str) -> Self {
        let latency = |name: &str, help: &str, bounds: &[f64]| {
            declare.histograms(name, help, "model_name", bounds).with_label_values(&[model])
        };
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
        }
    }
}

/// What became of clients' requests.
#[derive(Clone)]
struct Requests {
    answered: IntCounterVec,
    seconds: HistogramVec,
    in_flight: IntGauge,
    errors: IntCounterVec,
    connections: IntGauge,
    connections_ended: IntCounterVec,
}

impl Requests {
    fn new(declare: &Declare<'_>) -> Self {
        Self {
            answered: declare.counters(
                "expertmesh_frontend_requests_total",
                "Requests answered, by endpoint and HTTP status; 499 where the client left.",
                &["endpoint", "code"],
            ),
            seconds: declare.histograms(
                "expertmesh_frontend_request_duration_seconds",
                "From a request's arrival to the last byte of its answer.",
                "endpoint",
                &geometric(1e-3, 3.0, 12),
            ),
            in_flight: declare
                .gauge("expertmesh_frontend_requests_in_flight", "Requests that are being answered."),
            connections: declare
                .gauge("expertmesh_frontend_connections", "Connections of clients that are open."),
            connections_ended: declare.counters(
                "expertmesh_frontend_connections_ended_total",
                "Connections that the frontend ended, by why: idle where room was needed, silent, unread, share of the address.",
                &["cause"],
            ),
            errors: declare.counters(
                "expertmesh_frontend_errors_total",
                "Requests that failed, also in mid-stream, by reason.",
                &["reason"],
            ),
        }
    }
}

/// What became of the sequences that requests ask workers for.
#[derive(Clone)]
struct Sequences {
    prompt_tokens: IntCounter,
    generated_tokens: IntCounter,
    resumes: IntCounterVec,
    queue: IntGauge,
    eligible_workers: IntGauge,
    silences: IntCounter,
}

impl Sequences {
    fn new(declare: &Declare<'_>) -> Self {
        Self {
            prompt_tokens: declare
                .counter("expertmesh_frontend_prompt_tokens_total", "Tokens of accepted prompts."),
            generated_tokens: declare
                .counter("expertmesh_frontend_generated_tokens_total", "Tokens received from workers."),
            resumes: declare.counters(
                "expertmesh_frontend_resumes_total",
                "Sequences that went on to another try, by what ended the one before.",
                &["reason"],
            ),
            queue: declare.gauge("expertmesh_frontend_queue_length", "Sequences that wait for a worker."),
            silences: declare.counter(
                "expertmesh_frontend_worker_silences_total",
                "Workers that said nothing for 600 ms: frozen, cut off, or gone without a word.",
            ),
            eligible_workers: declare
                .gauge("expertmesh_frontend_eligible_workers", "Workers that can take a sequence."),
        }
    }
}
