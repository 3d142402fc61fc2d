//! What a frontend knows of its model: tokenizer, chat template, defaults. No weights.

use std::path::Path;

use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::generation::{GenerationConfig, SamplingOverrides};
use expertmesh_proto::v1;

use super::openai::ApiError;
use crate::conversation::Contents;
use crate::process::Fatal;
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;

pub(crate) struct Model {
    /// The name by which it calls itself.
    pub(crate) name: String,
    /// Other names by which clients may ask for it.
    pub(crate) aliases: Vec<String>,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) template: ChatTemplate,
    /// Positions of a sequence, prompt and answer together.
    pub(crate) context: usize,
    pub(crate) vocabulary: u32,
    /// Whether the model marks its thoughts, by `<think>` and `</think>`.
    pub(crate) thinks: bool,
    /// The token that a plain prompt begins with, where the tokenizer says so.
    pub(crate) bos: Option<u32>,
    /// What control tokens are that the contents of a chat spell.
    pub(crate) contents: Contents,
    /// The commit that it is at, where it is on a hub; else empty.
    pub(crate) commit: String,
    generation: GenerationConfig,
}

impl Model {
    /// Reads everything but the weights of a model's directory; `context` may be less than the model's own. The first
    /// of its names is the one that answers carry.
    pub(crate) fn load(directory: &Path, names: Vec<String>, context: Option<usize>) -> Result<Self, Fatal> {
        let mut names = names.into_iter();
        let name = names.next().unwrap_or_default();
        let config = ModelConfig::read(directory)?;
        let generation = GenerationConfig::read(directory, &config)?;
        let (tokenizer, template) = (Tokenizer::load(directory)?, ChatTemplate::load(directory)?);
        let thinks = tokenizer.id("<think>").is_some() && tokenizer.id("</think>").is_some();
        let bos = template.leading_bos().and_then(|token| tokenizer.id(token));
        let context = context.unwrap_or(usize::MAX).min(config.max_positions);
        Ok(Self {
            name,
            aliases: names.collect(),
            tokenizer,
            template,
            context,
            vocabulary: config.vocabulary as u32,
            thinks,
            bos,
            contents: Contents::default(),
            commit: String::new(),
            generation,
        })
    }

    /// Whether clients may ask for it by this name.
    pub(crate) fn is_called(&self, name: &str) -> bool {
        self.name == name || self.aliases.iter().any(|alias| alias == name)
    }

    pub(crate) fn eos_tokens(&self) -> &[u32] {
        self.generation.eos_tokens()
    }

    /// The texts before which an answer ends, where the client names none.
    pub(crate) fn stop_strings(&self) -> &[String] {
        self.generation.stop_strings()
    }

    /// The most tokens of a chat's answer, where the client does not say.
    pub(crate) fn max_new_tokens(&self) -> Option<u32> {
        self.generation.max_new_tokens()
    }

    /// How tokens are chosen: as the request says, and for the rest by the model's defaults. Checked.
    pub(crate) fn sampling(&self, choices: SamplingOverrides) -> Result<v1::Sampling, ApiError> {
        let checked = self.generation.sampling(choices);
        let sampling = checked.map_err(|error| ApiError::invalid(error.field, error.to_string()))?;
        Ok(crate::sampling::message(sampling.params()))
    }
}
