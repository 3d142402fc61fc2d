//! The name of a request, by which a client finds it again in answers, errors, logs and traces: `x-request-id`.

use std::sync::Arc;

use axum::http::{HeaderMap, HeaderName, HeaderValue};

/// The header that names a request, sent by clients or by the proxies before us, and told in every answer.
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The most characters of a name that is taken.
const MAX_LENGTH: usize = 128;

/// The name of one request: visible ASCII of at most [`MAX_LENGTH`] characters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RequestId(Arc<str>);

impl RequestId {
    /// The name that came with a request, or else `made`.
    pub(super) fn of(headers: &HeaderMap, made: impl FnOnce() -> String) -> Self {
        Self(sent(headers).map_or_else(|| made().into(), Into::into))
    }

    pub(super) fn name(&self) -> &str {
        &self.0
    }

    /// The header of the answer.
    pub(super) fn header(&self) -> Option<HeaderValue> {
        HeaderValue::from_str(&self.0).ok()
    }
}

/// The name that came with a request; one that is long or not visible is no name.
pub(super) fn sent(headers: &HeaderMap) -> Option<&str> {
    let name = headers.get(REQUEST_ID)?.to_str().ok()?;
    let visible = name.bytes().all(|byte| byte.is_ascii_graphic());
    (!name.is_empty() && name.len() <= MAX_LENGTH && visible).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_short_and_visible_or_made() {
        let named = |value: &[u8]| {
            let headers = HeaderMap::from_iter([(REQUEST_ID, value.try_into().unwrap())]);
            RequestId::of(&headers, || "made".to_string()).name().to_string()
        };
        assert_eq!(named(b"req-7f/3"), "req-7f/3");
        assert_eq!(named(&[b'a'; MAX_LENGTH]).len(), MAX_LENGTH);
        for other in [&b""[..], b"two words", b"\xff", &[b'a'; MAX_LENGTH + 1]] {
            assert_eq!(named(other), "made", "{other:?}");
        }
        assert_eq!(RequestId::of(&HeaderMap::new(), || "made".to_string()).name(), "made");
    }
}
