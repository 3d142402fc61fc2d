//! Why an answer ended, as clients and `generate` are told.

use serde::Serialize;

/// The `finish_reason` of an answer, as OpenAI's API spells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum End {
    /// A token that ends a sequence came, or a stop string.
    Stop,
    /// The answer has as many tokens as were allowed.
    Length,
}
