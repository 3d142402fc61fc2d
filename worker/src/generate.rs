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
    /// 0 takes the most probable token; default: the model's generation_config.json
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Sample from the most probable tokens that together have this probability
    #[arg(long, value_name = "P")]
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
    let request = Request { prompt: &prompt, limit, eos: generation.eos_tokens(), sampling: &sampling };
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
    let invalid = |message: String| Fatal::new("InvalidPrompt", message);
    let text = if args.chat {
        let message = Message { role: "user".to_owned(), content: args.prompt.clone() };
        let rendered = ChatTemplate::load(&args.model)?.render(&[message], true);
        rendered.map_err(|error| Fatal::new(error.reason(), error.to_string()))?
    } else {
        args.prompt.clone()
    };
    let tokens = tokenizer.encode(&text).map_err(|error| invalid(error.to_string()))?;
    let (count, most) = (tokens.len(), config.max_positions());
    match tokens.iter().find(|&&token| token as usize >= config.vocabulary()) {
        Some(token) => {
            Err(invalid(format!("tokenizer.json: token {token} is not in the model's vocabulary")))
        }
        None if tokens.is_empty() => Err(invalid("--prompt: no tokens".to_owned())),
        None if count >= most => {
            Err(invalid(format!("--prompt: {count} tokens leave no room in a context of {most}")))
        }
        None => Ok(tokens),
    }
}

/// The model with all its experts; a progress bar where stderr is a terminal.
pub(crate) fn load(model: &Path) -> Result<CpuBackend, Fatal> {
    let config = ModelConfig::read(model)?;
    let experts = (config.layers() - config.first_moe_layer()) * config.experts();
    let bar = ProgressBar::new(config.dense_bytes() + experts as u64 * config.expert_bytes());
    let style = ProgressStyle::with_template("loading {bar:40} {bytes}/{total_bytes} {binary_bytes_per_sec}");
    bar.set_style(style.expect("the template is a constant"));
    let backend = CpuBackend::load(model, |done, _| bar.set_position(done))?;
    for layer in config.first_moe_layer()..config.layers() {
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
        eprintln!(
            "prompt: {prompt} tokens, {:.0} tokens/s; decode: {} tokens, {:.0} tokens/s",
            rate(prompt, self.prefill),
            self.tokens.len(),
            rate(self.tokens.len(), self.decode),
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
