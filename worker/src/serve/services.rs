//! The gRPC services of a worker: `Control` and `Blobs` from the moment its model is known, the others once the worker is there.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use expertmesh_proto::channel::{self, ServeError};
use expertmesh_proto::v1::blobs_server::BlobsServer;
use expertmesh_proto::v1::control_server::ControlServer;
use expertmesh_proto::v1::inference_server::InferenceServer;
use futures::future::Either;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::codegen::http::{Request, Response};
use tonic::server::NamedService;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::early::{Early, EarlyService};
use super::inference::InferenceService;
use super::loading::Loading;
use crate::mesh::blobs::BlobService;
use crate::mesh::exchange::ExchangeServer;

/// The most bytes of a message of `Inference`: a prompt.
const PROMPT: usize = 16 << 20;

/// The services at one address.
pub(super) struct Services {
    pub(super) loading: Arc<Loading>,
    pub(super) health: HealthReporter,
    pub(super) server: JoinHandle<Result<(), ServeError>>,
    /// Takes no more calls; [`Self::server`] ends with the open streams.
    pub(super) finish: oneshot::Sender<()>,
    exchange: Late<ExchangeServer>,
    inference: Late<InferenceServer<InferenceService>>,
}

impl Services {
    pub(super) async fn open(grpc: TcpListener, early: Early, blobs: BlobService) -> Self {
        let (health, health_service) = tonic_health::server::health_reporter();
        for service in ["", InferenceServer::<InferenceService>::NAME] {
            health.set_service_status(service, ServingStatus::NotServing).await;
        }
        let (loading, trust) = (early.loading.clone(), early.identity.trust.clone());
        let (exchange, inference) = (Late::default(), Late::default());
        let routes = Routes::new(health_service)
            .add_service(ControlServer::new(EarlyService(Arc::new(early))))
            .add_service(BlobsServer::new(blobs))
            .add_service(exchange.clone())
            .add_service(inference.clone());
        let (finish, finished) = oneshot::channel::<()>();
        let server = tokio::spawn(channel::serve(grpc, routes, trust, async {
            let _ = finished.await;
        }));
        Self { loading, health, server, finish, exchange, inference }
    }

    /// From now on the others are there, too.
    pub(super) fn complete(&self, exchange: ExchangeServer, inference: InferenceService) {
        let inference = InferenceServer::new(inference).max_decoding_message_size(PROMPT);
        let _ = (self.exchange.0.set(exchange), self.inference.0.set(inference));
    }
}

/// A service that is unavailable until it is there.
#[derive(Clone)]
struct Late<S>(Arc<OnceLock<S>>);

impl<S> Default for Late<S> {
    fn default() -> Self {
        Self(Arc::new(OnceLock::new()))
    }
}

impl<S: NamedService> NamedService for Late<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for Late<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Either<S::Future, Ready<Result<Response<Body>, Infallible>>>;

    fn poll_ready(&mut self, _: &mut Context) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(())) // tonic's services always are
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        match self.0.get() {
            Some(service) => Either::Left(service.clone().call(request)),
            None => {
                let status = Status::unavailable("this worker still loads its dense weights");
                Either::Right(ready(Ok(status.into_http())))
            }
        }
    }
}
