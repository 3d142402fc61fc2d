//! Requests through all routes, over scripted workers.

use std::time::{Duration, Instant};

use axum::body::{Body as HttpBody, to_bytes};
use expertmesh_metrics::Registry;
use expertmesh_proto::latency::Histogram;
use expertmesh_proto::slot::Slot;
use expertmesh_proto::v1::report_response::State as WorkerState;
use serde_json::Value;
use tonic::Code;
use tower::ServiceExt;

use super::*;
use crate::frontend::access::AccessLog;
use crate::frontend::clients::Clients;
use crate::frontend::cors;
use crate::frontend::model::Model;
use crate::frontend::resume::Patience;
use crate::frontend::scripted::{Act, QUEUE_TIMEOUT, Stage, stage, token_at};
use crate::frontend::server::Settings;
use crate::metrics::clients::ClientMetrics;
use crate::tokenizer::tests::tiny_r1;

struct House {
    stage: Stage,
    server: Arc<Server>,
}

impl House {
    async fn open(scripts: &[&[Act]], max_requests: usize) -> Self {
        let stage = stage(scripts).await;
        let model = Model::load(&tiny_r1(), vec!["tiny-r1".to_string()], None).unwrap();
        let patience = Patience { stall: Duration::from_secs(5), queue: QUEUE_TIMEOUT };
        let settings = Settings { patience, max_requests, log: AccessLog::Text };
        let clients = Clients::anybody(ClientMetrics::new(&Registry::new()));
        Self::run(stage, model, clients, settings)
    }

    /// For clients with keys alone.
    async fn closed(keys: &[(&str, String)]) -> Self {
        let name = format!("expertmesh-keys-{}-{}", std::process::id(), keys[0].0);
        let folder = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        keys.iter().for_each(|(name, text)| std::fs::write(folder.join(name), text).unwrap());
        let clients = Clients::read(&folder, ClientMetrics::new(&Registry::new())).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        let House { stage, server } = Self::open(&[&[]], 8).await;
        let model = Model::load(&tiny_r1(), vec!["tiny-r1".to_string()], None).unwrap();
        let settings = Settings { patience: server.patience, max_requests: 8, log: AccessLog::Text };
        Self::run(stage, model, clients, settings)
    }

    fn run(stage: Stage, model: Model, clients: Clients, settings: Settings) -> Self {
        let server = Server::new(model, stage.workers.clone(), stage.metrics.clone(), clients, settings);
        Self { stage, server }
    }

    async fn call(&self, method: &str, path: &str, body: impl Into<HttpBody>) -> Response {
        let request = Request::builder().method(method).uri(path).body(body.into()).unwrap();
        router(self.server.clone()).oneshot(request).await.unwrap()
    }

    /// A request with a header, as it would come by a connection.
    async fn with(&self, method: &str, path: &str, header: (&str, &str), body: &str) -> Response {
        let request = Request::builder().method(method).uri(path).header(header.0, header.1);
        let request = request.body(HttpBody::from(body.to_string())).unwrap();
        router(self.server.clone()).oneshot(request).await.unwrap()
    }

    async fn chat(&self, more: Value) -> Response {
        let mut body =
            json!({"model": "tiny-r1", "messages": [{"role": "user", "content": "What is 46 + 37?"}]});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.call("POST", "/v1/chat/completions", body.to_string()).await
    }
}

async fn text(response: Response) -> String {
    String::from_utf8(to_bytes(response.into_body(), 1 << 20).await.unwrap().to_vec()).unwrap()
}

async fn value(response: Response) -> Value {
    serde_json::from_str(&text(response).await).unwrap()
}

/// The events of a stream, the last one being `[DONE]` or an error.
async fn events(response: Response) -> Vec<Value> {
    let data = |line: &str| {
        line.strip_prefix("data: ").map(|data| serde_json::from_str(data).unwrap_or(json!(data)))
    };
    text(response).await.lines().filter_map(data).collect()
}

/// What the scripted workers answer to the 15 tokens of the prompt: up to the stop token at position 40.
fn expected_tokens() -> Vec<u32> {
    (15..=40).map(token_at).collect()
}

fn joined(events: &[Value], path: &str) -> String {
    events.iter().filter_map(|event| event.pointer(path)?.as_str()).collect()
}

#[tokio::test]
async fn a_stream_adds_up_to_the_whole_answer_though_its_worker_dies() {
    let house = House::open(&[&[], &[]], 8).await;
    let whole = value(house.chat(json!({"return_token_ids": true})).await).await;
    assert_eq!(whole["choices"][0]["token_ids"], json!(expected_tokens()));
    assert_eq!(whole["choices"][0]["finish_reason"], "stop");
    let expected = json!({"prompt_tokens": 15, "completion_tokens": 26, "total_tokens": 41,
        "prompt_tokens_details": {"cached_tokens": 0}, "completion_tokens_details": {"reasoning_tokens": 25}});
    assert_eq!(whole["usage"], expected);

    let house = House::open(&[&[Act::Die(7)], &[Act::Move(9)]], 8).await;
    let wishes = json!({"stream": true, "stream_options": {"include_usage": true}, "return_token_ids": true});
    let events = events(house.chat(wishes).await).await;
    assert_eq!(
        joined(&events, "/choices/0/delta/reasoning_content"),
        whole["choices"][0]["message"]["reasoning_content"]
    );
    let ids = events.iter().filter_map(|event| event.pointer("/choices/0/token_ids")?.as_array()).flatten();
    assert_eq!(ids.cloned().collect::<Vec<_>>(), *whole["choices"][0]["token_ids"].as_array().unwrap());
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(
        (&events[0]["prompt_token_ids"], events[1].get("prompt_token_ids")),
        (&whole["prompt_token_ids"], None)
    );
    let [.., end, usage, done] = &events[..] else { panic!("{events:?}") };
    assert_eq!(end["choices"][0]["finish_reason"], "stop");
    assert_eq!((&usage["usage"], &usage["choices"], done), (&whole["usage"], &json!([]), &json!("[DONE]")));
}

#[tokio::test]
async fn a_stream_counts_as_it_goes_where_that_is_wanted() {
    let house = House::open(&[&[]], 8).await;
    let body = json!({"prompt": [[5, 6], [7]], "max_tokens": 3, "stream": true,
        "stream_options": {"include_usage": true, "continuous_usage_stats": true}});
    let events = events(house.call("POST", "/v1/completions", body.to_string()).await).await;
    let [chunks @ .., last, _done] = &events[..] else { panic!("{events:?}") };
    for chunk in chunks {
        let prompt = if chunk["choices"][0]["index"] == 0 { 2 } else { 1 };
        assert_eq!(chunk["usage"]["prompt_tokens"], prompt, "{chunk}");
    }
    let counts = |index| {
        let of_choice = chunks.iter().filter(move |chunk| chunk["choices"][0]["index"] == index);
        of_choice.map(|chunk| chunk["usage"]["completion_tokens"].as_u64().unwrap()).collect::<Vec<_>>()
    };
    for index in 0..2 {
        let counts = counts(index);
        assert!(counts.is_sorted() && counts.last() == Some(&3), "{counts:?}");
    }
    assert_eq!(
        (&last["usage"]["completion_tokens"], &last["usage"]["prompt_tokens"]),
        (&json!(6), &json!(3))
    );
}

#[tokio::test]
async fn logprobs_come_with_every_token_whole_and_streamed() {
    let house = House::open(&[&[Act::Die(3)]], 8).await;
    let wishes = json!({"logprobs": true, "top_logprobs": 2});
    let whole = value(house.chat(wishes).await).await;
    let content = whole["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 26);
    assert_eq!(content[25]["token"], "<｜end▁of▁sentence｜>");
    let top: Vec<_> =
        content[0]["top_logprobs"].as_array().unwrap().iter().map(|top| &top["logprob"]).collect();
    assert_eq!((top, &content[0]["logprob"]), (vec![&json!(-0.5), &json!(-1.0)], &json!(-0.5)));
    let wishes = json!({"logprobs": true, "top_logprobs": 2, "stream": true});
    let streamed = events(house.chat(wishes).await).await;
    let entries =
        streamed.iter().filter_map(|event| event.pointer("/choices/0/logprobs/content")?.as_array());
    assert_eq!(entries.flatten().cloned().collect::<Vec<_>>(), *content);
}

#[tokio::test]
async fn a_completions_offsets_are_where_its_tokens_begin() {
    let house = House::open(&[&[]], 8).await;
    let body = json!({"model": "tiny-r1", "prompt": vec![5; 500], "max_tokens": 12, "logprobs": 1});
    let whole = value(house.call("POST", "/v1/completions", body.to_string()).await).await;
    let (choice, logprobs) = (&whole["choices"][0], &whole["choices"][0]["logprobs"]);
    let text: Vec<char> = choice["text"].as_str().unwrap().chars().collect();
    let tokens = logprobs["tokens"].as_array().unwrap();
    assert_eq!(tokens.len(), 12);
    for (token, offset) in tokens.iter().zip(logprobs["text_offset"].as_array().unwrap()) {
        let here: String = text[offset.as_u64().unwrap() as usize..].iter().collect();
        assert!(here.starts_with(token.as_str().unwrap()), "{token} at {offset} of {text:?}");
    }
    assert_eq!(logprobs["token_logprobs"], json!(vec![-0.5; 12]));
    assert_eq!(logprobs["top_logprobs"][0].as_object().unwrap().len(), 1);
}

/// What an answer says of its seed: in a header, and in its last object that is JSON.
async fn told_seeds(response: Response) -> [u64; 2] {
    let header = response.headers()[&SEED].to_str().unwrap().parse().unwrap();
    let body = text(response).await;
    let objects = body.lines().map(|line| line.strip_prefix("data: ").unwrap_or(line));
    let last = objects.filter_map(|line| serde_json::from_str::<Value>(line).ok()).next_back().unwrap();
    [header, last["seed"].as_u64().unwrap()]
}

#[tokio::test]
async fn a_seed_that_is_not_given_is_drawn_told_and_goes_wherever_the_sequence_goes() {
    let house = House::open(&[&[Act::Die(3), Act::Move(3)]], 8).await;
    let mut drawn = Vec::new();
    for wishes in [
        json!({}),
        json!({"stream": true}),
        json!({"stream": true, "stream_options": {"include_usage": true}}),
    ] {
        let [header, field] = told_seeds(house.chat(wishes).await).await;
        assert_eq!(header, field);
        drawn.push(header);
    }
    let body = json!({"model": "tiny-r1", "prompt": [5], "stream": true}).to_string();
    let [header, field] = told_seeds(house.call("POST", "/v1/completions", body).await).await;
    assert_eq!(header, field);
    drawn.push(header);
    let different: std::collections::BTreeSet<_> = drawn.iter().collect();
    assert_eq!(different.len(), drawn.len());
    let tries: Vec<u64> = house.stage.seen(0).into_iter().map(|seen| seen.sampling.unwrap().seed).collect();
    // The first request came to its end in the third try.
    assert_eq!(tries, [&[drawn[0]; 2], &drawn[..]].concat());
    assert_eq!(told_seeds(house.chat(json!({"seed": 9})).await).await, [9, 9]);
}

#[tokio::test]
async fn a_request_that_is_repeated_under_its_name_has_its_seed_again() {
    let house = House::open(&[&[]], 8).await;
    let ask = async |name: &str| {
        let body = json!({"model": "tiny-r1", "prompt": [5], "max_tokens": 2}).to_string();
        let request =
            Request::post("/v1/completions").header(REQUEST_ID, name).body(HttpBody::from(body)).unwrap();
        told_seeds(router(house.server.clone()).oneshot(request).await.unwrap()).await[0]
    };
    assert_eq!(ask("one").await, ask("one").await);
    assert_ne!(ask("one").await, ask("two").await);
}

#[tokio::test]
async fn a_completion_carries_its_prompts_ids_in_every_choice() {
    let house = House::open(&[&[]], 8).await;
    let body =
        json!({"model": "tiny-r1", "prompt": [[5, 6], [7]], "max_tokens": 2, "return_token_ids": true});
    let whole = value(house.call("POST", "/v1/completions", body.to_string()).await).await;
    let ids: Vec<_> =
        whole["choices"].as_array().unwrap().iter().map(|choice| &choice["prompt_token_ids"]).collect();
    assert_eq!(ids, [&json!([5, 6]), &json!([7])]);
    assert_eq!(whole["choices"][1]["token_ids"], json!([101, 102]));
}

#[tokio::test]
async fn what_goes_wrong_before_the_first_token_has_a_status_and_after_it_an_event() {
    let house = House::open(&[&[Act::Refuse(Code::InvalidArgument)]], 8).await;
    let response = house.chat(json!({"stream": true})).await;
    assert_eq!(response.status(), StatusCode::BAD_REQUEST);
    assert_eq!(value(response).await["error"]["message"], "scripted");

    let dead = [Act::Die(0); 8];
    let house = House::open(&[&[&[Act::Die(2)][..], &dead].concat()], 8).await;
    let response = house.chat(json!({"stream": true})).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(events(response).await.last().unwrap()["error"]["code"], "interrupted");
}

#[tokio::test]
async fn without_a_worker_a_request_waits_and_is_then_told_to_come_back() {
    let house = House::open(&[&[]], 8).await;
    house.stage.players[0].state.send_replace(WorkerState::Loading);
    house.stage.until_eligible(0).await;
    let response = house.chat(json!({})).await;
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(response.headers().contains_key(header::RETRY_AFTER));
    assert_eq!(value(response).await["error"]["code"], "no_worker");
    let stream = house.chat(json!({"stream": true})).await;
    assert_eq!(events(stream).await.last().unwrap()["error"]["code"], "no_worker");
    house.stage.workers.fill_queue();
    let refused = timeout(QUEUE_TIMEOUT / 2, house.chat(json!({"stream": true}))).await.unwrap();
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE, "a full queue is no reason to wait");
    assert!(refused.headers().contains_key(header::RETRY_AFTER));
}

#[tokio::test]
async fn a_deployment_without_workers_holds_requests_until_one_comes() {
    let house = House::open(&[&[]], 8).await;
    let addresses = house.stage.place(&[]);
    house.stage.until_eligible(0).await;
    assert_eq!(house.server.readiness(), Ok(()));
    let come = async {
        house.stage.until_waiting(2).await;
        // Takes connections and never answers, as a pod that is gone may not.
        let gone = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addresses = [vec![gone.local_addr().unwrap().to_string()], addresses[0].clone()].concat();
        house.stage.place(&[addresses]);
        let placed = Instant::now();
        house.stage.until_waiting(0).await;
        (placed.elapsed(), gone)
    };
    let (whole, stream, (took, _gone)) =
        tokio::join!(house.chat(json!({})), house.chat(json!({"stream": true})), come);
    assert_eq!((whole.status(), stream.status()), (StatusCode::OK, StatusCode::OK));
    assert!(took < Duration::from_millis(900), "an address that does not answer held it up: {took:?}");
    assert_eq!(events(stream).await.last().unwrap(), "[DONE]");
}

#[tokio::test]
async fn a_slow_client_neither_slows_the_model_down_nor_looks_like_a_slow_model() {
    let house = House::open(&[&[]], 8).await;
    let wishes = json!({"stream": true, "max_tokens": 200, "ignore_eos": true});
    let mut body = house.chat(wishes.clone()).await.into_body().into_data_stream();
    while house.stage.tokens() < 65.0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // What it does not read pauses its sequence, and nobody else's.
    assert_eq!(events(house.chat(wishes).await).await.last().unwrap(), "[DONE]");
    assert!(house.stage.tokens() < 65.0 + 200.0 + 2.0, "{}", house.stage.tokens());
    tokio::time::sleep(Duration::from_millis(300)).await;
    while let Some(data) = body.next().await {
        drop(data.unwrap());
    }
    assert_eq!(house.stage.tokens(), 400.0);
    let report = house.server.latencies.report(Instant::now());
    let counts = |message: Option<_>| Histogram::from_proto(&message.unwrap()).unwrap();
    let (first, per_token) = (counts(report.first_token), counts(report.per_token));
    assert_eq!((first.count(), report.choices, counts(report.awaiting).count()), (2, 2, 0));
    assert!(per_token.count() >= 4, "{per_token:?}");
    assert_eq!(per_token.surely_above(Duration::from_millis(10)).count(), 0, "{per_token:?}");
}

#[tokio::test]
async fn one_request_too_many_is_refused_at_once_and_a_client_that_leaves_makes_room() {
    let house = House::open(&[&[Act::Stall(1)]], 1).await;
    let stalled = house.chat(json!({"stream": true})).await;
    assert_eq!(stalled.status(), StatusCode::OK);
    let refused = house.chat(json!({})).await;
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    assert!(refused.headers().contains_key(header::RETRY_AFTER));
    assert_eq!((*house.server.in_flight().borrow(), house.stage.workers.in_flight(Slot(0))), (1, Some(1)));
    drop(stalled);
    assert_eq!(*house.server.in_flight().borrow(), 0);
    house.stage.until_in_flight(Slot(0), 0).await;
    assert_eq!(house.chat(json!({})).await.status(), StatusCode::OK);
}

#[tokio::test]
async fn a_frontend_that_leaves_answers_what_comes_and_closes_its_connections() {
    let house = House::open(&[&[]], 8).await;
    assert_eq!(house.call("GET", "/health", "").await.status(), StatusCode::OK);
    house.server.leave();
    assert_eq!(house.server.readiness(), Err("draining".to_string()));
    assert_eq!(house.call("GET", "/health", "").await.status(), StatusCode::SERVICE_UNAVAILABLE);
    let response = house.chat(json!({})).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()[header::CONNECTION], "close");
}

#[tokio::test]
async fn bodies_are_read_in_bounded_memory() {
    let house = House::open(&[&[]], 8).await;
    let mut shares = Vec::new();
    let share = async || timeout(Duration::from_millis(50), house.server.reading.share(64 << 10)).await;
    while let Ok(share) = share().await {
        shares.push(share.unwrap());
    }
    assert!(timeout(Duration::from_millis(50), house.chat(json!({}))).await.is_err(), "it was read");
    drop(shares);
    assert_eq!(house.chat(json!({})).await.status(), StatusCode::OK);
    assert!(share().await.is_ok(), "a share was not given back");
}

#[tokio::test]
async fn a_request_has_the_name_that_it_came_with_and_otherwise_one_of_its_own() {
    let house = House::open(&[&[&[Act::Die(2)][..], &[Act::Die(0); 8]].concat()], 8).await;
    let body = json!({"prompt": [5], "max_tokens": 9, "stream": true}).to_string();
    let response = house.with("POST", "/v1/completions", ("x-request-id", "mine-7"), &body).await;
    assert_eq!(response.headers()[&REQUEST_ID], "mine-7");
    assert_eq!(events(response).await.last().unwrap()["error"]["request_id"], "mine-7");
    for (path, name) in [("/v1/nothing", "a-1"), ("/v1/models/other", "a-2"), ("/v1/completions", "a-3")] {
        let response = house.with("GET", path, ("x-request-id", name), "").await;
        assert_eq!(response.headers()[&REQUEST_ID], name);
        assert_eq!(value(response).await["error"]["request_id"], name);
    }
    let made = async || {
        let response = house.with("GET", "/v1/nothing", ("x-request-id", "two words"), "").await;
        let header = response.headers()[&REQUEST_ID].to_str().unwrap().to_string();
        assert_eq!(value(response).await["error"]["request_id"], header);
        header
    };
    assert_ne!(made().await, made().await);
}

#[tokio::test]
async fn a_stream_sends_its_head_while_it_waits() {
    let house = House::open(&[&[]], 8).await;
    house.stage.players[0].state.send_replace(WorkerState::Loading);
    house.stage.until_eligible(0).await;
    let begun = Instant::now();
    let response = house.chat(json!({"stream": true})).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert!(begun.elapsed() < QUEUE_TIMEOUT, "{:?}", begun.elapsed());
    let mut body = response.into_body().into_data_stream();
    assert_eq!(body.next().await.unwrap().unwrap(), ": waiting\n\n");
    house.stage.players[0].state.send_replace(WorkerState::Ready);
    let rest: Vec<u8> = body.map(|data| data.unwrap().to_vec()).collect::<Vec<_>>().await.concat();
    assert!(String::from_utf8(rest).unwrap().ends_with("data: [DONE]\n\n"));
}

#[tokio::test]
async fn a_page_of_a_browser_may_call_where_its_origin_is_allowed() {
    let house = House::open(&[&[]], 8).await;
    let allowed = async |origins: &str, method: &str, path: &str, asks: &str| {
        let origins: Vec<String> = origins.split(',').map(str::to_string).collect();
        let request = Request::builder().method(method).uri(path).header("origin", "http://app.test");
        let request = request.header("access-control-request-headers", "authorization,content-type");
        let request = request.header(asks, "POST").body(HttpBody::from(r#"{"prompt": [5]}"#)).unwrap();
        let router = router(house.server.clone()).layer(cors::layer(&origins).unwrap());
        let response = router.oneshot(request).await.unwrap();
        let header =
            |name: &str| response.headers().get(name).map(|value| value.to_str().unwrap().to_string());
        let [origin, methods, headers, exposed] =
            ["allow-origin", "allow-methods", "allow-headers", "expose-headers"]
                .map(|name| header(&format!("access-control-{name}")));
        assert_eq!(header("access-control-allow-credentials"), None);
        (
            response.status().as_u16(),
            origin,
            methods.is_some() && headers.is_some_and(|all| all == "authorization,content-type"),
            exposed,
        )
    };
    let any = || Some("*".to_string());
    const ASKS: &str = "access-control-request-method";
    let (status, origin, preflight, _) = allowed("*", "OPTIONS", "/v1/chat/completions", ASKS).await;
    assert_eq!((status, origin, preflight), (200, any(), true));
    let (status, origin, _, exposed) = allowed("*", "POST", "/v1/completions", "x-any").await;
    assert_eq!((status, origin), (200, any()));
    assert!(exposed.is_some_and(|headers| headers.contains("x-seed") && headers.contains("x-request-id")));
    let (status, origin, ..) = allowed("*", "GET", "/v1/nothing", "x-any").await;
    assert_eq!((status, origin), (404, any()));
    let (_, origin, ..) = allowed("http://app.test,http://b.test", "GET", "/v1/models", "x-any").await;
    assert_eq!(origin, Some("http://app.test".to_string()));
    for others in ["http://b.test", ""] {
        assert_eq!(allowed(others, "GET", "/v1/models", "x-any").await.1, None);
    }
    assert!(cors::layer(&["app.test".to_string()]).is_err());
}

#[tokio::test]
async fn every_refusal_has_the_shape_that_clients_read() {
    let house = House::open(&[&[]], 8).await;
    let large = vec![b' '; BODY_LIMIT + 1];
    for (method, path, body, status, code) in [
        ("GET", "/v1/nothing", vec![], 404, json!("not_found")),
        ("GET", "/v1/models/org/other", vec![], 404, json!("model_not_found")),
        ("GET", "/v1/chat/completions", vec![], 405, json!("method_not_allowed")),
        ("POST", "/v1/chat/completions", large, 413, json!("body_too_large")),
        ("POST", "/v1/completions/", b"{".to_vec(), 400, Value::Null),
        ("GET", "/v1/models/org/other/", vec![], 404, json!("model_not_found")),
    ] {
        let response = house.call(method, path, body).await;
        assert_eq!(response.status(), status, "{path}");
        let error = value(response).await["error"].take();
        assert_eq!(error["code"], code, "{path}");
        assert!(error["message"].is_string() && error["type"] == "invalid_request_error", "{path}: {error}");
    }
    assert_eq!(value(house.call("GET", "/v1/models", "").await).await["data"][0]["id"], "tiny-r1");
    for path in ["/v1/models/tiny-r1", "/v1/models/tiny-r1/"] {
        assert_eq!(value(house.call("GET", path, "").await).await["max_model_len"], 1024);
    }
    assert_eq!(house.call("GET", "/health/", "").await.status(), StatusCode::OK);
    let zipped = Request::post("/v1/completions").header(header::CONTENT_ENCODING, "gzip");
    let zipped =
        router(house.server.clone()).oneshot(zipped.body(HttpBody::from("x")).unwrap()).await.unwrap();
    assert_eq!(zipped.status(), StatusCode::UNSUPPORTED_MEDIA_TYPE);
    let message = value(zipped).await["error"]["message"].take();
    assert_eq!(message, "content-encoding: \"gzip\" is not supported; send the body as it is");
}

/// An entry for the key `secret`, with one limit.
fn limited(limit: &str, most: u32) -> String {
    use sha2::{Digest, Sha256};

    let hash: String = Sha256::digest("secret").iter().map(|byte| format!("{byte:02x}")).collect();
    json!({"key": format!("sha256:{hash}"), limit: most}).to_string()
}

#[tokio::test]
async fn what_no_worker_served_costs_a_client_nothing_of_its_limits() {
    let house = House::closed(&[("bob", limited("requestsPerMinute", 1))]).await;
    house.stage.players[0].state.send_replace(WorkerState::Loading);
    house.stage.until_eligible(0).await;
    let ask = |stream: bool| {
        let body = json!({"stream": stream, "messages": [{"role": "user", "content": "What is 46 + 37?"}]});
        let house = &house;
        async move {
            let key = ("authorization", "Bearer secret");
            house.with("POST", "/v1/chat/completions", key, &body.to_string()).await
        }
    };
    assert_eq!(ask(false).await.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(events(ask(true).await).await.last().unwrap()["error"]["code"], "no_worker");
    house.stage.players[0].state.send_replace(WorkerState::Ready);
    house.stage.until_eligible(1).await;
    let answered = ask(false).await;
    assert_eq!(answered.status(), StatusCode::OK);
    drop(text(answered).await);
    assert_eq!(ask(false).await.status(), StatusCode::TOO_MANY_REQUESTS);
}

#[tokio::test]
async fn without_a_key_nobody_is_answered_but_about_the_health() {
    let house = House::closed(&[("alice", limited("tokensPerMinute", 10))]).await;
    let body = r#"{"model":"tiny-r1","messages":[{"role":"user","content":"What is 46 + 37?"}]}"#;
    for path in ["/v1/chat/completions", "/v1/completions/", "/v1/models", "/v1/models/tiny-r1", "/metrics"] {
        for (header, code) in
            [(("x-other", "secret"), "missing_api_key"), (("x-api-key", "guess"), "invalid_api_key")]
        {
            let refused = house.with("POST", path, header, body).await;
            assert_eq!(refused.status(), StatusCode::UNAUTHORIZED, "{path}");
            assert_eq!(refused.headers()[header::WWW_AUTHENTICATE], "Bearer");
            let error = value(refused).await;
            assert_eq!(
                (&error["error"]["code"], &error["error"]["type"]),
                (&json!(code), &json!("authentication_error"))
            );
            assert!(!error.to_string().contains("guess"), "{error}");
        }
    }
    assert_ne!(house.call("GET", "/health", "").await.status(), StatusCode::UNAUTHORIZED);
    let key = ("authorization", "Bearer secret");
    assert_eq!(house.with("GET", "/v1/models", key, "").await.status(), StatusCode::OK);
    let answered = house.with("POST", "/v1/chat/completions", key, body).await;
    assert_eq!(answered.status(), StatusCode::OK);
    drop(text(answered).await);
    // 15 tokens of the prompt and 26 of the answer, of 10 a minute: 41 - 10 + 1, each of which takes 6 s.
    let refused = house.with("POST", "/v1/chat/completions", key, body).await;
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    let wait: u64 = refused.headers()[header::RETRY_AFTER].to_str().unwrap().parse().unwrap();
    assert!((180..=192).contains(&wait), "{wait}");
    let error = value(refused).await;
    assert_eq!(
        error["error"]["message"],
        format!("alice: its limit is 10 tokens a minute; try again in {wait} s")
    );
    assert_eq!(error["error"]["code"], "rate_limit_exceeded");
}

/// A stream's events as they are written, but for comments: each with its id, where it has one.
fn written(text: &str) -> Vec<(Option<String>, String)> {
    let events = text.split("\n\n").filter(|event| event.contains("data: "));
    let field =
        |event: &str, name: &str| event.lines().find_map(|line| line.strip_prefix(name).map(str::to_string));
    events.map(|event| (field(event, "id: "), field(event, "data: ").unwrap())).collect()
}

#[tokio::test]
async fn a_stream_goes_on_after_any_of_its_events_at_another_frontend() {
    let [one, other] = [House::open(&[&[]], 8).await, House::open(&[&[]], 8).await];
    let question = json!({"role": "user", "content": "What is 46 + 37?"});
    let body = json!({"messages": [question], "stream": true, "stream_options": {"include_usage": true}});
    let ask = |house: &House, header: (&'static str, String), body: &Value| {
        let (router, body) = (router(house.server.clone()), body.to_string());
        async move {
            let request =
                Request::builder().method("POST").uri("/v1/chat/completions").header(header.0, header.1);
            router.oneshot(request.body(HttpBody::from(body)).unwrap()).await.unwrap()
        }
    };
    let events = written(&text(ask(&one, ("x-other", String::new()), &body).await).await);
    assert!(events.len() > 20, "{events:?}");
    for (at, (id, _)) in events.iter().enumerate() {
        let Some(id) = id else { continue };
        let rest = written(&text(ask(&other, ("last-event-id", id.clone()), &body).await).await);
        assert_eq!(rest, events[at + 1..], "after {id}");
    }
    assert!(events[1..events.len() - 2].iter().all(|(id, _)| id.is_some()), "{events:?}");

    let id = events[5].0.clone().unwrap();
    let changed = |name: &str, value: Value| {
        let mut changed = body.clone();
        changed[name] = value;
        changed
    };
    let different = json!([{"role": "user", "content": "What is 46 + 38?"}]);
    for (name, value, status) in [
        ("messages", different, 409),
        ("seed", json!(1), 409),
        ("n", json!(2), 409),
        ("top_p", json!(0.5), 409),
        ("stop", json!("x"), 409),
        ("max_tokens", json!(9), 409),
        ("stream", json!(false), 400),
    ] {
        let refused = ask(&other, ("last-event-id", id.clone()), &changed(name, value)).await;
        assert_eq!(refused.status().as_u16(), status, "{name}");
    }
    let parts: Vec<&str> = id.split('.').collect();
    let another = [&parts[..4], &["fp_00000000", parts[5]]].concat().join(".");
    let refused = ask(&other, ("last-event-id", another), &body).await;
    assert_eq!(refused.status(), StatusCode::CONFLICT);
    assert!(text(refused).await.contains("fp_00000000 began the answer"));
    let refused = ask(&other, ("last-event-id", "made-up".to_string()), &body).await;
    assert_eq!(refused.status(), StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn each_choice_of_a_stream_goes_on_where_it_was() {
    let house = House::open(&[&[]], 8).await;
    let body = json!({"prompt": "What is", "n": 3, "max_tokens": 9, "seed": 4, "stream": true}).to_string();
    let ask = async |id: &str| {
        let header = if id.is_empty() { ("x-other", id) } else { ("last-event-id", id) };
        written(&text(house.with("POST", "/v1/completions", header, &body).await).await)
    };
    let of = |events: &[(Option<String>, String)], choice: usize| -> Vec<Value> {
        let events = events.iter().filter_map(|(_, data)| serde_json::from_str::<Value>(data).ok());
        events.filter(|event| event["choices"][0]["index"] == choice).collect()
    };
    let events = ask("").await;
    for at in 0..events.len() {
        let Some(id) = &events[at].0 else { continue };
        let rest = ask(id).await;
        for choice in 0..3 {
            let joined = [of(&events[..=at], choice), of(&rest, choice)].concat();
            assert_eq!(joined, of(&events, choice), "choice {choice} after {id}");
        }
    }
}
