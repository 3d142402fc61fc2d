//! Text as tokens come: never half a character, and the pieces put together are what `tokenizers` makes of all of them.

use std::collections::HashMap;
use std::sync::Arc;

use super::run::{Added, Run, Utf8};
use super::spelling::{Kind, Leading, Piece, Pieces, spelled};
use super::vocabulary::Vocabulary;

/// The most tokens that wait for the rest of a character where the decoder is none that is followed token by token.
const LONGEST_WINDOW: usize = 16;

/// Tokens of a prompt that may have begun a character which the answer finishes.
const TAIL: usize = 16;

/// A decoder for the tokens of one text as they come.
pub(crate) struct TokenStream {
    vocabulary: Arc<Vocabulary>,
    joined: Joined,
    /// Characters that were given out.
    sent: usize,
    /// Characters of the text before that of the last token.
    begins: usize,
}

/// What waits, by the kind of decoder.
enum Joined {
    Bytes(Arc<HashMap<char, u8>>, Utf8),
    Pieces(Fused),
    Window(Window),
}

/// Pieces and runs of byte tokens.
struct Fused {
    pieces: Arc<Pieces>,
    /// Whether no piece came yet.
    first: bool,
    run: Run,
    /// How many characters the text may still lose at its beginning.
    strip: usize,
}

/// Tokens that any other decoder is asked about.
#[derive(Default)]
struct Window {
    /// The token before those that wait, for decoders that look at it.
    context: Option<u32>,
    waiting: Vec<u32>,
}

impl TokenStream {
    /// A stream of what follows a prompt: its first piece keeps a leading space, and a character that the prompt began
    /// and these tokens finish is theirs.
    pub(super) fn after(vocabulary: Arc<Vocabulary>, prompt: &[u32]) -> Self {
        let joined = Joined::after(&vocabulary, prompt);
        Self { vocabulary, joined, sent: 0, begins: 0 }
    }

    /// The text that this token makes certain; empty where there is none yet.
    pub(crate) fn push(&mut self, id: u32) -> String {
        let Some(token) = self.vocabulary.token(id) else {
            self.begins = self.characters();
            return String::new();
        };
        let Added { text, before } = match &mut self.joined {
            Joined::Bytes(table, utf8) => utf8.push(&spelled(table, token)),
            Joined::Pieces(fused) => fused.push(token),
            Joined::Window(window) => window.push(&self.vocabulary, id),
        };
        self.begins = self.sent + before;
        self.give(text)
    }

    /// The text that waited for more, now that nothing follows.
    pub(crate) fn finish(&mut self) -> String {
        let rest = match &mut self.joined {
            Joined::Bytes(_, utf8) => utf8.finish(),
            Joined::Pieces(fused) => fused.close(),
            Joined::Window(window) => window.take(&self.vocabulary),
        };
        self.give(rest)
    }

    /// Where the text of the last token begins: characters before it. A byte of a character begins where that does.
    pub(crate) fn begins(&self) -> usize {
        self.begins
    }

    /// Characters of all tokens so far, were they all.
    pub(crate) fn characters(&self) -> usize {
        let waiting = match &self.joined {
            Joined::Bytes(_, utf8) => utf8.waiting(),
            Joined::Pieces(fused) => fused.run.waiting(),
            Joined::Window(_) => 0,
        };
        self.sent + waiting
    }

    fn give(&mut self, text: String) -> String {
        self.sent += text.chars().count();
        text
    }
}

impl Joined {
    fn after(vocabulary: &Vocabulary, prompt: &[u32]) -> Self {
        let known = |&id: &u32| vocabulary.token(id);
        let tail = prompt.iter().rev().filter_map(known).take(TAIL).collect::<Vec<_>>().into_iter().rev();
        match &vocabulary.spelling.kind {
            Kind::ByteLevel(table) => {
                let mut utf8 = Utf8::default();
                tail.for_each(|token| drop(utf8.push(&spelled(table, token))));
                Self::Bytes(table.clone(), utf8)
            }
            Kind::Pieces(pieces) => {
                let first = tail.len() == 0;
                let mut utf8 = Utf8::default();
                tail.for_each(|token| match pieces.piece(token) {
                    Piece::Byte(byte) => drop(utf8.push(&[byte])),
                    Piece::Text(_) => utf8 = Utf8::default(),
                });
                let strip = match pieces.leading {
                    Leading::OfText(_, most) if first => most,
                    Leading::OfText(..) | Leading::OfPiece(_) | Leading::Nothing => 0,
                };
                Self::Pieces(Fused { pieces: pieces.clone(), first, run: Run::after(utf8), strip })
            }
            Kind::Other => {
                let context = prompt.iter().rev().copied().find(|id| known(id).is_some());
                Self::Window(Window { context, waiting: Vec::new() })
            }
        }
    }
}

impl Fused {
    fn push(&mut self, token: String) -> Added {
        let piece = if self.first { self.pieces.first(token) } else { self.pieces.piece(token) };
        self.first = false;
        match piece {
            Piece::Byte(byte) => {
                let Added { text, before } = self.run.push(byte);
                Added { text: self.stripped(text), before }
            }
            Piece::Text(text) => {
                let waited = self.close();
                let before = waited.chars().count();
                Added { text: waited + &self.stripped(text), before }
            }
        }
    }

    fn close(&mut self) -> String {
        let text = self.run.close();
        self.stripped(text)
    }

    /// A text without what the beginning of all loses.
    fn stripped(&mut self, text: String) -> String {
        let Leading::OfText(lost, _) = self.pieces.leading else { return text };
        let mut rest = text.as_str();
        while self.strip > 0 && !rest.is_empty() {
            match rest.strip_prefix(lost) {
                Some(after) => (rest, self.strip) = (after, self.strip - 1),
                None => self.strip = 0,
            }
        }
        rest.to_owned()
    }
}

impl Window {
    fn push(&mut self, vocabulary: &Vocabulary, id: u32) -> Added {
        self.waiting.push(id);
        let unfinished = self.text(vocabulary).ends_with(char::REPLACEMENT_CHARACTER);
        let waits = unfinished && self.waiting.len() < LONGEST_WINDOW;
        let text = if waits { String::new() } else { self.take(vocabulary) };
        Added { text, before: 0 }
    }

    fn take(&mut self, vocabulary: &Vocabulary) -> String {
        let text = self.text(vocabulary);
        self.context = self.waiting.last().copied().or(self.context);
        self.waiting.clear();
        text
    }

    /// The text of the tokens that wait, as it follows that of their context.
    fn text(&self, vocabulary: &Vocabulary) -> String {
        let ids: Vec<u32> = self.context.iter().chain(&self.waiting).copied().collect();
        // There are decoders that cannot bear to be given nothing.
        if ids.is_empty() {
            return String::new();
        }
        let decode = |ids: &[u32]| vocabulary.tokenizer.decode(ids, false).unwrap_or_default();
        let context = self.context.map(|id| decode(&[id])).unwrap_or_default();
        decode(&ids).get(context.len()..).unwrap_or_default().to_owned()
    }
}
