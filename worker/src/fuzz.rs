//! Ways in for fuzzing: what reads bytes of strangers, without the process around it. An error is as good as an answer; only a
//! panic, or no end, is a find.

use std::path::Path;

use expertmesh_engine::Sampler;
use expertmesh_proto::v1;
use serde_json::Map;
use tokio::sync::mpsc;

use crate::conversation::{Contents, Conversation};
use crate::frontend::model::Model;
use crate::frontend::seed::Drawn;
use crate::frontend::valid::ValidRequest;
use crate::serve::inference::RequestLimits;
use crate::template::ChatTemplate;
use crate::template::message::{Message, Role};
use crate::tokenizer::Tokenizer;
use crate::tokenizer::literal::Literal;

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
        let _ =
            ValidRequest::chat(&self.0, body, Drawn::default()).map(|request| request.choices("id").len());
        let _ = ValidRequest::completion(&self.0, body, Drawn::default())
            .map(|request| request.choices("id").len());
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
    let mut marked = text.to_owned();
    if let Ok(Some(mark)) = tokenizer.mark(&mut [Literal { text: &mut marked, thinks: true }]) {
        let _ = tokenizer.encode_marked(&marked, mark);
    }
}

/// Reads the template of a model's directory, and renders a text as a user's and as an assistant's for `requests`' vocabulary.
pub fn template(model: &Path, text: &str, requests: &Requests) {
    let Ok(template) = ChatTemplate::load(model) else { return };
    for contents in [Contents::Text, Contents::Tokens] {
        let said = [Role::System, Role::User, Role::Assistant];
        let messages = said.map(|role| Message { role, content: text.to_owned() }).to_vec();
        let conversation = Conversation { messages, open: true, options: Map::new(), at: 0 };
        let rendered = conversation.render(&template, &requests.0.tokenizer, contents);
        let _ = rendered.map(|rendered| rendered.tokens(&requests.0.tokenizer));
    }
}

/// Checks a request to a worker of a small model, and draws the first token of what it accepts.
pub fn generate(request: v1::GenerateRequest) {
    let limits = RequestLimits { vocabulary: 128, max_context: 64 };
    let Ok(sequence) = limits.check(request, mpsc::channel(1).0) else { return };
    let logits: Vec<f32> = (0..limits.vocabulary).map(|token| (token * 37 % 101) as f32 / 8.0).collect();
    let token = Sampler::default().choose(&logits, &sequence.sampling, &sequence.history);
    assert!(token < limits.vocabulary, "{token} is no token");
    assert!(sequence.max_length > sequence.tokens.len() && sequence.max_length <= limits.max_context);
}
