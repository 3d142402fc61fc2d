//! Bytes that come one after the other and make characters: the pure part of decoding. No vocabulary.

use std::mem;

/// The most bytes of a [`Run`] that wait for its end. Text that is longer is text.
pub(super) const LONGEST_RUN: usize = 64;

/// What one more token adds.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Added {
    /// Whole characters that became certain.
    pub(super) text: String,
    /// How many of them come before the text of the token itself; those that still wait before it count too.
    pub(super) before: usize,
}

/// Bytes to characters as `String::from_utf8_lossy` has them, whatever pieces they come in.
#[derive(Debug, Default)]
pub(super) struct Utf8 {
    /// The beginning of a character: at most 3 bytes.
    held: Vec<u8>,
}

impl Utf8 {
    pub(super) fn push(&mut self, bytes: &[u8]) -> Added {
        let begun = self.held.len();
        self.held.extend(bytes);
        let bytes = mem::take(&mut self.held);
        let (mut added, mut at) = (Added::default(), 0);
        for chunk in bytes.utf8_chunks() {
            added.text.push_str(chunk.valid());
            at += chunk.valid().len() + chunk.invalid().len();
            if chunk.invalid().is_empty() {
                continue;
            }
            if at == bytes.len() && unfinished(chunk.invalid()) {
                self.held = chunk.invalid().to_vec();
            } else {
                added.text.push(char::REPLACEMENT_CHARACTER);
                added.before += usize::from(at <= begun);
            }
        }
        added
    }

    /// The character that was not finished.
    pub(super) fn finish(&mut self) -> String {
        let unfinished = !mem::take(&mut self.held).is_empty();
        String::from(if unfinished { "\u{fffd}" } else { "" })
    }

    /// How many characters [`Self::finish`] would give.
    pub(super) fn waiting(&self) -> usize {
        usize::from(!self.held.is_empty())
    }
}

/// Byte tokens without another between them, as `tokenizers`' ByteFallback reads them: text where all together are
/// UTF-8, and else a U+FFFD for each. So all of them wait for the run's end, up to [`LONGEST_RUN`]; of a longer one
/// what is text stays text.
#[derive(Debug)]
pub(super) enum Run {
    /// So far no byte was wrong.
    Waiting(Vec<u8>),
    Broken,
    Long(Utf8),
}

impl Default for Run {
    fn default() -> Self {
        Self::Waiting(Vec::new())
    }
}

impl Run {
    /// A run that goes on with the character that other text ended in.
    pub(super) fn after(Utf8 { held }: Utf8) -> Self {
        Self::Waiting(held)
    }

    pub(super) fn push(&mut self, byte: u8) -> Added {
        match self {
            Self::Waiting(bytes) => {
                let before = whole(bytes).chars().count();
                bytes.push(byte);
                let valid = whole(bytes).len();
                if valid < bytes.len() && !unfinished(&bytes[valid..]) {
                    let text = replaced(bytes.len());
                    let before = bytes.len() - 1;
                    *self = Self::Broken;
                    return Added { text, before };
                }
                if bytes.len() <= LONGEST_RUN {
                    return Added { text: String::new(), before };
                }
                let mut long = Utf8::default();
                let text = long.push(bytes).text;
                *self = Self::Long(long);
                Added { text, before }
            }
            Self::Broken => Added { text: replaced(1), before: 0 },
            Self::Long(utf8) => utf8.push(&[byte]),
        }
    }

    /// What waited, now that the run ends.
    pub(super) fn close(&mut self) -> String {
        match mem::take(self) {
            Self::Waiting(bytes) => {
                let bytes = String::from_utf8(bytes);
                bytes.unwrap_or_else(|error| replaced(error.as_bytes().len()))
            }
            Self::Broken => String::new(),
            Self::Long(mut utf8) => utf8.finish(),
        }
    }

    /// How many characters [`Self::close`] would give.
    pub(super) fn waiting(&self) -> usize {
        match self {
            Self::Waiting(bytes) => {
                let text = whole(bytes);
                if text.len() == bytes.len() { text.chars().count() } else { bytes.len() }
            }
            Self::Broken => 0,
            Self::Long(utf8) => utf8.waiting(),
        }
    }
}

/// The whole characters that bytes begin with.
fn whole(bytes: &[u8]) -> &str {
    bytes.utf8_chunks().next().map_or("", |chunk| chunk.valid())
}

/// Whether bytes may be the beginning of one character.
fn unfinished(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.valid_up_to() == 0 && error.error_len().is_none())
}

fn replaced(bytes: usize) -> String {
    "\u{fffd}".repeat(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_run_waits_until_it_ends_or_is_wrong_or_is_long() {
        let push = |run: &mut Run, bytes: &[u8]| bytes.iter().map(|&byte| run.push(byte)).collect::<Vec<_>>();
        let crab = "🦀".as_bytes();
        let mut run = Run::default();
        let silent = |before| Added { text: String::new(), before };
        assert_eq!(push(&mut run, &[crab, crab].concat())[3..6], [silent(0), silent(1), silent(1)]);
        assert_eq!((run.waiting(), run.close().as_str(), run.waiting()), (2, "🦀🦀", 0));
        let broken = push(&mut run, &[crab[0], crab[1], b'a', b'b']);
        assert_eq!(broken[2], Added { text: "\u{fffd}".repeat(3), before: 2 });
        assert_eq!((&broken[3].text[..], run.close().as_str()), ("\u{fffd}", ""));
        // Longer than what waits: what was text stays text.
        let long: String = push(&mut run, &crab.repeat(40)).into_iter().map(|added| added.text).collect();
        assert_eq!(long, "🦀".repeat(40));
        assert_eq!(run.push(0xff).text, "\u{fffd}");
    }

    proptest! {
        #[test]
        fn bytes_in_any_pieces_are_the_lossy_text(
            pieces in proptest::collection::vec(
                prop_oneof![proptest::collection::vec(any::<u8>(), 0..4), "[a🦀歪é]{0,2}".prop_map(String::into_bytes)],
                0..24,
            ),
            cut in 1usize..5,
        ) {
            let bytes = pieces.concat();
            let (mut utf8, mut text) = (Utf8::default(), String::new());
            for piece in bytes.chunks(cut) {
                text += &utf8.push(piece).text;
                prop_assert!(utf8.held.len() <= 3);
            }
            text += &utf8.finish();
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
        }
    }
}
