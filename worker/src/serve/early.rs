//! `Control` of a worker whose dense weights are not there yet: it says what its model is and how far it is, and takes placements, so that
//! experts are placed and peers are known before the first of them is needed.

use std::sync::Arc;
use std::time::Instant;

use expertmesh_proto::v1;
use expertmesh_proto::v1::control_server::Control;
use expertmesh_proto::v1::report_response::State;
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::control::{ControlService, PERIOD, placed};
use super::loading::Loading;
use crate::identity::Identity;
use crate::placement::CurrentPlacement;
use crate::process::age_ms;
use crate::reports::beat_until;

/// What a report is made of.
pub(super) struct Early {
    pub(super) identity: Identity,
    pub(super) shape: v1::ModelShape,
    pub(super) placement: CurrentPlacement,
    pub(super) loading: Arc<Loading>,
    /// Of the model, where it is on a hub.
    pub(super) commit: String,
    pub(super) began: Instant,
}

/// The service of all times of a worker: once it is there, it is the worker's own.
pub(super) struct EarlyService(pub(super) Arc<Early>);

impl Early {
    fn report(&self) -> v1::ReportResponse {
        let placement = self.placement.get();
        let experts = placement.worker(self.identity.slot).map_or(0, |mine| mine.experts.len() as u32);
        v1::ReportResponse {
            callee: Some(self.identity.caller(0)),
            slot: self.identity.slot.0,
            state: if self.loading.is_draining() { State::Draining } else { State::Loading }.into(),
            reason: self.loading.reason(),
            epoch: placement.epoch().counter,
            term: placement.epoch().term,
            placement_hash: placement.hash().to_string(),
            age_ms: age_ms(self.began),
            shape: Some(self.shape),
            experts_loading: experts,
            bytes_loaded: self.loading.done(),
            bytes_to_load: self.shape.dense_bytes + u64::from(experts) * self.shape.expert_bytes,
            commit: self.commit.clone(),
            ..v1::ReportResponse::default()
        }
    }
}

#[tonic::async_trait]
impl Control for EarlyService {
    type ReportStream = ReceiverStream<Result<v1::ReportResponse, Status>>;

    async fn apply_placement(
        &self,
        request: Request<v1::ApplyPlacementRequest>,
    ) -> Result<Response<v1::ApplyPlacementResponse>, Status> {
        if let Some(worker) = self.0.loading.worker.get() {
            return ControlService(worker.clone()).apply_placement(request).await;
        }
        self.0.placement.apply(placed(request.into_inner(), &self.0.identity, &self.0.shape)?)?;
        self.0.loading.set_draining(false);
        // It may have come about meanwhile, and followed what was before.
        self.0.loading.worker.get().into_iter().for_each(|worker| worker.follow());
        Ok(Response::new(v1::ApplyPlacementResponse {}))
    }

    async fn report(
        &self,
        request: Request<v1::ReportRequest>,
    ) -> Result<Response<Self::ReportStream>, Status> {
        let request = request.into_inner();
        self.0.identity.admit(request.caller.as_ref())?;
        let (reports, receiver) = mpsc::channel(1);
        let early = self.0.clone();
        tokio::spawn(async move {
            let mut placement = early.placement.subscribe();
            while early.loading.worker.get().is_none() {
                if reports.send(Ok(early.report())).await.is_err() {
                    return;
                }
                let something = async {
                    tokio::select! {
                        _ = placement.changed() => {}
                        _ = early.loading.worker.wait() => {}
                        () = sleep(PERIOD) => {}
                    }
                };
                beat_until(something, &reports, request.heartbeats).await;
            }
            let worker = early.loading.worker.wait().await.clone();
            worker.report_to(reports, request.heartbeats).await;
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        if let Some(worker) = self.0.loading.worker.get() {
            return ControlService(worker.clone()).drain(request).await;
        }
        self.0.identity.admit(request.into_inner().caller.as_ref())?;
        self.0.loading.set_draining(true); // it runs nothing
        Ok(Response::new(v1::DrainResponse {}))
    }
}
