//! What Prometheus sees. (The operator's metrics: `kubernetes.rs`.)

use expertmesh_tests::frontend::{Frontend, metrics};
use expertmesh_tests::mesh::Mesh;
use expertmesh_tests::reference::{Question, reference};
use expertmesh_tests::{promtool, skipped};

const WORKER: [&str; 16] = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "expertmesh_worker_prompt_tokens_total",
    "expertmesh_worker_generated_tokens_total",
    "expertmesh_worker_sequences_total",
    "expertmesh_worker_experts_resident",
    "expertmesh_worker_experts_resident_bytes",
    "expertmesh_worker_expert_loads_total",
    "expertmesh_worker_expert_loaded_bytes_total",
    "expertmesh_worker_peers",
    "expertmesh_worker_peers_alive",
    "expertmesh_worker_placement_epoch",
    "expertmesh_worker_rows_dispatched_total",
    "expertmesh_worker_rows_served_total",
    "expertmesh_worker_exchange_seconds",
];
const FRONTEND: [&str; 7] = [
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:request_time_per_output_token_seconds",
    "expertmesh_frontend_requests_total",
    "expertmesh_frontend_errors_total",
    "expertmesh_frontend_queue_length",
    "expertmesh_frontend_generated_tokens_total",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_and_frontends_export_what_dashboards_ask_for_each_series_from_one_of_them() {
    let mut mesh = Mesh::start("metrics", 2).await;
    let frontend = Frontend::start(&mut mesh).await;
    let questions = Question::several(4);
    questions.iter().for_each(|question| drop(reference(question)));
    // At once, so that both workers get some.
    std::thread::scope(|scope| {
        for question in &questions {
            scope.spawn(|| frontend.api.check(question).unwrap());
        }
    });
    let mut wrong = questions[0].clone();
    wrong.length = Some(0);
    frontend.api.check_refused(&wrong, 400);

    let workers = [metrics(&mesh.addresses[0]), metrics(&mesh.addresses[1])];
    let front = frontend.metrics();
    for text in workers.iter().chain([&front]) {
        if !skipped("promtool") {
            promtool::check(text);
        }
    }
    for name in WORKER {
        assert!(
            workers.iter().all(|text| promtool::declares(text, name)),
            "{name} is missing: {}",
            workers[0]
        );
        assert!(!promtool::declares(&front, name), "{name} has two exporters");
    }
    for name in FRONTEND {
        assert!(promtool::declares(&front, name), "{name} is missing: {front}");
        assert!(!promtool::declares(&workers[0], name), "{name} has two exporters");
    }

    let of_workers = |series: &str| workers.iter().map(|text| promtool::sum(text, series)).sum::<f64>();
    let of_frontend = |series: &str| promtool::sum(&front, series);
    let tokens = of_frontend("expertmesh_frontend_generated_tokens_total");
    assert!(tokens > 20.0 && tokens == of_workers("expertmesh_worker_generated_tokens_total"), "{tokens}");
    assert_eq!(of_frontend("expertmesh_frontend_requests_total{code=\"200\""), 4.0);
    assert_eq!(of_frontend("expertmesh_frontend_requests_total{code=\"400\""), 1.0);
    assert_eq!(of_frontend("expertmesh_frontend_errors_total"), 1.0);
    assert_eq!(of_frontend("vllm:time_to_first_token_seconds_count"), 4.0);
    assert_eq!(of_frontend("vllm:inter_token_latency_seconds_count"), tokens - 4.0);
    assert_eq!(of_frontend("vllm:request_time_per_output_token_seconds_count"), 4.0);
    let rows = of_workers("expertmesh_worker_rows_dispatched_total");
    assert!(rows > tokens && rows == of_workers("expertmesh_worker_rows_served_total"), "{rows}");
    assert!(of_workers("expertmesh_worker_exchange_seconds_count") > tokens);
    assert_eq!(of_workers("expertmesh_worker_experts_resident "), 160.0);
    assert_eq!(of_workers("expertmesh_worker_expert_loads_total{cause=\"placement\""), 160.0);
    assert_eq!(of_workers("expertmesh_worker_expert_loads_total{cause=\"elected\""), 0.0);
    let bytes = of_workers("expertmesh_worker_expert_loaded_bytes_total");
    assert_eq!(bytes, of_workers("expertmesh_worker_experts_resident_bytes"));
    assert_eq!(of_workers("expertmesh_worker_peers "), 2.0);
}
