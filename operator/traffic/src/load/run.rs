//! The open loop: every request is sent when it is due, however long the answers of others take.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::client::{Client, Target, Timing};
use super::trace::{Request, Trace};

/// What became of the requests of a trace.
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

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use axum::body::Body;
    use axum::http::StatusCode;
    use axum::response::{IntoResponse, Response};
    use axum::routing::{get, post};
    use axum::{Json, Router};
    use futures::{StreamExt as _, stream};
    use serde_json::{Value, json};

    use super::super::client::{Endpoint, Failure};
    use super::*;

    /// Answers as the model's name says.
    async fn answer(Json(request): Json<Value>) -> Response {
        let token = json!({"choices": [{"text": "a", "token_ids": [7]}]});
        let last = json!({"choices": [{"text": "b", "token_ids": [8], "finish_reason": "length"}]});
        let usage = json!({"choices": [], "usage": {"prompt_tokens": request["prompt"].as_array().map(Vec::len), "completion_tokens": 3}});
        let (mut events, mut wait) = (vec![token.clone(), token, last, usage], 100);
        match request["model"].as_str() {
            Some("busy") => {
                let error = json!({"error": {"message": "come back later"}});
                return (StatusCode::SERVICE_UNAVAILABLE, Json(error)).into_response();
            }
            Some("cut") => events.truncate(1),
            Some("broken") => events[1] = json!({"error": {"message": "no worker is left"}}),
            Some("stuck") => wait = 100_000,
            _ => {}
        }
        let mut lines: Vec<String> = events.iter().map(|event| format!("data: {event}\n\n")).collect();
        if events.len() > 1 {
            lines.push("data: [DONE]\n\n".into());
        }
        let lines = stream::iter(lines).then(move |line| async move {
            tokio::time::sleep(Duration::from_millis(wait)).await;
            Ok::<_, Infallible>(line)
        });
        Body::from_stream(lines).into_response()
    }

    async fn serve() -> Client {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let models = || async { Json(json!({"data": [{"id": "the model"}]})) };
        let router = Router::new().route("/v1/completions", post(answer)).route("/v1/models", get(models));
        tokio::spawn(async move { axum::serve(listener, router).await });
        Client::new(&url).unwrap()
    }

    async fn run(model: &str, (count, output): (u64, u32), max_in_flight: usize) -> Record {
        let request = |at: u64| Request { at: Duration::from_millis(20 * at), prompt: 5, output };
        let trace = Trace::new((0..count).map(request).collect(), Duration::from_millis(20 * count));
        let (endpoint, timeout) = (Endpoint::Completions, Duration::from_millis(2000));
        let target = Target { endpoint, model: model.into(), vocabulary: 1000, seed: 1, timeout };
        let sending = Loop { client: serve().await, target: Arc::new(target), max_in_flight };
        sending.run(&trace, std::future::pending(), |_| {}).await
    }

    fn failures(record: &Record) -> Vec<Option<Failure>> {
        record.timings.iter().map(|timing| timing.failure.clone()).collect()
    }

    #[tokio::test]
    async fn requests_are_sent_when_they_are_due_whatever_answers_take() {
        let record = run("any", (20, 3), 100).await;
        assert_eq!((record.sent, record.dropped, failures(&record)), (20, 0, vec![None; 20]));
        // One after the other they would take 20 times 400 ms.
        assert!(record.took < Duration::from_secs(4), "{:?}", record.took);
        for timing in &record.timings {
            assert_eq!((timing.prompt_tokens, timing.tokens), (5, 3));
            assert!(timing.first.unwrap() >= Duration::from_millis(100));
            assert!(timing.per_token().unwrap() >= Duration::from_millis(99), "{timing:?}");
        }
    }

    #[tokio::test]
    async fn what_is_due_beyond_the_bound_is_dropped_and_counted() {
        let record = run("stuck", (10, 3), 2).await;
        assert_eq!((record.sent, record.dropped), (2, 8));
        assert_eq!(failures(&record), [Some(Failure::Timeout), Some(Failure::Timeout)]);
    }

    #[tokio::test]
    async fn every_way_to_fail_has_its_name() {
        let failure = async |model, output| {
            let timing = run(model, (1, output), 1).await.timings.remove(0);
            (timing.failure.unwrap(), timing.message)
        };
        assert_eq!(failure("busy", 3).await, (Failure::Status(503), Some("come back later".into())));
        assert_eq!(failure("broken", 3).await, (Failure::Stream, Some("no worker is left".into())));
        assert_eq!(failure("cut", 3).await, (Failure::Cut, None));
        assert_eq!(failure("any", 4).await, (Failure::Short, None));
    }

    #[tokio::test]
    async fn it_can_be_ended_early() {
        let target = Target {
            endpoint: Endpoint::Completions,
            model: "any".into(),
            vocabulary: 1000,
            seed: 1,
            timeout: Duration::from_secs(9),
        };
        let sending = Loop { client: serve().await, target: Arc::new(target), max_in_flight: 9 };
        let request = |at: u64| Request { at: Duration::from_secs(at), prompt: 5, output: 3 };
        let trace = Trace::new((0..100).map(request).collect(), Duration::from_secs(100));
        let record = sending.run(&trace, tokio::time::sleep(Duration::from_millis(150)), |_| {}).await;
        assert!(record.ended_early && record.took < Duration::from_secs(50));
        assert_eq!(failures(&record), [Some(Failure::Ended)]);
    }

    #[tokio::test]
    async fn the_model_is_asked_for_where_none_is_named() {
        assert_eq!(serve().await.model().await.unwrap(), "the model");
        let refused = Client::new("http://127.0.0.1:1").unwrap().model().await.unwrap_err();
        assert!(format!("{refused:#}").starts_with("http://127.0.0.1:1/v1/models: "), "{refused:#}");
        for (url, problem) in [("https://host", "TLS is not spoken"), ("host:8000", "expected http://HOST")] {
            let error = Client::new(url).err().unwrap();
            assert!(format!("{error:#}").contains(problem), "{error:#}");
        }
    }
}
