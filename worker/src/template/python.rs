//! Values and methods as Python has them.

use minijinja::value::{ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

/// Takes the fuel of so many steps, each worth 64 bytes; an error where there is none left.
pub(super) type Pay<'a> = &'a dyn Fn(u64) -> Result<(), Error>;

/// A value as Python's `str` writes it; what is undefined is nothing.
pub(super) fn text(value: &Value, pay: Pay) -> Result<String, Error> {
    match value.kind() {
        ValueKind::Undefined => Ok(String::new()),
        ValueKind::String => Ok(value.as_str().unwrap_or_default().to_string()),
        _ => {
            let mut out = String::new();
            repr(value, pay, &mut out)?;
            Ok(out)
        }
    }
}

/// A value as Python's `repr` writes it. A list may be far longer than what it was made of, so that each item is paid for
/// before it is looked at.
fn repr(value: &Value, pay: Pay, out: &mut String) -> Result<(), Error> {
    let size = value.as_str().map_or(0, str::len);
    pay(1 + size as u64 / 64)?;
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number if !value.is_integer() => out.push_str(&float(value)),
        ValueKind::String => out.push_str(&quoted(value.as_str().unwrap_or_default())),
        ValueKind::Seq | ValueKind::Iterable => {
            let (open, close) = if value.is_tuple() { ('(', ')') } else { ('[', ']') };
            out.push(open);
            let mut count = 0;
            for item in value.try_iter()? {
                out.push_str(if count > 0 { ", " } else { "" });
                repr(&item, pay, out)?;
                count += 1;
            }
            out.push_str(if value.is_tuple() && count == 1 { "," } else { "" });
            out.push(close);
        }
        ValueKind::Map => {
            out.push('{');
            for (at, key) in value.try_iter()?.enumerate() {
                out.push_str(if at > 0 { ", " } else { "" });
                repr(&key, pay, out)?;
                out.push_str(": ");
                repr(&value.get_item(&key)?, pay, out)?;
            }
            out.push('}');
        }
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

fn float(value: &Value) -> String {
    match f64::try_from(value.clone()) {
        Ok(number) if number.is_nan() => "nan".to_string(),
        Ok(number) => {
            // Python signs every exponent and gives it two digits.
            let text = format!("{number:?}");
            match text.split_once('e') {
                Some((digits, exponent)) => {
                    let (sign, exponent) =
                        exponent.strip_prefix('-').map_or(("+", exponent), |rest| ("-", rest));
                    format!("{digits}e{sign}{exponent:0>2}")
                }
                None => text,
            }
        }
        Err(_) => value.to_string(),
    }
}

/// In single quotes, unless it has those and no double ones.
fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for char in text.chars() {
        match char {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            other if other == quote => out.extend(['\\', other]),
            other if other.is_ascii_control() => out.push_str(&format!("\\x{:02x}", u32::from(other))),
            other => out.push(other),
        }
    }
    out.push(quote);
    out
}

/// Methods of Python's strings that minijinja's own collection lacks, and then that.
pub(super) fn method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let Some(text) = value.as_str() else { return unknown_method_callback(state, value, method, args) };
    match method {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(text.strip_prefix(prefix).unwrap_or(text).into())
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(text.strip_suffix(suffix).unwrap_or(text).into())
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let parts = partition(text, nonempty(separator)?, method == "rpartition");
            Ok(parts.into_iter().map(Value::from).collect())
        }
        "rsplit" => {
            let (separator, most): (Option<&str>, Option<i64>) = from_args(args)?;
            let most = usize::try_from(most.unwrap_or(-1)).unwrap_or(usize::MAX);
            let parts = match separator {
                Some(separator) => rsplit(text, nonempty(separator)?, most),
                None => rsplit_whitespace(text, most),
            };
            Ok(parts.into_iter().map(Value::from).collect())
        }
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['-', '+'])));
            let zeros = width.min(MOST_ZEROS).saturating_sub(text.chars().count());
            Ok(format!("{sign}{}{digits}", "0".repeat(zeros)).into())
        }
        "join" => {
            let (items,): (&Value,) = from_args(args)?;
            join(state, text, items).map(Value::from)
        }
        _ => unknown_method_callback(state, value, method, args),
    }
}

/// What Python's `join` makes: an error where an item is no string.
fn join(state: &State, separator: &str, items: &Value) -> Result<String, Error> {
    let mut joined = String::new();
    for (at, item) in items.try_iter()?.enumerate() {
        let text = item.as_str().ok_or_else(|| {
            let problem = format!("sequence item {at}: expected str instance, {} found", item.kind());
            Error::new(ErrorKind::InvalidOperation, problem)
        })?;
        let separator = if at > 0 { separator } else { "" };
        state.consume_fuel(1 + (separator.len() + text.len()) as u64 / 64)?;
        joined.push_str(separator);
        joined.push_str(text);
    }
    Ok(joined)
}

/// The widest field that `zfill` fills, more than any template asks for.
const MOST_ZEROS: usize = 256;

fn nonempty(separator: &str) -> Result<&str, Error> {
    if separator.is_empty() {
        return Err(Error::new(ErrorKind::InvalidOperation, "empty separator"));
    }
    Ok(separator)
}

fn partition<'a>(text: &'a str, separator: &'a str, last: bool) -> [&'a str; 3] {
    let split = if last { text.rsplit_once(separator) } else { text.split_once(separator) };
    match split {
        Some((before, after)) => [before, separator, after],
        None if last => ["", "", text],
        None => [text, "", ""],
    }
}

fn rsplit<'a>(text: &'a str, separator: &str, most: usize) -> Vec<&'a str> {
    let mut parts: Vec<&str> = text.rsplitn(most.saturating_add(1), separator).collect();
    parts.reverse();
    parts
}

fn rsplit_whitespace(text: &str, most: usize) -> Vec<&str> {
    let (mut rest, mut parts) = (text.trim_end(), Vec::new());
    while parts.len() < most {
        let Some(at) = rest.rfind(char::is_whitespace) else { break };
        let width = rest[at..].chars().next().map_or(1, char::len_utf8);
        parts.push(&rest[at + width..]);
        rest = rest[..at].trim_end();
    }
    parts.extend((!rest.is_empty()).then_some(rest));
    parts.reverse();
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_written_as_python_writes_them() {
        let text = |value: &Value| text(value, &|_| Ok(())).unwrap();
        assert_eq!(
            text(&Value::from(vec![Value::from("it's"), Value::from("a\"'\n\u{1}")])),
            "[\"it's\", 'a\"\\'\\n\\x01']"
        );
        let floats = [1.0, 1e16, 1.5e-7, f64::INFINITY, f64::NAN].map(|number| text(&Value::from(number)));
        assert_eq!(floats, ["1.0", "1e+16", "1.5e-07", "inf", "nan"]);
    }

    #[test]
    fn strings_are_split_from_the_right() {
        assert_eq!(rsplit("a.b.c", ".", 1), ["a.b", "c"]);
        assert_eq!(rsplit("a.b.c", ".", usize::MAX), ["a", "b", "c"]);
        assert_eq!(rsplit_whitespace(" a  b c ", 1), [" a  b", "c"]);
        assert_eq!(rsplit_whitespace(" a  b c ", usize::MAX), ["a", "b", "c"]);
        assert_eq!(partition("a-b-c", "-", true), ["a-b", "-", "c"]);
        assert_eq!(partition("abc", "-", true), ["", "", "abc"]);
    }
}
