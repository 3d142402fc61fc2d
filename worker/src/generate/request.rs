//! One sequence on a backend of this process.

use std::io;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use expertmesh_engine::{Backend, Draw, History, LocalExchange, Logprobs, Sampled, forward};
use expertmesh_model::sampling::Sampling;
use expertmesh_scheduler::{BlockAllocator, Span, Step};

use crate::end::End;
use crate::process::Fatal;

/// A prompt, and how it is to be continued.
#[derive(Clone, Copy)]
pub(super) struct Request<'a> {
    pub(super) prompt: &'a [u32],
    /// The most tokens to generate after the prompt.
    pub(super) limit: usize,
    pub(super) sampling: &'a Sampling,
    /// Alternatives to log for each token; `None`: no log-probabilities at all.
    pub(super) logprobs: Option<usize>,
}

/// What a prompt was continued by, and how long that took.
pub(super) struct Generated {
    pub(super) tokens: Vec<u32>,
    pub(super) logprobs: Vec<Logprobs>,
    pub(super) end: End,
    prefill: Duration,
    decode: Duration,
}

impl Request<'_> {
    /// Continues the prompt. `emit` gets each token, and whether it is one that ends the sequence; it may end it too.
    pub(super) fn generate<B: Backend>(
        &self,
        backend: &B,
        mut emit: impl FnMut(u32, bool) -> io::Result<ControlFlow<()>>,
    ) -> Result<Generated, Fatal> {
        let mut sequence = Sequence::new(backend, self)?;
        let start = Instant::now();
        let mut history = History::new(self.sampling, self.prompt, self.prompt.len());
        let chunk = backend.step_rows();
        let mut drawn = None;
        for (index, tokens) in self.prompt.chunks(chunk).enumerate() {
            drawn = sequence.compute(index * chunk, tokens, &history)?;
        }
        let prefilled = Instant::now();
        let (mut tokens, mut logged, mut end) = (Vec::new(), Vec::new(), End::Length);
        while tokens.len() < self.limit
            && let Some(Sampled { token, logprobs }) = drawn.take()
        {
            let (position, ends) = (history.len(), self.sampling.ends(token, history.generated()));
            logged.extend(logprobs);
            tokens.push(token);
            history.push(token);
            if emit(token, ends).map_err(output_failed)?.is_break() || ends {
                end = End::Stop;
                break;
            }
            if tokens.len() < self.limit {
                drawn = sequence.compute(position, &[token], &history)?;
            }
        }
        let (prefill, decode) = (prefilled - start, prefilled.elapsed());
        Ok(Generated { tokens, logprobs: logged, end, prefill, decode })
    }
}

/// The only sequence of a backend.
struct Sequence<'a, B: Backend> {
    backend: &'a B,
    request: &'a Request<'a>,
    queue: B::Queue,
    kv: B::Kv,
    exchange: LocalExchange,
    blocks: Vec<u32>,
}

impl<'a, B: Backend> Sequence<'a, B> {
    fn new(backend: &'a B, request: &'a Request<'a>) -> Result<Self, Fatal> {
        let blocks = BlockAllocator::needed(request.prompt.len() + request.limit);
        let exchange = LocalExchange::new(backend);
        let exchange = exchange.map_err(|error| Fatal::new("NotResident", error.to_string()))?;
        let (queue, kv) = (backend.queue()?, backend.allocate_kv(blocks)?);
        Ok(Self { backend, request, queue, kv, exchange, blocks: (0..blocks as u32).collect() })
    }

    /// Computes rows from position `start` on. After the sequence's last one, the token that comes next.
    fn compute(&mut self, start: usize, tokens: &[u32], history: &History) -> Result<Option<Sampled>, Fatal> {
        let Self { backend, queue, kv, exchange, .. } = self;
        let last = start + tokens.len() == history.len();
        let span = Span { tokens: tokens.to_vec(), start, blocks: self.blocks.clone(), logits: last };
        let step = Step { spans: vec![span] };
        let Ok(logits) = forward(*backend, queue, &step, kv, exchange, None); // (1 or 0, vocabulary)
        if !last {
            return Ok(None);
        }
        let Request { sampling, logprobs, .. } = *self.request;
        let draw = Draw { row: 0, sampling, history, logprobs };
        match backend.sample(queue, &logits, &[draw]).wait().pop().flatten() {
            Some(sampled) => Ok(Some(sampled)),
            None => Err(Fatal::new("NotFinite", "the logits are not finite")),
        }
    }
}

impl Generated {
    /// Says on stderr how fast the prompt and the tokens after it were computed.
    pub(super) fn report(&self, prompt: usize, seed: u64) {
        let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
        let decoded = self.tokens.len().saturating_sub(1); // the first token is the prompt's
        eprintln!(
            "prompt: {prompt} tokens, {:.0} tokens/s; decode: {decoded} tokens, {:.0} tokens/s; seed: {seed}",
            rate(prompt, self.prefill),
            rate(decoded, self.decode),
        );
    }
}

/// The failure of a write to stdout.
pub(super) fn output_failed(error: io::Error) -> Fatal {
    Fatal::new("OutputFailed", format!("stdout: {error}"))
}

#[cfg(test)]
mod tests {
    use expertmesh_engine::{CpuBackend, LoadOptions};
    use expertmesh_model::sampling::SamplingParams;

    use super::*;
    use crate::source::{Found, load};
    use crate::tokenizer::tests::tiny_r1;

    #[derive(serde::Deserialize)]
    struct Conversation {
        ids: Vec<u32>,
        prompt_len: usize,
        top: Vec<[(u32, f32); 2]>,
    }

    fn generate(backend: &CpuBackend, request: Request<'_>) -> Generated {
        request.generate(backend, |_, _| Ok(ControlFlow::Continue(()))).unwrap()
    }

    fn sampling(params: SamplingParams) -> Sampling {
        Sampling::new(params).unwrap()
    }

    #[test]
    fn greedy_answers_are_transformers_where_no_token_was_close() {
        let backend = load(&Found::here(&tiny_r1()), &LoadOptions::default()).unwrap();
        let heldout = std::fs::read(tiny_r1().join("heldout.json")).unwrap();
        let conversations: Vec<Conversation> = serde_json::from_slice(&heldout).unwrap();
        let clear = |conversation: &&Conversation| {
            conversation.top[conversation.prompt_len - 1..]
                .iter()
                .all(|[first, second]| first.1 - second.1 > 0.02)
        };
        let greedy = sampling(SamplingParams { temperature: 0.0, ..Default::default() })
            .ending(backend.config().eos.clone(), 0);
        let mut compared = 0;
        for Conversation { ids, prompt_len, .. } in conversations.iter().filter(clear) {
            let (prompt, answer) = ids.split_at(*prompt_len);
            let request = Request { prompt, limit: answer.len(), sampling: &greedy, logprobs: None };
            let generated = generate(&backend, request);
            assert_eq!(generated.tokens, answer);
            let ended = answer.ends_with(&backend.config().eos);
            assert_eq!(generated.end, if ended { End::Stop } else { End::Length });
            compared += 1;
        }
        assert!(compared > 20, "{compared} of {}", conversations.len());
    }

    #[test]
    fn a_long_prompt_goes_in_chunks_and_an_answer_ends_where_the_context_does() {
        let backend = load(&Found::here(&tiny_r1()), &LoadOptions::default()).unwrap();
        let prompt: Vec<u32> = (0..1000).map(|i| i * 7 % 1500 + 10).collect();
        let sampling = sampling(SamplingParams { seed: 3, ..Default::default() });
        let request = Request { prompt: &prompt, limit: 24, sampling: &sampling, logprobs: None };
        let generated = generate(&backend, request);
        assert_eq!((generated.tokens.len(), generated.end), (24, End::Length));
        assert!(generated.logprobs.is_empty());
        // A sequence that goes on elsewhere, from any of its tokens, goes on the same.
        let (before, after) = generated.tokens.split_at(10);
        let resumed = [&prompt[..], before].concat();
        assert_eq!(generate(&backend, Request { prompt: &resumed, limit: 14, ..request }).tokens, after);
    }

    #[test]
    fn the_greedy_token_is_the_most_probable_one_and_early_ends_do_not_come() {
        let backend = load(&Found::here(&tiny_r1()), &LoadOptions::default()).unwrap();
        let greedy = sampling(SamplingParams { temperature: 0.0, ..Default::default() });
        let prompt = [0, 2, 100, 101, 3];
        let request = Request { prompt: &prompt, limit: 12, sampling: &greedy, logprobs: Some(2) };
        let generated = generate(&backend, request);
        for (&token, logged) in generated.tokens.iter().zip(&generated.logprobs) {
            assert_eq!((logged.top.len(), logged.top[0]), (2, (token, logged.logprob)));
            assert!(logged.top[1].1 <= logged.logprob && logged.logprob <= 0.0);
        }
        // What came is now impossible until eight tokens are there, and then it ends the sequence.
        let ending = greedy.clone().ending(generated.tokens[..3].to_vec(), 8);
        let other = generate(&backend, Request { sampling: &ending, ..request });
        assert_ne!(other.tokens[0], generated.tokens[0]);
        assert!(other.tokens.iter().take(8).all(|token| !generated.tokens[..3].contains(token)));
        // Whoever reads may end it too.
        let left = request.generate(&backend, |_, _| Ok(ControlFlow::Break(()))).unwrap();
        assert_eq!((left.tokens.len(), left.end), (1, End::Stop));
    }
}
