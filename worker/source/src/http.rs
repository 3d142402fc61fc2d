//! HTTP as sources need it: small documents whole, large files by ranges, again where that may help.

use std::collections::HashMap;
use std::io::Read;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::crypto::ring;
use serde::de::DeserializeOwned;
use ureq::Agent;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use ureq::tls::{RootCerts, TlsConfig};

use crate::{Sink, SourceError};

/// The most bytes of one request: what a slow network gives within [`BODY`].
const PIECE: u64 = 32 << 20;
/// The most bytes of a document.
const DOCUMENT: u64 = 64 << 20;
const CONNECT: Duration = Duration::from_secs(10);
const RESPONSE: Duration = Duration::from_secs(30);
const BODY: Duration = Duration::from_secs(120);
/// Attempts in a row that bring no byte.
pub(crate) const ATTEMPTS: u32 = 6;
/// The pause before the second attempt; each further is twice as long.
const PAUSE: Duration = Duration::from_millis(500);
/// The longest pause, whatever a server asks for: hubs count requests by five minutes.
const LONGEST: Duration = Duration::from_secs(300);
/// How often in a row a server may ask to wait since there were too many requests.
const WAITS: u32 = 12;
/// Fewer bytes are an attempt in vain, though they are kept.
const PROGRESS: u64 = 1 << 20;
/// Bytes that a sink gets at once.
const BUFFER: usize = 1 << 18;

/// Requests to one place, with its token.
pub(crate) struct Http {
    agent: Agent,
    /// What all addresses begin with that may see the token.
    home: String,
    token: Option<String>,
    /// Attempts in a row that bring no byte.
    pub(crate) attempts: u32,
    /// What a file is called where it is read, and the entity tag that it had first.
    tags: Mutex<HashMap<String, String>>,
}

/// Why one attempt failed.
enum Failure {
    /// Another attempt may help.
    Passing {
        problem: String,
    },
    /// Another attempt will help, after the time that the server asks for.
    Throttled {
        problem: String,
        wait: Option<Duration>,
    },
    Final(SourceError),
}

impl Http {
    pub(crate) fn new(home: &str, token: Option<String>) -> Self {
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::PlatformVerifier)
            .unversioned_rustls_crypto_provider(Arc::new(ring::default_provider()));
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(RESPONSE))
            .timeout_recv_body(Some(BODY))
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .user_agent(concat!("expertmesh/", env!("CARGO_PKG_VERSION")))
            .tls_config(tls.build());
        Self {
            agent: config.build().into(),
            home: format!("{home}/"),
            token,
            attempts: ATTEMPTS,
            tags: Mutex::default(),
        }
    }

    /// A JSON document, and where its next page is. `refused` says what a status means.
    pub(crate) fn document<T: DeserializeOwned>(
        &self,
        url: &str,
        what: &str,
        refused: &dyn Fn(&Response<ureq::Body>) -> Option<SourceError>,
    ) -> Result<(T, Option<String>), SourceError> {
        self.again(what, &mut || {
            let mut response = self.get(url, None, refused)?;
            let next = response.headers().get(header::LINK).and_then(|link| next(link.to_str().ok()?));
            let body = response.body_mut().with_config().limit(DOCUMENT).read_to_vec();
            let body = body.map_err(|error| passing(&error))?;
            let document = serde_json::from_slice(&body).map_err(|error| {
                Failure::Final(SourceError::Refused {
                    what: what.into(),
                    problem: format!("its answer: {error}"),
                })
            })?;
            Ok((document, next))
        })
    }

    /// A range of a file of so many bytes, by requests that follow each other; what was cut goes on where it was.
    pub(crate) fn range(
        &self,
        url: &str,
        (what, size): (&str, u64),
        range: Range<u64>,
        sink: &mut Sink,
        refused: &dyn Fn(&Response<ureq::Body>) -> Option<SourceError>,
    ) -> Result<(), SourceError> {
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min(at + PIECE);
            let before = at;
            let piece = self.again(what, &mut || {
                let result = self.piece(url, (what, size), (&mut at, end), sink, refused);
                match result {
                    Err(Failure::Passing { problem }) if at - before >= PROGRESS => {
                        tracing::warn!(what, problem, "goes on at byte {at} in {PAUSE:?}");
                        std::thread::sleep(PAUSE);
                        Ok(())
                    }
                    result => result,
                }
            });
            piece?;
        }
        Ok(())
    }

    fn piece(
        &self,
        url: &str,
        (what, size): (&str, u64),
        (at, end): (&mut u64, u64),
        sink: &mut Sink,
        refused: &dyn Fn(&Response<ureq::Body>) -> Option<SourceError>,
    ) -> Result<(), Failure> {
        let asked = *at..end;
        let mut response = self.get(url, Some(&asked), refused)?;
        let mut from = self.begins_at((what, size), &asked, &response)?;
        let mut body = response.body_mut().as_reader();
        let mut buffer = vec![0; BUFFER];
        let mut read = |buffer: &mut [u8]| {
            body.read(buffer).map_err(|error| Failure::Passing { problem: error.to_string() })
        };
        while from < end {
            let next = if from < *at { *at } else { end };
            let most = BUFFER.min(usize::try_from(next - from).unwrap_or(BUFFER));
            let count = read(&mut buffer[..most])?;
            if count == 0 {
                return Err(Failure::Passing {
                    problem: format!("its body ended {} bytes early", end - from),
                });
            }
            if from >= *at {
                sink(from, &buffer[..count])
                    .map_err(|error| Failure::Final(SourceError::Sink { what: what.into(), error }))?;
                *at += count as u64;
            }
            from += count as u64;
        }
        // Read to its end, a connection is used again.
        match read(&mut buffer[..1])? {
            0 => Ok(()),
            _ => {
                let problem = format!("more than its {size} bytes came");
                Err(Failure::Final(SourceError::Changed { what: what.into(), problem }))
            }
        }
    }

    /// Where in the file an answer begins, which is of the range that was asked for, or of a small file whole.
    fn begins_at(
        &self,
        (what, size): (&str, u64),
        asked: &Range<u64>,
        response: &Response<ureq::Body>,
    ) -> Result<u64, Failure> {
        let changed = |problem: String| Failure::Final(SourceError::Changed { what: what.into(), problem });
        let text = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
        let refused = |problem: String| Failure::Final(SourceError::Refused { what: what.into(), problem });
        if let Some(coding) = text(header::CONTENT_ENCODING).filter(|coding| *coding != "identity") {
            return Err(refused(format!("it came encoded as {coding}, though as it is was asked for")));
        }
        let begin = match (response.status(), text(header::CONTENT_RANGE)) {
            (StatusCode::PARTIAL_CONTENT, Some(given)) => {
                let wanted = format!("bytes {}-{}/{size}", asked.start, asked.end - 1);
                if given != wanted {
                    return Err(changed(format!("{wanted} were asked for, {given} came")));
                }
                asked.start
            }
            (StatusCode::OK, _) if asked.end == size && size <= PIECE => 0,
            (status, _) => {
                return Err(refused(format!("its server knows no ranges: it answered with {status}")));
            }
        };
        let Some(tag) = text(header::ETAG) else { return Ok(begin) };
        let mut tags = self.tags.lock().unwrap_or_else(PoisonError::into_inner);
        let first = tags.entry(what.to_owned()).or_insert_with(|| tag.to_owned());
        if first == tag {
            Ok(begin)
        } else {
            Err(changed(format!("its entity tag was {first} and is {tag}")))
        }
    }

    fn get(
        &self,
        url: &str,
        range: Option<&Range<u64>>,
        refused: &dyn Fn(&Response<ureq::Body>) -> Option<SourceError>,
    ) -> Result<Response<ureq::Body>, Failure> {
        // Weights are read by their bytes: no coding may stand between.
        let mut request = self.agent.get(url).header(header::ACCEPT_ENCODING, "identity");
        if let Some(token) = self.token.as_ref().filter(|_| url.starts_with(&self.home)) {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if let Some(range) = range {
            request = request.header(header::RANGE, format!("bytes={}-{}", range.start, range.end - 1));
        }
        let response = request.call().map_err(|error| passing(&error))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        if let Some(error) = refused(&response) {
            return Err(Failure::Final(error));
        }
        let problem = format!("{url} answered with {status}");
        Err(match status {
            StatusCode::TOO_MANY_REQUESTS => {
                Failure::Throttled { problem, wait: asked_to_wait(response.headers()) }
            }
            StatusCode::SERVICE_UNAVAILABLE if response.headers().contains_key(header::RETRY_AFTER) => {
                Failure::Throttled { problem, wait: asked_to_wait(response.headers()) }
            }
            StatusCode::REQUEST_TIMEOUT => Failure::Passing { problem },
            status if status.is_server_error() => Failure::Passing { problem },
            _ => Failure::Final(SourceError::Refused { what: url.to_owned(), problem }),
        })
    }

    fn again<T>(
        &self,
        what: &str,
        attempt: &mut dyn FnMut() -> Result<T, Failure>,
    ) -> Result<T, SourceError> {
        let (mut attempts, mut waits, mut pause) = (1, 0, PAUSE);
        loop {
            let (problem, asked) = match attempt() {
                Ok(value) => return Ok(value),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing { problem }) => (problem, None),
                Err(Failure::Throttled { problem, wait }) => (problem, Some(wait.unwrap_or(LONGEST / 5))),
            };
            if attempts == self.attempts || waits == WAITS.min(2 * self.attempts) {
                let attempts = attempts + waits;
                return Err(SourceError::Unreachable { what: what.into(), attempts, problem });
            }
            let wait = asked.unwrap_or(pause).min(LONGEST);
            match asked {
                Some(_) => waits += 1,
                None => (attempts, pause) = (attempts + 1, pause * 2),
            }
            tracing::warn!(what, problem, "tried again in {wait:?}");
            std::thread::sleep(wait);
        }
    }
}

fn passing(error: &ureq::Error) -> Failure {
    Failure::Passing { problem: error.to_string() }
}

/// `Retry-After` in seconds, or `t` of `RateLimit` (draft-ietf-httpapi-ratelimit-headers), as huggingface.co says it.
fn asked_to_wait(headers: &HeaderMap) -> Option<Duration> {
    let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    let after = text("retry-after").and_then(|seconds| seconds.trim().parse().ok());
    let reset =
        || text("ratelimit")?.split(';').find_map(|part| part.trim().strip_prefix("t=")?.parse().ok());
    after.or_else(reset).map(Duration::from_secs)
}

/// The address of the next page in a `Link` header (RFC 8288).
fn next(link: &str) -> Option<String> {
    link.split(',').find_map(|link| {
        let (address, parameters) = link.trim().strip_prefix('<')?.split_once('>')?;
        let is_next = parameters.split(';').any(|parameter| parameter.trim() == "rel=\"next\"");
        is_next.then(|| address.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use ureq::http::HeaderName;

    use super::*;

    #[test]
    fn how_long_to_wait_is_said_in_either_of_two_ways() {
        let wait = |name: &'static str, value: &'static str| {
            let header = (HeaderName::from_static(name), HeaderValue::from_static(value));
            asked_to_wait(&[header].into_iter().collect())
        };
        assert_eq!(wait("retry-after", "7"), Some(Duration::from_secs(7)));
        assert_eq!(wait("ratelimit", r#""resolvers";r=0;t=132"#), Some(Duration::from_secs(132)));
        assert_eq!(wait("retry-after", "Sun, 29 Nov 2026 12:00:00 GMT"), None);
    }

    #[test]
    fn the_next_page_is_found_among_links() {
        let link = r#"<https://hub/a?cursor=x>; rel="prev", <https://hub/a?cursor=y>; rel="next""#;
        assert_eq!(next(link).as_deref(), Some("https://hub/a?cursor=y"));
        assert_eq!(next(r#"<https://hub/a>; rel="last""#), None);
    }
}
