//! What a model thinks (`<think>…</think>`) apart from what it answers. Text in, text out; no IO.

use crate::stop::held_back;

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// Text of a choice, what the model thinks apart from what it answers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Split {
    pub(crate) reasoning: String,
    pub(crate) content: String,
}

impl Split {
    /// Adds the text that came after this one.
    pub(crate) fn append(&mut self, more: Self) {
        self.reasoning.push_str(&more.reasoning);
        self.content.push_str(&more.content);
    }
}

/// What is to become of thoughts, and what tells them apart.
#[derive(Debug, Clone)]
pub(crate) struct Thoughts {
    pub(crate) reasoning: Reasoning,
    pub(crate) shown: Shown,
    /// Whether stop strings count in them too.
    pub(crate) stops: bool,
}

/// Where a client reads what the model thinks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shown {
    /// In a field of its own.
    Apart,
    /// In the content, between the model's own tags.
    Within,
    Nowhere,
}

/// Splits a text that arrives in pieces; any pieces give the same split. A tag counts only where it is
/// expected: `<think>` at the very start, the first `</think>` after it. Newlines that lead the reasoning or
/// the answer are dropped, as servers of R1 do.
#[derive(Debug, Clone)]
pub(crate) struct Reasoning {
    state: State,
    /// Text that may be the beginning of a tag, or whitespace before one.
    held: String,
    /// Whether tags, and the whitespace around them, stay in the reasoning.
    verbatim: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Before anything but whitespace came.
    Start,
    Thinking {
        begun: bool,
    },
    Answering {
        begun: bool,
    },
}

impl Reasoning {
    /// Splits the answer to a prompt, which may have opened `<think>` itself.
    pub(crate) fn after(prompt: &str) -> Self {
        // At its very end, where the template writes: elsewhere it may be a word of the user's.
        let thinking = prompt.trim_end().ends_with(OPEN);
        let state = if thinking { State::Thinking { begun: false } } else { State::Start };
        Self { state, held: String::new(), verbatim: false }
    }

    /// The same, with the tags and the whitespace around them as part of the reasoning: reasoning and content put
    /// together are the text.
    pub(crate) fn verbatim(self) -> Self {
        Self { verbatim: true, ..self }
    }

    /// Whether the text so far ends within a thought.
    pub(crate) fn thinks(&self) -> bool {
        match self.state {
            State::Thinking { .. } => true,
            State::Start | State::Answering { .. } => false,
        }
    }

    pub(crate) fn push(&mut self, text: &str) -> Split {
        self.held.push_str(text);
        let mut split = Split::default();
        while self.step(&mut split) {}
        split
    }

    /// The text that was held back, now that nothing follows.
    pub(crate) fn finish(&mut self) -> Split {
        let held = std::mem::take(&mut self.held);
        let mut split = Split::default();
        match self.state {
            State::Start | State::Answering { .. } => split.content = held,
            State::Thinking { .. } => split.reasoning = held,
        }
        split
    }

    /// Moves what is certain from `held` into `split`; true where the state changed.
    fn step(&mut self, split: &mut Split) -> bool {
        let verbatim = self.verbatim;
        match &mut self.state {
            State::Start => {
                let text = self.held.trim_start();
                if let Some(thought) = text.strip_prefix(OPEN) {
                    let opened = self.held.len() - thought.len();
                    let thought = self.held.split_off(opened);
                    let opening = std::mem::replace(&mut self.held, thought);
                    split.reasoning.push_str(if verbatim { &opening } else { "" });
                    self.state = State::Thinking { begun: false };
                    return true;
                }
                let answers = !OPEN.starts_with(text);
                if answers {
                    self.state = State::Answering { begun: true };
                }
                answers
            }
            State::Thinking { begun } => {
                let end = self.held.find(CLOSE);
                let certain = end.unwrap_or_else(|| self.held.len() - held_back(&self.held, CLOSE));
                *begun |= verbatim;
                emit(&self.held[..certain], begun, &mut split.reasoning);
                self.held.drain(..certain + end.map_or(0, |_| CLOSE.len()));
                split.reasoning.push_str(if verbatim && end.is_some() { CLOSE } else { "" });
                if end.is_some() {
                    self.state = State::Answering { begun: false };
                }
                end.is_some()
            }
            State::Answering { begun } => {
                let space = self.held.len() - after_newlines(&self.held, *begun).len();
                split.reasoning.push_str(if verbatim { &self.held[..space] } else { "" });
                emit(&self.held, begun, &mut split.content);
                self.held.clear();
                false
            }
        }
    }
}

/// Appends, without the newlines that come before anything else.
fn emit(text: &str, begun: &mut bool, out: &mut String) {
    let text = after_newlines(text, *begun);
    *begun |= !text.is_empty();
    out.push_str(text);
}

fn after_newlines(text: &str, begun: bool) -> &str {
    if begun { text } else { text.trim_start_matches(['\n', '\r']) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn split<'a>(prompt: &str, pieces: impl IntoIterator<Item = &'a str>) -> (String, String) {
        let mut reasoning = Reasoning::after(prompt);
        let mut splits: Vec<Split> = pieces.into_iter().map(|piece| reasoning.push(piece)).collect();
        splits.push(reasoning.finish());
        splits
            .into_iter()
            .fold(Default::default(), |(r, c), split| (r + &split.reasoning, c + &split.content))
    }

    fn whole(prompt: &str, text: &str) -> (String, String) {
        split(prompt, [text])
    }

    fn pair(reasoning: &str, content: &str) -> (String, String) {
        (reasoning.to_string(), content.to_string())
    }

    #[test]
    fn a_template_that_opened_the_thought_is_continued() {
        assert_eq!(whole("<｜Assistant｜><think>\n", "hm, 8.</think>\n\n8"), pair("hm, 8.", "8"));
        assert_eq!(whole("<think>\n", "cut off </thi"), pair("cut off </thi", ""));
        assert_eq!(whole("<think>\n", "a<b </think>"), pair("a<b ", ""));
    }

    #[test]
    fn a_model_may_open_the_thought_itself_or_not_think_at_all() {
        assert_eq!(whole("Hi", "<think>\nhm\n</think>\n\n8"), pair("hm\n", "8"));
        assert_eq!(whole("Hi", " \n<think>hm</think>8"), pair("hm", "8"));
        assert_eq!(whole("Hi", "\n8 <think>no</think>"), pair("", "\n8 <think>no</think>"));
        assert_eq!(whole("Hi", "<thin"), pair("", "<thin"));
        assert_eq!(whole("<think>done</think> and now", "8"), pair("", "8"));
        assert_eq!(whole("What does <think> mean?<｜Assistant｜>", "8"), pair("", "8"));
    }

    #[test]
    fn a_template_that_closed_the_thought_leaves_the_answer() {
        assert_eq!(whole("<｜Assistant｜></think>", "8"), pair("", "8"));
        assert_eq!(whole("<|im_start|>assistant\n<think>\n\n</think>\n\n", "8\n"), pair("", "8\n"));
        assert_eq!(whole("<｜Assistant｜><think>", "</think>8"), pair("", "8"), "it thought nothing");
    }

    #[test]
    fn only_the_first_close_ends_the_thought() {
        assert_eq!(whole("<think>", "a</think>b</think>c"), pair("a", "b</think>c"));
    }

    proptest! {
        #[test]
        fn any_pieces_give_the_same_split(
            parts in proptest::collection::vec(
                prop_oneof![Just("<think>"), Just("</think>"), Just("<"), Just("</th"), Just("ink>"), Just("\n"), Just(" "), Just("é")],
                0..12,
            ),
            cuts in proptest::collection::vec(0usize..80, 0..12),
            opened: bool,
        ) {
            let text = parts.concat();
            let prompt = if opened { "<think>\n" } else { "" };
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|&at| text.is_char_boundary(at)).chain([0, text.len()]).collect();
            cuts.sort_unstable();
            let pieces = cuts.windows(2).map(|cut| &text[cut[0]..cut[1]]);
            prop_assert_eq!(split(prompt, pieces.clone()), whole(prompt, &text));
            let mut verbatim = Reasoning::after(prompt).verbatim();
            let mut sum = Split::default();
            pieces.for_each(|piece| sum.append(verbatim.push(piece)));
            sum.append(verbatim.finish());
            prop_assert_eq!(&sum.content, &whole(prompt, &text).1);
            prop_assert_eq!(sum.reasoning + &sum.content, text);
        }
    }
}
