//! The fields of a completion: one prompt or several, as text or as tokens.

use std::fmt;

use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::super::fields::read::{Fields, bounded};
use super::super::model::Model;
use super::super::openai::ApiError;
use super::body::missing;
use super::prompt::{MAX_SEQUENCES, tokens};
use super::sampling::top_logprobs;

/// The tokens of every prompt.
pub(super) fn prompts(model: &Model, fields: &Fields) -> Result<Vec<Vec<u32>>, ApiError> {
    let begins = fields.flag("add_special_tokens")?.unwrap_or(true);
    let prompt: PromptField = fields.parts("prompt")?.ok_or_else(|| missing("prompt"))?;
    let prompts = prompt.tokens(model, begins)?;
    if let Some(token) = prompts.iter().flatten().find(|&&token| token >= model.vocabulary) {
        let problem = format!("prompt: token {token} is outside a vocabulary of {}", model.vocabulary);
        return Err(ApiError::invalid("prompt", problem));
    }
    Ok(prompts)
}

/// Alternatives to log for each token; `None`: no log-probabilities at all.
pub(super) fn logprobs(fields: &Fields) -> Result<Option<u32>, ApiError> {
    top_logprobs("logprobs", fields.count("logprobs")?)
}

#[derive(Debug)]
enum PromptField {
    Texts(Vec<String>),
    Tokens(Vec<Vec<u32>>),
}

impl PromptField {
    /// The tokens of each prompt; a text `begins` with the model's first token, where there is one.
    fn tokens(self, model: &Model, begins: bool) -> Result<Vec<Vec<u32>>, ApiError> {
        let encode = |text: String| -> Result<Vec<u32>, ApiError> {
            let tokens = tokens(model, &text, "prompt", || model.tokenizer.encode(&text))?;
            let bos = model.bos.filter(|bos| begins && tokens.first() != Some(bos));
            Ok(bos.into_iter().chain(tokens).collect())
        };
        match self {
            Self::Texts(texts) => texts.into_iter().map(encode).collect(),
            Self::Tokens(lists) => Ok(lists),
        }
    }
}

impl<'de> Deserialize<'de> for PromptField {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PromptVisitor)
    }
}

struct PromptVisitor;

impl<'de> Visitor<'de> for PromptVisitor {
    type Value = PromptField;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a string, a list of strings, a list of token ids or a list of such lists")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<PromptField, E> {
        Ok(PromptField::Texts(vec![text.to_string()]))
    }

    /// Takes a list, whose first element says of what.
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<PromptField, A::Error> {
        match seq.next_element()? {
            Some(Element::Text(text)) => bounded(vec![text], seq, MAX_SEQUENCES).map(PromptField::Texts),
            Some(Element::Token(token)) => {
                let tokens = bounded(vec![TokenId(token)], seq, usize::MAX)?;
                Ok(PromptField::Tokens(vec![ids(tokens)]))
            }
            Some(Element::Tokens(tokens)) => {
                let lists = bounded(vec![tokens], seq, MAX_SEQUENCES)?;
                Ok(PromptField::Tokens(lists.into_iter().map(ids).collect()))
            }
            None => Err(A::Error::custom("an empty list")),
        }
    }
}

/// The first element of a list of prompts, or of a prompt.
enum Element {
    Text(String),
    Token(u32),
    Tokens(Vec<TokenId>),
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ElementVisitor)
    }
}

struct ElementVisitor;

impl<'de> Visitor<'de> for ElementVisitor {
    type Value = Element;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a string, a token id or a list of token ids")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Element, E> {
        Ok(Element::Text(text.to_string()))
    }

    fn visit_u64<E: Error>(self, id: u64) -> Result<Element, E> {
        token_id(id).map(Element::Token)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Element, A::Error> {
        bounded(Vec::new(), seq, usize::MAX).map(Element::Tokens)
    }
}

#[derive(Debug)]
struct TokenId(u32);

impl<'de> Deserialize<'de> for TokenId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TokenIdVisitor)
    }
}

struct TokenIdVisitor;

impl Visitor<'_> for TokenIdVisitor {
    type Value = TokenId;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a token id")
    }

    fn visit_u64<E: Error>(self, id: u64) -> Result<TokenId, E> {
        token_id(id).map(TokenId)
    }
}

fn token_id<E: Error>(id: u64) -> Result<u32, E> {
    u32::try_from(id).map_err(|_| E::custom(format!("{id} is not a token id")))
}

fn ids(tokens: Vec<TokenId>) -> Vec<u32> {
    tokens.into_iter().map(|TokenId(id)| id).collect()
}
