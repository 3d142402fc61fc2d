//! An answer as one object or as chunks; chat completions and completions differ in their shapes only.

use serde_json::{Map, Value, json};

use super::logprobs::Logged;
use super::model::Model;
use super::openai::{ApiError, Completed, Usage};
use super::reasoning::Split;
use super::seed::Drawn;
use super::update::{Piece, Update};
use super::valid::ValidRequest;
use super::valid::body::{Reply, StreamUsage};
use crate::end::End;
use crate::metrics::labels::Endpoint;

/// What every object of one answer begins with.
pub(crate) struct Header {
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) system_fingerprint: Option<String>,
}

/// All of a choice, once it is complete.
#[derive(Debug, Clone, Default)]
pub(crate) struct Whole {
    pub(crate) split: Split,
    pub(crate) tokens: Vec<u32>,
    /// How many of the tokens were thought.
    pub(crate) thought: usize,
    pub(crate) logprobs: Vec<Logged>,
    pub(crate) end: Option<End>,
}

impl Whole {
    pub(crate) fn add(&mut self, piece: Piece) {
        self.split.append(piece.split);
        self.tokens.extend(piece.tokens);
        self.thought += piece.thought;
        self.logprobs.extend(piece.logprobs);
        self.end = piece.end.or(self.end);
    }

    fn completed(&self) -> Completed {
        Completed { tokens: self.tokens.len(), thought: self.thought }
    }
}

/// How one endpoint reads requests and writes answers.
pub(crate) trait Format: Send + Sync + 'static {
    const ENDPOINT: Endpoint;
    /// What the ids of its answers begin with.
    const ID: &'static str;
    /// The `object` of a whole answer.
    const OBJECT: &'static str;
    /// The `object` of a chunk of a stream.
    const CHUNK: &'static str;
    /// Whether a choice carries its prompt's token ids, or the whole answer does.
    const PROMPT_IDS_IN_CHOICE: bool;

    /// Reads and checks a body; `drawn` is what it does not say.
    fn validate(model: &Model, body: &[u8], drawn: Drawn) -> Result<ValidRequest, ApiError>;

    /// The entry of `choices` of a whole answer, without index, logprobs, finish_reason and token_ids.
    fn choice(whole: &Whole) -> Map<String, Value>;

    /// The entry of `choices` that opens a choice in a stream, if it takes one.
    fn opening() -> Option<Map<String, Value>>;

    /// The entry of `choices` of a chunk.
    fn delta(split: &Split) -> Map<String, Value>;

    /// The value of `logprobs` in an entry of `choices`.
    fn logprobs(logged: &[Logged]) -> Value;
}

/// Makes the JSON of one request's answer.
pub(crate) struct Writer {
    pub(crate) header: Header,
    pub(crate) reply: Reply,
    pub(crate) request: ValidRequest,
}

impl Writer {
    /// The whole answer as one object.
    pub(crate) fn whole<F: Format>(&self, wholes: &[Whole]) -> Value {
        let mut object = self.object(F::OBJECT);
        let choice = |(index, whole): (usize, &Whole)| {
            let mut choice = self.numbered(F::choice(whole), index, whole.end);
            self.logprobs::<F>(&mut choice, &whole.logprobs);
            if self.reply.return_token_ids {
                choice.insert("token_ids".into(), json!(whole.tokens));
                self.prompt_ids::<F>(&mut choice, index, F::PROMPT_IDS_IN_CHOICE);
            }
            Value::Object(choice)
        };
        object.insert("choices".into(), wholes.iter().enumerate().map(choice).collect());
        self.seed(&mut object);
        let mut completed = Completed::default();
        wholes.iter().for_each(|whole| completed.add(whole.completed()));
        object.insert("usage".into(), json!(self.usage(completed)));
        self.prompt_ids::<F>(&mut object, 0, !F::PROMPT_IDS_IN_CHOICE);
        Value::Object(object)
    }

    /// The chunk that opens a choice in a stream, where the endpoint has one.
    pub(crate) fn opening<F: Format>(&self, index: usize) -> Option<Value> {
        let choice = self.numbered(F::opening()?, index, None);
        Some(Value::Object(self.chunk::<F>(choice, index, true, Completed::default())))
    }

    /// The chunk of a piece, if it is worth one; `first` where nothing was sent of its choice before. `so_far` counts its
    /// choice's tokens, those of the piece included.
    pub(crate) fn piece<F: Format>(&self, update: &Update, first: bool, so_far: Completed) -> Option<Value> {
        let Update { choice: index, piece } = update;
        let tokens = self.reply.return_token_ids && !piece.tokens.is_empty();
        if piece.split == Split::default() && piece.end.is_none() && !tokens && piece.logprobs.is_empty() {
            return None;
        }
        let mut choice = self.numbered(F::delta(&piece.split), *index, piece.end);
        self.logprobs::<F>(&mut choice, &piece.logprobs);
        if self.reply.return_token_ids {
            choice.insert("token_ids".into(), json!(piece.tokens));
        }
        let mut chunk = self.chunk::<F>(choice, *index, first, so_far);
        if piece.end.is_some() {
            self.seed(&mut chunk);
        }
        Some(Value::Object(chunk))
    }

    /// The chunk of the usage, after the last choice's end, where the client asked for it.
    pub(crate) fn last<F: Format>(&self, completed: Completed) -> Option<Value> {
        let mut object = self.object(F::CHUNK);
        object.insert("choices".into(), json!([]));
        object.insert("usage".into(), json!(self.usage(completed)));
        self.seed(&mut object);
        (self.reply.usage != StreamUsage::Never).then_some(Value::Object(object))
    }

    fn chunk<F: Format>(
        &self,
        mut choice: Map<String, Value>,
        index: usize,
        first: bool,
        so_far: Completed,
    ) -> Map<String, Value> {
        let mut object = self.object(F::CHUNK);
        self.prompt_ids::<F>(&mut choice, index, first && F::PROMPT_IDS_IN_CHOICE);
        self.prompt_ids::<F>(&mut object, index, first && !F::PROMPT_IDS_IN_CHOICE);
        object.insert("choices".into(), json!([choice]));
        let usage = match self.reply.usage {
            StreamUsage::Never => return object,
            StreamUsage::Last => Value::Null,
            StreamUsage::Continuous => json!(Usage::new(self.request.prompt_of(index).len(), so_far)),
        };
        object.insert("usage".into(), usage);
        object
    }

    /// Tells the seed: in a whole answer, and in a stream's last chunk, which is that of a choice's end or of the usage.
    fn seed(&self, object: &mut Map<String, Value>) {
        object.insert("seed".into(), json!(self.request.seed()));
    }

    fn prompt_ids<F: Format>(&self, object: &mut Map<String, Value>, index: usize, here: bool) {
        if here && self.reply.return_token_ids {
            object.insert("prompt_token_ids".into(), json!(self.request.prompt_of(index)));
        }
    }

    /// Sets `logprobs`, which stays null where no token came or nobody asked.
    fn logprobs<F: Format>(&self, choice: &mut Map<String, Value>, logged: &[Logged]) {
        if !logged.is_empty() {
            choice.insert("logprobs".into(), F::logprobs(logged));
        }
    }

    fn usage(&self, completed: Completed) -> Usage {
        Usage::new(self.request.prompt_tokens(), completed)
    }

    fn numbered(&self, mut choice: Map<String, Value>, index: usize, end: Option<End>) -> Map<String, Value> {
        choice.insert("index".into(), json!(index));
        choice.insert("logprobs".into(), Value::Null);
        choice.insert("finish_reason".into(), json!(end));
        choice
    }

    fn object(&self, kind: &str) -> Map<String, Value> {
        let Header { id, created, model, system_fingerprint } = &self.header;
        let entries = [
            ("id", json!(id)),
            ("object", json!(kind)),
            ("created", json!(created)),
            ("model", json!(model)),
            ("system_fingerprint", json!(system_fingerprint)),
        ];
        entries.into_iter().map(|(key, value)| (key.to_string(), value)).collect()
    }
}
