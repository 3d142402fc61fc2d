//! Jinja as transformers sets it up, so that published templates render the same.

use jiff::civil::DateTime;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value};

use super::{json, python};

/// What the one template of an environment is called.
pub(super) const NAME: &str = "chat_template";

/// An environment with the template [`NAME`], where there is a source.
pub(super) fn compile(source: Option<String>) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(python::method);
    environment.set_formatter(|out, state, value| Ok(out.write_str(&text(state, value)?)?));
    environment.add_function("raise_exception", raise_exception);
    environment.add_filter("tojson", to_json);
    environment.add_filter("string", |state: &State, value: &Value| text(state, value));
    if let Some(source) = source {
        environment.add_template_owned(NAME, without_generation(&source))?;
    }
    Ok(environment)
}

/// Sets the clock of `strftime_now`, which stands still.
pub(super) fn set_clock(environment: &mut Environment, at: DateTime) {
    environment.add_function("strftime_now", move |format: &str| strftime(format, at));
}

/// A value as Python's `str` writes it, paid for by the template.
fn text(state: &State, value: &Value) -> Result<String, Error> {
    python::text(value, &|fuel| state.consume_fuel(fuel))
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raise(String);

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raise(message)))
}

/// What the template itself raised, if it did.
pub(super) fn raised(error: &Error) -> Option<String> {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(Raise(message)) = error.downcast_ref() {
            return Some(message.clone());
        }
        next = error.source();
    }
    None
}

fn strftime(format: &str, now: DateTime) -> Result<String, Error> {
    jiff::fmt::strtime::format(format, now)
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))
}

/// `json.dumps(value, ensure_ascii=False)` with transformers' options; minijinja's own filter escapes HTML.
fn to_json(state: &State, value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let separators = match options.get::<Option<Value>>("separators")? {
        Some(pair) if !pair.is_none() => Some(json::Separators {
            item: text(state, &pair.get_item_by_index(0)?)?,
            key: text(state, &pair.get_item_by_index(1)?)?,
        }),
        _ => None,
    };
    let json = json::Options {
        indent,
        separators,
        ensure_ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    json.dumps(value, &|fuel| state.consume_fuel(fuel))
}

/// `{% generation %}` marks what a model is trained on, and means nothing here: a block that is always rendered, with
/// the same control of whitespace.
fn without_generation(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        let word = tag.trim_start_matches(['-', '+']).trim_start();
        let replaced =
            [("endgeneration", "endif"), ("generation", "if true")].into_iter().find_map(|(name, by)| {
                let after = word.strip_prefix(name)?;
                after.trim_start().trim_start_matches(['-', '+']).starts_with("%}").then_some((after, by))
            });
        rest = match replaced {
            Some((after, by)) => {
                out.push_str(&tag[..tag.len() - word.len()]);
                out.push_str(by);
                after
            }
            None => tag,
        };
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_blocks_keep_their_control_of_whitespace() {
        let found =
            without_generation("a{%- generation -%} b {%endgeneration+%}c{% if generation %}d{% endif %}{%");
        assert_eq!(found, "a{%- if true -%} b {%endif+%}c{% if generation %}d{% endif %}{%");
    }
}
