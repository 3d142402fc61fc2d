//! `Control` as a frontend serves it: the placement to follow, what it says of itself, and how it leaves.

use std::sync::Arc;
use std::time::{Duration, Instant};

use expertmesh_proto::invalid::Invalid;
use expertmesh_proto::placement::Placement;
use expertmesh_proto::trust::Trust;
use expertmesh_proto::v1::control_server::{Control, ControlServer};
use expertmesh_proto::v1::report_response::State;
use expertmesh_proto::{channel, v1};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::{Request, Response, Status};
use tonic_health::ServingStatus;
use tonic_health::server::health_reporter;

use super::server::Server;
use crate::placement::CurrentPlacement;
use crate::reports::{Reports, beat_until};

/// The longest time between two reports.
const PERIOD: Duration = Duration::from_secs(1);
/// How long changes are gathered for one report.
const GATHER: Duration = Duration::from_millis(20);

pub(crate) struct ControlService {
    pub(crate) server: Arc<Server>,
    pub(crate) placement: CurrentPlacement,
    pub(crate) me: v1::Caller,
}

#[tonic::async_trait]
impl Control for ControlService {
    type ReportStream = ReceiverStream<Result<v1::ReportResponse, Status>>;

    async fn apply_placement(
        &self,
        request: Request<v1::ApplyPlacementRequest>,
    ) -> Result<Response<v1::ApplyPlacementResponse>, Status> {
        let placement = request.into_inner().placement.ok_or_else(|| Invalid::new("placement", "missing"))?;
        self.placement.apply(Placement::from_proto(placement)?)?;
        Ok(Response::new(v1::ApplyPlacementResponse {}))
    }

    async fn report(
        &self,
        request: Request<v1::ReportRequest>,
    ) -> Result<Response<Self::ReportStream>, Status> {
        let (reports, receiver) = mpsc::channel(1);
        let heartbeats = request.into_inner().heartbeats;
        let (server, placement) = (self.server.clone(), self.placement.clone());
        tokio::spawn(report(server, placement, self.me.clone(), reports, heartbeats));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn drain(&self, _: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        Err(Status::unimplemented("a frontend leaves at SIGTERM"))
    }
}

/// Sends a report at once, on every change, and once a second, until nobody reads them.
async fn report(
    server: Arc<Server>,
    placement: CurrentPlacement,
    me: v1::Caller,
    reports: Reports,
    heartbeats: bool,
) {
    let (mut workers, mut in_flight, mut leaving) =
        (server.workers.changes(), server.in_flight(), server.leaving());
    let (mut placements, mut waiting) = (placement.subscribe(), server.workers.waiting());
    loop {
        // Before the report is made: whoever begins to wait after it is told by the next one.
        let none_waited = waiting.borrow_and_update().waiting == 0;
        if reports.send(Ok(now(&server, &placement, &me))).await.is_err() {
            return;
        }
        let changed = async {
            tokio::select! {
                _ = workers.changed() => {}
                _ = in_flight.changed() => {}
                // The first that waits may wake a deployment from zero: it does not gather.
                _ = waiting.changed() => if none_waited { return },
                _ = leaving.changed() => {}
                _ = placements.changed() => {}
            }
            sleep(GATHER).await;
        };
        tokio::select! {
            _ = beat_until(timeout(PERIOD, changed), &reports, heartbeats) => {}
            () = reports.closed() => return,
        }
    }
}

fn now(server: &Server, placement: &CurrentPlacement, me: &v1::Caller) -> v1::ReportResponse {
    let placement = placement.get();
    let (state, reason) = match server.readiness() {
        Err(reason) if *server.leaving().borrow() => (State::Draining, reason),
        Err(reason) => (State::Loading, reason),
        Ok(()) => (State::Ready, String::new()),
    };
    v1::ReportResponse {
        callee: Some(me.clone()),
        state: state as i32,
        reason,
        epoch: placement.epoch().counter,
        term: placement.epoch().term,
        age_ms: server.age_ms(),
        placement_hash: placement.hash().to_string(),
        running: *server.in_flight().borrow(),
        waiting: server.workers.waiting().borrow().waiting,
        latencies: Some(server.latencies.report(Instant::now())),
        eligible_workers: server.workers.eligible() as u32,
        commit: server.model.commit.clone(),
        ..v1::ReportResponse::default()
    }
}

/// Serves `Control` and gRPC health, which is readiness, until the listener fails.
pub(crate) async fn serve(listener: TcpListener, control: ControlService, trust: Option<Trust>) {
    let (reporter, health) = health_reporter();
    let (server, mut changes, mut leaving) =
        (control.server.clone(), control.server.workers.changes(), control.server.leaving());
    let follow = async move {
        loop {
            let status = match server.readiness() {
                Ok(()) => ServingStatus::Serving,
                Err(_) => ServingStatus::NotServing,
            };
            reporter.set_service_status("", status).await;
            tokio::select! {
                _ = changes.changed() => {}
                _ = leaving.changed() => {}
            }
        }
    };
    let services = Routes::new(health).add_service(ControlServer::new(control));
    let serving = channel::serve(listener, services, trust, std::future::pending());
    tokio::select! {
        () = follow => {}
        served = serving => {
            if let Err(error) = served {
                tracing::error!(%error, "the control port failed");
            }
        }
    }
}

#[cfg(test)]
mod tests;
