//! The model's chat template: messages to the prompt's text, as transformers renders it.

use std::io;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error, ErrorKind, Value};
use serde::{Deserialize, Serialize};

use crate::process::Fatal;

const NAME: &str = "chat_template";

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Message {
    pub(crate) role: String,
    pub(crate) content: String,
}

/// A model's chat template, compiled; a model may have none.
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    bos: Option<String>,
    eos: Option<String>,
    add_bos: bool,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum TemplateError {
    #[error("the model has no chat template")]
    Absent,
    /// The template itself refuses the conversation (`raise_exception`).
    #[error("{0}")]
    Raised(String),
    #[error("the chat template failed: {0}")]
    Failed(String),
}

impl TemplateError {
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::Absent => "NoChatTemplate",
            Self::Raised(_) => "ChatTemplateRefused",
            Self::Failed(_) => "ChatTemplateFailed",
        }
    }
}

impl ChatTemplate {
    /// Reads `chat_template.jinja`, or else `chat_template` of `tokenizer_config.json`, in a model's directory.
    pub(crate) fn load(model: &Path) -> Result<Self, Fatal> {
        let file = model.join("tokenizer_config.json");
        let config = match read(&file)? {
            Some(text) => serde_json::from_str(&text).map_err(|error| invalid(&file, &error))?,
            None => TokenizerConfig::default(),
        };
        let jinja = model.join("chat_template.jinja");
        let (file, source) = match read(&jinja)? {
            Some(source) => (jinja, Some(source)),
            None => (file, config.chat_template.and_then(Source::chat)),
        };
        let mut environment = environment().map_err(|error| invalid(&file, &error))?;
        if let Some(source) = source {
            environment.add_template_owned(NAME, source).map_err(|error| invalid(&file, &error))?;
        }
        let text = |token: Option<Token>| token.map(Token::text);
        let (bos, eos, add_bos) = (text(config.bos_token), text(config.eos_token), config.add_bos_token);
        Ok(Self { environment, bos, eos, add_bos })
    }

    /// The token that a text without a template begins with, where the tokenizer adds one.
    pub(crate) fn leading_bos(&self) -> Option<&str> {
        self.bos.as_deref().filter(|_| self.add_bos)
    }

    /// The prompt's text. `add_generation_prompt` opens the assistant's turn.
    pub(crate) fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, TemplateError> {
        let template = self.environment.get_template(NAME).map_err(|_| TemplateError::Absent)?;
        let context = minijinja::context! {
            messages => Serde(messages),
            add_generation_prompt => add_generation_prompt,
            bos_token => token(&self.bos),
            eos_token => token(&self.eos),
        };
        template.render(context).map_err(|error| match raised(&error) {
            Some(message) => TemplateError::Raised(message),
            None => TemplateError::Failed(error.to_string()),
        })
    }
}

#[derive(Default, Deserialize)]
struct TokenizerConfig {
    chat_template: Option<Source>,
    bos_token: Option<Token>,
    eos_token: Option<Token>,
    #[serde(default)]
    add_bos_token: bool,
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

#[derive(Deserialize)]
#[serde(untagged)]
enum Token {
    Text(String),
    Object { content: String },
}

impl Token {
    fn text(self) -> String {
        match self {
            Self::Text(text) | Self::Object { content: text } => text,
        }
    }
}

fn read(file: &PathBuf) -> Result<Option<String>, Fatal> {
    match std::fs::read_to_string(file) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(invalid(file, &error)),
    }
}

fn invalid(file: &Path, error: &dyn std::error::Error) -> Fatal {
    Fatal::new("InvalidChatTemplate", format!("{}: {error}", file.display()))
}

/// As transformers sets Jinja up, so that published templates render the same.
fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", to_json);
    Ok(environment)
}

/// A token that the model lacks is undefined, which renders as nothing.
fn token(text: &Option<String>) -> Value {
    text.as_deref().map_or(Value::UNDEFINED, Value::from)
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raise(String);

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raise(message)))
}

fn raised(error: &Error) -> Option<String> {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(Raise(message)) = error.downcast_ref() {
            return Some(message.clone());
        }
        next = error.source();
    }
    None
}

fn strftime_now(format: &str) -> Result<String, Error> {
    let now = jiff::Zoned::now();
    jiff::fmt::strtime::format(format, &now)
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`; minijinja's own filter escapes HTML.
fn to_json(value: Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let failed = |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
    let mut bytes = Vec::new();
    match indent {
        Some(indent) => {
            let spaces = " ".repeat(indent.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value
                .serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter))
                .map_err(failed)?;
        }
        None => {
            value
                .serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, PythonFormatter))
                .map_err(failed)?;
        }
    }
    String::from_utf8(bytes).map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))
}

/// Python's separators: `", "` and `": "`.
struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::Tokenizer;
    use crate::tokenizer::tests::tiny_r1;

    fn user(content: &str) -> Message {
        Message { role: "user".into(), content: content.into() }
    }

    fn template(source: &str) -> ChatTemplate {
        let mut environment = environment().unwrap();
        environment.add_template_owned(NAME, source.to_string()).unwrap();
        ChatTemplate { environment, bos: Some("<s>".into()), eos: None, add_bos: false }
    }

    #[derive(Deserialize)]
    struct Heldout {
        prompt: String,
        ids: Vec<u32>,
        prompt_len: usize,
    }

    #[test]
    fn tiny_r1s_prompts_are_tokenized_as_transformers_did() {
        let (chat, tokenizer) =
            (ChatTemplate::load(&tiny_r1()).unwrap(), Tokenizer::load(&tiny_r1()).unwrap());
        let text = std::fs::read_to_string(tiny_r1().join("heldout.json")).unwrap();
        let heldout: Vec<Heldout> = serde_json::from_str(&text).unwrap();
        assert_eq!(heldout.len(), 40);
        for Heldout { prompt, ids, prompt_len } in heldout {
            let text = chat.render(&[user(&prompt)], true).unwrap();
            assert_eq!(tokenizer.encode(&text).unwrap(), ids[..prompt_len], "{prompt}");
        }
    }

    #[test]
    fn an_assistants_thoughts_are_left_out_of_the_next_prompt() {
        let chat = ChatTemplate::load(&tiny_r1()).unwrap();
        let answer = Message { role: "assistant".into(), content: "<think>\nhm\n</think>\n\n8".into() };
        let text = chat.render(&[user("6 + 2?"), answer, user("And 1 more?")], true).unwrap();
        let expected = "<｜begin▁of▁sentence｜><｜User｜>6 + 2?<｜Assistant｜>8<｜end▁of▁sentence｜><｜User｜>And 1 more?<｜Assistant｜><think>\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn what_a_template_raises_is_told_apart_from_what_it_does_wrong() {
        let refusing =
            template("{% if messages[0].role != 'user' %}{{ raise_exception('users first') }}{% endif %}");
        let system = Message { role: "system".into(), content: String::new() };
        let error = refusing.render(&[system], false).unwrap_err();
        assert!(matches!(&error, TemplateError::Raised(message) if message == "users first"), "{error}");
        let failing = template("{{ messages.nothing() }}").render(&[user("x")], false).unwrap_err();
        assert_eq!(failing.reason(), "ChatTemplateFailed");
    }

    #[test]
    fn blocks_are_trimmed_and_json_is_pythons() {
        let source = "{{ bos_token }}{% for m in messages %}\n    {% if true %}\n{{ m | tojson }}\n    {% endif %}\n{% endfor %}";
        let text = template(source).render(&[user("<b> & 'é'")], false).unwrap();
        assert_eq!(text, "<s>{\"role\": \"user\", \"content\": \"<b> & 'é'\"}\n");
    }

    #[test]
    fn a_template_knows_the_date() {
        let text = template("{{ strftime_now('%Y') }}").render(&[], false).unwrap();
        assert!(text.parse::<u32>().unwrap() >= 2026);
    }

    #[test]
    fn a_model_without_a_template_loads_and_says_so_when_asked() {
        let chat = ChatTemplate::load(Path::new("/nowhere")).unwrap();
        assert_eq!(chat.render(&[], true).unwrap_err().to_string(), "the model has no chat template");
    }

    #[test]
    fn tokens_and_templates_come_in_both_of_their_forms() {
        let json = r#"{"bos_token": {"content": "<s>", "special": true}, "eos_token": null,
                       "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]}"#;
        let config: TokenizerConfig = serde_json::from_str(json).unwrap();
        assert_eq!(config.bos_token.map(Token::text).as_deref(), Some("<s>"));
        assert_eq!(config.chat_template.and_then(Source::chat).as_deref(), Some("yes"));
    }
}
