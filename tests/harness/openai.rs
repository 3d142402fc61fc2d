//! The OpenAI API as a client asks it, every token compared with one process's, and clients that ask without end.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use serde_json::{Value, json};

use crate::reference::{Generated, PENALTIES, Question, reference};
use crate::{http, wait_for};

/// Where a deployment answers, and the name of its model.
#[derive(Debug, Clone)]
pub struct Api {
    pub url: String,
    pub model: String,
}

/// What came of one choice.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    prompt_tokens: Vec<u32>,
    tokens: Vec<u32>,
    reasoning: String,
    content: String,
    finish_reason: String,
}

impl Api {
    /// Asks for one object and compares it with what one process answers.
    pub fn check(&self, question: &Question) -> Result<(), String> {
        let wanted = reference(question);
        let (status, body) = http::post(&self.completions(), &self.body(question, false))?;
        if status != 200 {
            return Err(format!("{status}: {body}"));
        }
        let mut answer = Answer::default();
        answer.take(&body, "message");
        answer.compare(question, &wanted)
    }

    /// The same of a stream; `token` is called with the number of tokens so far, as they come.
    pub fn check_stream(&self, question: &Question, mut token: impl FnMut(usize)) -> Result<(), String> {
        let (wanted, mut answer) = (reference(question), Answer::default());
        http::stream(&self.completions(), &self.body(question, true), |event| {
            answer.take(&event, "delta");
            token(answer.tokens.len());
            ControlFlow::Continue(())
        })
        .map_err(|problem| format!("{question:?} after {} tokens: {problem}", answer.tokens.len()))?;
        answer.compare(question, &wanted)
    }

    /// The same by several frontends: where one dies, the next goes on after the last event that came.
    pub fn check_stream_by(
        &self,
        urls: &[&str],
        question: &Question,
        token: impl Fn(usize),
    ) -> Result<(), String> {
        let (wanted, mut answer, mut last) = (reference(question), Answer::default(), None);
        for url in urls {
            let url = format!("{url}/v1/chat/completions");
            let ended = http::stream_after(&url, &mut last, &self.body(question, true), |event| {
                answer.take(&event, "delta");
                token(answer.tokens.len());
                ControlFlow::Continue(())
            });
            match ended {
                Ok(()) => return answer.compare(question, &wanted),
                Err(problem) => println!("after {} tokens: {problem}", answer.tokens.len()),
            }
        }
        Err(format!("{question:?}: {} tokens by all frontends", answer.tokens.len()))
    }

    /// Asks for what cannot be answered.
    pub fn check_refused(&self, question: &Question, wanted: u16) {
        let (status, body) = http::post(&self.completions(), &self.body(question, false)).expect("an answer");
        assert!(status == wanted && body["error"]["message"].is_string(), "{status}: {body}");
    }

    pub fn completions(&self) -> String {
        format!("{}/v1/chat/completions", self.url)
    }

    pub fn body(&self, question: &Question, stream: bool) -> Value {
        let mut body = json!({
            "model": self.model,
            "messages": [{"role": "user", "content": question.prompt}],
            "stream": stream,
            "return_token_ids": true,
        });
        match question.seed {
            Some(seed) => body["seed"] = json!(seed),
            None => body["temperature"] = json!(0),
        }
        if question.penalized {
            body["repetition_penalty"] = json!(PENALTIES.repetition);
            body["presence_penalty"] = json!(PENALTIES.presence);
            body["frequency_penalty"] = json!(PENALTIES.frequency);
        }
        if let Some(length) = question.length {
            body["ignore_eos"] = json!(true);
            body["max_tokens"] = json!(length);
        }
        body
    }
}

impl Answer {
    fn take(&mut self, body: &Value, part: &str) {
        let ids = |value: &Value| serde_json::from_value::<Vec<u32>>(value.clone()).unwrap_or_default();
        let choice = &body["choices"][0];
        self.prompt_tokens.extend(ids(&body["prompt_token_ids"]));
        self.tokens.extend(ids(&choice["token_ids"]));
        self.reasoning += choice[part]["reasoning_content"].as_str().unwrap_or_default();
        self.content += choice[part]["content"].as_str().unwrap_or_default();
        self.finish_reason += choice["finish_reason"].as_str().unwrap_or_default();
    }

    fn compare(&self, question: &Question, wanted: &Generated) -> Result<(), String> {
        if self.prompt_tokens != wanted.prompt_tokens || self.finish_reason != wanted.finish_reason {
            return Err(format!("{question:?}: {self:?}, but one process says {wanted:?}"));
        }
        if self.tokens != wanted.tokens {
            let same = self.tokens.iter().zip(&wanted.tokens).take_while(|(ours, theirs)| ours == theirs);
            return Err(format!("{question:?}: token {} differs: {self:?}, not {wanted:?}", same.count()));
        }
        let (reasoning, content) = wanted.text.split_once("</think>").unwrap_or((&wanted.text, ""));
        let same = self.reasoning.trim() == reasoning.trim() && self.content.trim() == content.trim();
        // What goes on after its end may think again.
        if same || question.length.is_some() {
            return Ok(());
        }
        Err(format!("{question:?}: the text of {self:?} is not {:?}", wanted.text))
    }
}

/// Clients that ask one question after the other until they are stopped, or until one answer is not as it should be.
pub struct Load {
    stop: Arc<AtomicBool>,
    answers: Arc<AtomicUsize>,
    clients: Vec<JoinHandle<Result<(), String>>>,
}

impl Load {
    pub fn start(api: &Api, clients: usize) -> Self {
        // Half of the answers are short, and half are long enough to be under way whatever happens.
        let short = Question::several(8);
        let long = (0..4).map(|seed| Question::long(seed, 300));
        let questions: Vec<_> = short.into_iter().zip(long.cycle()).flat_map(|(a, b)| [a, b]).collect();
        questions.iter().for_each(|question| drop(reference(question)));
        let (stop, answers) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let client = |client: usize| {
            let (api, stop, answers) = (api.clone(), stop.clone(), answers.clone());
            let questions = questions.clone();
            std::thread::spawn(move || {
                for question in questions.iter().cycle().skip(client * 5) {
                    if stop.load(Ordering::SeqCst) {
                        break;
                    }
                    api.check_stream(question, |_| {})?;
                    answers.fetch_add(1, Ordering::SeqCst);
                }
                Ok(())
            })
        };
        let clients = (0..clients).map(client).collect();
        Self { stop, answers, clients }
    }

    /// Waits until so many more answers are complete.
    pub fn go_on_for(&self, count: usize) {
        let start = self.answers.load(Ordering::SeqCst);
        wait_for("answers", || {
            let answers = self.answers.load(Ordering::SeqCst) - start;
            if answers >= count || self.clients.iter().any(JoinHandle::is_finished) {
                return Ok(());
            }
            Err(format!("{answers} of {count} came"))
        });
    }

    /// Lets every client finish its answer. Fails where one was not as it should be; else says how many there were.
    pub fn end(self) -> usize {
        self.stop.store(true, Ordering::SeqCst);
        let failed: Vec<String> = self
            .clients
            .into_iter()
            .filter_map(|client| client.join().expect("clients do not panic").err())
            .collect();
        assert!(failed.is_empty(), "{} requests failed: {failed:#?}", failed.len());
        self.answers.load(Ordering::SeqCst)
    }
}
