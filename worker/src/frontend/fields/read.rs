//! Fields to values: numbers also as clients spell them where the meaning is plain (`5.0`, `"0.5"`); `null` is the same as
//! absent.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{DeserializeOwned, Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Number;
use serde_json::value::RawValue;

use super::super::openai::ApiError;
use super::words;

/// How much of a wrong value an error repeats, in characters.
const SHOWN: usize = 40;
/// Integers below this are exact as floating-point numbers.
const EXACT: f64 = 9_007_199_254_740_992.0;

/// The fields of a body that are honoured, as they were written.
#[derive(Debug, Default)]
pub(in super::super) struct Fields<'a> {
    read: Vec<(&'static str, &'a RawValue)>,
    refused: Option<&'static str>,
}

impl<'a> Fields<'a> {
    /// Sets a field; of several of one name the last one counts.
    pub(super) fn set(&mut self, name: &'static str, value: &'a RawValue) {
        self.read.retain(|(known, _)| *known != name);
        self.read.push((name, value));
    }

    pub(super) fn refuse(&mut self, name: &'static str) {
        self.refused.get_or_insert(name);
    }

    /// Fails where a field would change the answer and is not honoured.
    pub(in super::super) fn check(&self) -> Result<(), ApiError> {
        match self.refused {
            Some(name) => Err(ApiError::invalid(name, format!("{name}: not supported yet"))),
            None => Ok(()),
        }
    }

    /// A whole number; `None` where it is absent.
    pub(in super::super) fn whole(&self, name: &str) -> Result<Option<i128>, ApiError> {
        self.read(name, "a whole number", |text| whole(&number(text)?))
    }

    /// A whole number, 0 or more; one that is too large counts as the largest.
    pub(in super::super) fn count(&self, name: &str) -> Result<Option<u32>, ApiError> {
        let count = |text: &str| {
            let number = whole(&number(text)?)?;
            (number >= 0).then(|| u32::try_from(number).unwrap_or(u32::MAX))
        };
        self.read(name, "a whole number, 0 or more", count)
    }

    pub(in super::super) fn number(&self, name: &str) -> Result<Option<f32>, ApiError> {
        self.read(name, "a number", |text| Some(number(text)?.as_f64()? as f32))
    }

    pub(in super::super) fn flag(&self, name: &str) -> Result<Option<bool>, ApiError> {
        self.read(name, "true or false", |text| serde_json::from_str(text).ok())
    }

    pub(in super::super) fn text(&self, name: &str) -> Result<Option<String>, ApiError> {
        self.read(name, "a string", |text| serde_json::from_str(text).ok())
    }

    /// A field with parts; what is wrong is named by its path.
    pub(in super::super) fn parts<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, ApiError> {
        let Some(text) = self.raw(name) else { return Ok(None) };
        let mut json = serde_json::Deserializer::from_str(text);
        serde_path_to_error::deserialize(&mut json).map(Some).map_err(|error| {
            let param = match error.path().to_string() {
                path if path == "." => name.to_string(),
                path if path.starts_with('[') => format!("{name}{path}"),
                path => format!("{name}.{path}"),
            };
            let problem = format!("{param}: {}", words::plain(error.inner()));
            ApiError::invalid(param, problem)
        })
    }

    /// The text of a field that is not null.
    pub(in super::super) fn raw(&self, name: &str) -> Option<&'a str> {
        let (_, value) = self.read.iter().find(|(known, _)| *known == name)?;
        Some(value.get()).filter(|text| *text != "null")
    }

    fn read<T>(
        &self,
        name: &str,
        expected: &str,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(text) = self.raw(name) else { return Ok(None) };
        read(text).map(Some).ok_or_else(|| {
            let problem = format!("{name}: {} is not {expected}", shown(text));
            ApiError::invalid(name, problem)
        })
    }
}

/// As much of a value as an error repeats.
fn shown(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_string(),
    }
}

/// A number, or the text of one.
fn number(text: &str) -> Option<Number> {
    match text.starts_with('"') {
        true => serde_json::from_str(serde_json::from_str::<String>(text).ok()?.trim()).ok(),
        false => serde_json::from_str(text).ok(),
    }
}

/// A number without a fraction.
fn whole(number: &Number) -> Option<i128> {
    let floating = || number.as_f64().filter(|float| float.fract() == 0.0 && float.abs() <= EXACT);
    number.as_i128().or_else(|| floating().map(|float| float as i128))
}

/// A list of at most so many elements; a longer one is not read to its end.
#[derive(Debug)]
pub(in super::super) struct Bounded<T, const MOST: usize>(pub(in super::super) Vec<T>);

impl<'de, T: Deserialize<'de>, const MOST: usize> Deserialize<'de> for Bounded<T, MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(List(PhantomData))
    }
}

struct List<T, const MOST: usize>(PhantomData<T>);

impl<'de, T: Deserialize<'de>, const MOST: usize> Visitor<'de> for List<T, MOST> {
    type Value = Bounded<T, MOST>;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Self::Value, A::Error> {
        bounded(Vec::new(), seq, MOST).map(Bounded)
    }
}

/// The rest of a list that may have so many elements, after those that were read.
pub(in super::super) fn bounded<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(
    mut read: Vec<T>,
    mut rest: A,
    most: usize,
) -> Result<Vec<T>, A::Error> {
    while let Some(element) = rest.next_element()? {
        if read.len() == most {
            return Err(A::Error::custom(format!("at most {most} are allowed")));
        }
        read.push(element);
    }
    Ok(read)
}

#[cfg(test)]
mod tests {
    use super::super::On;
    use super::*;

    #[test]
    fn numbers_are_taken_as_clients_spell_them() {
        let body = br#"{"n": 5.0, "max_tokens": "12", "seed": -3, "top_k": 1e30, "temperature": "0.5", "top_p": 1, "min_p": null, "stream": 1}"#;
        let fields = Fields::parse(On::Chat, body).unwrap();
        assert_eq!((fields.count("n"), fields.count("max_tokens")), (Ok(Some(5)), Ok(Some(12))));
        assert_eq!((fields.whole("seed"), fields.number("temperature")), (Ok(Some(-3)), Ok(Some(0.5))));
        assert_eq!((fields.number("top_p"), fields.number("min_p")), (Ok(Some(1.0)), Ok(None)));
        let refused = |result: Result<(), ApiError>| result.unwrap_err().to_string();
        assert_eq!(refused(fields.whole("top_k").map(drop)), "top_k: 1e30 is not a whole number");
        assert_eq!(refused(fields.count("seed").map(drop)), "seed: -3 is not a whole number, 0 or more");
        assert_eq!(refused(fields.flag("stream").map(drop)), "stream: 1 is not true or false");
    }

    #[test]
    fn of_two_fields_of_one_name_the_last_counts() {
        let fields = Fields::parse(On::Chat, br#"{"n": 1, "n": 2}"#).unwrap();
        assert_eq!(fields.count("n"), Ok(Some(2)));
    }
}
