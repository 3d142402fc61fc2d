//! The seed of a request that names none: drawn anew for each, and told with its answer, so that any answer can be
//! had again.

use axum::http::{HeaderMap, HeaderName};
use sha2::{Digest, Sha256};

use super::openai::ApiError;
use super::request_id;
use crate::process::seconds_since_1970;

/// The header that tells a request's seed.
pub(super) const SEED: HeaderName = HeaderName::from_static("x-seed");
/// A drawn seed is below 2 to the power of this, so that clients whose numbers are all floating-point can repeat it.
const BITS: u32 = 53;

/// What a request is given that its body does not say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Drawn {
    /// The seed, where it names none.
    pub(crate) seed: u64,
    /// The time that a template sees, in seconds since 1970.
    pub(crate) time: u64,
}

/// The seed of a request without one, and the time. Where it is named by `x-request-id`, the first 53 bits of that name's SHA-256, so
/// that a request which a proxy repeats is answered alike; otherwise 53 random bits of the operating system's.
pub(super) fn drawn(headers: &HeaderMap) -> Result<Drawn, ApiError> {
    let bits = match request_id::sent(headers) {
        Some(name) => first_bits(&Sha256::digest(name)),
        None => {
            getrandom::u64().map_err(|error| ApiError::Internal(format!("no seed can be drawn: {error}")))?
        }
    };
    Ok(Drawn { seed: bits >> (u64::BITS - BITS), time: seconds_since_1970() })
}

fn first_bits(hash: &[u8]) -> u64 {
    hash.iter().take(8).fold(0, |bits, &byte| bits << 8 | u64::from(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> u64 {
        drawn(&HeaderMap::from_iter([(request_id::REQUEST_ID, name.parse().unwrap())])).unwrap().seed
    }

    #[test]
    fn a_seed_is_drawn_anew_and_fits_a_floating_point_number() {
        let seeds: Vec<u64> = (0..64).map(|_| drawn(&HeaderMap::new()).unwrap().seed).collect();
        assert!(seeds.iter().all(|seed| seed >> BITS == 0), "{seeds:?}");
        assert!(seeds.iter().any(|seed| seed >> (BITS - 1) == 1), "the highest bit is never set: {seeds:?}");
        let different: std::collections::BTreeSet<_> = seeds.iter().collect();
        assert_eq!(different.len(), seeds.len());
    }

    #[test]
    fn a_request_of_a_name_has_the_seed_that_the_name_says() {
        // printf req-1 | sha256sum: 9456bdfa12ea7695…
        assert_eq!(named("req-1"), 0x9456_bdfa_12ea_7695 >> 11);
        assert_ne!(named("req-1"), named("req-2"));
    }
}
