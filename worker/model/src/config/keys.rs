//! JSON objects whose values are read with errors that name the key and the value.

use std::fmt::Display;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::ModelError;
use crate::files::{self, FileError};

/// The file that every model has.
pub const CONFIG: &str = "config.json";

/// No size in a real model comes near; products of two still fit a usize.
const MAX_SIZE: u64 = 1 << 28;

/// The text of a file of the model's directory; `None` where only that file is absent and is not config.json.
pub fn read_json(model: &Path, file: &'static str) -> Result<Option<String>, ModelError> {
    let path = model.join(file);
    let invalid = |problem: &dyn Display| ModelError::InvalidConfig {
        file,
        problem: format!("{}: {problem}", path.display()),
    };
    match files::read_json(&path, files::CONFIGURATION) {
        Ok(bytes) => String::from_utf8(bytes).map(Some).map_err(|error| invalid(&error.utf8_error())),
        Err(FileError::Missing) if file != CONFIG => Ok(None),
        Err(FileError::Missing) => {
            let problem = match (model.is_dir(), model.exists()) {
                (true, _) => "config.json is missing",
                (false, true) => "it is no directory",
                (false, false) => "no such directory",
            };
            Err(ModelError::ModelNotFound { path: model.to_owned(), problem: problem.to_owned() })
        }
        Err(error) => Err(invalid(&error)),
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

    /// One token id or a list of them; none where the key is absent. -1 is no token.
    pub fn tokens(&self, key: &str) -> Result<Vec<u32>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let token = |value: &Value| match integral(value) {
            Some(-1) => Some(None),
            Some(id) => u32::try_from(id).ok().map(Some),
            None => None,
        };
        let tokens: Option<Vec<Option<u32>>> = match value {
            Value::Array(list) => list.iter().map(token).collect(),
            one => token(one).map(|token| vec![token]),
        };
        let tokens = tokens.ok_or_else(|| self.invalid(key, value, "a token id or a list of them"))?;
        Ok(tokens.into_iter().flatten().collect())
    }
}

/// An integer, also where it is written as 5.0.
pub fn integral(value: &Value) -> Option<i64> {
    let whole = |number: &f64| number.fract() == 0.0 && number.abs() < (1u64 << 53) as f64;
    value.as_i64().or_else(|| value.as_f64().filter(whole).map(|number| number as i64))
}

/// A value as errors show it: a string without its quotes, anything else as JSON.
pub fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
