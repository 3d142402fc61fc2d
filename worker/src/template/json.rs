//! JSON as Python's `json.dumps` writes it.

use std::fmt::Write;

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

use super::python;

/// `json.dumps`' keyword arguments.
pub(super) struct Options {
    pub(super) indent: Option<usize>,
    /// Between items, and between key and value.
    pub(super) separators: Option<(String, String)>,
    pub(super) ensure_ascii: bool,
    pub(super) sort_keys: bool,
}

/// More than any template asks for.
const WIDEST_INDENT: usize = 16;

impl Options {
    pub(super) fn dumps(&self, value: &Value) -> Result<String, Error> {
        let mut out = String::new();
        self.write(value, 0, &mut out)?;
        Ok(out)
    }

    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&python::text(value)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let write = |item: Value, out: &mut String| self.write(&item, depth + 1, out);
                self.items(('[', ']'), value.try_iter()?.collect(), depth, out, write)?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                let write = |key: Value, out: &mut String| {
                    self.string(&python::text(&key), out);
                    out.push_str(self.separators.as_ref().map_or(": ", |(_, colon)| colon));
                    self.write(&value.get_item(&key)?, depth + 1, out)
                };
                self.items(('{', '}'), keys, depth, out, write)?;
            }
            kind => {
                let problem = format!("{kind} is not JSON serializable");
                return Err(Error::new(ErrorKind::BadSerialization, problem));
            }
        }
        Ok(())
    }

    fn items(
        &self,
        (open, close): (char, char),
        items: Vec<Value>,
        depth: usize,
        out: &mut String,
        write: impl Fn(Value, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        out.push(open);
        let empty = items.is_empty();
        let default = if self.indent.is_some() { "," } else { ", " };
        let comma = self.separators.as_ref().map_or(default, |(comma, _)| comma);
        for (at, item) in items.into_iter().enumerate() {
            out.push_str(if at > 0 { comma } else { "" });
            self.line(depth + 1, out);
            write(item, out)?;
        }
        if !empty {
            self.line(depth, out);
        }
        out.push(close);
        Ok(())
    }

    fn line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = self.indent {
            out.push('\n');
            out.push_str(&" ".repeat(indent.min(WIDEST_INDENT) * depth));
        }
    }

    fn string(&self, text: &str, out: &mut String) {
        let quoted = serde_json::Value::from(text).to_string();
        if !self.ensure_ascii {
            return out.push_str(&quoted);
        }
        for char in quoted.chars() {
            if char.is_ascii() && char != '\x7f' {
                out.push(char);
            } else {
                let mut units = [0; 2];
                for unit in char.encode_utf16(&mut units) {
                    // A String takes whatever is written.
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
        }
    }
}
