//! `Inference`: checks what a frontend asks for and hands it to the engine's thread.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{SyncSender, TrySendError};

use expertmesh_engine::History;
use expertmesh_model::sampling::{MAX_TOP_LOGPROBS, Sampling};
use expertmesh_proto::invalid::Invalid;
use expertmesh_proto::v1;
use expertmesh_proto::v1::inference_server::Inference;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::run::{Command, EVENTS, Events, Shared, Spans, Submission};
use crate::identity::Identity;
use crate::metrics::labels::SequenceOutcome;
use crate::traces;

/// More stop tokens than any client names.
const MAX_STOP_TOKENS: usize = 128;

/// What a request is checked against.
pub(crate) struct RequestLimits {
    /// Tokens are below it.
    pub(crate) vocabulary: u32,
    /// Positions of a sequence, prompt and answer together.
    pub(crate) max_context: usize,
}

pub(crate) struct InferenceService {
    pub(crate) identity: Identity,
    pub(crate) limits: RequestLimits,
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
        let parent = traces::called(request.metadata());
        let request = request.into_inner();
        self.identity.admit(request.caller.as_ref())?;
        let (events, receiver) = mpsc::channel(EVENTS);
        let spans = Spans::begin(&parent, &request);
        let submission = Submission { spans, ..self.limits.check(request, events)? };
        self.submit(submission).inspect_err(|_| {
            self.shared.metrics.engine.ended(SequenceOutcome::Refused);
        })?;
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

impl InferenceService {
    fn submit(&self, submission: Submission) -> Result<(), Status> {
        if self.shared.draining.load(Ordering::SeqCst) {
            return Err(Status::unavailable("this worker leaves"));
        }
        self.commands.try_send(Command::Submit(Box::new(submission))).map_err(|error| match error {
            TrySendError::Full(_) => Status::resource_exhausted("the queue is full"),
            TrySendError::Disconnected(_) => Status::unavailable("this worker leaves"),
        })
    }
}

impl RequestLimits {
    /// A sequence of a request that a worker can compute; an error names the field.
    pub(crate) fn check(&self, request: v1::GenerateRequest, events: Events) -> Result<Submission, Invalid> {
        self.check_tokens(&request)?;
        check_limits(&request)?;
        let v1::GenerateRequest { tokens, max_tokens, min_tokens, stop_tokens, logprobs, .. } = request;
        let prompt = request.prompt_tokens as usize;
        let sampling = request.sampling.ok_or_else(|| Invalid::new("sampling", "missing"))?;
        let sampling = Sampling::new(crate::sampling::params(sampling))
            .map_err(|error| Invalid::new("sampling", error.to_string()))?;
        // The request counts from here, and a sequence from the end of its prompt.
        let sampling = sampling.ending(stop_tokens, tokens.len() - prompt + min_tokens as usize);
        let history = History::new(&sampling, &tokens, prompt);
        let max_length = (tokens.len() + max_tokens as usize).min(self.max_context);
        let logprobs = logprobs.map(|top| top as usize);
        let spans = Spans::default();
        Ok(Submission { tokens, history, sampling, logprobs, max_length, events, spans })
    }

    fn check_tokens(&self, request: &v1::GenerateRequest) -> Result<(), Invalid> {
        let v1::GenerateRequest { tokens, stop_tokens, prompt_tokens, .. } = request;
        if tokens.is_empty() || tokens.len() >= self.max_context {
            let problem = format!(
                "{} do not fit a context of {} with room for an answer",
                tokens.len(),
                self.max_context
            );
            return Err(Invalid::new("tokens", problem));
        }
        if let Some(token) = tokens.iter().chain(stop_tokens).find(|token| **token >= self.vocabulary) {
            return Err(Invalid::new(
                "tokens",
                format!("{token} is outside a vocabulary of {}", self.vocabulary),
            ));
        }
        if *prompt_tokens == 0 || *prompt_tokens as usize > tokens.len() {
            let problem = format!("{prompt_tokens} is not from 1 to the number of tokens, {}", tokens.len());
            return Err(Invalid::new("prompt_tokens", problem));
        }
        Ok(())
    }
}

fn check_limits(request: &v1::GenerateRequest) -> Result<(), Invalid> {
    let v1::GenerateRequest { max_tokens, min_tokens, stop_tokens, logprobs, .. } = request;
    if *max_tokens == 0 || min_tokens > max_tokens {
        let problem = format!("{max_tokens} must be at least 1, and min_tokens ({min_tokens})");
        return Err(Invalid::new("max_tokens", problem));
    }
    if stop_tokens.len() > MAX_STOP_TOKENS {
        let problem = format!("{} are more than {MAX_STOP_TOKENS}", stop_tokens.len());
        return Err(Invalid::new("stop_tokens", problem));
    }
    match logprobs {
        Some(top) if *top as usize > MAX_TOP_LOGPROBS => {
            Err(Invalid::new("logprobs", format!("{top} are more than {MAX_TOP_LOGPROBS}")))
        }
        _ => Ok(()),
    }
}
