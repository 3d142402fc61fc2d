//! Time between two looks at a clock that may be set back.

use std::time::Duration;

use jiff::Timestamp;

/// The time from `since` to `now`; zero where the clock was set back.
pub(crate) fn elapsed(since: Timestamp, now: Timestamp) -> Duration {
    now.duration_since(since).try_into().unwrap_or(Duration::ZERO)
}
