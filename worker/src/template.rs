//! The model's chat template: messages to the prompt's text, as transformers renders it.

pub(crate) mod apart;
mod bounds;
mod environment;
pub(crate) mod error;
mod json;
pub(crate) mod message;
mod python;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use expertmesh_model::files::{self, FileError};
use jiff::civil::DateTime;
use minijinja::value::Serde;
use minijinja::{Environment, Value};
use serde::Deserialize;
use serde_json::Map;

use self::apart::Apart;
use self::bounds::{Bounds, exhausted};
use self::environment::{NAME, compile, raised, set_clock};
use self::error::TemplateError;
use self::message::Message;
use crate::process::Fatal;

/// The special tokens that a template may use, under the names that tokenizer_config.json gives them.
const TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
/// What every template is given beside [`TOKENS`].
const GIVEN: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];

/// A model's chat template, compiled; a model may have none.
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    /// The model's special tokens by their names in [`TOKENS`]. One that it lacks is undefined, which renders as nothing.
    tokens: BTreeMap<&'static str, String>,
    add_bos: bool,
    /// Where it is rendered, where that is not here.
    apart: Option<Apart>,
}

impl ChatTemplate {
    /// Reads `chat_template.jinja`, or else `chat_template` of `tokenizer_config.json`, in a model's directory.
    pub(crate) fn load(model: &Path) -> Result<Self, Fatal> {
        let file = model.join("tokenizer_config.json");
        let config = match found(files::read_json(&file, files::CONFIGURATION), &file)? {
            Some(text) => serde_json::from_slice(&text).map_err(|error| invalid(&file, &error))?,
            None => TokenizerConfig::default(),
        };
        let tokens = config.tokens();
        let jinja = model.join("chat_template.jinja");
        let (file, source) = match found(files::read(&jinja, files::CONFIGURATION), &jinja)? {
            Some(source) => {
                let source =
                    String::from_utf8(source).map_err(|error| invalid(&jinja, &error.utf8_error()))?;
                (jinja, Some(source))
            }
            None => (file, config.chat_template.and_then(Source::chat)),
        };
        let environment = compile(source).map_err(|error| invalid(&file, &error))?;
        let add_bos = config.add_bos_token.unwrap_or(false);
        Ok(Self { environment, add_bos, tokens, apart: None })
    }

    /// The same, rendered by processes of `program`, which is this one. The model's directory is the one that it was read of.
    pub(crate) fn apart(self, program: PathBuf, model: &Path) -> Self {
        Self { apart: Some(Apart::new(program, model)), ..self }
    }

    #[cfg(test)]
    pub(crate) fn of(source: &str) -> Self {
        let environment = compile(Some(source.to_string())).unwrap();
        let tokens = BTreeMap::from([("bos_token", "<s>".to_string())]);
        Self { environment, add_bos: false, tokens, apart: None }
    }

    /// The token that a text without a template begins with, where the tokenizer adds one.
    pub(crate) fn leading_bos(&self) -> Option<&str> {
        self.tokens.get("bos_token").filter(|_| self.add_bos).map(String::as_str)
    }

    /// The prompt's text. `open` opens the assistant's turn (`add_generation_prompt`); `options` are what else this
    /// template looks at, as `enable_thinking`; it sees the time `at`, in seconds since 1970.
    pub(crate) fn render(
        &self,
        messages: &[Message],
        open: bool,
        options: &Map<String, serde_json::Value>,
        at: u64,
    ) -> Result<String, TemplateError> {
        let given = |name: &&String| GIVEN.contains(&name.as_str()) || TOKENS.contains(&name.as_str());
        if let Some(name) = options.keys().find(given) {
            return Err(TemplateError::Given(name.clone()));
        }
        if let Some(apart) = self.apart.as_ref().filter(|_| self.environment.get_template(NAME).is_ok()) {
            return apart.render(messages, open, options, at);
        }
        let options = options.iter().map(|(name, value)| (name.as_str(), Value::from(Serde(value))));
        let tokens = self.tokens.iter().map(|(&name, token)| (name, Value::from(token.as_str())));
        let mut context: BTreeMap<&str, Value> = options.chain(tokens).collect();
        context.insert("messages", Value::from(Serde(messages)));
        context.insert("add_generation_prompt", open.into());
        // Templates ask whether these are none, which what is undefined is not.
        context.insert("tools", Value::from(()));
        context.insert("documents", Value::from(()));
        let said = messages.iter().map(|message| message.content.len()).sum();
        self.fill(Value::from_pairs(context), Bounds::of(messages.len(), said), local(at))
    }

    fn fill(&self, context: Value, bounds: Bounds, at: DateTime) -> Result<String, TemplateError> {
        let mut environment = self.environment.clone();
        set_clock(&mut environment, at);
        environment.set_fuel(Some(bounds.fuel));
        let template = environment.get_template(NAME).map_err(|_| TemplateError::Absent)?;
        let mut out = bounds.output();
        match template.render_captured_to(context, &mut out) {
            Ok(_) => Ok(out.text()),
            Err(_) if out.full() => Err(TemplateError::TooLong(bounds.bytes)),
            Err(error) if exhausted(&error) => Err(TemplateError::Endless(bounds.fuel)),
            Err(error) => Err(match raised(&error) {
                Some(message) => TemplateError::Raised(message),
                None => TemplateError::Failed(error.to_string()),
            }),
        }
    }
}

/// The local time at a second since 1970, for templates that write the date.
fn local(at: u64) -> DateTime {
    let at = i64::try_from(at).ok().and_then(|at| jiff::Timestamp::from_second(at).ok());
    at.unwrap_or(jiff::Timestamp::UNIX_EPOCH).to_zoned(jiff::tz::TimeZone::system()).datetime()
}

#[derive(Default, Deserialize)]
struct TokenizerConfig {
    chat_template: Option<Source>,
    add_bos_token: Option<bool>,
    #[serde(flatten)]
    others: Map<String, serde_json::Value>,
}

impl TokenizerConfig {
    /// The tokens of [`TOKENS`] that are named, each by a string or by an object with its content.
    fn tokens(&self) -> BTreeMap<&'static str, String> {
        let text = |token: &serde_json::Value| {
            let content = token.get("content").unwrap_or(token);
            content.as_str().map(str::to_string)
        };
        TOKENS.into_iter().filter_map(|name| Some((name, text(self.others.get(name)?)?))).collect()
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Source {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl Source {
    fn chat(self) -> Option<String> {
        match self {
            Self::One(source) => Some(source),
            Self::Named(all) => {
                all.into_iter().find(|named| named.name == "default").map(|named| named.template)
            }
        }
    }
}

/// The bytes of a file; `None` where there is none.
fn found(bytes: Result<Vec<u8>, FileError>, file: &Path) -> Result<Option<Vec<u8>>, Fatal> {
    match bytes {
        Ok(bytes) => Ok(Some(bytes)),
        Err(FileError::Missing) => Ok(None),
        Err(error) => Err(invalid(file, &error)),
    }
}

fn invalid(file: &Path, error: &dyn std::error::Error) -> Fatal {
    Fatal::new("InvalidChatTemplate", format!("{}: {error}", file.display()))
}

#[cfg(test)]
mod tests;
