//! The operator's view of a frontend, over real gRPC.

use expertmesh_metrics::Registry;
use expertmesh_proto::epoch::Epoch;
use expertmesh_proto::expert_set::ExpertSet;
use expertmesh_proto::latency::Histogram;
use expertmesh_proto::placement::PlacedWorker;
use expertmesh_proto::slot::Slot;
use expertmesh_proto::v1::control_client::ControlClient;
use futures::StreamExt;
use tokio::task::JoinSet;
use tonic::Code;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use super::*;
use crate::frontend::access::AccessLog;
use crate::frontend::choices::{self, Start};
use crate::frontend::clients::Clients;
use crate::frontend::model::Model;
use crate::frontend::resume::Patience;
use crate::frontend::scripted::{Stage, stage};
use crate::frontend::seed::Drawn;
use crate::frontend::server::Settings;
use crate::frontend::valid::ValidRequest;
use crate::metrics::clients::ClientMetrics;
use crate::tokenizer::tests::tiny_r1;
use crate::traces::Parent;

struct Post {
    stage: Stage,
    server: Arc<Server>,
    channel: Channel,
    _serving: JoinSet<()>,
}

async fn post() -> Post {
    let stage = stage(&[&[]]).await;
    let model = Model::load(&tiny_r1(), vec!["tiny-r1".to_string()], None).unwrap();
    let patience = Patience { stall: Duration::from_secs(5), queue: Duration::from_secs(5) };
    let settings = Settings { patience, max_requests: 8, log: AccessLog::Off };
    let server = Server::new(
        model,
        stage.workers.clone(),
        stage.metrics.clone(),
        Clients::anybody(ClientMetrics::new(&Registry::new())),
        settings,
    );
    let me = v1::Caller { name: "frontend-0".to_string(), ..v1::Caller::default() };
    let placement = CurrentPlacement::load(None).unwrap();
    let service = ControlService { server: server.clone(), placement, me };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let mut serving = JoinSet::new();
    serving.spawn(serve(listener, service, None));
    let channel = Channel::from_shared(address).unwrap().connect().await.unwrap();
    Post { stage, server, channel, _serving: serving }
}

fn placement(epoch: u64) -> v1::ApplyPlacementRequest {
    let addresses = vec!["127.0.0.1:1".to_string()];
    let name = "w-0".to_string();
    let worker =
        PlacedWorker { slot: Slot(0), name, addresses, experts: ExpertSet::default(), draining: false };
    let placement = Placement::new(Epoch { term: 0, counter: epoch }, vec![worker]).unwrap().to_proto();
    v1::ApplyPlacementRequest { caller: None, placement: Some(placement) }
}

#[tokio::test]
async fn a_placement_is_taken_reported_and_never_replaced_by_an_older_one() {
    let post = post().await;
    let mut control = ControlClient::new(post.channel.clone());
    let mut reports = control.report(v1::ReportRequest::default()).await.unwrap().into_inner();
    let first = reports.message().await.unwrap().unwrap();
    assert_eq!(
        (first.state(), first.epoch, first.callee.unwrap().name.as_str()),
        (State::Ready, 0, "frontend-0")
    );
    control.apply_placement(placement(2)).await.unwrap();
    let hash = placement(2).placement.unwrap().hash;
    loop {
        let report = reports.message().await.unwrap().unwrap();
        if report.epoch == 2 {
            assert_eq!(report.placement_hash, hash);
            break;
        }
    }
    assert_eq!(control.apply_placement(placement(1)).await.unwrap_err().code(), Code::FailedPrecondition);
    let nothing = v1::ApplyPlacementRequest::default();
    assert_eq!(control.apply_placement(nothing).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_frontend_that_leaves_says_so_to_everyone_who_asks_and_nobody_else_makes_it_leave() {
    let post = post().await;
    let (mut control, mut health) =
        (ControlClient::new(post.channel.clone()), HealthClient::new(post.channel.clone()));
    let mut statuses = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    let serving = tonic_health::ServingStatus::Serving as i32;
    while statuses.message().await.unwrap().unwrap().status != serving {}
    let told = control.drain(v1::DrainRequest::default()).await.unwrap_err();
    assert_eq!((told.code(), post.server.readiness()), (Code::Unimplemented, Ok(())));
    post.server.leave();
    assert_eq!(post.server.readiness(), Err("draining".to_string()));
    while statuses.message().await.unwrap().unwrap().status == serving {}
    let mut reports = control.report(v1::ReportRequest::default()).await.unwrap().into_inner();
    let report = reports.message().await.unwrap().unwrap();
    assert_eq!((report.state(), report.reason.as_str()), (State::Draining, "draining"));
}

#[tokio::test]
async fn a_sequence_that_waits_is_reported_at_once_and_for_how_long_it_waits() {
    let post = post().await;
    let addresses = post.stage.place(&[]);
    post.stage.until_eligible(0).await;
    let mut control = ControlClient::new(post.channel.clone());
    let mut reports = control.report(v1::ReportRequest::default()).await.unwrap().into_inner();
    assert_eq!(reports.message().await.unwrap().unwrap().waiting, 0);
    let request = ValidRequest::completion(
        &post.server.model,
        br#"{"model": "tiny-r1", "prompt": [5]}"#,
        Drawn::default(),
    )
    .unwrap();
    let asked = Instant::now();
    let updates =
        choices::start(&post.server, &request, "c", &Start { arrived: asked, parent: Parent::default() });
    let awaited = |report: &v1::ReportResponse| {
        let awaiting = report.latencies.as_ref().unwrap().awaiting.as_ref().unwrap();
        Histogram::from_proto(awaiting).unwrap()
    };
    let report = reports.message().await.unwrap().unwrap();
    assert!(asked.elapsed() < PERIOD / 2, "it waited for the period");
    assert_eq!((report.waiting, awaited(&report).count()), (1, 1));
    let later = reports.message().await.unwrap().unwrap();
    assert_eq!(awaited(&later).surely_above(PERIOD / 2).count(), 1);
    post.stage.place(&addresses);
    assert_eq!(updates.count().await, 17, "sixteen tokens and the end");
    loop {
        let report = reports.message().await.unwrap().unwrap();
        if report.waiting == 0 && awaited(&report).count() == 0 {
            let latencies = report.latencies.unwrap();
            let first = Histogram::from_proto(&latencies.first_token.unwrap()).unwrap();
            assert_eq!((first.surely_above(PERIOD / 2).count(), latencies.choices), (1, 1));
            break;
        }
    }
}
