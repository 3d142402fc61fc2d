//! `expertmesh-worker generate`: one process, all experts, tokens as they come.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use expertmesh_engine::{
    Backend, BlockAllocator, CpuBackend, GenerationConfig, LocalExchange, ModelConfig, Sampling,
    SamplingOverrides, Span, Step, forward, sample,
};
use indicatif::{ProgressBar, ProgressStyle};

use crate::process::Fatal;
use crate::template::{ChatTemplate, Message};
use crate::tokenizer::Tokenizer;

/// Rows of the prompt that are computed at a time.
const CHUNK: usize = 256;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Directory of the model: config.json, safetensors, tokenizer.json
    #[arg(long)]
    model: PathBuf,
    /// The text to continue, or with --chat the user's message
    #[arg(long)]
    prompt: String,
    /// Render the prompt with the model's chat template
    #[arg(long)]
    chat: bool,
    /// Stop after so many tokens; default: when the context is full
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// Go on after the end of the sequence, as long as --max-tokens and the context allow
    #[arg(long)]
    ignore_eos: bool,
    /// 0 takes the most probable token; default: the model's generation_config.json
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Sample from the most probable tokens that together have this probability
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f32>,
    /// Sample from so many most probable tokens; 0: from all
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,
    /// The same seed and prompt give the same tokens
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print one JSON object at the end instead of text as it comes
    #[arg(long)]
    json: bool,
}

/// What one prompt led to.
#[derive(serde::Serialize)]
struct Answer<'a> {
    prompt_tokens: &'a [u32],
    /// The ending end-of-sequence token included.
    tokens: &'a [u32],
    text: String,
    finish_reason: &'static str,
}

pub(crate) fn run(args: Args) -> Result<ExitCode, Fatal> {
    let config = ModelConfig::read(&args.model)?;
    let generation = GenerationConfig::read(&args.model, &config)?;
    let sampling = generation
        .sampling(&args.overrides())
        .map_err(|error| Fatal::new("InvalidSampling", error.to_string()))?;
    let tokenizer = Tokenizer::load(&args.model)?;
    let prompt = encode(&args, &tokenizer, &config)?;
    let limit = args.max_tokens.unwrap_or(usize::MAX).min(config.max_positions() - prompt.len());
    let backend = load(&args.model)?;

    let mut out = io::stdout().lock();
    let mut stream = tokenizer.stream();
    let mut print = |text: Option<String>| match text {
        Some(text) if !args.json => out.write_all(text.as_bytes()).and_then(|()| out.flush()),
        _ => Ok(()),
    };
    let eos: &[u32] = if args.ignore_eos { &[] } else { generation.eos_tokens() };
    let request = Request { prompt: &prompt, limit, eos, sampling: &sampling };
    let generated = request.generate(&backend, |token| print(stream.push(token)))?;
    print(stream.finish()).map_err(output_failed)?;
    if args.json {
        let (tokens, finish_reason) = (&generated.tokens, generated.finish_reason);
        let text = tokenizer.decode(tokens);
        serde_json::to_writer(&mut out, &Answer { prompt_tokens: &prompt, tokens, text, finish_reason })
            .map_err(|error| output_failed(error.into()))?;
    }
    writeln!(out).map_err(output_failed)?;
    generated.report(prompt.len());
    Ok(ExitCode::SUCCESS)
}

impl Args {
    fn overrides(&self) -> SamplingOverrides {
        let Self { temperature, top_p, top_k, seed, .. } = *self;
        SamplingOverrides { temperature, top_p, top_k, seed: Some(seed), min_p: None }
    }
}

/// The prompt's tokens; they leave room for at least one more.
fn encode(args: &Args, tokenizer: &Tokenizer, config: &ModelConfig) -> Result<Vec<u32>, Fatal> {
    let invalid = |problem: String| Fatal::new("InvalidPrompt", format!("--prompt: {problem}"));
    let template = ChatTemplate::load(&args.model)?;
    let text = if args.chat {
        let message = Message { role: "user".to_owned(), content: args.prompt.clone() };
        let rendered = template.render(&[message], true);
        rendered.map_err(|error| Fatal::new(error.reason(), error.to_string()))?
    } else {
        args.prompt.clone()
    };
    let mut tokens = tokenizer.encode(&text).map_err(|error| invalid(error.to_string()))?;
    let bos = template.leading_bos().and_then(|bos| tokenizer.id(bos));
    if let Some(bos) = bos.filter(|bos| !args.chat && tokens.first() != Some(bos)) {
        tokens.insert(0, bos);
    }
    let (count, most) = (tokens.len(), config.max_positions());
    match tokens.iter().find(|&&token| token as usize >= config.vocabulary()) {
        Some(token) => Err(invalid(format!("tokenizer.json has token {token}, which the model has not"))),
        None if tokens.is_empty() => Err(invalid("no tokens".to_owned())),
        None if count >= most => Err(invalid(format!("{count} tokens leave no room in a context of {most}"))),
        None => Ok(tokens),
    }
}

/// The model with all its experts; a progress bar where stderr is a terminal.
pub(crate) fn load(model: &Path) -> Result<CpuBackend, Fatal> {
    let config = ModelConfig::read(model)?;
    let experts = config.moe_layers().count() * config.experts();
    let bar = ProgressBar::new(config.dense_bytes() + experts as u64 * config.expert_bytes());
    let style = ProgressStyle::with_template("loading {bar:40} {bytes}/{total_bytes} {binary_bytes_per_sec}");
    bar.set_style(style.expect("the template is a constant"));
    let backend = CpuBackend::load(model, |done, _| bar.set_position(done))?;
    for layer in config.moe_layers() {
        for expert in 0..config.experts() as u32 {
            bar.inc(backend.load(layer, expert)?);
        }
    }
    bar.finish_and_clear();
    Ok(backend)
}

/// A prompt to continue.
struct Request<'a> {
    prompt: &'a [u32],
    /// Tokens to generate at most.
    limit: usize,
    eos: &'a [u32],
    sampling: &'a Sampling,
}

struct Generated {
    tokens: Vec<u32>,
    finish_reason: &'static str,
    prefill: Duration,
    decode: Duration,
}

impl Request<'_> {
    fn generate<B: Backend>(
        &self,
        backend: &B,
        mut emit: impl FnMut(u32) -> io::Result<()>,
    ) -> Result<Generated, Fatal> {
        let blocks = BlockAllocator::needed(self.prompt.len() + self.limit);
        let mut kv = backend.allocate_kv(blocks);
        let blocks: Vec<u32> = (0..blocks as u32).collect();
        let start = Instant::now();
        let mut logits = Vec::new();
        for (index, chunk) in self.prompt.chunks(CHUNK).enumerate() {
            let span =
                Span { tokens: chunk.to_vec(), start: index * CHUNK, blocks: blocks.clone(), logits: true };
            logits = compute(backend, span, &mut kv)?; // (vocabulary)
        }
        let prefilled = Instant::now();
        let (mut tokens, mut finish_reason) = (Vec::new(), "length");
        while tokens.len() < self.limit {
            let position = self.prompt.len() + tokens.len();
            let token = sample(&logits, self.sampling, position as u64);
            tokens.push(token);
            emit(token).map_err(output_failed)?;
            if self.eos.contains(&token) {
                finish_reason = "stop";
                break;
            }
            if tokens.len() < self.limit {
                let span =
                    Span { tokens: vec![token], start: position, blocks: blocks.clone(), logits: true };
                logits = compute(backend, span, &mut kv)?; // (vocabulary)
            }
        }
        Ok(Generated { tokens, finish_reason, prefill: prefilled - start, decode: prefilled.elapsed() })
    }
}

impl Generated {
    fn report(&self, prompt: usize) {
        let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
        let decoded = self.tokens.len().saturating_sub(1); // the first token is the prompt's
        eprintln!(
            "prompt: {prompt} tokens, {:.0} tokens/s; decode: {decoded} tokens, {:.0} tokens/s",
            rate(prompt, self.prefill),
            rate(decoded, self.decode),
        );
    }
}

fn compute<B: Backend>(backend: &B, span: Span, kv: &mut B::Kv) -> Result<Vec<f32>, Fatal> {
    let step = Step { spans: vec![span] };
    let logits = forward(backend, &step, kv, &mut LocalExchange, &mut |_| {});
    let logits = logits.map_err(|error| Fatal::new("NotResident", error.to_string()))?;
    Ok(backend.download(&logits))
}

fn output_failed(error: io::Error) -> Fatal {
    Fatal::new("OutputFailed", format!("stdout: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::tiny_r1;

    #[derive(serde::Deserialize)]
    struct Conversation {
        ids: Vec<u32>,
        prompt_len: usize,
        top: Vec<[(u32, f32); 2]>,
    }

    fn generate(backend: &CpuBackend, prompt: &[u32], limit: usize, sampling: &Sampling) -> Generated {
        let request = Request { prompt, limit, eos: backend.config().eos_tokens(), sampling };
        request.generate(backend, |_| Ok(())).unwrap()
    }

    #[test]
    fn greedy_answers_are_transformers_where_no_token_was_close() {
        let backend = load(&tiny_r1()).unwrap();
        let heldout = std::fs::read(tiny_r1().join("heldout.json")).unwrap();
        let conversations: Vec<Conversation> = serde_json::from_slice(&heldout).unwrap();
        let clear = |conversation: &&Conversation| {
            conversation.top[conversation.prompt_len - 1..]
                .iter()
                .all(|[first, second]| first.1 - second.1 > 0.02)
        };
        let greedy = Sampling::new(0.0, 1.0, 0, 0.0, 0).unwrap();
        let mut compared = 0;
        for Conversation { ids, prompt_len, .. } in conversations.iter().filter(clear) {
            let (prompt, answer) = ids.split_at(*prompt_len);
            let generated = generate(&backend, prompt, answer.len(), &greedy);
            assert_eq!(generated.tokens, answer);
            let ended = answer.ends_with(backend.config().eos_tokens());
            assert_eq!(generated.finish_reason, if ended { "stop" } else { "length" });
            compared += 1;
        }
        assert!(compared > 20, "{compared} of {}", conversations.len());
    }

    #[test]
    fn a_long_prompt_goes_in_chunks_and_an_answer_ends_where_the_context_does() {
        let backend = load(&tiny_r1()).unwrap();
        let prompt: Vec<u32> = (0..1000).map(|i| i * 7 % 1500 + 10).collect();
        let sampling = Sampling::new(1.0, 1.0, 0, 0.0, 3).unwrap();
        let request = Request { prompt: &prompt, limit: 24, eos: &[], sampling: &sampling };
        let generated = request.generate(&backend, |_| Ok(())).unwrap();
        assert_eq!((generated.tokens.len(), generated.finish_reason), (24, "length"));
        // A sequence that goes on elsewhere, from any of its tokens, goes on the same.
        let (before, after) = generated.tokens.split_at(10);
        let resumed = [&prompt[..], before].concat();
        let request = Request { prompt: &resumed, limit: 14, ..request };
        assert_eq!(request.generate(&backend, |_| Ok(())).unwrap().tokens, after);
    }
}
