//! What a step computes: rows of sequences.

/// One step: rows of several sequences, ragged. The rows are those of the spans, one after another. Spans may
/// continue each other in one sequence, as they must where the logits of several of its rows are wanted.
#[derive(Debug, Clone, Default)]
pub struct Step {
    pub spans: Vec<Span>,
}

/// Consecutive positions of one sequence: a chunk of its prompt, or its next token.
#[derive(Debug, Clone)]
pub struct Span {
    pub tokens: Vec<u32>,
    /// The position of `tokens[0]`; everything before it is in the cache.
    pub start: usize,
    /// The sequence's block table: position p lives in `blocks[p / BLOCK_TOKENS]`.
    pub blocks: Vec<u32>,
    /// Whether the logits of the span's last row are wanted.
    pub logits: bool,
}

impl Step {
    pub fn rows(&self) -> usize {
        self.spans.iter().map(|span| span.tokens.len()).sum()
    }
}
