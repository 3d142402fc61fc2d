//! What is wrong with a JSON text, in words for those who wrote it.

use serde_json::error::Category;

/// What is wrong with a body that is no JSON, and where.
pub(super) fn malformed(text: &str, error: &serde_json::Error) -> String {
    match error.classify() {
        Category::Eof => "the body ends in the middle of its JSON".to_string(),
        Category::Io | Category::Syntax | Category::Data => {
            let lines = text.split_inclusive('\n').take(error.line().saturating_sub(1));
            let before = lines.map(str::len).sum::<usize>() + error.column();
            format!("the body is not JSON: {}, at its byte {before}", plain(error))
        }
    }
}

/// The error without the names of types and without its place, which is that of a part of the body.
pub(super) fn plain(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    let text = text.strip_suffix(&place).unwrap_or(&text);
    if text.contains("surrogate") || text.contains("hex escape") {
        return "half a surrogate pair (as \\ud83d) is no character; send both halves, or \\ufffd"
            .to_string();
    }
    let wrong = text.strip_prefix("invalid type: ").or_else(|| text.strip_prefix("invalid value: "));
    match wrong.and_then(|wrong| wrong.split_once(", expected ")) {
        Some((found, expected)) => format!("{found} is not {expected}"),
        None => text.to_string(),
    }
}
