//! A streamed answer as its events come: tokens, the end, or what went wrong. Pure: bytes in.

use serde::Deserialize;
use serde_json::Value;

/// An event is a few tokens and their ids; a server that sends more is not one of ours.
const MAX_EVENT: usize = 1 << 20;

/// What an answer has come to.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    /// Of an event whose end has not come.
    rest: Vec<u8>,
    /// Tokens that came, as ids, or as events where a server sends no ids.
    pub(crate) tokens: u32,
    /// As the server counted them at the end.
    pub(crate) usage: Option<Usage>,
    /// Whether a choice has said why it ended, and whether the stream has.
    finished: bool,
    done: bool,
    pub(crate) error: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: u32,
    pub(crate) completion_tokens: u32,
}

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    text: Option<String>,
    delta: Option<Delta>,
    finish_reason: Option<String>,
    token_ids: Option<Vec<u32>>,
}

#[derive(Deserialize)]
struct Delta {
    content: Option<String>,
    reasoning_content: Option<String>,
}

impl Choice {
    fn tokens(&self) -> u32 {
        let full = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
        let delta = self.delta.as_ref();
        let text = full(&self.text)
            || delta.is_some_and(|delta| full(&delta.content) || full(&delta.reasoning_content));
        match &self.token_ids {
            Some(ids) => ids.len() as u32,
            None => u32::from(text),
        }
    }
}

impl Answer {
    /// Takes the bytes that came next; says whether a token was among them.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> bool {
        let before = self.tokens;
        self.rest.extend_from_slice(bytes);
        let mut begin = 0;
        while let Some(length) = self.rest[begin..].iter().position(|byte| *byte == b'\n') {
            let line = self.rest[begin..begin + length].to_vec();
            begin += length + 1;
            self.line(&line);
        }
        self.rest.drain(..begin);
        if self.rest.len() > MAX_EVENT {
            self.fail(format!("an event of more than {MAX_EVENT} bytes"));
            self.rest.clear();
        }
        self.tokens > before
    }

    fn line(&mut self, line: &[u8]) {
        let Some(data) = line.strip_prefix(b"data:").map(<[u8]>::trim_ascii) else { return };
        if data == b"[DONE]" {
            self.done = true;
            return;
        }
        match serde_json::from_slice::<Chunk>(data) {
            Ok(chunk) => self.chunk(chunk),
            Err(error) => self.fail(format!("an event that is no chunk: {error}")),
        }
    }

    fn chunk(&mut self, chunk: Chunk) {
        if let Some(error) = chunk.error {
            self.fail(error["message"].as_str().unwrap_or("an error without a message").to_string());
        }
        for choice in &chunk.choices {
            self.tokens += choice.tokens();
            self.finished |= choice.finish_reason.is_some();
        }
        self.usage = chunk.usage.or(self.usage);
    }

    fn fail(&mut self, problem: String) {
        self.error.get_or_insert(problem);
    }

    /// Tokens by the server's own count, where it gave one.
    pub(crate) fn completion_tokens(&self) -> u32 {
        self.usage.map_or(self.tokens, |usage| usage.completion_tokens)
    }

    /// Whether the answer came to its end, and the stream too.
    pub(crate) fn is_whole(&self) -> bool {
        self.done && self.finished
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STREAM: &str = "data: {\"choices\":[{\"text\":\"a\",\"finish_reason\":null,\"token_ids\":[5]}],\"usage\":null}\n\n\
        : keep-alive\n\n\
        data: {\"choices\":[{\"text\":\"\",\"finish_reason\":null,\"token_ids\":[200,201]}]}\n\n\
        data: {\"choices\":[{\"text\":\"b\",\"finish_reason\":\"length\",\"token_ids\":[7]}]}\n\n\
        data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":4,\"total_tokens\":7}}\n\n\
        data: [DONE]\n\n";

    fn answer(stream: &str) -> Answer {
        let mut answer = Answer::default();
        answer.take(stream.as_bytes());
        answer
    }

    #[test]
    fn tokens_are_counted_by_their_ids_also_where_they_are_half_a_letter() {
        let answer = answer(STREAM);
        assert_eq!((answer.tokens, answer.completion_tokens(), answer.is_whole()), (4, 4, true));
        assert_eq!(answer.usage, Some(Usage { prompt_tokens: 3, completion_tokens: 4 }));
        assert_eq!(answer.error, None);
    }

    #[test]
    fn events_of_other_servers_are_a_token_each() {
        let chat = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\r\n\r\n\
            data: {\"choices\":[{\"delta\":{\"reasoning_content\":\"hm\"}}]}\r\n\r\n\
            data: {\"choices\":[{\"delta\":{\"content\":\"yes\"},\"finish_reason\":\"stop\"}]}\r\n\r\n";
        let answer = answer(chat);
        assert_eq!((answer.tokens, answer.is_whole()), (2, false), "the stream has not ended");
    }

    #[test]
    fn an_error_in_the_stream_is_kept() {
        let cut = answer("data: {\"error\":{\"message\":\"no worker is left\"}}\n\ndata: {\n\n");
        assert_eq!(cut.error.as_deref(), Some("no worker is left"));
        assert!(answer("data: {\n\n").error.unwrap().starts_with("an event that is no chunk"));
    }

    proptest! {
        #[test]
        fn however_the_bytes_are_cut_the_answer_is_the_same(cuts in proptest::collection::vec(1usize..60, 1..30)) {
            let (mut answer, mut rest) = (Answer::default(), STREAM.as_bytes());
            for cut in cuts {
                let (now, later) = rest.split_at(cut.min(rest.len()));
                answer.take(now);
                rest = later;
            }
            answer.take(rest);
            prop_assert_eq!((answer.tokens, answer.is_whole()), (4, true));
        }
    }
}
