//! `Inference`: checks what a frontend asks for and hands it to the engine's thread.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{SyncSender, TrySendError};

use expertmesh_engine::Sampling;
use expertmesh_proto::v1::inference_server::Inference;
use expertmesh_proto::{Invalid, v1};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::run::{Command, EVENTS, Events, Shared, Submission};
use crate::mesh::identity::Identity;

/// More stop tokens than any client names.
const MAX_STOP_TOKENS: usize = 128;

pub(crate) struct InferenceService {
    pub(crate) identity: Identity,
    pub(crate) vocabulary: u32,
    /// Positions of a sequence, prompt and answer together.
    pub(crate) max_context: usize,
    pub(crate) commands: SyncSender<Command>,
    pub(crate) shared: Arc<Shared>,
}

#[tonic::async_trait]
impl Inference for InferenceService {
    type GenerateStream = ReceiverStream<Result<v1::GenerateEvent, Status>>;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let request = request.into_inner();
        self.identity.admit(request.caller.as_ref())?;
        let (events, receiver) = mpsc::channel(EVENTS);
        let submission = self.check(request, events)?;
        self.submit(submission).inspect_err(|_| {
            self.shared.metrics.sequences.with_label_values(&["refused"]).inc();
        })?;
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

impl InferenceService {
    fn submit(&self, submission: Submission) -> Result<(), Status> {
        if self.shared.draining.load(Ordering::SeqCst) {
            return Err(Status::unavailable("this worker leaves"));
        }
        self.commands.try_send(Command::Submit(submission)).map_err(|error| match error {
            TrySendError::Full(_) => Status::resource_exhausted("the queue is full"),
            TrySendError::Disconnected(_) => Status::unavailable("this worker leaves"),
        })
    }

    fn check(&self, request: v1::GenerateRequest, events: Events) -> Result<Submission, Invalid> {
        let v1::GenerateRequest { tokens, max_tokens, min_tokens, stop_tokens, sampling, .. } = request;
        if tokens.is_empty() || tokens.len() >= self.max_context {
            let problem = format!(
                "{} do not fit a context of {} with room for an answer",
                tokens.len(),
                self.max_context
            );
            return Err(Invalid::new("tokens", problem));
        }
        if let Some(token) = tokens.iter().chain(&stop_tokens).find(|token| **token >= self.vocabulary) {
            return Err(Invalid::new(
                "tokens",
                format!("{token} is outside a vocabulary of {}", self.vocabulary),
            ));
        }
        if max_tokens == 0 || min_tokens > max_tokens {
            return Err(Invalid::new(
                "max_tokens",
                format!("{max_tokens} must be at least 1, and min_tokens ({min_tokens})"),
            ));
        }
        if stop_tokens.len() > MAX_STOP_TOKENS {
            return Err(Invalid::new(
                "stop_tokens",
                format!("{} are more than {MAX_STOP_TOKENS}", stop_tokens.len()),
            ));
        }
        let v1::Sampling { temperature, top_p, top_k, min_p, seed } =
            sampling.ok_or_else(|| Invalid::new("sampling", "missing"))?;
        let sampling = Sampling::new(temperature, top_p, top_k, min_p, seed)
            .map_err(|error| Invalid::new("sampling", error.to_string()))?;
        let min_length = tokens.len() + min_tokens as usize;
        let max_length = (tokens.len() + max_tokens as usize).min(self.max_context);
        Ok(Submission { tokens, sampling, stop_tokens, min_length, max_length, events })
    }
}
