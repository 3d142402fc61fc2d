//! The shapes of the answers of `/v1/completions`.

use serde_json::{Map, Value, json};

use super::format::{Format, Whole};
use super::logprobs::{self, Logged};
use super::model::Model;
use super::openai::ApiError;
use super::reasoning::Split;
use super::seed::Drawn;
use super::valid::ValidRequest;
use crate::metrics::labels::Endpoint;

pub(crate) struct Completions;

impl Format for Completions {
    const ENDPOINT: Endpoint = Endpoint::Completions;
    const ID: &'static str = "cmpl";
    const OBJECT: &'static str = "text_completion";
    const CHUNK: &'static str = "text_completion";
    const PROMPT_IDS_IN_CHOICE: bool = true;

    fn validate(model: &Model, body: &[u8], drawn: Drawn) -> Result<ValidRequest, ApiError> {
        ValidRequest::completion(model, body, drawn)
    }

    fn choice(whole: &Whole) -> Map<String, Value> {
        Self::delta(&whole.split)
    }

    fn opening() -> Option<Map<String, Value>> {
        None
    }

    /// Makes text of content alone: a completion's thoughts are part of it.
    fn delta(split: &Split) -> Map<String, Value> {
        [("text".to_string(), json!(split.content))].into_iter().collect()
    }

    fn logprobs(logged: &[Logged]) -> Value {
        logprobs::completion(logged)
    }
}
