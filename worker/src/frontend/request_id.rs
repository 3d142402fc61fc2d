//! The name of a request, by which a client finds it again in logs and traces: `x-request-id`.

use axum::http::{HeaderMap, HeaderName};

/// The header that names a request, sent by clients or by the proxies before us.
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The most characters of a name that is taken.
const MAX_LENGTH: usize = 128;

/// The name that came with a request: visible ASCII of at most [`MAX_LENGTH`] characters. Any other is no name.
pub(super) fn sent(headers: &HeaderMap) -> Option<&str> {
    let name = headers.get(REQUEST_ID)?.to_str().ok()?;
    let visible = name.bytes().all(|byte| byte.is_ascii_graphic());
    (!name.is_empty() && name.len() <= MAX_LENGTH && visible).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_short_and_visible_or_none() {
        let named = |value: &[u8]| {
            let headers = HeaderMap::from_iter([(REQUEST_ID, value.try_into().unwrap())]);
            sent(&headers).map(str::to_string)
        };
        assert_eq!(named(b"req-7f/3"), Some("req-7f/3".to_string()));
        assert_eq!(named(&[b'a'; MAX_LENGTH]).map(|name| name.len()), Some(MAX_LENGTH));
        for other in [&b""[..], b"two words", b"\xff", &[b'a'; MAX_LENGTH + 1]] {
            assert_eq!(named(other), None, "{other:?}");
        }
        assert_eq!(sent(&HeaderMap::new()), None);
    }
}
