//! The id of each event of a stream, from which any frontend goes on with the answer: `Last-Event-ID`. An answer is a function of prompt
//! and seed, so that nothing has to be kept for it: it is generated again, and what the client has is left out.

use std::fmt::{self, Write as _};
use std::str::FromStr;

use axum::http::{HeaderMap, HeaderName};
use sha2::{Digest, Sha256};

use super::openai::ApiError;
use super::seed::Drawn;
use super::valid::ValidRequest;

/// The header with the id of the last event that a client has.
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// The most characters of an answer's id.
const MAX_ID: usize = 64;

/// How far a stream is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct EventId {
    /// The id of the answer.
    pub(super) answer: String,
    pub(super) drawn: Drawn,
    /// What tells the request from others: 32 bits of a hash over all that was read of it.
    pub(super) request: u32,
    /// The `system_fingerprint` of the answer.
    pub(super) fingerprint: String,
    /// Of each choice, how many updates were sent: one for each token, and one for an end without a token.
    pub(super) sent: Vec<u32>,
}

impl EventId {
    /// The id that came with a request.
    pub(super) fn of(headers: &HeaderMap) -> Result<Option<Self>, ApiError> {
        let Some(text) = headers.get(LAST_EVENT_ID) else { return Ok(None) };
        let id = text.to_str().ok().and_then(|text| text.parse().ok());
        let problem =
            || ApiError::invalid("last-event-id", "last-event-id: no id of an event of a stream of this API");
        id.map(Some).ok_or_else(problem)
    }

    /// Refuses to go on where another request comes with the id, or where other tokens would follow. `hash` is the request's, of a stream alone;
    /// `endpoint` is what ids of its answers begin with.
    pub(super) fn check(
        &self,
        (request, hash): (&ValidRequest, Option<u32>),
        endpoint: &str,
        fingerprint: Option<&str>,
    ) -> Result<(), ApiError> {
        if hash.is_none() {
            return Err(ApiError::invalid("stream", "stream: last-event-id is for streams"));
        }
        let of_endpoint = self.answer.strip_prefix(endpoint).is_some_and(|rest| rest.starts_with('-'));
        if !of_endpoint || hash != Some(self.request) || self.sent.len() != request.count() {
            return Err(ApiError::NotThisStream(
                "the request is not the one of which it is the event".into(),
            ));
        }
        match fingerprint {
            Some(now) if self.fingerprint == now => Ok(()),
            Some(now) => Err(ApiError::NotThisStream(format!(
                "{} began the answer, and {now} serves now: other tokens would follow",
                self.fingerprint
            ))),
            None => Err(ApiError::NotYetKnown),
        }
    }
}

/// What tells one request from another: whatever was read of it, its seed and a template's time included.
pub(super) fn hash(request: &ValidRequest) -> u32 {
    struct Hashing(Sha256);

    impl fmt::Write for Hashing {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            self.0.update(text);
            Ok(())
        }
    }

    let mut hashing = Hashing(Sha256::new());
    let _ = write!(hashing, "{request:?}"); // hashing never fails
    hashing.0.finalize().iter().take(4).fold(0, |bits, &byte| bits << 8 | u32::from(byte))
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { answer, drawn: Drawn { seed, time }, request, fingerprint, sent } = self;
        write!(f, "{answer}.{time}.{seed}.{request:08x}.{fingerprint}.")?;
        sent.iter().enumerate().try_for_each(|(index, sent)| {
            let dash = if index == 0 { "" } else { "-" };
            write!(f, "{dash}{sent}")
        })
    }
}

/// A text that is no event's id.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NoEventId;

impl FromStr for EventId {
    type Err = NoEventId;

    fn from_str(text: &str) -> Result<Self, NoEventId> {
        let parts: Vec<&str> = text.split('.').collect();
        let [answer, time, seed, request, fingerprint, sent] = parts[..] else { return Err(NoEventId) };
        // They are told again in the answer.
        let is_plain = |text: &str| {
            text.len() <= MAX_ID
                && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
        };
        if answer.is_empty() || !is_plain(answer) || !is_plain(fingerprint) {
            return Err(NoEventId);
        }
        let number = |text: &str| text.parse().map_err(|_| NoEventId);
        let sent: Result<_, _> = sent.split('-').map(|sent| sent.parse().map_err(|_| NoEventId)).collect();
        Ok(Self {
            answer: answer.into(),
            drawn: Drawn { seed: number(seed)?, time: number(time)? },
            request: u32::from_str_radix(request, 16).map_err(|_| NoEventId)?,
            fingerprint: fingerprint.into(),
            sent: sent?,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_id_is_read_as_it_was_written(
            answer in "[a-z]{1,8}-[0-9a-f]{1,16}-[0-9a-f]{1,8}", seed: u64, time: u64, request: u32,
            fingerprint in "(fp_[0-9a-f]{8})?", sent in prop::collection::vec(any::<u32>(), 1..9)
        ) {
            let id = EventId { answer, drawn: Drawn { seed, time }, request, fingerprint, sent };
            prop_assert_eq!(id.to_string().parse(), Ok(id));
        }

        #[test]
        fn no_text_of_a_stranger_is_told_again_as_it_came(answer in "\\PC{1,80}", fingerprint in "\\PC{0,80}") {
            let is_plain = |text: &str| {
                text.len() <= MAX_ID && text.chars().all(|one| one.is_ascii_alphanumeric() || "-_".contains(one))
            };
            let read = format!("{answer}.1.2.3.{fingerprint}.4").parse::<EventId>();
            prop_assert_eq!(read.is_ok(), is_plain(&answer) && is_plain(&fingerprint));
        }
    }

    #[test]
    fn what_is_no_id_is_refused() {
        for text in
            ["", "a", "a.1.2.3.fp.", ".1.2.3.fp.4", "a.1.2.3.fp.4-x", "a\"b.1.2.3.fp.4", "a.1.2.3.fp.4.5"]
        {
            assert_eq!(text.parse::<EventId>(), Err(NoEventId), "{text}");
        }
    }
}
