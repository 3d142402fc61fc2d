//! Strings that end an answer, wherever token boundaries fall. Text in, text out; no IO.

/// Looks for stop strings in a text that arrives in pieces. The one that ends first wins, as if the text came
/// character by character, so that any pieces give the same answer.
#[derive(Debug)]
pub(crate) struct StopStrings {
    stops: Vec<String>,
    /// The end of the text so far, where that may be the beginning of a stop string.
    held: String,
}

/// Text that became certain, and whether a stop string followed it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Checked {
    pub(crate) text: String,
    pub(crate) stopped: bool,
}

impl StopStrings {
    /// Looks for these stop strings, none of which is empty.
    pub(crate) fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new() }
    }

    pub(crate) fn push(&mut self, text: &str) -> Checked {
        self.held.push_str(text);
        let spans = self.stops.iter().filter_map(|stop| self.held.find(stop).map(|at| (at + stop.len(), at)));
        if let Some((_, at)) = spans.min() {
            let mut text = std::mem::take(&mut self.held);
            text.truncate(at);
            return Checked { text, stopped: true };
        }
        let hold = self.stops.iter().map(|stop| held_back(&self.held, stop)).max().unwrap_or(0);
        let tail = self.held.split_off(self.held.len() - hold);
        Checked { text: std::mem::replace(&mut self.held, tail), stopped: false }
    }

    /// Takes text in which no stop string counts.
    pub(crate) fn pass(&mut self, text: &str) -> Checked {
        let mut passed = self.finish();
        passed.push_str(text);
        Checked { text: passed, stopped: false }
    }

    /// The text that was held back, now that nothing follows.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// How many bytes at the end of `text` may be the beginning of `tag`.
pub(crate) fn held_back(text: &str, tag: &str) -> usize {
    let longest = tag.len().saturating_sub(1).min(text.len());
    let begins = |&length: &usize| tag.as_bytes().starts_with(&text.as_bytes()[text.len() - length..]);
    (1..=longest).rev().find(begins).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cut<'a>(stops: &[&str], pieces: impl IntoIterator<Item = &'a str>) -> Checked {
        let mut strings = StopStrings::new(stops.iter().map(|stop| stop.to_string()).collect());
        let mut text = String::new();
        for piece in pieces {
            let checked = strings.push(piece);
            text += &checked.text;
            if checked.stopped {
                return Checked { text, stopped: true };
            }
        }
        Checked { text: text + &strings.finish(), stopped: false }
    }

    #[test]
    fn a_stop_string_is_found_across_pieces_and_left_out() {
        let found = cut(&["END"], ["one E", "N", "D two"]);
        assert_eq!(found, Checked { text: "one ".into(), stopped: true });
        let almost = cut(&["END"], ["one E", "N", "d two EN"]);
        assert_eq!(almost, Checked { text: "one ENd two EN".into(), stopped: false });
    }

    #[test]
    fn the_stop_string_that_ends_first_wins() {
        assert_eq!(cut(&["xabz", "ab"], ["xabz"]).text, "x");
        assert_eq!(cut(&["ab", "xab"], ["xab"]).text, "");
    }

    #[test]
    fn nothing_stops_text_that_is_passed() {
        let mut strings = StopStrings::new(vec!["ab".into()]);
        assert_eq!(strings.push("a").text, "");
        assert_eq!(strings.pass("b").text, "ab");
        assert!(strings.push("ab").stopped);
    }

    proptest! {
        #[test]
        fn any_pieces_stop_at_the_same_place(
            text in "[abé]{0,24}",
            stops in proptest::collection::vec("[abé]{1,4}", 0..4),
            cuts in proptest::collection::vec(0usize..40, 0..10),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|&at| text.is_char_boundary(at)).chain([0, text.len()]).collect();
            cuts.sort_unstable();
            let pieces = cuts.windows(2).map(|cut| &text[cut[0]..cut[1]]);
            prop_assert_eq!(cut(&stops, pieces), cut(&stops, [text.as_str()]));
        }
    }
}
