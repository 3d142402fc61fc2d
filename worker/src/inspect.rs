//! `expertmesh-worker inspect`: what a model is and takes, and what `serve` and `frontend` would refuse of it: all that can be
//! told without its weights, of which only headers and samples are read.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use expertmesh_engine::{Isa, PackedModel, unloadable};
use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::error::ModelError;
use expertmesh_model::facts::{AttentionFacts, ModelFacts};
use expertmesh_model::format::WeightFormat;
use expertmesh_model::generation::GenerationConfig;
use expertmesh_model::numerics::Numerics;
use expertmesh_source::address::Address;
use indicatif::{BinaryBytes, ProgressBar, ProgressStyle};

use crate::engine::ComputedAs;
use crate::process::Fatal;
use crate::source::{self, Found};
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;

/// Tensors that are named where more are wrong, as all are beside a config.json of another model.
const MOST_TENSORS: usize = 20;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Directory of a checkpoint or of a packed model, or hf://ORGANISATION/NAME@REVISION on a hub, of which no weights are drawn
    #[arg(long)]
    model: Address,
    /// Read all of a packed model and compare its checksums
    #[arg(long)]
    check: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(serde::Serialize)]
struct Report {
    #[serde(flatten)]
    model: ModelFacts,
    /// What a packed model holds; `null` for a checkpoint, or for a config.json alone.
    packed: Option<PackedFacts>,
    /// The instruction sets that this machine can compute with.
    isa: Vec<&'static str>,
    numerics: Vec<&'static str>,
    /// What `serve` or `frontend` would end with; several where several files are at fault.
    refused: Vec<Refusal>,
}

#[derive(serde::Serialize)]
struct Refusal {
    reason: &'static str,
    message: String,
}

#[derive(serde::Serialize)]
struct PackedFacts {
    weights: &'static str,
    bytes: u64,
    /// The experts that are there, by layer, in ranges such as 0-15.
    experts: BTreeMap<usize, String>,
    /// What is wrong with blobs; `null` where they were not read.
    problems: Option<Vec<String>>,
}

pub(crate) fn run(args: Args) -> Result<ExitCode, Fatal> {
    crate::process::log();
    let found = source::Args { model: args.model, cache: None }.find()?;
    let model = found.headers()?;
    let config = ModelConfig::read(&model)?;
    let packed = PackedModel::open(&model, &config)?;
    if args.check && packed.is_none() {
        let message = format!("--check: {} is not a packed model", model.display());
        return Err(Fatal::new("NotPacked", message));
    }
    let report = Report {
        model: config.facts(),
        packed: packed.map(|packed| packed_facts(&packed, args.check)),
        isa: Isa::available().map(|isa| isa.level().name()).collect(),
        numerics: Numerics::ALL.map(Numerics::name).to_vec(),
        refused: refused(&found, &model, &config),
    };
    if args.json {
        serde_json::to_writer_pretty(io::stdout(), &report)
            .map_err(|error| Fatal::new("OutputFailed", error.to_string()))?;
        println!();
    } else {
        report.print();
    }
    let problems = report.packed.and_then(|packed| packed.problems).unwrap_or_default();
    let served = report.refused.is_empty() && problems.is_empty();
    Ok(if served { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What the starts of a worker and of a frontend fail with, by the ways in which they read a model.
fn refused(found: &Found, model: &Path, config: &ModelConfig) -> Vec<Refusal> {
    let computed = ComputedAs { weights: WeightFormat::default(), numerics: Numerics::default() };
    let mut refused: Vec<Fatal> = config.placed_layers().err().map(Fatal::from).into_iter().collect();
    match found.fingerprint(computed) {
        Ok(_) => refused.extend(tensors(model, config, computed.weights)),
        Err(error) => refused.push(error),
    }
    refused.extend(GenerationConfig::read(model, config).err().map(Fatal::from));
    refused.extend(Tokenizer::load(model).err());
    refused.extend(ChatTemplate::load(model).err());
    refused.into_iter().map(|Fatal { reason, message }| Refusal { reason, message }).collect()
}

/// The tensors that no worker could load, and how many more there are.
fn tensors(model: &Path, config: &ModelConfig, weights: WeightFormat) -> Vec<Fatal> {
    let errors = unloadable(model, config, weights).unwrap_or_else(|error| vec![error]);
    let more = errors.len().saturating_sub(MOST_TENSORS);
    let reason = errors.last().map_or("", ModelError::reason);
    let mut told: Vec<Fatal> = errors.into_iter().take(MOST_TENSORS).map(Fatal::from).collect();
    if more > 0 {
        told.push(Fatal::new(
            reason,
            format!("{more} more tensors are missing, or of another shape or type"),
        ));
    }
    told
}

fn packed_facts(packed: &PackedModel, check: bool) -> PackedFacts {
    let experts = packed.experts().into_iter().map(|(layer, experts)| (layer, ranges(&experts)));
    let problems = check.then(|| {
        let bar = ProgressBar::new(packed.bytes());
        let style = ProgressStyle::with_template("checking {bar:40} {bytes}/{total_bytes}");
        bar.set_style(style.expect("the template is a constant"));
        let errors = packed.check(|done, _| bar.set_position(done));
        bar.finish_and_clear();
        errors.iter().map(ToString::to_string).collect()
    });
    PackedFacts {
        weights: packed.weights().name(),
        bytes: packed.bytes(),
        experts: experts.collect(),
        problems,
    }
}

/// Ascending numbers in ranges, such as 0-15,20.
fn ranges(numbers: &[u32]) -> String {
    let runs = numbers.chunk_by(|a, b| a + 1 == *b).map(|run| match run {
        [one] => one.to_string(),
        run => format!("{}-{}", run[0], run[run.len() - 1]),
    });
    runs.collect::<Vec<_>>().join(",")
}

impl Report {
    fn print(&self) {
        let model = &self.model;
        let line = |name: &str, value: String| println!("{name:<14} {value}");
        line("architecture", model.architecture.to_owned());
        let dense = match model.layers - model.moe_layers {
            0 => "none dense".to_owned(),
            dense => format!("{dense} dense (inner {})", model.dense_inner),
        };
        line("layers", format!("{}: {dense}, {} with experts", model.layers, model.moe_layers));
        let shared = match model.shared_inner {
            0 => "none shared".to_owned(),
            inner => format!("a shared one (inner {inner})"),
        };
        line(
            "experts",
            format!(
                "{} per layer (inner {}), {} per token by {} scores, {shared}",
                model.experts_per_layer, model.expert_inner, model.experts_per_token, model.gate_scores
            ),
        );
        line("attention", attention(&model.attention));
        line("hidden", model.hidden.to_string());
        line("vocabulary", model.vocabulary.to_string());
        line("context", format!("{} tokens", model.context));
        line("cache", format!("{} per token", BinaryBytes(model.kv_bytes_per_token)));
        if model.mtp_modules > 0 {
            line("drafting", format!("{} modules, not counted here", model.mtp_modules));
        }
        let (all, active) = (billions(model.parameters), billions(model.active_parameters));
        line("parameters", format!("{all}, of which a token uses {active}"));
        line("here", format!("{}; numerics {}", self.isa.join(", "), self.numerics.join(", ")));
        if let Some(packed) = &self.packed {
            packed.print(model);
        }
        self.refused.iter().for_each(|refusal| line("REFUSED", refusal.message.clone()));
        print_formats(model);
    }
}

/// A table of what the model takes in each format.
fn print_formats(model: &ModelFacts) {
    println!("\n{:<14} {:>12} {:>12} {:>12}", "weights", "dense part", "an expert", "all");
    for format in &model.formats {
        let name = match format.weights == format.held_as {
            true => format.weights.to_owned(),
            false => format!("{} ({})", format.weights, format.held_as),
        };
        let [dense, expert, all] =
            [format.dense, format.expert, format.all].map(|bytes| BinaryBytes(bytes).to_string());
        println!("{name:<14} {dense:>12} {expert:>12} {all:>12}");
    }
}

impl PackedFacts {
    fn print(&self, model: &ModelFacts) {
        println!("{:<14} {}, {}", "packed", self.weights, BinaryBytes(self.bytes));
        let alike = self.experts.values().all(|experts| self.experts.values().next() == Some(experts));
        match self.experts.values().next() {
            None => println!("{:<14} no experts", ""),
            Some(experts) if alike && self.experts.len() == model.moe_layers => {
                println!("{:<14} experts {experts} of each layer", "");
            }
            Some(_) => self
                .experts
                .iter()
                .for_each(|(layer, experts)| println!("{:<14} experts {experts} of layer {layer}", "")),
        }
        match self.problems.as_deref() {
            None => {}
            Some([]) => println!("{:<14} whole: every checksum is right", ""),
            Some(problems) => problems.iter().for_each(|problem| println!("{:<14} WRONG: {problem}", "")),
        }
    }
}

fn attention(attention: &AttentionFacts) -> String {
    match attention {
        AttentionFacts::Latent { heads, query_latent, latent, nope, rope, value } => {
            let queries = query_latent.map_or("no latent".to_owned(), |width| format!("a latent of {width}"));
            format!(
                "latent: {heads} heads of {nope} + {rope} rotated, values of {value}; keys and values from a latent \
                 of {latent}, queries from {queries}"
            )
        }
        AttentionFacts::Grouped { heads, kv_heads, head, bias, normed } => {
            let normed = if *normed { ", normed" } else { "" };
            let bias = if *bias { ", with biases" } else { "" };
            format!("grouped: {heads} heads of {head}, {kv_heads} of keys and values{normed}{bias}")
        }
    }
}

fn billions(count: u64) -> String {
    match count {
        0..1_000_000 => count.to_string(),
        1_000_000..1_000_000_000 => format!("{:.1} M", count as f64 / 1e6),
        _ => format!("{:.2} B", count as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::tokenizer::tests::tiny_r1;

    #[test]
    fn numbers_that_follow_each_other_are_a_range() {
        assert_eq!(ranges(&[0, 1, 2, 5, 8, 9]), "0-2,5,8-9");
        assert_eq!(ranges(&[]), "");
    }

    #[test]
    fn what_serving_would_refuse_is_said_file_by_file() {
        let refused = |model: &Path| refused(&Found::here(model), model, &ModelConfig::read(model).unwrap());
        assert!(refused(&tiny_r1()).is_empty());
        let copy = std::env::temp_dir().join(format!("expertmesh-inspect-{}", std::process::id()));
        fs::create_dir_all(&copy).unwrap();
        fs::copy(tiny_r1().join("config.json"), copy.join("config.json")).unwrap();
        let reasons = |copy: &Path| refused(copy).iter().map(|refusal| refusal.reason).collect::<Vec<_>>();
        assert_eq!(reasons(&copy), ["ModelNotFound", "ModelNotFound"], "neither weights nor tokenizer");
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 26876488\n";
        for file in ["model.safetensors", "tokenizer.json"] {
            fs::write(copy.join(file), pointer).unwrap();
        }
        fs::write(copy.join("generation_config.json"), r#"{"num_beams": 4}"#).unwrap();
        fs::write(copy.join("tokenizer_config.json"), r#"{"chat_template": "{{"}"#).unwrap();
        let expected = ["InvalidCheckpoint", "InvalidConfig", "InvalidTokenizer", "InvalidChatTemplate"];
        assert_eq!(reasons(&copy), expected);
        let all = refused(&copy);
        assert!(all[0].message.ends_with(
            "model.safetensors: a git-lfs pointer in the place of the file; run git lfs pull where the model was cloned"
        ));
        assert!(all[2].message.contains("tokenizer.json: a git-lfs pointer"));
        fs::remove_dir_all(&copy).unwrap();
    }

    #[test]
    fn tensors_that_are_wrong_are_named_and_where_all_are_counted() {
        let copy = std::env::temp_dir().join(format!("expertmesh-inspect-tensors-{}", std::process::id()));
        fs::create_dir_all(&copy).unwrap();
        for file in ["model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
            fs::copy(tiny_r1().join(file), copy.join(file)).unwrap();
        }
        let config = fs::read_to_string(tiny_r1().join("config.json")).unwrap();
        let told = |from: &str, to: &str| {
            assert!(config.contains(from), "{from}");
            fs::write(copy.join("config.json"), config.replace(from, to)).unwrap();
            let refused = refused(&Found::here(&copy), &copy, &ModelConfig::read(&copy).unwrap());
            refused.into_iter().map(|refusal| refusal.message).collect::<Vec<_>>()
        };
        let weights = copy.join("model.safetensors");
        let weights = weights.display();
        assert_eq!(
            told("\"vocab_size\": 1536", "\"vocab_size\": 4096"),
            [
                format!(
                    "tensor model.embed_tokens.weight in {weights}: expected shape [4096, 192], found [1536, 192]"
                ),
                format!("tensor lm_head.weight in {weights}: expected shape [4096, 192], found [1536, 192]"),
            ]
        );
        let all = told("\"hidden_size\": 192", "\"hidden_size\": 512");
        assert_eq!(all.len(), MOST_TENSORS + 1);
        assert!(
            all[MOST_TENSORS].ends_with(" more tensors are missing, or of another shape or type"),
            "{all:?}"
        );
        fs::remove_dir_all(&copy).unwrap();
    }
}
