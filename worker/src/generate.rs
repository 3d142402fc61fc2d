//! `expertmesh-worker generate`: one process, all experts, tokens as they come.

mod request;

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::process::ExitCode;

use expertmesh_engine::Logprobs;
use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::generation::{GenerationConfig, SamplingOverrides};
use expertmesh_model::sampling::Sampling;

use self::request::{Generated, Request, output_failed};
use crate::conversation::{Contents, Conversation};
use crate::end::End;
use crate::engine::{ComputedAs, ComputedWith};
use crate::process::{Fatal, seconds_since_1970};
use crate::source::{self, load};
use crate::stop::Checked;
use crate::template::ChatTemplate;
use crate::template::message::{Message, Role};
use crate::text::Text;
use crate::tokenizer::Tokenizer;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    source: source::Args,
    /// The text to continue, or with --chat the user's message
    #[arg(long)]
    prompt: String,
    #[command(flatten)]
    computed_as: ComputedAs,
    #[command(flatten)]
    computed_with: ComputedWith,
    /// Render the prompt with the model's chat template
    #[arg(long)]
    chat: bool,
    /// Special tokens that the user's message spells are those tokens; without it they are text
    #[arg(long, requires = "chat")]
    special_tokens_in_content: bool,
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
    /// Leave out tokens that are less probable than so much of the best one's probability
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    min_p: Option<f32>,
    /// Above 1: tokens of prompt and answer become less likely; 1: no matter
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    repetition_penalty: Option<f32>,
    /// Above 0: tokens of the answer become less likely
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    presence_penalty: Option<f32>,
    /// Above 0: tokens of the answer become less likely with each time
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    frequency_penalty: Option<f32>,
    /// Add VALUE (-100 to 100) to a token's logit; can be given several times
    #[arg(long, value_name = "ID=VALUE", value_parser = token_bias)]
    logit_bias: Vec<(u32, f32)>,
    /// End before this text; can be given several times; default: the model's generation_config.json
    #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    stop: Vec<String>,
    /// End with this token; can be given several times
    #[arg(long, value_name = "ID")]
    stop_token: Vec<u32>,
    /// Do not end before so many tokens
    #[arg(long, value_name = "N", default_value_t = 0)]
    min_tokens: usize,
    /// The same seed and prompt give the same tokens; the one that counted is printed at the end
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print one JSON object at the end instead of text as it comes
    #[arg(long)]
    json: bool,
    /// Log-probabilities of every token and of the N most probable ones instead of it (20 at most), by the raw logits
    #[arg(long, value_name = "N", requires = "json", value_parser = clap::value_parser!(u8).range(..=20))]
    logprobs: Option<u8>,
}

/// The JSON object that `--json` prints.
#[derive(serde::Serialize)]
struct Answer<'a> {
    prompt_tokens: &'a [u32],
    /// What was generated, the end-of-sequence token that ends it included.
    tokens: &'a [u32],
    text: &'a str,
    finish_reason: End,
    /// The log-probabilities of each token, where `--logprobs` asked for them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    logprobs: Vec<TokenLogprobs<'a>>,
}

#[derive(serde::Serialize)]
struct TokenLogprobs<'a> {
    logprob: f32,
    /// Token ids with their log-probabilities, the most probable first.
    top: &'a [(u32, f32)],
}

pub(crate) fn run(args: Args) -> Result<ExitCode, Fatal> {
    crate::process::log();
    let found = args.source.find()?;
    let model = &found.folder;
    let config = ModelConfig::read(model)?;
    let generation = GenerationConfig::read(model, &config)?;
    let sampling = args.sampling(&generation, config.vocabulary)?;
    let tokenizer = Tokenizer::load(model)?;
    let prompt = encode(&args, model, (&tokenizer, &config))?;
    let most = args.max_tokens.or(generation.max_new_tokens().map(|most| most as usize));
    let limit = most.unwrap_or(usize::MAX).min(config.max_positions - prompt.len());
    let backend = load(&found, &args.computed_as.with(args.computed_with))?;

    let mut out = io::stdout().lock();
    let stops = if args.stop.is_empty() { generation.stop_strings() } else { &args.stop };
    let mut text = Text::new(&tokenizer, &prompt, stops.to_vec(), args.min_tokens);
    let mut whole = String::new();
    let mut print = |text: &str| {
        whole.push_str(text);
        if args.json { Ok(()) } else { out.write_all(text.as_bytes()).and_then(|()| out.flush()) }
    };
    let logprobs = args.logprobs.map(usize::from);
    let request = Request { prompt: &prompt, limit, sampling: &sampling, logprobs };
    let mut generated = request.generate(&backend, |token, ends| {
        let Checked { text, stopped } = text.push(token, ends);
        print(&text)?;
        Ok(if stopped { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    })?;
    let rest = text.finish();
    print(&rest.text).map_err(output_failed)?;
    if rest.stopped {
        generated.end = End::Stop;
    }
    if args.json {
        serde_json::to_writer(&mut out, &generated.answer(&prompt, &whole))
            .map_err(|error| output_failed(error.into()))?;
    }
    writeln!(out).map_err(output_failed)?;
    generated.report(prompt.len(), args.seed);
    Ok(ExitCode::SUCCESS)
}

impl Args {
    /// How tokens are chosen: as the options say, and for the rest as the model's generation_config.json does.
    fn sampling(&self, generation: &GenerationConfig, vocabulary: usize) -> Result<Sampling, Fatal> {
        let invalid = |problem: String| Fatal::new("InvalidSampling", problem);
        let biased = self.logit_bias.iter().map(|(token, _)| ("--logit-bias", *token));
        let mut named = self.stop_token.iter().map(|&token| ("--stop-token", token)).chain(biased);
        if let Some((option, token)) = named.find(|&(_, token)| token as usize >= vocabulary) {
            return Err(invalid(format!("{option}: {token} is outside a vocabulary of {vocabulary}")));
        }
        let overrides = SamplingOverrides {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            seed: Some(self.seed),
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias.clone(),
        };
        let sampling = generation.sampling(overrides).map_err(|error| invalid(error.to_string()))?;
        let eos: &[u32] = if self.ignore_eos { &[] } else { generation.eos_tokens() };
        Ok(sampling.ending([eos, &self.stop_token].concat(), self.min_tokens))
    }
}

fn token_bias(text: &str) -> Result<(u32, f32), String> {
    let (id, bias) = text.split_once('=').ok_or("expected ID=VALUE, as in 42=-1.5")?;
    let id = id.parse().map_err(|_| format!("{id:?} is not a token id"))?;
    bias.parse().map(|bias| (id, bias)).map_err(|_| format!("{bias:?} is not a number"))
}

impl Generated {
    fn answer<'a>(&'a self, prompt: &'a [u32], text: &'a str) -> Answer<'a> {
        let logprobs = |logged: &'a Logprobs| TokenLogprobs { logprob: logged.logprob, top: &logged.top };
        Answer {
            prompt_tokens: prompt,
            tokens: &self.tokens,
            text,
            finish_reason: self.end,
            logprobs: self.logprobs.iter().map(logprobs).collect(),
        }
    }
}

/// The prompt's tokens; they leave room for at least one more.
fn encode(
    args: &Args,
    model: &Path,
    (tokenizer, config): (&Tokenizer, &ModelConfig),
) -> Result<Vec<u32>, Fatal> {
    let invalid = |problem: String| Fatal::new("InvalidPrompt", format!("--prompt: {problem}"));
    let template = ChatTemplate::load(model)?;
    let tokens = if args.chat {
        let messages = vec![Message { role: Role::User, content: args.prompt.clone() }];
        let conversation =
            Conversation { messages, open: true, options: serde_json::Map::new(), at: seconds_since_1970() };
        let contents = Contents::spelling(args.special_tokens_in_content);
        let rendered = conversation.render(&template, tokenizer, contents);
        let tokens = rendered.and_then(|rendered| Ok(rendered.tokens(tokenizer)?));
        tokens.map_err(|error| Fatal::new(error.reason(), error.to_string()))?
    } else {
        let tokens = tokenizer.encode(&args.prompt).map_err(|error| invalid(error.to_string()))?;
        let bos = template.leading_bos().and_then(|bos| tokenizer.id(bos));
        bos.filter(|bos| tokens.first() != Some(bos)).into_iter().chain(tokens).collect()
    };
    let (count, most) = (tokens.len(), config.max_positions);
    match tokens.iter().find(|&&token| token as usize >= config.vocabulary) {
        Some(token) => Err(invalid(format!("tokenizer.json has token {token}, which the model has not"))),
        None if tokens.is_empty() => Err(invalid("no tokens".to_owned())),
        None if count >= most => Err(invalid(format!("{count} tokens leave no room in a context of {most}"))),
        None => Ok(tokens),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bias_names_a_token_and_a_number() {
        assert_eq!(token_bias("42=-1.5"), Ok((42, -1.5)));
        assert_eq!(token_bias("42"), Err("expected ID=VALUE, as in 42=-1.5".to_string()));
        assert_eq!(token_bias("x=1"), Err("\"x\" is not a token id".to_string()));
        assert_eq!(token_bias("1=x"), Err("\"x\" is not a number".to_string()));
    }
}
