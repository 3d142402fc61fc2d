//! A worker whose device is lost: it ends with the device's name, and its requests go on elsewhere.

use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use expertmesh_deferred::DeferredCpu;
use expertmesh_engine::{Backend, CpuBackend, LoadOptions, fingerprint};
use expertmesh_metrics::Registry;
use expertmesh_model::expert::ExpertId;
use expertmesh_model::fingerprint::ModelFingerprint;
use expertmesh_model::format::WeightFormat;
use expertmesh_model::layout::budget::Layout;
use expertmesh_model::numerics::Numerics;
use expertmesh_proto::epoch::Epoch;
use expertmesh_proto::incarnation::Incarnation;
use expertmesh_proto::placement::{PlacedWorker, Placement};
use expertmesh_proto::slot::Slot;
use expertmesh_proto::v1;
use tokio::net::TcpListener;

use super::control::shape;
use super::early::Early;
use super::loading::Loaded;
use super::services::Services;
use super::worker::{Capacity, Worker};
use crate::frontend::resume::{Patience, Sequence};
use crate::frontend::sequence::{Generated, SequenceRequest, Step};
use crate::frontend::workers::Workers;
use crate::identity::{Identity, fingerprint_message};
use crate::mesh::blobs::BlobService;
use crate::metrics::frontend::FrontendMetrics;
use crate::placement::CurrentPlacement;
use crate::process::Fatal;
use crate::traces::Parent;

const PATIENCE: Duration = Duration::from_secs(60);
const CAPACITY: Capacity =
    Capacity { max_context: 256, experts_mib: None, kv_cache_mib: 1, running: 4, waiting: 4 };

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/v3")
}

fn processor() -> CpuBackend {
    let options = LoadOptions { threads: 1, ..LoadOptions::default() };
    CpuBackend::load(&model(), &options, |_, _| ()).unwrap()
}

fn computed() -> ModelFingerprint {
    fingerprint(&model(), WeightFormat::Native, Numerics::default()).unwrap()
}

/// Runs a worker as its process would: with a runtime that ends with it.
fn serve<B: Backend>(
    backend: Arc<B>,
    slot: u32,
    listener: std::net::TcpListener,
    placement: &Placement,
) -> JoinHandle<Result<ExitCode, Fatal>> {
    let (identity, current) = (
        Identity {
            name: format!("worker-{slot}"),
            slot: Slot(slot),
            incarnation: Incarnation(1),
            fingerprint: computed(),
            trust: None,
        },
        CurrentPlacement::load(None).unwrap(),
    );
    current.apply(placement.clone()).unwrap();
    std::thread::spawn(move || {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let result = runtime.block_on(async {
            let loaded = Loaded { backend, weights: WeightFormat::Native, drawn: None, peers: None };
            let early = Early {
                identity: identity.clone(),
                shape: shape(loaded.backend.config(), Layout::Cpu1, loaded.weights),
                placement: current.clone(),
                loading: Arc::default(),
                commit: String::new(),
                began: Instant::now(),
            };
            let blobs = BlobService::new(identity.clone(), current.clone(), None);
            let services = Services::open(TcpListener::from_std(listener).unwrap(), early, blobs).await;
            let worker = Worker::start(loaded, identity, CAPACITY, current, &Registry::new())?;
            worker.serve(services, pin!(std::future::pending()), Duration::ZERO).await
        });
        runtime.shutdown_timeout(Duration::from_secs(1));
        result
    })
}

/// All tokens of a sequence, as a frontend gets them from its workers.
async fn answer(workers: &Workers, metrics: &FrontendMetrics) -> Vec<u32> {
    let request = SequenceRequest {
        id: "s".to_owned(),
        prompt: (5..75).collect(),
        max_tokens: 60,
        min_tokens: 60,
        stop_tokens: Vec::new(),
        sampling: v1::Sampling {
            seed: 5,
            temperature: 1.0,
            top_p: 1.0,
            repetition_penalty: 1.0,
            ..Default::default()
        },
        logprobs: None,
    };
    let patience = Patience { stall: PATIENCE, queue: PATIENCE };
    let mut sequence = Sequence::new(request, workers.clone(), metrics.clone(), patience, Parent::default());
    let mut tokens = Vec::new();
    while let Step::Token(Generated { id, .. }) = sequence.next().await.unwrap() {
        tokens.push(id);
    }
    tokens
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_device_ends_its_worker_with_its_name_and_costs_no_request() {
    let listeners = [0, 1].map(|_| {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    });
    // Each holds half of the experts: the device sends rows, and computes those of its peer.
    let config = expertmesh_model::config::model::ModelConfig::read(&model()).unwrap();
    let placed = |slot: u32| {
        let held = (0..config.experts() as u32).filter(|expert| expert % 2 == slot);
        let layers = || config.moe_layers().map(|layer| layer as u32);
        let experts = held.flat_map(|expert| layers().map(move |layer| ExpertId { layer, expert })).collect();
        let addresses = vec![listeners[slot as usize].local_addr().unwrap().to_string()];
        PlacedWorker { slot: Slot(slot), name: format!("worker-{slot}"), addresses, experts, draining: false }
    };
    let placement = Placement::new(Epoch::FIRST, vec![placed(0), placed(1)]).unwrap();
    let device = Arc::new(DeferredCpu::new(processor()));
    let [first, second] = listeners;
    let lost = serve(device.clone(), 0, first, &placement);
    let _stays = serve(Arc::new(processor()), 1, second, &placement);

    let metrics = FrontendMetrics::new(&Registry::new(), "m");
    let caller = v1::Caller {
        name: "frontend".to_owned(),
        incarnation: 1,
        attempt: 0,
        fingerprint: Some(fingerprint_message(&computed())),
    };
    let workers = Workers::new(caller, None, PATIENCE, metrics.clone());
    let current = CurrentPlacement::load(None).unwrap();
    current.apply(placement).unwrap();
    tokio::spawn(workers.clone().follow(current));
    let mut changes = workers.changes();
    while workers.eligible() < 2 {
        changes.changed().await.unwrap();
    }
    // Of two that are idle the first is chosen: the device.
    let expected = answer(&workers, &metrics).await;
    assert_eq!(expected.len(), 60);
    device.lose_after(500);
    assert_eq!(answer(&workers, &metrics).await, expected);
    let ended = tokio::task::spawn_blocking(|| lost.join().unwrap()).await.unwrap().unwrap_err();
    assert_eq!((ended.reason, &*ended.message), ("DeviceLost", "deferred-cpu: lost on command"));
}
