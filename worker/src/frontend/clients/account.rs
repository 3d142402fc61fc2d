//! What a client has used up of its limits.

use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::metrics::labels::ClientLimit;

/// What a client may use of one frontend; what is absent has no limit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Limits {
    pub(super) requests_per_minute: Option<NonZeroU64>,
    /// Those of prompts and of answers together.
    pub(super) tokens_per_minute: Option<NonZeroU64>,
    pub(super) concurrent_requests: Option<NonZeroU64>,
}

/// Why a request does not begin.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("its limit is {most} {}", limit.unit())]
pub(super) struct Exceeded {
    pub(super) limit: ClientLimit,
    most: NonZeroU64,
    /// When one would begin; unknown where another one has to end.
    pub(super) wait: Option<Duration>,
}

#[derive(Debug, Default)]
pub(super) struct Account(Mutex<Used>);

#[derive(Debug, Default)]
struct Used {
    requests: Bucket,
    tokens: Bucket,
    running: u64,
}

/// What was taken of an amount per minute, which flows back evenly. Nothing was at first.
#[derive(Debug, Default)]
struct Bucket {
    taken: f64,
    at: Option<Instant>,
}

/// A request that runs, until it is dropped.
pub(crate) struct Turn(Arc<Account>);

impl Account {
    /// Begins a request. Its tokens are taken when they are known, so that a client may be over its limit for a while; it waits then.
    pub(super) fn begin(self: &Arc<Self>, limits: &Limits, now: Instant) -> Result<Turn, Exceeded> {
        let mut used = self.used();
        let Used { requests, tokens, running } = &mut *used;
        let exceeded = |limit, most, wait| Err(Exceeded { limit, most, wait });
        if let Some(most) = limits.concurrent_requests.filter(|most| *running >= most.get()) {
            return exceeded(ClientLimit::Concurrent, most, None);
        }
        if let Some(most) = limits.tokens_per_minute
            && let Some(wait) = tokens.wait(most, 1.0, now)
        {
            return exceeded(ClientLimit::Tokens, most, Some(wait));
        }
        if let Some(most) = limits.requests_per_minute {
            if let Some(wait) = requests.wait(most, 1.0, now) {
                return exceeded(ClientLimit::Requests, most, Some(wait));
            }
            requests.taken += 1.0;
        }
        *running += 1;
        Ok(Turn(self.clone()))
    }

    pub(super) fn spend(&self, limits: &Limits, tokens: usize, now: Instant) {
        if let Some(most) = limits.tokens_per_minute {
            let mut used = self.used();
            used.tokens.flow(most, now);
            used.tokens.taken += tokens as f64;
        }
    }

    /// Gives back what a request took that was not served: itself, and its `tokens`.
    pub(super) fn give_back(&self, limits: &Limits, tokens: usize, now: Instant) {
        let Used { requests, tokens: used, .. } = &mut *self.used();
        let taken =
            [(limits.requests_per_minute, requests, 1.0), (limits.tokens_per_minute, used, tokens as f64)];
        for (most, bucket, amount) in taken {
            if let Some(most) = most {
                bucket.flow(most, now);
                bucket.taken = (bucket.taken - amount).max(0.0);
            }
        }
    }

    fn used(&self) -> MutexGuard<'_, Used> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Bucket {
    fn flow(&mut self, most: NonZeroU64, now: Instant) {
        let since = self.at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        self.taken = (self.taken - since.as_secs_f64() / 60.0 * most.get() as f64).max(0.0);
        self.at = Some(now);
    }

    /// How long until `amount` is left of what there is per minute; none where it is.
    fn wait(&mut self, most: NonZeroU64, amount: f64, now: Instant) -> Option<Duration> {
        self.flow(most, now);
        let most = most.get() as f64;
        let lacking = self.taken + amount - most;
        (lacking > 0.0).then(|| Duration::try_from_secs_f64(lacking / most * 60.0).unwrap_or(Duration::MAX))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut used = self.0.used();
        used.running = used.running.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limits(requests: u64, tokens: u64, concurrent: u64) -> Limits {
        let [requests_per_minute, tokens_per_minute, concurrent_requests] =
            [requests, tokens, concurrent].map(NonZeroU64::new);
        Limits { requests_per_minute, tokens_per_minute, concurrent_requests }
    }

    fn refused(begun: Result<Turn, Exceeded>) -> (ClientLimit, Option<u64>) {
        let Err(Exceeded { limit, wait, .. }) = begun else { panic!("it began") };
        (limit, wait.map(|wait| wait.as_millis() as u64))
    }

    #[test]
    fn requests_that_run_are_counted_until_they_end() {
        let (account, now) = (Arc::<Account>::default(), Instant::now());
        let begin = || account.begin(&limits(0, 0, 2), now);
        let both = [begin().ok().unwrap(), begin().ok().unwrap()];
        assert_eq!(refused(begin()), (ClientLimit::Concurrent, None));
        drop(both);
        assert!(begin().is_ok());
    }

    #[test]
    fn a_minutes_requests_may_come_at_once_and_then_as_they_flow_back() {
        let (account, start) = (Arc::<Account>::default(), Instant::now());
        let begin = |millis| account.begin(&limits(30, 0, 0), start + Duration::from_millis(millis));
        assert!((0..30).all(|_| begin(0).is_ok()));
        assert_eq!(refused(begin(500)), (ClientLimit::Requests, Some(1500)));
        assert!(begin(2000).is_ok());
        assert_eq!(refused(begin(2000)), (ClientLimit::Requests, Some(2000)));
    }

    #[test]
    fn a_client_that_took_more_tokens_than_it_may_waits_until_they_have_flowed_back() {
        let (account, start) = (Arc::<Account>::default(), Instant::now());
        let limits = limits(0, 600, 0);
        assert!(account.begin(&limits, start).is_ok());
        account.spend(&limits, 1199, start);
        assert_eq!(refused(account.begin(&limits, start)), (ClientLimit::Tokens, Some(60_000)));
        assert!(account.begin(&limits, start + Duration::from_secs(60)).is_ok());
    }

    #[test]
    fn what_was_not_served_is_given_back_and_no_more_than_was_taken() {
        let (account, now) = (Arc::<Account>::default(), Instant::now());
        let limits = limits(1, 10, 0);
        assert!(account.begin(&limits, now).is_ok());
        account.spend(&limits, 10, now);
        assert_eq!(refused(account.begin(&limits, now)).0, ClientLimit::Tokens);
        account.give_back(&limits, 10, now);
        account.give_back(&limits, 10, now);
        assert!(account.begin(&limits, now).is_ok());
        assert_eq!(refused(account.begin(&limits, now)).0, ClientLimit::Requests);
    }

    proptest! {
        #[test]
        fn no_minute_has_more_requests_than_two_minutes_may(
            gaps in prop::collection::vec(0u64..5_000, 1..200), most in 1u64..20
        ) {
            let (account, start) = (Arc::<Account>::default(), Instant::now());
            let (mut at, mut begun) = (0, vec![]);
            for gap in gaps {
                at += gap;
                if account.begin(&limits(most, 0, 0), start + Duration::from_millis(at)).is_ok() {
                    begun.push(at);
                }
            }
            for first in &begun {
                let within = begun.iter().filter(|at| (*first..first + 60_000).contains(*at)).count() as u64;
                prop_assert!(within <= 2 * most, "{within}");
            }
        }
    }
}
