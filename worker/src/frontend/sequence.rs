//! A sequence as a worker is asked for it, and how far it is. No IO.

use expertmesh_proto::v1;

use crate::end::End;

/// What a frontend asks workers to generate.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct SequenceRequest {
    pub(crate) id: String,
    pub(crate) prompt: Vec<u32>,
    /// The most tokens to generate, at least 1.
    pub(crate) max_tokens: u32,
    /// Tokens before which no stop token ends the sequence.
    pub(crate) min_tokens: u32,
    pub(crate) stop_tokens: Vec<u32>,
    pub(crate) sampling: v1::Sampling,
    /// Alternatives to log for each token; `None`: no log-probabilities at all.
    pub(crate) logprobs: Option<u32>,
}

/// A token; `ends` where it is one of the stop tokens and so the last one.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Generated {
    pub(crate) id: u32,
    pub(crate) ends: bool,
    pub(crate) logprobs: Option<v1::Logprobs>,
}

/// What a sequence brings: tokens one by one, and then its end.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Step {
    Token(Generated),
    Ended(End),
}

/// What is known of a sequence, and what is left to do.
#[derive(Debug, Clone)]
pub(super) struct Progress {
    pub(super) request: SequenceRequest,
    /// The prompt and what was generated so far.
    tokens: Vec<u32>,
    /// How the sequence ends, once the token came that must be its last.
    pub(super) ended: Option<End>,
}

impl Progress {
    pub(super) fn new(request: SequenceRequest) -> Self {
        Self { tokens: request.prompt.clone(), request, ended: None }
    }

    /// How many tokens were generated so far.
    pub(super) fn generated(&self) -> u32 {
        (self.tokens.len() - self.request.prompt.len()) as u32
    }

    /// What the next worker must do.
    pub(super) fn rest(&self, caller: v1::Caller) -> v1::GenerateRequest {
        let SequenceRequest { id, prompt, max_tokens, min_tokens, stop_tokens, sampling, logprobs } =
            self.request.clone();
        v1::GenerateRequest {
            caller: Some(caller),
            request_id: id,
            tokens: self.tokens.clone(),
            max_tokens: max_tokens - self.generated(),
            min_tokens: min_tokens.saturating_sub(self.generated()),
            stop_tokens,
            sampling: Some(sampling),
            prompt_tokens: prompt.len() as u32,
            logprobs,
        }
    }

    /// Takes a token, which must be the next one.
    pub(super) fn accept(&mut self, token: v1::Token) -> Result<Generated, String> {
        let v1::Token { id, position, logprobs } = token;
        if self.ended.is_some() {
            return Err(format!("a token at {position}, after the last one"));
        }
        if position as usize != self.tokens.len() {
            return Err(format!("a token at {position} instead of {}", self.tokens.len()));
        }
        let ends = self.generated() >= self.request.min_tokens && self.request.stop_tokens.contains(&id);
        self.tokens.push(id);
        self.ended = match ends {
            true => Some(End::Stop),
            false => (self.generated() >= self.request.max_tokens).then_some(End::Length),
        };
        Ok(Generated { id, ends, logprobs })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_token_that_comes_too_early_does_not_end_the_sequence() {
        let request = SequenceRequest {
            id: String::new(),
            prompt: vec![7],
            max_tokens: 4,
            min_tokens: 2,
            stop_tokens: vec![1],
            sampling: v1::Sampling::default(),
            logprobs: None,
        };
        let mut progress = Progress::new(request);
        let ends = [1, 1, 1].map(|id| {
            let position = progress.tokens.len() as u32;
            progress.accept(v1::Token { id, position, logprobs: None }).unwrap().ends
        });
        assert_eq!((ends, progress.ended), ([false, false, true], Some(End::Stop)));
        assert!(progress.accept(v1::Token { id: 5, position: 4, logprobs: None }).is_err());
        let rest = progress.rest(v1::Caller::default());
        assert_eq!((rest.tokens, rest.max_tokens, rest.min_tokens), (vec![7, 1, 1, 1], 1, 0));
    }
}
