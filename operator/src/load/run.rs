//! The open loop: every request is sent when it is due, however long the answers of others take.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::client::{Client, Target, Timing};
use super::trace::{Request, Trace};

/// What happened.
#[derive(Debug, Default)]
pub(crate) struct Record {
    /// In the order of their ends.
    pub(crate) timings: Vec<Timing>,
    pub(crate) sent: usize,
    pub(crate) failed: usize,
    /// Those that were not sent, since as many as may be were in flight.
    pub(crate) dropped: usize,
    /// Until the last one was sent, and until the last answer ended.
    pub(crate) sending: Duration,
    pub(crate) took: Duration,
    /// By Ctrl-C, before everything was sent and answered.
    pub(crate) ended_early: bool,
}

/// How many there are, for a line of progress.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Progress {
    pub(crate) sent: usize,
    pub(crate) in_flight: usize,
    pub(crate) failed: usize,
}

pub(crate) struct Loop {
    pub(crate) client: Client,
    pub(crate) target: Arc<Target>,
    /// Requests at the same time.
    pub(crate) max_in_flight: usize,
}

impl Loop {
    /// Sends the trace, until all is answered or `stop` is ready. `show` is told about twice a second at least.
    pub(crate) async fn run(
        &self,
        trace: &Trace,
        stop: impl Future<Output = ()>,
        show: impl Fn(Progress),
    ) -> Record {
        let begin = Instant::now();
        let mut record = Record::default();
        let mut flights = JoinSet::new();
        tokio::pin!(stop);
        let mut ticks = tokio::time::interval(Duration::from_millis(500));
        let mut requests = trace.requests.iter().enumerate().peekable();
        loop {
            let due = requests.peek().map(|(_, request)| begin + request.at);
            if due.is_none() && flights.is_empty() {
                break;
            }
            let sleep = tokio::time::sleep_until(due.unwrap_or(begin).into());
            tokio::select! {
                biased;
                () = &mut stop => {
                    record.ended_early = true;
                    break;
                }
                () = sleep, if due.is_some() => {
                    if let Some((number, &request)) = requests.next() {
                        self.depart(request, (number, begin + request.at), &mut flights, &mut record);
                    }
                    record.sending = begin.elapsed();
                }
                Some(Ok(timing)) = flights.join_next(), if !flights.is_empty() => record.arrive(timing),
                _ = ticks.tick() => show(record.progress(flights.len())),
            }
        }
        record.took = begin.elapsed();
        (0..flights.len()).for_each(|_| record.arrive(Timing::ended()));
        record
    }

    fn depart(
        &self,
        request: Request,
        (number, due): (usize, Instant),
        flights: &mut JoinSet<Timing>,
        record: &mut Record,
    ) {
        if flights.len() >= self.max_in_flight {
            record.dropped += 1;
            return;
        }
        record.sent += 1;
        let (client, target) = (self.client.clone(), self.target.clone());
        flights.spawn(async move { client.send(&target, request, (number, due)).await });
    }
}

impl Record {
    fn arrive(&mut self, timing: Timing) {
        self.failed += usize::from(timing.failure.is_some());
        self.timings.push(timing);
    }

    fn progress(&self, in_flight: usize) -> Progress {
        Progress { sent: self.sent, in_flight, failed: self.failed }
    }
}
