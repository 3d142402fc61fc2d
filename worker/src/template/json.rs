//! JSON as Python's `json.dumps` writes it.

use std::fmt::Write;

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

use super::python::{self, Pay};

/// The keyword arguments of Python's `json.dumps`.
pub(super) struct Options {
    pub(super) indent: Option<usize>,
    pub(super) separators: Option<Separators>,
    pub(super) ensure_ascii: bool,
    pub(super) sort_keys: bool,
}

/// What stands between the parts of a collection, where a template says so.
pub(super) struct Separators {
    /// After each item but the last.
    pub(super) item: String,
    /// Between a key and its value.
    pub(super) key: String,
}

/// The widest indent that is honoured, more than any template asks for.
const WIDEST_INDENT: usize = 16;

impl Options {
    /// A value as text; each part of it is paid for before it is looked at.
    pub(super) fn dumps(&self, value: &Value, pay: Pay) -> Result<String, Error> {
        let mut out = String::new();
        self.write(value, pay, 0, &mut out)?;
        Ok(out)
    }

    fn write(&self, value: &Value, pay: Pay, depth: usize, out: &mut String) -> Result<(), Error> {
        let between = self.separators.as_ref().map_or(0, |between| between.item.len() + between.key.len());
        let size = value.as_str().map_or(0, str::len) + between + WIDEST_INDENT * depth;
        pay(1 + size as u64 / 16)?;
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&python::text(value, pay)?),
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                out.push('[');
                for (at, item) in value.try_iter()?.enumerate() {
                    self.before(at, depth, out);
                    self.write(&item, pay, depth + 1, out)?;
                }
                self.end(']', depth, out);
            }
            ValueKind::Map => {
                out.push('{');
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                for (at, key) in keys.into_iter().enumerate() {
                    self.before(at, depth, out);
                    self.string(&python::text(&key, pay)?, out);
                    out.push_str(self.separators.as_ref().map_or(": ", |separators| &separators.key));
                    self.write(&value.get_item(&key)?, pay, depth + 1, out)?;
                }
                self.end('}', depth, out);
            }
            kind => {
                let problem = format!("{kind} is not JSON serializable");
                return Err(Error::new(ErrorKind::BadSerialization, problem));
            }
        }
        Ok(())
    }

    /// What stands before item `at` of a collection.
    fn before(&self, at: usize, depth: usize, out: &mut String) {
        let default = if self.indent.is_some() { "," } else { ", " };
        let comma = self.separators.as_ref().map_or(default, |separators| &separators.item);
        out.push_str(if at > 0 { comma } else { "" });
        self.line(depth + 1, out);
    }

    /// Closes a collection, on a line of its own where it has items.
    fn end(&self, close: char, depth: usize, out: &mut String) {
        if !out.ends_with(['[', '{']) {
            self.line(depth, out);
        }
        out.push(close);
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
