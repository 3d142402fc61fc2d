//! What both endpoints read alike: which model is meant, and how the answer is to look.

use serde::Deserialize;

use super::super::fields::On;
use super::super::fields::read::Fields;
use super::super::model::Model;
use super::super::openai::ApiError;

/// The fields of a body that is for this model and asks for nothing that would not happen.
pub(super) fn open<'a>(model: &Model, on: On, body: &'a [u8]) -> Result<Fields<'a>, ApiError> {
    let fields = Fields::parse(on, body)?;
    // Whoever does not say which model means the only one.
    if let Some(name) = fields.text("model")?.filter(|name| !model.is_called(name)) {
        return Err(ApiError::ModelNotFound(name));
    }
    fields.check()?;
    Ok(fields)
}

/// How the client wants its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) stream: bool,
    pub(crate) usage: StreamUsage,
    pub(crate) return_token_ids: bool,
}

/// Where a stream tells its usage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StreamUsage {
    Never,
    /// In a chunk of its own, the last one.
    Last,
    /// There too, and in every chunk that of its choice so far.
    Continuous,
}

#[derive(Debug, Default, Deserialize)]
#[serde(expecting = "an object")]
struct StreamOptions {
    include_usage: Option<bool>,
    continuous_usage_stats: Option<bool>,
}

impl Reply {
    pub(super) fn read(fields: &Fields) -> Result<Self, ApiError> {
        let stream = fields.flag("stream")?.unwrap_or(false);
        let options = fields.parts::<StreamOptions>("stream_options")?;
        if options.is_some() && !stream {
            return Err(ApiError::invalid(
                "stream_options",
                "stream_options: only allowed where stream is true",
            ));
        }
        let options = options.unwrap_or_default();
        let continuous = options.continuous_usage_stats.unwrap_or(false);
        let usage = match options.include_usage.unwrap_or(false) {
            false => StreamUsage::Never,
            true if continuous => StreamUsage::Continuous,
            true => StreamUsage::Last,
        };
        let return_token_ids = fields.flag("return_token_ids")?.unwrap_or(false);
        Ok(Self { stream, usage, return_token_ids })
    }
}

/// The error of a request without a field that it must have.
pub(super) fn missing(field: &str) -> ApiError {
    ApiError::invalid(field, format!("{field}: missing"))
}
