//! Whether the process at the other end of a stream still runs.

use std::pin::pin;
use std::time::Duration;

use tokio::time::{Instant, sleep};

/// How often a process that has nothing else to say says that it runs.
pub const HEARTBEAT: Duration = Duration::from_millis(200);
/// How many heartbeats may be missed: the verdict on a process that was stopped or cut off comes after 600 ms.
const MISSED: u32 = 3;

/// Nothing came from a process for as long as it takes to miss the heartbeats that may be missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no word for {} ms", (HEARTBEAT * MISSED).as_millis())]
pub struct Silent;

/// Waits for what comes next from a process that sends heartbeats.
///
/// Time in which this process did not run itself is not held against the other one: whoever is starved of processors, or was
/// stopped, hears late.
///
/// # Errors
///
/// Where nothing comes.
pub async fn hear<T>(next: impl Future<Output = T>) -> Result<T, Silent> {
    let mut next = pin!(next);
    let mut missed = 0;
    while missed < MISSED {
        let began = Instant::now();
        tokio::select! {
            biased;
            heard = &mut next => return Ok(heard),
            () = sleep(HEARTBEAT) => missed = if began.elapsed() < HEARTBEAT * 2 { missed + 1 } else { 0 },
        }
    }
    Err(Silent)
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_silent_process_is_noticed_and_one_that_speaks_is_heard() {
        assert_eq!(hear(ready(7)).await, Ok(7));
        let late = async {
            sleep(HEARTBEAT * 2).await;
            7
        };
        assert_eq!(hear(late).await, Ok(7));
        let began = Instant::now();
        assert_eq!(hear(pending::<u32>()).await, Err(Silent));
        assert_eq!(began.elapsed(), Duration::from_millis(600));
    }

    #[tokio::test(start_paused = true)]
    async fn time_in_which_nothing_ran_here_is_nobodys_silence() {
        let began = Instant::now();
        let starved = async {
            tokio::task::yield_now().await;
            tokio::time::advance(Duration::from_secs(5)).await;
            pending::<u32>().await
        };
        assert_eq!(hear(starved).await, Err(Silent));
        assert!(began.elapsed() >= Duration::from_millis(5600));
    }
}
