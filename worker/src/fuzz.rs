//! Ways in for fuzzing: what reads bytes of strangers, without the process around it. An error is as good as an answer; only a
//! panic, or no end, is a find.

use std::path::Path;

use serde_json::Map;

use crate::conversation::{Contents, Conversation};
use crate::frontend::model::Model;
use crate::frontend::valid::ValidRequest;
use crate::template::{ChatTemplate, Message, Role};
use crate::tokenizer::Tokenizer;

/// A frontend's model, which requests are read for.
pub struct Requests(Model);

impl Requests {
    /// Reads a model's directory.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn of(model: &Path) -> Result<Self, String> {
        Model::load(model, vec!["fuzzed".to_owned()], None).map(Self).map_err(|error| error.to_string())
    }

    /// Reads a body as both endpoints do.
    pub fn read(&self, body: &[u8]) {
        let _ = ValidRequest::chat(&self.0, body, 0).map(|request| request.choices("id").len());
        let _ = ValidRequest::completion(&self.0, body, 0).map(|request| request.choices("id").len());
    }
}

/// Reads the vocabulary of a model's directory, and takes a text to tokens and back.
pub fn vocabulary(model: &Path, text: &str) {
    let Ok(tokenizer) = Tokenizer::load(model) else { return };
    let tokens = tokenizer.encode(text).unwrap_or_default();
    let mut stream = tokenizer.stream(&tokens);
    for token in tokens.into_iter().chain(0..64) {
        stream.push(token);
        tokenizer.bytes(token);
    }
    stream.finish();
}

/// Reads the template of a model's directory, and renders a text as a user's and as an assistant's for `requests`' vocabulary.
pub fn template(model: &Path, text: &str, requests: &Requests) {
    let Ok(template) = ChatTemplate::load(model) else { return };
    for contents in [Contents::Text, Contents::Tokens] {
        let said = [Role::System, Role::User, Role::Assistant];
        let messages = said.map(|role| Message { role, content: text.to_owned() }).to_vec();
        let conversation = Conversation { messages, open: true, options: Map::new() };
        let rendered = conversation.render(&template, &requests.0.tokenizer, contents);
        let _ = rendered.map(|rendered| rendered.tokens(&requests.0.tokenizer));
    }
}
