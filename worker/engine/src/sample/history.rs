//! What a sequence holds so far, as its penalties ask for it.

use std::collections::HashMap;

use expertmesh_model::sampling::Sampling;

/// A sequence's length and, where a penalty asks for them, its tokens' counts; kept up to date token by token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct History {
    prompt: usize,
    generated: usize,
    /// `None` where no penalty asks.
    counts: Option<HashMap<u32, u32>>,
}

impl History {
    /// The history of a sequence that `sampling` is for: its first `prompt` tokens are the prompt, the rest was generated.
    pub fn new(sampling: &Sampling, tokens: &[u32], prompt: usize) -> Self {
        let (prompt, generated) = tokens.split_at(prompt.min(tokens.len()));
        let counts = sampling.penalizes().then(|| prompt.iter().map(|&token| (token, 0)).collect());
        let mut history = Self { prompt: prompt.len(), generated: 0, counts };
        generated.iter().for_each(|&token| history.push(token));
        history
    }

    /// Takes note of a token that was generated.
    pub fn push(&mut self, token: u32) {
        self.generated += 1;
        if let Some(counts) = &mut self.counts {
            let count = counts.entry(token).or_default();
            *count = count.saturating_add(1);
        }
    }

    /// Tokens of the prompt and the answer: the position of the next one.
    pub fn len(&self) -> usize {
        self.prompt + self.generated
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many tokens were generated so far.
    pub fn generated(&self) -> usize {
        self.generated
    }

    /// Every token that the sequence holds, in no order, and how often the answer does.
    pub(super) fn counts(&self) -> impl Iterator<Item = (u32, u32)> {
        self.counts.iter().flatten().map(|(&token, &count)| (token, count))
    }
}
