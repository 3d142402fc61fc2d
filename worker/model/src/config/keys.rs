//! JSON objects whose values are read with errors that name the key and the value.

use std::path::Path;
use std::{fs, io};

use serde_json::{Map, Value};

use crate::error::ModelError;

/// The file that every model has.
pub const CONFIG: &str = "config.json";

/// No size in a real model comes near; products of two still fit a usize.
const MAX_SIZE: u64 = 1 << 28;

/// The text of a file of the model's directory; `None` where only that file is absent and is not config.json.
pub fn read_json(model: &Path, file: &'static str) -> Result<Option<String>, ModelError> {
    let path = model.join(file);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound && file != CONFIG => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let problem = if model.is_dir() { "config.json is missing" } else { "no such directory" };
            Err(ModelError::ModelNotFound { path: model.to_owned(), problem: problem.to_owned() })
        }
        Err(error) => {
            Err(ModelError::InvalidConfig { file, problem: format!("{}: {error}", path.display()) })
        }
    }
}

/// An object of a JSON file, and the file's name for errors.
pub struct Keys<'a> {
    pub file: &'static str,
    pub map: &'a Map<String, Value>,
}

impl Keys<'_> {
    /// The value of a key; `None` where it is absent or null.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn wanted(&self, key: &str) -> Result<&Value, ModelError> {
        self.get(key).ok_or_else(|| self.missing(key))
    }

    /// The error of a key that must be there.
    pub fn missing(&self, key: &str) -> ModelError {
        ModelError::InvalidConfig { file: self.file, problem: format!("{key}: missing") }
    }

    /// The error of a key whose value is not what is expected.
    pub fn invalid(&self, key: &str, value: &Value, expected: &str) -> ModelError {
        let problem = format!("{key}: {} is not supported; expected: {expected}", plain(value));
        ModelError::InvalidConfig { file: self.file, problem }
    }

    /// An error unless `holds`. Where the value is absent, its default was at fault, and null is what the error shows.
    pub fn require(&self, key: &str, holds: bool, expected: &str) -> Result<(), ModelError> {
        if holds {
            return Ok(());
        }
        Err(self.invalid(key, self.map.get(key).unwrap_or(&Value::Null), expected))
    }

    /// An error where the key has another value than the one that is supported; it may be absent.
    pub fn only(&self, key: &str, supported: impl Into<Value>) -> Result<(), ModelError> {
        let supported = supported.into();
        match self.get(key) {
            Some(value) if *value != supported => Err(self.invalid(key, value, &plain(&supported))),
            _ => Ok(()),
        }
    }

    /// One of the supported strings; `None` where the key is absent, an error where it is anything else.
    pub fn one_of(&self, key: &str, supported: &[&str]) -> Result<Option<&str>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let found = value.as_str().filter(|value| supported.contains(value));
        found.map(Some).ok_or_else(|| self.invalid(key, value, &supported.join(" or ")))
    }

    /// The object under a key; `None` where it is absent.
    pub fn object(&self, key: &str) -> Result<Option<Keys<'_>>, ModelError> {
        match self.get(key) {
            Some(Value::Object(map)) => Ok(Some(Keys { file: self.file, map })),
            Some(value) => Err(self.invalid(key, value, "an object")),
            None => Ok(None),
        }
    }

    /// An integer from 0 to 2²⁸.
    pub fn count(&self, key: &str) -> Result<usize, ModelError> {
        let value = self.wanted(key)?;
        let count = value.as_u64().filter(|&count| count <= MAX_SIZE);
        count.map(|count| count as usize).ok_or_else(|| self.invalid(key, value, "an integer"))
    }

    /// An integer from 1 to 2²⁸.
    pub fn size(&self, key: &str) -> Result<usize, ModelError> {
        let count = self.count(key)?;
        self.require(key, count > 0, "a positive integer").map(|()| count)
    }

    /// A positive integer; `None` where the key is absent.
    pub fn optional_size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        self.get(key).map(|_| self.size(key)).transpose()
    }

    /// A list of layers; none where the key is absent.
    pub fn indices(&self, key: &str) -> Result<Vec<u64>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let list = value.as_array().and_then(|list| list.iter().map(Value::as_u64).collect());
        list.ok_or_else(|| self.invalid(key, value, "a list of integers"))
    }

    /// A number that is finite in f64.
    pub fn number(&self, key: &str) -> Result<f64, ModelError> {
        let value = self.wanted(key)?;
        value.as_f64().filter(|number| number.is_finite()).ok_or_else(|| self.invalid(key, value, "a number"))
    }

    /// A finite number above 0.
    pub fn positive(&self, key: &str) -> Result<f64, ModelError> {
        let number = self.number(key)?;
        self.require(key, number > 0.0, "a positive number").map(|()| number)
    }

    /// A finite number above 0; `None` where the key is absent.
    pub fn optional_positive(&self, key: &str) -> Result<Option<f64>, ModelError> {
        self.get(key).map(|_| self.positive(key)).transpose()
    }

    /// True or false; `default` where the key is absent.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool, ModelError> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.invalid(key, value, "true or false"))
    }

    /// One token id or a list of them; none where the key is absent.
    pub fn tokens(&self, key: &str) -> Result<Vec<u32>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let token = |value: &Value| value.as_u64().and_then(|token| u32::try_from(token).ok());
        let tokens = match value {
            Value::Array(list) => list.iter().map(token).collect(),
            one => token(one).map(|token| vec![token]),
        };
        tokens.ok_or_else(|| self.invalid(key, value, "a token id or a list of them"))
    }
}

/// A value as errors show it: a string without its quotes, anything else as JSON.
pub fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
