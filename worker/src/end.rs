//! Why an answer ended.

use serde::Serialize;

/// The `finish_reason` of OpenAI's API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum End {
    /// By a token that ends a sequence, or by a stop string.
    Stop,
    /// It has as many tokens as were allowed.
    Length,
}
