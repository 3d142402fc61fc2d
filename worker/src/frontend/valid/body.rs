//! A request's body, before anything in it is checked against the model's limits.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::super::fields;
use super::super::model::Model;
use super::super::openai::ApiError;
use super::sampling::SamplingFields;

/// The fields of a request that are known; others are ignored, as clients expect.
pub(super) struct Body<T> {
    pub(super) common: Common,
    pub(super) sampling: SamplingFields,
    /// The fields of one endpoint alone.
    pub(super) own: T,
}

impl<T: DeserializeOwned> Body<T> {
    pub(super) fn parse(model: &Model, body: &[u8]) -> Result<Self, ApiError> {
        let value: Value =
            serde_json::from_slice(body).map_err(|error| ApiError::Malformed(error.to_string()))?;
        let Some(map) = value.as_object() else {
            return Err(ApiError::Malformed("expected an object".to_string()));
        };
        match map.get("model") {
            Some(Value::String(name)) if *name == model.name => {}
            Some(Value::String(name)) => return Err(ApiError::ModelNotFound(name.clone())),
            None | Some(Value::Null) => return Err(missing("model")),
            Some(_) => return Err(ApiError::invalid("model", "model: expected a string")),
        }
        fields::reject_unhonoured(map)?;
        Ok(Self { common: read(&value)?, sampling: read(&value)?, own: read(&value)? })
    }
}

/// The fields that both endpoints take, beside [`SamplingFields`]. `null` is the same as absent.
#[derive(Debug, Deserialize)]
pub(super) struct Common {
    pub(super) max_tokens: Option<u32>,
    pub(super) n: Option<u32>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    return_token_ids: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

/// How the client wants its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) return_token_ids: bool,
}

impl Common {
    pub(super) fn reply(&self) -> Result<Reply, ApiError> {
        let stream = self.stream.unwrap_or(false);
        if self.stream_options.is_some() && !stream {
            return Err(ApiError::invalid(
                "stream_options",
                "stream_options: only allowed where stream is true",
            ));
        }
        let include_usage = self.stream_options.as_ref().and_then(|options| options.include_usage);
        Ok(Reply {
            stream,
            include_usage: include_usage.unwrap_or(false),
            return_token_ids: self.return_token_ids.unwrap_or(false),
        })
    }
}

fn read<T: DeserializeOwned>(value: &Value) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let problem = format!("{path}: {}", error.into_inner());
        ApiError::invalid(path, problem)
    })
}

/// The error of a request without a field that it must have.
pub(super) fn missing(field: &str) -> ApiError {
    ApiError::invalid(field, format!("{field}: missing"))
}
