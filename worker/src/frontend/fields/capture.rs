//! A body's text to the fields that are honoured, each as the text that it was; nothing else is kept in memory.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserializer as _, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, de};
use serde_json::Value;
use serde_json::value::RawValue;

use super::super::openai::ApiError;
use super::Fate::{Harmless, Honoured, Refused};
use super::read::Fields;
use super::{On, fate, same, words};

/// The longest text of a field that is compared with values which change nothing.
const LONGEST_NEUTRAL: usize = 256;
/// What editors of Windows put before a text.
const BOM: &[u8] = "\u{feff}".as_bytes();

impl<'a> Fields<'a> {
    /// The fields of a body, which must be a JSON object.
    pub(in super::super) fn parse(on: On, body: &'a [u8]) -> Result<Self, ApiError> {
        let malformed = |problem: String| ApiError::Malformed(problem);
        let body = body.strip_prefix(BOM).unwrap_or(body);
        let text = std::str::from_utf8(body).map_err(|error| {
            malformed(format!("the body is not UTF-8, from byte {} on", error.valid_up_to()))
        })?;
        let first = text.trim_start().bytes().next();
        match first {
            None => return Err(malformed("the body is empty; expected: a JSON object".into())),
            Some(b'[' | b'"' | b'0'..=b'9' | b'-' | b't' | b'f' | b'n') => {
                return Err(malformed("the body must be a JSON object, in { and }".into()));
            }
            Some(_) => {}
        }
        let mut json = serde_json::Deserializer::from_str(text);
        let fields = json.deserialize_map(Capture { on });
        let fields = fields.and_then(|fields| json.end().map(|()| fields));
        fields.map_err(|error| malformed(words::malformed(text, &error)))
    }
}

/// Collects the fields of an object for one endpoint.
struct Capture {
    on: On,
}

#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Visitor<'de> for Capture {
    type Value = Fields<'de>;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut fields = Fields::default();
        while let Some(Name(name)) = map.next_key()? {
            match fate(&name, self.on) {
                None | Some((_, Harmless)) => {
                    map.next_value::<IgnoredAny>()?;
                }
                Some((name, Honoured)) => fields.set(name, map.next_value()?),
                Some((name, Refused(neutral))) => {
                    let value = map.next_value::<&RawValue>()?;
                    if !changes_nothing::<A::Error>(value, neutral)? {
                        fields.refuse(name);
                    }
                }
            }
        }
        Ok(fields)
    }
}

/// Whether a field may have this value though it is not honoured.
fn changes_nothing<E: de::Error>(value: &RawValue, neutral: &[&str]) -> Result<bool, E> {
    let text = value.get();
    if text.len() > LONGEST_NEUTRAL {
        return Ok(false);
    }
    let parse = |text: &str| serde_json::from_str::<Value>(text).map_err(E::custom);
    let value = parse(text)?;
    let mut others = neutral.iter().map(|text| parse(text)).collect::<Result<Vec<_>, _>>()?.into_iter();
    Ok(value.is_null() || others.any(|other| same(&value, &other)))
}
