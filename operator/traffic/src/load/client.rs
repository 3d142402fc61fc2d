//! One request to an OpenAI-compatible endpoint, timed as its answer streams in.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use clap::ValueEnum;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Response, StatusCode, Uri, header};
use hyper_util::client::legacy::Client as Pool;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};

use super::answer::Answer;
use super::random::Random;
use super::trace::Request;

/// Of an answer that is not a stream: a list of models, or an error.
const MAX_BODY: usize = 1 << 20;
/// The words that a prompt is made of where it is no list of ids.
const WORDS: [&str; 8] = ["one", "day", "the", "sea", "was", "calm", "and", "blue"];
/// The stream of random numbers that prompts are made of.
const PROMPT: u64 = 6;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Endpoint {
    /// /v1/completions, prompts as token ids: lengths are exact.
    Completions,
    /// /v1/chat/completions, prompts as words: about a token each.
    Chat,
}

/// What requests are made of, beside their lengths.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) endpoint: Endpoint,
    pub(crate) model: String,
    /// Ids of prompts are below it.
    pub(crate) vocabulary: u32,
    pub(crate) seed: u64,
    pub(crate) timeout: Duration,
}

#[derive(Clone)]
pub(crate) struct Client {
    pool: Pool<HttpConnector, Full<Bytes>>,
    /// Without a slash at its end.
    base: Arc<str>,
}

/// What a client waited for in one request, and what it got.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Timing {
    /// How long after it was due it was sent.
    pub(crate) late: Duration,
    /// From the moment at which it was due, so that a late generator flatters nobody.
    pub(crate) first: Option<Duration>,
    pub(crate) end: Duration,
    /// From the first token to the last.
    pub(crate) decoding: Duration,
    pub(crate) prompt_tokens: u32,
    pub(crate) tokens: u32,
    pub(crate) failure: Option<Failure>,
    /// What the server said of it.
    pub(crate) message: Option<String>,
}

/// Why a request is none that was answered; few kinds, so that they can be counted.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub(crate) enum Failure {
    #[error("no connection")]
    Connect,
    #[error("HTTP {0}")]
    Status(u16),
    #[error("error in the stream")]
    Stream,
    #[error("cut off before its end")]
    Cut,
    #[error("fewer tokens than asked for")]
    Short,
    #[error("timed out")]
    Timeout,
    #[error("ended by Ctrl-C")]
    Ended,
}

impl Client {
    pub(crate) fn new(url: &str) -> anyhow::Result<Self> {
        let uri: Uri = url.parse().with_context(|| format!("--url {url}"))?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => bail!(
                "--url {url}: TLS is not spoken here; use http://, such as through kubectl port-forward"
            ),
            _ => bail!("--url {url}: expected http://HOST:PORT"),
        }
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let pool = Pool::builder(TokioExecutor::new()).build(connector);
        let base = url.trim_end_matches('/').trim_end_matches("/v1").trim_end_matches('/');
        Ok(Self { pool, base: base.into() })
    }

    /// The one model that is served.
    pub(crate) async fn model(&self) -> anyhow::Result<String> {
        let path = format!("{}/v1/models", self.base);
        let list = async {
            let response =
                self.pool.request(request(Method::GET, &path, Bytes::new())?).await.map_err(cause)?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_BODY).collect().await;
            let body = body.map_err(|error| anyhow::anyhow!(error))?.to_bytes();
            ensure!(status == StatusCode::OK, "HTTP {status}");
            Ok(serde_json::from_slice::<Value>(&body)?)
        };
        let list: Value = list.await.with_context(|| path.clone())?;
        let models: Vec<&str> =
            list["data"].as_array().into_iter().flatten().filter_map(|one| one["id"].as_str()).collect();
        match models[..] {
            [model] => Ok(model.to_string()),
            [] => bail!("{path}: no model; name one by --model"),
            _ => bail!("{path}: {}; choose one by --model", models.join(", ")),
        }
    }

    /// Sends the request numbered `number`, which was due at `due`, and reads its answer to the end.
    pub(crate) async fn send(
        &self,
        target: &Target,
        request: Request,
        (number, due): (usize, Instant),
    ) -> Timing {
        let mut timing = Timing { late: due.elapsed(), ..Timing::new(request.prompt) };
        let mut answer = Answer::default();
        let sent = self.exchange(target, (request, number), due, (&mut timing, &mut answer));
        let result = tokio::time::timeout(target.timeout, sent).await;
        timing.end = due.elapsed();
        timing.tokens = answer.completion_tokens();
        timing.prompt_tokens = answer.usage.map_or(request.prompt, |usage| usage.prompt_tokens);
        timing.message = timing.message.or(answer.error.clone());
        timing.failure = match result {
            Err(_) => Some(Failure::Timeout),
            Ok(Err(failure)) => Some(failure),
            Ok(Ok(())) if answer.error.is_some() => Some(Failure::Stream),
            Ok(Ok(())) if !answer.is_whole() => Some(Failure::Cut),
            Ok(Ok(())) if timing.tokens < request.output => Some(Failure::Short),
            Ok(Ok(())) => None,
        };
        timing
    }

    async fn exchange(
        &self,
        target: &Target,
        (request, number): (Request, usize),
        due: Instant,
        (timing, answer): (&mut Timing, &mut Answer),
    ) -> Result<(), Failure> {
        let message = target.message(&self.base, request, number).map_err(|_| Failure::Connect)?;
        let response = self
            .pool
            .request(message)
            .await
            .map_err(|error| if error.is_connect() { Failure::Connect } else { Failure::Cut })?;
        let status = response.status();
        if status != StatusCode::OK {
            timing.message = explanation(response).await;
            return Err(Failure::Status(status.as_u16()));
        }
        read(response, |bytes| {
            if answer.take(bytes) {
                let now = due.elapsed();
                timing.decoding = now - *timing.first.get_or_insert(now);
            }
        })
        .await
    }
}

/// What the body of an error says.
async fn explanation(response: Response<Incoming>) -> Option<String> {
    let body = Limited::new(response.into_body(), MAX_BODY).collect().await.ok()?.to_bytes();
    let error: Value = serde_json::from_slice(&body).ok()?;
    Some(error["error"]["message"].as_str()?.to_string())
}

async fn read(response: Response<Incoming>, mut take: impl FnMut(&[u8])) -> Result<(), Failure> {
    let mut body = response.into_body();
    while let Some(frame) = body.frame().await {
        if let Some(bytes) = frame.map_err(|_| Failure::Cut)?.data_ref() {
            take(bytes);
        }
    }
    Ok(())
}

impl Timing {
    fn new(prompt: u32) -> Self {
        let zero = Duration::ZERO;
        Self {
            late: zero,
            first: None,
            end: zero,
            decoding: zero,
            prompt_tokens: prompt,
            tokens: 0,
            failure: None,
            message: None,
        }
    }

    /// Of one that was given up.
    pub(crate) fn ended() -> Self {
        Self { failure: Some(Failure::Ended), ..Self::new(0) }
    }

    /// Time per token after the first; none where there is no second.
    pub(crate) fn per_token(&self) -> Option<Duration> {
        let more = self.tokens.checked_sub(1).filter(|more| *more > 0)?;
        Some(self.decoding / more)
    }
}

impl Target {
    fn message(
        &self,
        base: &str,
        request: Request,
        number: usize,
    ) -> anyhow::Result<hyper::Request<Full<Bytes>>> {
        let mut random = Random::new(self.seed.wrapping_add(number as u64), PROMPT);
        let mut body = json!({
            "model": self.model,
            "stream": true,
            "stream_options": {"include_usage": true},
            "max_tokens": request.output,
            "min_tokens": request.output,
            "ignore_eos": true,
            "return_token_ids": true,
            "seed": number,
        });
        let path = match self.endpoint {
            Endpoint::Completions => {
                let ids: Vec<u32> = (0..request.prompt)
                    .map(|_| random.between(self.vocabulary / 8, self.vocabulary - 1))
                    .collect();
                body["prompt"] = json!(ids);
                "/v1/completions"
            }
            Endpoint::Chat => {
                let word = |_| WORDS[random.between(0, WORDS.len() as u32 - 1) as usize];
                let words: Vec<&str> = (0..request.prompt).map(word).collect();
                body["messages"] = json!([{"role": "user", "content": words.join(" ")}]);
                "/v1/chat/completions"
            }
        };
        self::request(Method::POST, &format!("{base}{path}"), serde_json::to_vec(&body)?.into())
    }
}

fn request(method: Method, url: &str, body: Bytes) -> anyhow::Result<hyper::Request<Full<Bytes>>> {
    let builder =
        hyper::Request::builder().method(method).uri(url).header(header::CONTENT_TYPE, "application/json");
    Ok(builder.body(Full::new(body))?)
}

/// The innermost cause says it best.
fn cause(error: hyper_util::client::legacy::Error) -> anyhow::Error {
    let mut source: &dyn std::error::Error = &error;
    while let Some(inner) = source.source() {
        source = inner;
    }
    anyhow::anyhow!("{source}")
}
